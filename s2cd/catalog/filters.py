"""What a search lets through: area, time, tile, orbit, cloud."""

from __future__ import annotations

import calendar
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from itertools import pairwise
from numbers import Real
from typing import Any

from s2cd.catalog.items import bounds, normal_tile, parse_time, rings
from s2cd.catalog.scene import Scene
from s2cd.errors import CatalogError, ConfigError

BBox = tuple[float, float, float, float]
Interval = tuple[datetime | None, datetime | None]


@dataclass(frozen=True, slots=True)
class Filter:
    """Conditions on scenes, all of which must hold; None lets everything through. Tiles are told in any case."""

    bbox: BBox | None = None
    interval: Interval = (None, None)
    tiles: frozenset[str] | None = None
    orbits: frozenset[int] | None = None
    max_cloud: float | None = None

    def rejects(self, scene: Scene) -> str | None:
        """Return which condition `scene` fails ("bbox", ...), None if it passes."""
        start, end = self.interval
        if self.tiles is not None and scene.tile.casefold() not in _in_any_case(self.tiles):
            return "tiles"
        if (start and scene.time < start) or (end and scene.time > end):
            return "datetime"
        if self.orbits is not None and scene.orbit not in self.orbits:
            return "orbit"
        if self.max_cloud is not None and scene.cloud_cover is not None and scene.cloud_cover > self.max_cloud:
            return "max_cloud"
        if self.bbox is not None and not intersects(scene.footprint, self.bbox):
            return "bbox"
        return None


def make_filter(
    bbox: Collection[float] | None = None,
    datetime: str | date | None = None,
    tiles: Collection[str] | str | None = None,
    orbit: int | Collection[int] | None = None,
    max_cloud: float | None = None,
) -> Filter:
    """Check search conditions and make them a `Filter`.

    Raises CatalogError for a bbox that is none, ConfigError for other values that cannot be used.
    """
    if max_cloud is not None and not (isinstance(max_cloud, Real) and 0 <= max_cloud <= 100):
        raise ConfigError(f"max_cloud: found {max_cloud!r}, expected percent from 0 to 100")
    return Filter(
        bbox=None if bbox is None else check_bbox(bbox),
        interval=parse_interval(datetime),
        tiles=None if tiles is None else _check_tiles(tiles),
        orbits=None if orbit is None else _check_orbits(orbit),
        max_cloud=max_cloud,
    )


def _check_tiles(tiles: Collection[str] | str) -> frozenset[str]:
    names = [tiles] if isinstance(tiles, str) else tiles
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f'tiles: found {tiles!r}, expected MGRS tiles such as "31UDS"')
    return frozenset(normal_tile(name) for name in names)


def _check_orbits(orbit: int | Collection[int]) -> frozenset[int]:
    orbits = orbit if isinstance(orbit, Collection) else [orbit]
    if not all(isinstance(o, Real) and 1 <= o <= 143 for o in orbits):
        raise ConfigError(f"orbit: found {orbit!r}, expected relative orbits from 1 to 143")
    return frozenset(orbits)


@lru_cache(maxsize=8)
def _in_any_case(tiles: frozenset[str]) -> frozenset[str]:
    return frozenset(tile.casefold() for tile in tiles)


def check_bbox(bbox: Collection[float]) -> BBox:
    """Check (west, south, east, north) in degrees; west > east crosses the antimeridian.

    Raises CatalogError that says which number is wrong.
    """
    order = "expected west, south, east, north in degrees of longitude and latitude"
    try:
        values = tuple(float(v) for v in ([bbox] if isinstance(bbox, str) else bbox))
    except (TypeError, ValueError):
        raise CatalogError(f"bbox: found {bbox!r}, {order}") from None
    if len(values) != 4:
        raise CatalogError(f"bbox: found {len(values)} numbers, {order}")
    west, south, east, north = values
    if not all(-90 <= v <= 90 for v in (south, north)):
        swapped = all(-90 <= v <= 90 for v in (west, east))
        hint = "; latitude and longitude look swapped" if swapped else ""
        raise CatalogError(f"bbox {_text(values)}: latitude outside -90..90{hint}, {order}")
    if not all(-180 <= v <= 180 for v in (west, east)):
        raise CatalogError(f"bbox {_text(values)}: longitude outside -180..180, {order}")
    if south >= north:
        raise CatalogError(f"bbox {_text(values)}: south {south:g} is not below north {north:g}, {order}")
    if 0 < west - east < 180:
        hint = "a box across the antimeridian is narrower than half of the globe; west and east look swapped"
        raise CatalogError(f"bbox {_text(values)}: west {west:g} lies east of east {east:g}: {hint}, {order}")
    if west == east:
        raise CatalogError(f"bbox {_text(values)}: west equals east, {order}")
    return west, south, east, north


