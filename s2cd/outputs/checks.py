"""Checks of an output folder: are the maps what their items say, and is the catalogue whole?"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import numpy as np
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader, MemoryFile
from rasterio.windows import Window

from s2cd.addresses import public_href
from s2cd.codes import CODE_NODATA, decode_codes, encode_codes
from s2cd.errors import OutputError
from s2cd.outputs.layout import ROOT, is_map_name, is_ours
from s2cd.outputs.overviews import code_pyramid
from s2cd.outputs.profiles import BLOCK
from s2cd.outputs.recipe import Recipe, difference, recipe_of
from s2cd.outputs.store import DAMAGED, Store, open_store, require_there

Document = dict[str, Any]
Files = Mapping[str, int]
OVERVIEW_TOLERANCE = 0.01  # rounding to uint8 and LERC's error add up over the levels


def validate(out: str, threads: int = 2) -> list[str]:
    """Return what is wrong with an output folder, one line a problem; an empty list means that all is well.

    Every map is read whole: it must be a COG with full overviews on the grid of its item, with values in [0, 1] or
    no observation. The links and assets of every item must resolve, its box, times and fractions must be some, all maps
    must be of one model, mask and profile, and the catalogue must list every finished map and no other. A damaged
    document is a problem of its own. Raises OutputError if the folder itself cannot be read.
    """
    require_there(out)
    store = open_store(out)
    files = dict(store.list())
    # Maps of another output folder that lies below this one are not ours.
    names = {path: path.rpartition("/")[2].rpartition(".") for path in files if is_ours(path)}
    items = sorted(p for p, (stem, _, kind) in names.items() if kind == "json" and is_map_name(stem))
    maps = {p for p, (stem, _, kind) in names.items() if kind == "tif" and is_map_name(stem)}
    problems = [] if items else [f"{public_href(out)}: no maps"]
    problems += [f"{p}: no item, the map is not finished" for p in sorted(maps) if p[:-4] + ".json" not in files]
    usual = _recipe(store, items[0]) if items else None
    with ThreadPoolExecutor(threads) as pool:
        for found in pool.map(lambda path: list(_item_problems(store, path, files, usual)), items):
            problems += found
    return problems + list(_catalog_problems(store, items, files))


def _recipe(store: Store, path: str) -> Recipe | None:
    """Return how a map was made, None where its item does not tell: a problem of its own."""
    try:
        return recipe_of(json.loads(store.get(path)))
    except (OutputError, *DAMAGED):
        return None


def _item_problems(store: Store, path: str, files: Files, usual: Recipe | None) -> Iterator[str]:
    item, problem = _document(store, path)
    if not problem and not isinstance(item.get("properties"), dict):
        problem = f"{path}: properties {item.get('properties')!r}, expected an object"
    if problem:
        yield problem
        return
    checks = (
        _statement_problems(path, item),
        _link_problems(path, item, files),
        _asset_problems(store, path, item, files),
        _recipe_problems(path, item, usual),
    )
    for found in checks:
        try:
            yield from found
        except DAMAGED as error:
            yield _damage(path, error, "the item of a map")


def _statement_problems(path: str, item: Document) -> Iterator[str]:
    """What is wrong with an item's id, box, times and fractions."""
    stem, properties = path.rpartition("/")[2].removesuffix(".json"), item["properties"]
    if item.get("id") != stem:
        yield f"{path}: id {item.get('id')!r}, expected {stem!r}"
    if not _is_box(item.get("bbox")):
        yield f"{path}: bbox {item.get('bbox')!r}, expected west, south, east, north in degrees"
    for key in ("start_datetime", "end_datetime"):
        if not _is_time(properties.get(key)):
            yield f"{path}: {key} {properties.get(key)!r}, expected a time such as 2023-01-31T10:50:31Z"
    valid, changed = (properties.get(f"s2cd:{kind}_fraction") for kind in ("valid", "changed"))
    if not _is_within(valid, 0, 1):
        yield f"{path}: s2cd:valid_fraction {valid!r}, expected 0 to 1"
    if not _is_within(changed, 0, 1) and not (changed is None and valid == 0):
        yield f"{path}: s2cd:changed_fraction {changed!r}, expected 0 to 1, or null where nothing is valid"


