"""One search -> scenes, whatever the catalogue."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from s2cd.addresses import local_path
from s2cd.catalog import static
from s2cd.catalog.api import provider_at, search_api
from s2cd.catalog.bands import canonical_band
from s2cd.catalog.filters import Filter, asked, describe, intersects, make_filter
from s2cd.catalog.frozen import SUFFIXES, read_frozen
from s2cd.catalog.items import format_time, scene_from_item, understood
from s2cd.catalog.providers import PROVIDERS
from s2cd.catalog.safe import find_products, scene_from_safe
from s2cd.catalog.scene import Scene
from s2cd.errors import CatalogError, NoScenesError, S2cdWarning


def search(
    source: str | PathLike[str],
    *,
    bbox: Collection[float] | None = None,
    datetime: str | date | None = None,
    tiles: Collection[str] | str | None = None,
    orbit: int | Collection[int] | None = None,
    max_cloud: float | None = None,
    collection: str | None = None,
    bands: Sequence[str] | None = None,
    extra: Collection[str] = (),
) -> list[Scene]:
    """Search a catalogue once for Sentinel-2 scenes.

    Args:
        source: a provider ("earth-search", "planetary-computer", "cdse"), the URL of a STAC API, or the path
            or URL of a static catalogue, collection, item, ItemCollection or stac-geoparquet file, or a
            folder that holds a catalogue or .SAFE products. An ItemCollection by URL is read to its last page;
            a stac-geoparquet file may lie in a bucket (s3://), with keys from the environment.
        bbox: (west, south, east, north) in degrees; west > east crosses the antimeridian.
        datetime: "2023-01-01/2023-12-31", either end "..", or one year, month, day or time, ends included;
            a date or datetime names one day or time.
        tiles: MGRS tiles such as "31UDS", in upper or lower case.
        orbit: relative orbit or orbits, 1..143.
        max_cloud: percent by the scene's metadata; scenes that state none pass.
        collection: STAC collection id; for a provider, by name or by URL, its first by default.
        bands: names such as "B04" or "red"; other assets are dropped, "scl" is kept.
        extra: keys of the items' assets to keep beside the bands, such as the mask that `Mask(band=...)` names;
            read as class layers.

    Returns scenes ordered by tile and time. Items that are no Sentinel-2 scene, and scenes of which `bands` leaves
    nothing, are left out with a warning.

    Raises CatalogError for a catalogue that does not exist, is not STAC or cannot be reached and for a bbox
    that is none, NoScenesError (saying what the catalogue holds) if nothing is left, ConfigError for other
    bad values.
    """
    wanted = make_filter(bbox, datetime, tiles, orbit, max_cloud)
    kept_bands = None if bands is None else {canonical_band(b) for b in bands} | {"scl", *extra}
    passed = [_with_bands(s, kept_bands) for s in found_scenes(source, wanted, collection, extra)]
    if bands is not None:
        _require_bands(passed, bands)
        passed = _with_assets(passed, bands)
    return sorted(passed, key=lambda s: (s.tile, s.time, s.id))


def found_scenes(
    source: str | PathLike[str], wanted: Filter, collection: str | None = None, extra: Collection[str] = ()
) -> Iterator[Scene]:
    """Yield what `search` finds as it arrives, with all bands, so that a continent's scenes need not be held at once.

    Raises CatalogError and NoScenesError as `search` does, when it comes to them.
    """
    address = _address(source)
    none = True
    failed: list[Scene] = []
    others: Counter[str] = Counter()
    for scene in _read_scenes(address, wanted, collection, extra):
        if collection and scene.collection != collection:
            others[scene.collection] += 1
        elif not wanted.rejects(scene):
            none, failed = False, []
            yield scene
        elif none:
            failed.append(scene)
    if none:
        raise NoScenesError(_why_none(address, wanted, failed, others))


def _address(source: str | PathLike[str]) -> str:
    """Path or URL of a source. Raises CatalogError for an address that is none."""
    try:
        address = local_path(fspath(source))
        urlsplit(address)
    except ValueError as error:
        raise CatalogError(f"{fspath(source)}: is no address: {error}") from None
    return address


def _read_scenes(source: str, wanted: Filter, collection: str | None, extra: Collection[str]) -> Iterator[Scene]:
    """Scenes of any source; servers filter already, files do not."""
    record = PROVIDERS.get(source) or provider_at(source)
    if record is not None:
        return _scenes(search_api(record.url, wanted, collection or record.collections[0], record), record.key, extra)
    if static.is_url(source) and not urlsplit(source).path.endswith(SUFFIXES):
        document = static.read_document(source)
        root, api_collection = _api_behind(document, source)
        if root is not None:
            known = provider_at(root)
            name = collection or api_collection
            return _scenes(search_api(root, wanted, name, known), known.key if known else None, extra)
        return _scenes(static.iter_items(document, source), None, extra)
    return _read_local(source, extra)


def _read_local(source: str, extra: Collection[str]) -> Iterator[Scene]:
    if source.endswith(SUFFIXES):
        return read_frozen(source, extra)
    if "://" in source and not static.is_url(source):
        kind = source.partition("://")[0]
        raise CatalogError(f"{source}: found an address of kind {kind}://, expected a path, http(s):// or file://")
    path = Path(source).absolute()
    if not source or not os.path.exists(path):  # pathlib raises an error for a name that is too long
        known = ", ".join(PROVIDERS)
        raise CatalogError(f"{source or repr(source)}: does not exist; expected a path, a URL or one of {known}")
    if path.is_dir():
        products = find_products(path)
        if products:
            read = partial(scene_from_safe, extra=extra)
            return understood(products, read) if len(products) > 1 else map(read, products)  # one is an error in full
        path = static.entry_document(path, "products (*.SAFE)")
    document = static.read_document(str(path))
    root, _ = _api_behind(document, str(path))
    if root is not None:
        raise CatalogError(f"{source}: holds no items, it belongs to the STAC API at {root}: search that URL")
    return _scenes(static.iter_items(document, str(path)), None, extra)


def _scenes(items: Iterable[static.Document], provider: str | None, extra: Collection[str]) -> Iterator[Scene]:
    return understood(items, lambda document: scene_from_item(document[0], provider, document[1], extra))


def _api_behind(document: Mapping[str, Any], source: str) -> tuple[str | None, str | None]:
    """Root URL of the STAC API that a landing page or collection belongs to, and the collection, if any."""
    links = {link["rel"]: link["href"] for link in static.links_of(document, source, "search", "items", "self", "root")}
    if document.get("type") == "Catalog" and "search" in links:
        return source if static.is_url(source) else links.get("self") or links.get("root"), None
    if document.get("type") == "Collection" and "items" in links and "root" in links:
        return links["root"], document.get("id")
    return None, None


def _with_bands(scene: Scene, bands: set[str] | None) -> Scene:
    if bands is None:
        return scene
    return replace(scene, assets={b: a for b, a in scene.assets.items() if b in bands})


def _require_bands(scenes: list[Scene], bands: Sequence[str]) -> None:
    for name in map(canonical_band, bands):
        if not any(name in s.assets for s in scenes):
            offered = sorted({b for s in scenes for b in s.assets})
            raise CatalogError(f"band {name!r} is offered by none of {len(scenes)} scenes, they offer {offered}")


def _with_assets(scenes: list[Scene], bands: Sequence[str]) -> list[Scene]:
    """Leave out scenes with nothing to read, of which one is told."""
    empty = [s.id for s in scenes if not s.assets]
    if empty:
        told = f"{len(empty)} scenes left out, the first: {empty[0]} offers none of the bands {', '.join(bands)}"
        warnings.warn(told, S2cdWarning, stacklevel=3)
    return [s for s in scenes if s.assets]


def _why_none(source: str, wanted: Filter, failed: list[Scene], others: Counter[str]) -> str:
    if not failed and others:
        names = ", ".join(map(repr, sorted(others)))
        return f"{source}: no scenes found, {others.total()} by collection left out; its collections are {names}"
    if not failed:
        return f"{source}: no Sentinel-2 scenes found{' for ' * bool(asked(wanted))}{asked(wanted)}"
    why = Counter(wanted.rejects(s) for s in failed)
    causes = ", ".join(f"{count} by {cause}" for cause, count in why.most_common())
    hint = ""
    if wanted.bbox is not None:
        west, south, east, north = wanted.bbox
        turned = (south, west, north, east)
        if abs(west) <= 90 >= abs(east) and any(intersects(s.footprint, turned) for s in failed):
            hint = " (bbox has latitude and longitude swapped: expected west, south, east, north)"
    return f"{source}: no scenes found, {causes} left out{hint}; it holds {describe(failed)}"


def scene_rows(scenes: Iterable[Scene]) -> list[dict[str, Any]]:
    """List scenes for a person: one flat dict each, in one form whatever the provider.

    Keys: id, tile, orbit, time, platform, level, baseline, cloud, offset (of the red band or the first there
    is), offset_reason, provider, collection.
    """
    rows = []
    for scene in scenes:
        asset = scene.assets.get("red") or next(iter(scene.assets.values()))
        rows.append(
            {
                "id": scene.id,
                "tile": scene.tile,
                "orbit": scene.orbit,
                "time": format_time(scene.time),
                "platform": scene.platform,
                "level": scene.level,
                "baseline": scene.baseline,
                "cloud": scene.cloud_cover,
                "offset": asset.offset,
                "offset_reason": asset.reason,
                "provider": scene.provider,
                "collection": scene.collection,
            }
        )
    return rows
