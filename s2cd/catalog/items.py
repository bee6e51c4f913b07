"""STAC items to scenes and back. With the modules beside it, the only place that knows STAC JSON."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin

from s2cd import radiometry
from s2cd.addresses import local_path, with_login
from s2cd.catalog.bands import BANDS, SCL, canonical_band
from s2cd.catalog.providers import infer_provider
from s2cd.catalog.scene import Asset, Grid, Scene
from s2cd.errors import CatalogError, ConfigError, S2cdWarning

Item = Mapping[str, Any]
T = TypeVar("T")
R = TypeVar("R")

_PRODUCT = re.compile(
    r"(?P<platform>S2[A-D])_MSIL(?P<level>1C|2A)_(?P<start>\d{8}T\d{6})(?:_N(?P<baseline>\d{4}))?_R(?P<orbit>\d{3})"
    r"_T(?P<tile>\d{2}[A-Z]{3})_(?P<processed>\d{8}T\d{6})"
)
_DATATAKE = re.compile(r"^G(?P<platform>S2[A-D])_\d{8}T\d{6}_(?P<orbit>\d{6})_N(?P<baseline>\d{2}\.\d{2})$")
_GRANULE = re.compile(
    r"_TL_[A-Z0-9_]{4}_(?P<processed>\d{8}T\d{6})_A(?P<orbit>\d{6})_T?(?P<tile>\d{2}[A-Z]{3})(?:_N(?P<baseline>\d{2}\.\d{2}))?"
)
_STRIP = re.compile(r"_S(?P<start>\d{8}T\d{6})_N")
_EARTH_SEARCH_ID = re.compile(r"^S2[A-D]_T?(?P<tile>\d{1,2}[A-Z]{3})_\d{8}(?P<strip>T\d{6})?_")
_BASELINE = re.compile(r"^\d{2}\.\d{2}$")
_LEVEL = re.compile(r"(?:^|(?<![A-Z])L|MSIL?|LEVEL[-_ ]?)(1C|2A)")  # not that of S2A, sentinel-2a or Sentinel2A
_KEY_SUFFIX = re.compile(r"(_\d{2}m|-\d{2}m)$")
CLASS_CODES = "class codes"
_GSD = {band.common_name: band.gsd for band in BANDS} | {SCL: 20}
# (absolute orbit + shift) mod 143 + 1 is the relative orbit; absolute orbits and their shifts, from products that state
# both. Sentinel-2A was moved in early 2025: A050827 (16 March) is R036, A052286 R065, A054503 R137, A057594 R082 and
# A058365 R138. After A049800 (January), the last that is certain in the old place, and before A050827 nothing is told.
_ALL = range(10**6)
_ORBIT_SHIFTS = {
    "S2A": ((range(49_801), 2), (range(50_827, 10**6), -27)),
    "S2B": ((_ALL, -27),),
    "S2C": ((_ALL, 29),),
}
_shared_grid = lru_cache(10_000)(Grid)  # one object for all dates of a tile: half the memory of their scenes


def scene_from_item(
    item: Item, provider: str | None = None, base: str | None = None, extra: Collection[str] = ()
) -> Scene:
    """Read a scene out of a STAC item.

    Args:
        item: the item as plain JSON, STAC 1.0 or 1.1.
        provider: key of the provider, by default told from the item's own links.
        base: path or URL of the document, against which relative links are resolved.
        extra: keys of assets to keep beside the bands, as class layers: a mask.

    Raises CatalogError with the reason for what is no Sentinel-2 scene or cannot be understood.
    """
    name = item.get("id")
    if item.get("type") != "Feature" or not name:
        raise CatalogError(f"{base or 'document'}: found type {item.get('type')!r}, expected a STAC item")
    if not isinstance(name, str):
        raise CatalogError(f"{base or 'document'}: found an item with id {name!r}, expected text")
    try:
        return _Reader(item, provider or infer_provider(item), base, extra).scene()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise CatalogError(f"item {name}: cannot be understood: {error!r}") from error


def understood(items: Iterable[T], read: Callable[[T], R]) -> Iterator[R]:
    """Yield what `read` makes of items, as they stream; of those that it refuses (CatalogError) one is told."""
    refused: Counter[str] = Counter()
    for item in items:
        try:
            result = read(item)
        except CatalogError as error:
            refused[str(error)] += 1
        else:
            yield result
    if refused:
        first = next(iter(refused))
        warnings.warn(f"{refused.total()} items left out, the first: {first}", S2cdWarning, stacklevel=2)


def radiometry_of(item: Item, band: str) -> tuple[float, float, int]:
    """Return scale, offset and nodata of the asset `band`, a canonical name, as the scene of this item would have them.

    Reflectance is scale * digital number + offset. Raises CatalogError for what cannot be understood.
    """
    try:
        reader = _Reader(item, "", None, ())
        scale, offset, _, nodata = reader.radiometry(band, item["assets"][band], reader.level(), reader.baseline())
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise CatalogError(f"item {item.get('id')}, band {band}: cannot be understood: {error!r}") from error
    return scale, offset, nodata


def stated_scale(asset: Item) -> float | None:
    """Return the scale that an asset states; None for none, and for 0, which counts as none."""
    return _number(_raster_fields(asset)["scale"]) or None


class _Reader:
    """One item on its way to a scene: every fact looked up in all the places providers put it."""

    def __init__(self, item: Item, provider: str, base: str | None, extra: Collection[str]):
        self.item = item
        self.id: str = item["id"]
        self.provider = provider
        self.base = base
        self.extra = extra
        self.properties: Mapping[str, Any] = item.get("properties") or {}
        self.product = self._match(_PRODUCT, "s2:product_uri", "sentinel:product_id", "id")
        self.datatake = self._text("datatake", self._first("s2:datatake_id", "eopf:datatake_id"))
        self.collection = self._text("collection", item.get("collection")) or ""
        self.granule = self._match(_GRANULE, "s2:tile_id", "s2:granule_id", "id")

    def scene(self) -> Scene:
        self._require_sentinel2()
        level = self.level()
        baseline = self.baseline()
        return Scene(
            id=self.id,
            provider=self._first("s2cd:provider") or self.provider,
            collection=self.collection,
            level=level,
            tile=self._tile(),
            orbit=self._orbit(),
            time=self._time(),
            platform=self._platform(),
            baseline=baseline,
            cloud_cover=self._cloud_cover(),
            datatake=self.datatake,
            footprint=self._footprint(),
            assets=self._assets(level, baseline),
            processed=self._processed(),
            strip_start=self._strip_start(),
            address=self._address(),
        )

    def _first(self, *names: str) -> Any:
        return next((v for n in names if (v := self.properties.get(n)) is not None), None)

    def _text(self, name: str, value: Any) -> str | None:
        if value is not None and not isinstance(value, str):
            raise CatalogError(f"item {self.id}: found {name} {value!r}, expected text")
        return value

    def _match(self, pattern: re.Pattern[str], *names: str) -> dict[str, str]:
        """Named groups of the first of these properties (or the item's id) that has the pattern."""
        for name in names:
            text = self.id if name == "id" else self.properties.get(name)
            found = pattern.search(text) if isinstance(text, str) else None
            if found:
                return {k: v for k, v in found.groupdict().items() if v}
        return {}

    def _require_sentinel2(self) -> None:
        platform = self._first("platform", "constellation")
        if platform and not re.match(r"sentinel[- ]?2", str(platform).lower()):
            raise CatalogError(f"item {self.id}: found platform {platform!r}, expected sentinel-2")
        if not self.item.get("assets"):
            raise CatalogError(f"item {self.id}: has no assets, so nothing to read")

    def level(self) -> str:
        stated = self._first("s2:product_type", "product:type", "processing:level") or ""
        for text in (stated, self.product.get("level", ""), self.collection, self.id):
            found = _LEVEL.search(str(text).upper())
            if found:
                return f"L{found[1]}"
        return "L2A" if any(_asset_band(k, a) == SCL for k, a in self.item["assets"].items()) else "L1C"

    def baseline(self) -> str | None:
        taken = _DATATAKE.match(self.datatake or "")
        stated = self._first("s2:processing_baseline", "sentinel:processing_baseline")
        named = self.product.get("baseline") or (taken and taken["baseline"]) or self.granule.get("baseline")
        value = next((v for v in (stated, named) if v is not None), None)
        if value is None:
            version = self._first("processing:version")  # which may be that of a program, such as 4.0
            return version if isinstance(version, str) and _BASELINE.match(version) else None
        found = _baseline(value)
        if found is None:
            raise CatalogError(f"item {self.id}: found processing baseline {value!r}, expected one such as '05.11'")
        return found

    def _cloud_cover(self) -> float | None:
        stated = self.properties.get("eo:cloud_cover")
        number = _number(stated)
        if number is None and isinstance(stated, str):
            with suppress(ValueError):
                number = _number(float(stated))
        if number is None and stated is not None:
            raise CatalogError(f"item {self.id}: found eo:cloud_cover {stated!r}, expected percent")
        return number

    def _tile(self) -> str:
        code = self._first("grid:code")
        if isinstance(code, str) and not code.startswith("MGRS-"):
            return code
        short = self._match(_EARTH_SEARCH_ID, "id").get("tile")
        zone = self._first("mgrs:utm_zone", "sentinel:utm_zone")
        band = self._first("mgrs:latitude_band", "sentinel:latitude_band")
        square = self._first("mgrs:grid_square", "sentinel:grid_square")
        parts = f"{zone}{band}{square}" if zone and band and square else None
        stated = (code or "").removeprefix("MGRS-") or self._first("s2:mgrs_tile") or parts
        tile = stated or self.product.get("tile") or self.granule.get("tile") or short
        if not tile:
            raise CatalogError(f"item {self.id}: no tile, expected grid:code, mgrs:* or a product name")
        return normal_tile(tile)

    def _orbit(self) -> int | None:
        stated = self._first("sat:relative_orbit")
        if stated is not None:
            return int(stated)
        if "orbit" in self.product:
            return int(self.product["orbit"])
        taken = _DATATAKE.match(self.datatake or "")
        absolute = self._first("sat:absolute_orbit") or (taken and taken["orbit"]) or self.granule.get("orbit")
        return None if absolute is None else _relative_orbit(_short_platform(self._platform()), int(absolute))

    def _platform(self) -> str | None:
        stated = self._first("platform")
        if stated:
            return str(stated).lower().replace(" ", "-")
        short = self.product.get("platform") or (self.id[:3] if re.match(r"S2[A-D]_", self.id) else None)
        return f"sentinel-{short[1:].lower()}" if short else None

    def _time(self) -> datetime:
        text = self._first("s2cd:datetime", "datetime", "start_datetime")
        if not text:
            raise CatalogError(f"item {self.id}: no datetime")
        return parse_time(text)

    def _processed(self) -> datetime | None:
        text = self._first("s2:generation_time", "processing:datetime")
        if text:
            return parse_time(text)
        return _compact_time(self.product.get("processed") or self.granule.get("processed"))

    def _strip_start(self) -> datetime | None:
        strip = self._match(_STRIP, "s2:datastrip_id", "eopf:datastrip_id")
        return _compact_time(strip.get("start"))

    def _address(self) -> str | None:
        own = (link["href"] for link in self.item.get("links") or () if link.get("rel") == "self")
        return next((resolve_href(href, self.base) for href in own), None)

    def _footprint(self) -> dict[str, Any]:
        geometry = self.item.get("geometry")
        if not geometry or geometry.get("type") not in {"Polygon", "MultiPolygon"}:
            found = geometry.get("type") if geometry else None
            raise CatalogError(f"item {self.id}: found geometry {found!r}, expected Polygon or MultiPolygon")
        footprint = {"type": geometry["type"], "coordinates": _plain_coordinates(geometry["coordinates"])}
        drawn = list(rings(footprint))
        if not drawn or not all(map(_is_ring, drawn)):
            found = repr(geometry["coordinates"])[:80]
            raise CatalogError(f"item {self.id}: found coordinates {found}, expected rings of four or more positions")
        return footprint

    def _assets(self, level: str, baseline: str | None) -> dict[str, Asset]:
        chosen: dict[str, tuple[tuple[bool, bool, float], str, Item]] = {}
        for key, asset in self.item["assets"].items():
            band = _asset_band(key, asset)
            if band is None or not asset.get("href"):
                continue
            described = _asset_band(key, {}) is None  # as what is made of a band may be, such as its quality
            rank = (described, _is_jp2(asset), abs((_asset_gsd(key, asset) or _GSD[band]) - _GSD[band]))
            if band not in chosen or rank < chosen[band][0]:
                chosen[band] = (rank, key, asset)
        if not any(band != SCL for band in chosen):
            found = ", ".join(list(self.item["assets"])[:6])
            raise CatalogError(f"item {self.id}: no asset is a Sentinel-2 band, found {found}")
        assets = {b: self._asset(b, asset, level, baseline) for b, (_, _, asset) in chosen.items()}
        extra = {k: a for k, a in self.item["assets"].items() if k not in assets and self._is_extra(k, a)}
        assets |= {k: self._asset(k, a, level, baseline) for k, a in extra.items()}
        return dict(sorted(assets.items()))

    def _is_extra(self, key: str, asset: Item) -> bool:
        """Whether an asset is kept as a class layer: asked for, or kept by the search that was frozen."""
        return bool(asset.get("href")) and (key in self.extra or asset.get("s2cd:reason") == CLASS_CODES)

    def _asset(self, band: str, asset: Item, level: str, baseline: str | None) -> Asset:
        scale, offset, reason, nodata = self.radiometry(band, asset, level, baseline)
        return Asset(
            band=band,
            href=resolve_href(asset["href"], self.base),
            grid=self._grid(asset, band),
            scale=scale,
            offset=offset,
            reason=reason,
            nodata=nodata,
        )

    def radiometry(self, band: str, asset: Item, level: str, baseline: str | None) -> tuple[float, float, str, int]:
        """Scale, offset, the reason for both, and nodata of an asset."""
        raster = _raster_fields(asset)
        frozen_reason = asset.get("s2cd:reason")
        if band not in _GSD or band == SCL:
            scale, offset, reason = 1.0, 0.0, CLASS_CODES
        elif frozen_reason is not None:
            scale, offset, reason = float(raster["scale"]), float(raster["offset"]), frozen_reason
        else:
            scale, offset, reason = radiometry.resolve(
                level=level,
                baseline=baseline,
                stated_scale=_number(raster.get("scale")),
                stated_offset=_number(raster.get("offset")),
                offset_applied=self._first("earthsearch:boa_offset_applied", "sentinel:boa_offset_applied"),
                whole_numbers=str(raster["data_type"]).startswith(("int", "uint")),
            )
            if abs(offset) > radiometry.LARGEST_OFFSET:
                expected = f"one of reflectance, such as {radiometry.RADIO_ADD_OFFSET:g}"
                raise CatalogError(f"item {self.id}, band {band}: found offset {offset:g}, expected {expected}")
        nodata = _number(raster.get("nodata"))
        return scale, offset, reason, 0 if nodata is None else int(nodata)

    def _grid(self, asset: Item, band: str) -> Grid:
        code = self._either(asset, "proj:code")
        epsg = self._either(asset, "proj:epsg") or (int(str(code).split(":")[-1]) if code else None)
        transform, shape = self._either(asset, "proj:transform"), self._either(asset, "proj:shape")
        if not epsg or not transform or not shape:
            found = [n for n in ("proj:epsg", "proj:code", "proj:transform", "proj:shape") if self._either(asset, n)]
            raise CatalogError(
                f"item {self.id}, band {band}: expected proj:code or proj:epsg, proj:transform, proj:shape, "
                f"found {found or 'none of them'}"
            )
        a, b, c, d, e, f = (float(v) for v in transform[:6])
        if b or d:
            raise CatalogError(
                f"item {self.id}, band {band}: found proj:transform {transform[:6]}, expected no rotation"
            )
        return _shared_grid(int(epsg), (a, b, c, d, e, f), (int(shape[0]), int(shape[1])))

    def _either(self, asset: Item, name: str) -> Any:
        value = asset.get(name)
        return self.properties.get(name) if value is None else value


def _asset_band(key: str, asset: Item) -> str | None:
    """Canonical band of an asset by its key, else by its one band's name; None if it is none of ours."""
    bands = asset.get("bands") or asset.get("eo:bands") or []
    stem = _KEY_SUFFIX.sub("", key.removesuffix("-jp2"))
    names = [stem]
    if len(bands) == 1:
        names += [str(bands[0].get(n) or "") for n in ("name", "eo:common_name", "common_name")]
    roles = asset.get("roles") or []
    if {"thumbnail", "overview", "metadata", "visual"} & set(roles):
        return None
    for name in names:
        try:
            return canonical_band(name)
        except ConfigError:
            continue
    return None


def _asset_gsd(key: str, asset: Item) -> float | None:
    suffix = _KEY_SUFFIX.search(key)
    if suffix:
        return float(suffix[0][1:3])
    bands = asset.get("raster:bands") or []
    return _number(asset.get("gsd") or (bands[0].get("spatial_resolution") if bands else None))


def _is_jp2(asset: Item) -> bool:
    return "jp2" in str(asset.get("type", "")) or str(asset.get("href", "")).endswith(".jp2")


def _raster_fields(asset: Item) -> dict[str, Any]:
    """Scale, offset, nodata and data type of an asset, from the places STAC 1.0 and 1.1 put them."""
    old = (asset.get("raster:bands") or [{}])[0]
    new = (asset.get("bands") or [{}])[0]
    fields = {}
    for name in ("scale", "offset", "nodata", "data_type"):
        places = [asset.get(f"raster:{name}"), new.get(f"raster:{name}"), old.get(name)]
        if name in {"nodata", "data_type"}:
            places += [asset.get(name), new.get(name)]
        fields[name] = next((v for v in places if v is not None), None)
    return fields


def _number(value: Any) -> float | None:
    """Return a finite number, None for anything else ("nan", null, ...)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _baseline(value: Any) -> str | None:
    """Return a processing baseline as "05.11", however it is written: 5.11, "N0511"; None for what is none."""
    digits = re.fullmatch(r"N?(\d{2})\.?(\d{2})", value) if isinstance(value, str) else None
    if digits:
        return f"{digits[1]}.{digits[2]}"
    number = re.fullmatch(r"\d{1,2}(\.\d{1,2})?", str(value))
    return f"{float(number[0]):05.2f}" if number else None  # it has lost its zeros: 5.1 is 05.10


def _relative_orbit(platform: str, absolute: int) -> int | None:
    shifts = _ORBIT_SHIFTS.get(platform, ())
    return next(((absolute + shift) % 143 + 1 for orbits, shift in shifts if absolute in orbits), None)


def _short_platform(platform: str | None) -> str:
    return "" if not platform else f"S{platform[-2:].upper()}"


def _plain_coordinates(value: Any) -> Any:
    """Coordinates as nested lists of floats, without heights."""
    if isinstance(value, str):
        raise TypeError(f"found coordinates {value!r}")
    if value and isinstance(value[0], (int, float)):
        return [float(value[0]), float(value[1])]
    return [_plain_coordinates(v) for v in value]


def _is_ring(value: Any) -> bool:
    return len(value) >= 4 and all(len(p) == 2 and all(map(math.isfinite, p)) for p in value)


def normal_tile(tile: str) -> str:
    """Return an MGRS tile in its usual form: "T6VVN", "6VVN" and "MGRS-06VVN" become "06VVN"."""
    found = re.fullmatch(r"(?:MGRS-|T)?(\d{1,2})([A-Z]{3})", tile.strip().upper())
    return f"{int(found[1]):02d}{found[2]}" if found else tile.strip()


def parse_time(text: str | datetime) -> datetime:
    """Parse an RFC 3339 time to UTC; a time without zone is UTC. Raises ValueError."""
    time = text if isinstance(text, datetime) else datetime.fromisoformat(text.replace("Z", "+00:00"))
    try:
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except OverflowError:
        raise ValueError("outside the years 1 to 9999 in UTC") from None


def _compact_time(text: str | None) -> datetime | None:
    return datetime.strptime(text, "%Y%m%dT%H%M%S").replace(tzinfo=UTC) if text else None


def resolve_href(href: str, base: str | None) -> str:
    """Resolve `href` against the document at `base`, a path or a URL; local results are absolute paths."""
    if href.startswith("file://"):
        return local_path(href)
    if "://" in href and base is not None:
        return with_login(href, base)
    if "://" in href or href.startswith("/") or base is None:
        return href
    if "://" in base:
        return urljoin(base, href)
    return str((Path(base).parent / href).resolve())


def scene_to_item(scene: Scene) -> dict[str, Any]:
    """Return a compact STAC 1.0 item: `scene_from_item` gives `scene` back, but for its parts."""
    stated = {
        "grid:code": f"MGRS-{scene.tile}" if re.fullmatch(r"\d{2}[A-Z]{3}", scene.tile) else scene.tile,
        "sat:relative_orbit": scene.orbit,
        "platform": scene.platform,
        "s2:product_type": f"S2MSI{scene.level[1:]}",
        "s2:processing_baseline": scene.baseline,
        "eo:cloud_cover": scene.cloud_cover,
        "s2:datatake_id": scene.datatake,
        "s2:generation_time": format_time(scene.processed) if scene.processed else None,
        "s2:datastrip_id": f"_S{scene.strip_start:%Y%m%dT%H%M%S}_N" if scene.strip_start else None,
        "s2cd:provider": scene.provider,
        # stac-geoparquet keeps milliseconds of the datetime.
        "s2cd:datetime": format_time(scene.time),
    }
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [],
        "id": scene.id,
        "collection": scene.collection,
        "geometry": dict(scene.footprint),
        "bbox": list(bounds(scene.footprint)),
        "properties": {"datetime": format_time(scene.time)} | {k: v for k, v in stated.items() if v is not None},
        "assets": {band: _asset_to_json(asset) for band, asset in scene.assets.items()},
        "links": [{"rel": "self", "href": scene.address}] if scene.address else [],
    }


def _asset_to_json(asset: Asset) -> dict[str, Any]:
    return {
        "href": asset.href,
        "roles": ["data"],
        "proj:epsg": asset.grid.epsg,
        "proj:transform": list(asset.grid.transform),
        "proj:shape": list(asset.grid.shape),
        "raster:bands": [{"nodata": asset.nodata, "scale": asset.scale, "offset": asset.offset}],
        "s2cd:reason": asset.reason,
    }


def format_time(time: datetime) -> str:
    """Format a time as RFC 3339 in UTC, to the microsecond where it has any."""
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def rings(footprint: Mapping[str, Any]) -> Iterable[list[list[float]]]:
    """Return the outer rings of a Polygon or MultiPolygon."""
    polygons = footprint["coordinates"] if footprint["type"] == "MultiPolygon" else [footprint["coordinates"]]
    return [polygon[0] for polygon in polygons if polygon]


def bounds(footprint: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Return (west, south, east, north) of a footprint, without regard to the antimeridian."""
    lon, lat = zip(*(corner for ring in rings(footprint) for corner in ring), strict=True)
    return min(lon), min(lat), max(lon), max(lat)