def _recipe_problems(path: str, item: Document, usual: Recipe | None) -> Iterator[str]:
    """What is wrong where a map was made in another way than the first of its folder."""
    if usual and (differ := difference(recipe_of(item), usual)):
        yield f"{path}: {differ} as of the first map"


def _is_box(value: Any) -> bool:
    """Whether it is a bounding box in degrees; across the antimeridian its west exceeds its east."""
    if not isinstance(value, list) or len(value) != 4:
        return False
    west, south, east, north = value
    return (
        all(_is_within(v, -180, 180) for v in (west, east))
        and _is_within(south, -90, 90)
        and _is_within(north, south, 90)
    )


def _is_time(value: Any) -> bool:
    """Whether it is a time with its zone, as RFC 3339 has it."""
    try:
        return datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _is_within(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _link_problems(path: str, item: Document, files: Files) -> Iterator[str]:
    for rel, target in _links(path, item):
        if rel != "derived_from" and target not in files:
            yield f"{path}: {rel} link to {target}, which does not exist"


def _asset_problems(store: Store, path: str, item: Document, files: Files) -> Iterator[str]:
    stated = item.get("assets")
    assets = stated if isinstance(stated, dict) else {}
    if "change" not in assets:
        yield f"{path}: no asset change, expected the map"
    for key, asset in assets.items():
        target = _resolve(path, asset["href"])
        expected = asset.get("file:size")
        if target not in files:
            yield f"{path}: asset {key} at {target} does not exist"
        elif expected is not None and files[target] != expected:
            yield f"{target}: {files[target]} bytes, expected {expected}"
        elif key == "change":
            yield from _map_problems(store, target, item["properties"], float(asset["raster:bands"][0]["scale"]))


def _map_problems(store: Store, path: str, properties: Document, scale: float) -> Iterator[str]:
    try:
        with MemoryFile(store.get(path)) as file:
            with file.open() as dataset:
                found = [*_layout_problems(dataset), *_grid_problems(dataset, properties)]
                codes, outside = _read_codes(dataset, scale)
                levels = len(dataset.overviews(1))
            found += [f"{outside} values are neither in [0, 1] nor nodata"] if outside else []
            for level, expected in zip(range(levels), code_pyramid(codes)[1:], strict=False):
                with file.open(overview_level=level) as overview:
                    found += _overview_problems(overview, scale, expected, level)
    except (RasterioError, ValueError, OutputError) as error:
        found = [f"cannot be checked: {type(error).__name__}: {' '.join(str(error).split())}"]
    yield from (f"{path}: {problem}" for problem in found)


def _layout_problems(dataset: DatasetReader) -> Iterator[str]:
    """What keeps the file from being a COG: https://gdal.org/drivers/raster/cog.html, "File format details"."""
    levels: list[int | None] = [None, *range(len(dataset.overviews(1)))]
    headers = [_offset(dataset, "IFD_OFFSET", level) for level in levels]
    blocks = [_offset(dataset, "BLOCK_OFFSET_0_0", level) for level in levels]
    if headers != sorted(headers) or blocks != sorted(blocks, reverse=True) or headers[-1] > blocks[-1]:
        yield "not laid out as a cloud-optimised GeoTIFF: headers, then overviews, then the map"
    if dataset.count != 1 or dataset.nodata is None:
        yield f"{dataset.count} bands with nodata {dataset.nodata}, expected one with nodata"
    if max(dataset.shape) > BLOCK and ((BLOCK, BLOCK) not in dataset.block_shapes or len(levels) == 1):
        yield f"{dataset.shape} pixels without tiles of {BLOCK} or without overviews"


def _offset(dataset: DatasetReader, tag: str, level: int | None) -> int:
    return int(dataset.get_tag_item(tag, "TIFF", bidx=1, ovr=level) or 0)


def _grid_problems(dataset: DatasetReader, properties: Document) -> Iterator[str]:
    found = {
        "proj:shape": list(dataset.shape),
        "proj:transform": list(dataset.transform)[:6],
        "proj:epsg": dataset.crs.to_epsg() if dataset.crs else None,
    }
    for key, value in found.items():
        if value != properties.get(key):
            yield f"{key} {value}, expected the item's {properties.get(key)}"


def _read_codes(dataset: DatasetReader, scale: float) -> tuple[np.ndarray, int]:
    """Return a map as codes, and how many of its values are no probability."""
    codes = np.full(dataset.shape, CODE_NODATA, np.uint16)
    outside = 0
    for top in range(0, dataset.height, BLOCK):
        rows = slice(top, min(top + BLOCK, dataset.height))
        values = _probability(dataset, scale, Window(0, top, dataset.width, rows.stop - top))
        wrong = (values < 0) | (values > 1)
        outside += int(np.count_nonzero(wrong))
        with np.errstate(invalid="ignore"):  # damaged bytes may be signalling NaNs
            codes[rows] = encode_codes(np.where(wrong, np.float32(np.nan), values))
    return codes, outside


def _overview_problems(overview: DatasetReader, scale: float, expected: np.ndarray, level: int) -> Iterator[str]:
    values, means = _probability(overview, scale), decode_codes(expected)
    if values.shape != means.shape:
        yield f"overview {level} of {values.shape} pixels, expected {means.shape}"
    elif not np.array_equal(np.isnan(values), np.isnan(means)):
        holes = int(np.count_nonzero(np.isnan(values) != np.isnan(means)))
        yield f"overview {level}: {holes} pixels are observed where the map is not, or the reverse"
    elif np.nanmax(np.abs(values - means), initial=0) > OVERVIEW_TOLERANCE:
        yield f"overview {level} does not show the mean of the map"


def _probability(dataset: DatasetReader, scale: float, window: Window | None = None) -> np.ndarray:
    stored = dataset.read(1, window=window)
    if dataset.nodata is None or np.isnan(dataset.nodata):
        return stored.astype(np.float32, copy=False)
    return np.where(stored == dataset.nodata, np.float32(np.nan), stored * np.float32(scale))


def _catalog_problems(store: Store, items: list[str], files: Files) -> Iterator[str]:
    listed: set[str] = set()
    children, problem = _listing(store, ROOT, "child")
    yield from [problem] if problem else []
    for child in children:
        found, problem = _listing(store, child, "item")
        yield from [problem] if problem else []
        listed.update(found)
    for path in sorted(listed - set(files)):
        yield f"{path}: listed in the catalogue, but does not exist"
    for path in sorted(set(items) - listed):
        yield f"{path}: not listed in the catalogue"


def _listing(store: Store, path: str, rel: str) -> tuple[list[str], str]:
    """Return what a document of the catalogue lists, or nothing and what is wrong with it."""
    document, problem = _document(store, path)
    if problem:
        return [], problem
    try:
        return [target for found, target in _links(path, document) if found == rel], ""
    except DAMAGED as error:
        return [], _damage(path, error, "a document of the catalogue")


def _document(store: Store, path: str) -> tuple[Document, str]:
    """Return a JSON document, or an empty one and what is wrong with it."""
    try:
        document = json.loads(store.get(path))
    except OutputError as error:
        return {}, f"{path}: {error}"
    except DAMAGED as error:
        return {}, _damage(path, error, "JSON")
    return (document, "") if isinstance(document, dict) else ({}, f"{path}: not a JSON object")


def _damage(path: str, error: Exception, expected: str) -> str:
    return f"{path}: {type(error).__name__} {' '.join(str(error).split())}, expected {expected}"


def _links(path: str, document: Document) -> list[tuple[str, str]]:
    """Return relation and target of every link. Raises one of DAMAGED if there are none, or they are no links."""
    links = document["links"]
    if not isinstance(links, list):
        raise TypeError(f"links of type {type(links).__name__}")
    return [(link["rel"], _resolve(path, link["href"])) for link in links]


def _resolve(path: str, href: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), href))