def asked(wanted: Filter) -> str:
    """Say what a search asked for, and which of its tiles are none."""
    start, end = (t.isoformat() if t else ".." for t in wanted.interval)
    parts = [
        f"bbox {_text(wanted.bbox)}" if wanted.bbox else "",
        f"datetime {start}/{end}" if any(wanted.interval) else "",
        f"tiles {', '.join(sorted(wanted.tiles))}" if wanted.tiles else "",
    ]
    strange = [tile for tile in sorted(wanted.tiles or ()) if not _MGRS.fullmatch(tile)]
    hint = f" ({', '.join(strange)}: no MGRS tile, expected one such as 31UDS)" if strange else ""
    return ", ".join(filter(None, parts)) + hint


_MGRS = re.compile(r"\d{2}[C-HJ-NP-X][A-HJ-NP-Z][A-HJ-NP-V]")


def _text(values: Collection[float]) -> str:
    return ",".join(f"{v:g}" for v in values)


_DAY = re.compile(r"^(\d{4})(?:-(\d{2})(?:-(\d{2}))?)?$")
_COMPACT_DAY = re.compile(r"^(\d{4})(\d{2})(\d{2})$")
_TIME = re.compile(r"^\d{4}-?\d{2}-?\d{2}[Tt ]\d{2}:?\d{2}")


def parse_interval(text: str | date | None) -> Interval:
    """Parse "2023", "2023-05", "2023-05-01" or "20230501", a time to the minute or finer, or two of them as "start/end"
    with ".." for an open end; a date or datetime means what its ISO form does.

    Both ends are inclusive; a year, month or day means all of it. Raises ConfigError for anything else.
    """
    if text is None:
        return None, None
    text = text.isoformat() if isinstance(text, date) else text
    expected = 'expected "2023-01-01/2023-12-31", with ".." for an open end'
    if not isinstance(text, str):
        raise ConfigError(f"datetime: found {text!r}, {expected}")
    ends = text.split("/")
    try:
        if len(ends) > 2:
            raise ValueError("more than two times")
        start = None if ends[0] in {"", ".."} else _span(ends[0])[0]
        end = None if ends[-1] in {"", ".."} else _span(ends[-1])[1]
    except ValueError as error:
        raise ConfigError(f"datetime {text!r}: {error}, {expected}") from error
    if start and end and start > end:
        raise ConfigError(f"datetime {text!r}: starts after it ends")
    return start, end


def _span(text: str) -> tuple[datetime, datetime]:
    """First and last microsecond of what `text` names."""
    found = _DAY.match(_COMPACT_DAY.sub(r"\1-\2-\3", text))
    if not found:
        if not _TIME.match(text):  # Python reads weeks, and hours alone, as their first moment
            raise ValueError(f"{text!r} is no year, month, day or time to the minute")
        time = parse_time(text)
        return time, time
    year, month, day = (int(v) if v else None for v in found.groups())
    first = datetime(year or 0, month or 1, day or 1, tzinfo=UTC)
    last_month = month or 12
    last_day = day or calendar.monthrange(first.year, last_month)[1]
    last = datetime(first.year, last_month, last_day, tzinfo=UTC) + timedelta(days=1, microseconds=-1)
    return first, last


