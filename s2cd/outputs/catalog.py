"""The output folder as a static STAC catalogue, and what in it is finished."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from s2cd.catalog.frozen import freeze
from s2cd.catalog.scene import Scene
from s2cd.outputs.item import STAC_VERSION
from s2cd.outputs.layout import (
    COLLECTION_ID,
    ITEM_TYPE,
    ROOT,
    TILE_CATALOG,
    VALIDITY,
    is_map_name,
    path_of,
    tile_of,
    times_of,
)
from s2cd.outputs.store import DAMAGED, Store, is_there, open_store, place_of, understood

CONFIG_FILE = "run.yaml"
SCENES_FILE = "scenes.parquet"
REPORT_FILE = "report.json"


def is_done(out: str, name: str) -> bool:
    """Whether the map of this name is finished: its item, written last, and its COG are there.

    An empty file, as a machine that lost its power may leave, is none.
    """
    store = open_store(out)
    return bool(store.size(path_of(name, ".json")) and store.size(path_of(name, ".tif")))


def finished(out: str) -> set[str]:
    """Return the names of all finished maps, from one listing. Raises OutputError if the folder cannot be used."""
    return _finished(open_store(out)) if is_there(out) else set()  # asking must not make the folder


def count_inputs(out: str, name: str) -> int:
    """Return of how many items a finished map was made: two, or more if a date was split. Raises OutputError."""
    with understood(out, path_of(name, ".json"), "the item of a map"):
        return sum(link["rel"] == "derived_from" for link in item_of(out, name)["links"])


def item_of(out: str, name: str) -> dict[str, Any]:
    """Return the STAC item of a finished map. Raises OutputError."""
    path = path_of(name, ".json")
    with understood(out, path, "the item of a map"):
        return dict(json.loads(open_store(out).get(path)))


def remove_map(out: str, name: str) -> None:
    """Remove a map with all its files, its item first. Raises OutputError if that fails."""
    store = open_store(out)
    for extension in (".json", ".tif", ".png", VALIDITY):
        store.delete(path_of(name, extension))


def write_catalog(out: str) -> set[str]:
    """Make the folder a valid static STAC catalogue of the maps that are finished; return their names.

    One collection, a catalogue a tile, links relative. Only the client calls it: it rewrites whole files. Raises
    OutputError, also for the item of a map that is none.
    """
    store = open_store(out)
    done = _finished(store)
    by_tile: dict[str, list[str]] = defaultdict(list)
    for name in sorted(done):
        by_tile[tile_of(name)].append(name)
    boxes = []
    for tile, names in sorted(by_tile.items()):
        _put_json(store, f"{tile}/{TILE_CATALOG}", _tile_catalog(tile, names))
        boxes += _box(out, names)
    times = [t for names in by_tile.values() for name in names for t in times_of(name)]
    _put_json(store, ROOT, _collection(sorted(by_tile), boxes, times))
    return done


@contextmanager
def cataloguing(out: str) -> Iterator[set[str]]:
    """Write the catalogue when the block ends, however it ends; after it the set has the names of the finished maps."""
    listed: set[str] = set()
    try:
        yield listed
    except BaseException:
        with suppress(Exception):  # what ended the block says more
            write_catalog(out)
        raise
    listed |= write_catalog(out)


def lost_maps(out: str, listed: Collection[str], places: Mapping[str, list[str]]) -> dict[str, str]:
    """Return the maps that were written but are not in the folder, by name, each with an error that says so.

    listed  names of the maps that the folder's listing shows
    places  names of the maps that were written, by the place, as `place_of` tells it there
    """
    here = place_of(out)
    return {
        name: f"written to {place}, "
        + (
            "but it is there no more: expected that nothing else writes to this folder meanwhile"
            if place == here
            else f"not found in {here}: expected a folder that both share"
        )
        for place, names in places.items()
        for name in names
        # a network folder may list late what another machine wrote, but knows it when asked
        if name not in listed and not is_done(out, name)
    }


def save_run(out: str, config: str, scenes: Iterable[Scene]) -> None:
    """Keep a run's configuration (YAML) and frozen scenes beside its maps, so that it can be repeated."""
    store = open_store(out)
    store.delete(REPORT_FILE)  # that of an earlier run says nothing of this one
    store.put(CONFIG_FILE, config.encode())
    with tempfile.TemporaryDirectory() as folder:
        frozen = Path(folder) / SCENES_FILE
        freeze(scenes, frozen)
        store.put(SCENES_FILE, frozen.read_bytes())


def save_report(out: str, report: Mapping[str, Any]) -> None:
    """Keep a run's report (JSON) beside its maps."""
    _put_json(open_store(out), REPORT_FILE, report)


def load_report(out: str) -> dict[str, Any]:
    """Return the report of the last run, as far as it can be read; empty if there is none."""
    store = open_store(out)
    try:
        return dict(json.loads(store.get(REPORT_FILE))) if store.size(REPORT_FILE) else {}
    except DAMAGED:
        return {}


def _finished(store: Store) -> set[str]:
    found: dict[str, set[str]] = {".json": set(), ".tif": set()}
    for path, size in store.list():
        name, dot, extension = path.rpartition("/")[2].rpartition(".")
        if size and f".{extension}" in found and is_map_name(name) and path == path_of(name, dot + extension):
            found[f".{extension}"].add(name)
    return found[".json"] & found[".tif"]


def _box(out: str, names: list[str]) -> list[list[float]]:
    """West, south, east, north of the first of a tile's maps that is still there: another run may make one anew."""
    for name in names:
        if is_done(out, name):
            with understood(out, path_of(name, ".json"), "the item of a map"):
                west, south, east, north = (float(v) for v in item_of(out, name)["bbox"])
                return [[west, south, east, north]]
    return []


def _put_json(store: Store, path: str, document: Mapping[str, Any]) -> None:
    store.put(path, json.dumps(document, indent=1, default=str).encode())


def _tile_catalog(tile: str, names: list[str]) -> dict[str, Any]:
    links = [{"rel": rel, "href": f"../{ROOT}", "type": "application/json"} for rel in ("root", "parent")]
    items = [{"rel": "item", "href": f"./{name}.json", "type": ITEM_TYPE} for name in names]
    return {
        "type": "Catalog",
        "stac_version": STAC_VERSION,
        "id": f"{COLLECTION_ID}-{tile}",
        "title": tile,
        "description": f"Change maps of tile {tile}",
        "links": links + items,
    }


def _collection(tiles: list[str], boxes: list[list[float]], times: list[str]) -> dict[str, Any]:
    children = [
        {"rel": "child", "href": f"./{tile}/{TILE_CATALOG}", "type": "application/json", "title": tile}
        for tile in tiles
    ]
    return {
        "type": "Collection",
        "stac_version": STAC_VERSION,
        "id": COLLECTION_ID,
        "title": "Sentinel-2 change maps",
        "description": "Probability of change between consecutive Sentinel-2 acquisitions of the same field of view",
        "license": "other",
        "keywords": ["sentinel-2", "change detection"],
        "extent": {
            "spatial": {"bbox": [_union(boxes)]},
            "temporal": {"interval": [[min(times, default=None), max(times, default=None)]]},
        },
        "links": [{"rel": "root", "href": f"./{ROOT}", "type": "application/json"}, *children],
    }


def _union(boxes: list[list[float]]) -> list[float]:
    """Return a box around all boxes; around the globe if one of them crosses the antimeridian."""
    if not boxes or any(west > east for west, _, east, _ in boxes):
        south, north = min((b[1] for b in boxes), default=-90.0), max((b[3] for b in boxes), default=90.0)
        return [-180.0, south, 180.0, north]
    low, high = np.min(boxes, axis=0), np.max(boxes, axis=0)
    return [float(v) for v in (low[0], low[1], high[2], high[3])]