def intersects(footprint: Mapping[str, Any], bbox: BBox) -> bool:
    """Tell whether a footprint and a box share a point, across the antimeridian if need be.

    Footprints are taken as drawn in the plane of longitude and latitude, their outer rings only.
    """
    boxes = boxes_of(bbox)
    for ring in rings(footprint):
        for moved in _copies(_unwrap(ring)):
            if any(_ring_meets_box(moved, box) for box in boxes):
                return True
    return False


def boxes_of(bbox: BBox) -> list[BBox]:
    """Return the box, or its two parts on either side of the antimeridian that it crosses (west > east)."""
    west, south, east, north = bbox
    return [bbox] if west <= east else [(west, south, 180.0, north), (-180.0, south, east, north)]


def _copies(ring: list[list[float]]) -> Iterator[list[tuple[float, float]]]:
    """Draw a ring where it is, and once around the Earth where it reaches the antimeridian or beyond."""
    west, east = min(p[0] for p in ring), max(p[0] for p in ring)
    for shift, reaches in ((0.0, True), (-360.0, east >= 180), (360.0, west <= -180)):
        if reaches:
            yield [(p[0] + shift, p[1]) for p in ring]


def _unwrap(ring: list[list[float]]) -> list[list[float]]:
    """Draw a ring that jumps over the antimeridian in one piece, east of it."""
    if all(abs(a[0] - b[0]) <= 180 for a, b in pairwise(ring)):
        return ring
    return [[p[0] + 360 if p[0] < 0 else p[0], p[1]] for p in ring]


def _ring_meets_box(ring: list[tuple[float, float]], box: BBox) -> bool:
    west, south, east, north = box
    lon, lat = zip(*ring, strict=True)
    if min(lon) > east or max(lon) < west or min(lat) > north or max(lat) < south:
        return False
    if any(west <= x <= east and south <= y <= north for x, y in ring):
        return True
    edges = list(pairwise(ring))
    return _inside(edges, (west, south)) or any(_edge_crosses_box(a, b, box) for a, b in edges)


def _inside(edges: list[tuple[tuple[float, float], tuple[float, float]]], point: tuple[float, float]) -> bool:
    """Ray casting: whether `point` lies inside the ring of `edges`."""
    x, y = point
    inside = False
    for (x0, y0), (x1, y1) in edges:
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
            inside = not inside
    return inside


def _edge_crosses_box(a: tuple[float, float], b: tuple[float, float], box: BBox) -> bool:
    """Liang-Barsky: whether the segment from `a` to `b` enters the box."""
    west, south, east, north = box
    first, last = 0.0, 1.0
    for start, step, low, high in (
        (a[0], b[0] - a[0], west, east),
        (a[1], b[1] - a[1], south, north),
    ):
        if step == 0:
            if not low <= start <= high:
                return False
            continue
        near, far = sorted(((low - start) / step, (high - start) / step))
        first, last = max(first, near), min(last, far)
    return first <= last


def describe(scenes: Collection[Scene]) -> str:
    """Say what a catalogue holds, for a message: how many scenes, tiles, orbits, time and area."""
    if not scenes:
        return "no Sentinel-2 scene"
    boxes = [bounds(s.footprint) for s in scenes]
    west, south = min(b[0] for b in boxes), min(b[1] for b in boxes)
    east, north = max(b[2] for b in boxes), max(b[3] for b in boxes)
    times = sorted(s.time for s in scenes)
    return (
        f"{len(scenes)} scenes, tiles {_some(sorted({s.tile for s in scenes}))}, "
        f"orbits {_some(sorted({s.orbit for s in scenes if s.orbit})) or 'unknown'}, "
        f"{times[0]:%Y-%m-%d} to {times[-1]:%Y-%m-%d}, "
        f"bbox {west:.4f},{south:.4f},{east:.4f},{north:.4f}"
    )


def _some(values: list[Any]) -> str:
    shown = ", ".join(str(v) for v in values[:8])
    return shown + (f", ... ({len(values)} in all)" if len(values) > 8 else "")
