"""Changes of known truth: what happened where and when, and how it looks.

An event is in effect from its date to its end (most never end). Two dates differ by it if it is in effect at
exactly one of them: that is what `truth_between` paints. Construction, clear-cut, burn and flood count as change.
Harvest is abrupt too but belongs to the season: it is recorded apart and counts only where asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import rasterio
from rasterio.errors import RasterioError
from scipy.ndimage import binary_opening, label

from s2cd.errors import CatalogError, ConfigError, ReadError
from s2cd.simulate import spectra
from s2cd.simulate.ground import Ground, fabric
from s2cd.simulate.spectra import Cover
from s2cd.simulate.texture import Array, IntArray, fractal

CHANGE_KINDS = ("construction", "clear-cut", "burn", "flood")
HARVEST = "harvest"
_PER_100_KM2 = {"construction": 18, "clear-cut": 8, "burn": 4, "flood": 1}


@dataclass
class Event:
    """One change: its number, kind, when it begins and ends (UTC, None = never), and its pixels.

    index are flat pixel numbers; at them the ground shows `share` (n,) of `reflectance` (band, n).
    """

    id: int
    kind: str
    date: datetime
    end: datetime | None
    index: IntArray = field(repr=False)
    share: Array = field(repr=False)
    reflectance: Array = field(repr=False)

    def in_effect(self, when: datetime) -> bool:
        """Whether the change is visible at `when`."""
        return self.date <= when and (self.end is None or when < self.end)


def draw_events(rng: np.random.Generator, ground: Ground, times: Sequence[datetime]) -> list[Event]:
    """Place events in the gaps between the acquisition `times`; none overlaps another."""
    free = ~np.isin(ground.pixel_cover, (Cover.RIVER, Cover.LAKE, Cover.GARDEN))
    free.ravel()[ground.built[0][ground.built[1] > 0.5]] = False
    events: list[Event] = []
    if len(times) < 2:
        return events
    gaps = len(times) - 1
    for kind in ("flood", "burn", "clear-cut", "construction"):
        count = max(1, round(_PER_100_KM2[kind] * free.size / 1e6))
        for turn in range(max(count, gaps) if kind == "construction" else count):
            mask = _PLACERS[kind](rng, ground, free)
            if mask.sum() < 12:
                continue
            gap = gaps // 2 if kind == "flood" else (turn if kind == "construction" else 3 * turn + 1) % gaps
            date = _between(times[gap], times[gap + 1])
            end = None
            if kind == "flood" and gap + 3 < len(times):
                end = _between(times[gap + 2], times[gap + 3])
            index = np.flatnonzero(mask)
            share, reflectance = _appearance(rng, kind, ground, index)
            events.append(Event(len(events) + 1, kind, date, end, index, share, reflectance))
            free &= ~mask
    return events


def _between(a: datetime, b: datetime) -> datetime:
    return (a + (b - a) / 2).replace(minute=0, second=0, microsecond=0)


def _pick_object(
    rng: np.random.Generator, ground: Ground, free: IntArray, wanted: IntArray, size: tuple[int, int]
) -> IntArray:
    """Pixels of one free object among the `wanted` (object,) weights with an area in `size`."""
    area = ground.area
    open_area = np.bincount(ground.objects.ravel(), free.ravel(), minlength=len(ground.cover))
    weight = wanted * (area >= size[0]) * (area <= size[1]) * (open_area > 0.75 * area)
    if weight.sum() == 0:
        return np.zeros(free.shape, bool)
    chosen = rng.choice(len(weight), p=weight / weight.sum())
    return (ground.objects == chosen) & free


def _place_construction(rng: np.random.Generator, ground: Ground, free: IntArray) -> IntArray:
    """A field at the edge of a settlement, whole or in part."""
    open_land = ~np.isin(ground.cover, spectra.WOODS)
    mask = _pick_object(rng, ground, free, open_land * (ground.object_urbanity + 0.01) ** 1.5, (100, 1800))
    rows, cols = np.nonzero(mask)
    if len(rows) > 500 or (len(rows) > 120 and rng.random() < 0.4):
        r0, c0 = int(np.median(rows)), int(np.median(cols))
        half = int(rng.integers(5, 11))
        yard = np.zeros_like(mask)
        yard[max(r0 - half, 0) : r0 + half, max(c0 - half, 0) : c0 + half + int(rng.integers(0, 6))] = True
        mask &= yard
    return mask


def _place_clear_cut(rng: np.random.Generator, ground: Ground, free: IntArray) -> IntArray:
    """One stand or a few neighbouring ones, whole, so that the cut has straight edges."""
    woods = np.isin(ground.cover, spectra.WOODS)
    mask = _pick_object(rng, ground, free, woods.astype(float), (90, 1500))
    if not mask.any():
        return mask
    rows, cols = np.nonzero(mask)
    y, x = np.ogrid[: free.shape[0], : free.shape[1]]
    disc = (y - rows.mean()) ** 2 + (x - cols.mean()) ** 2 < rng.uniform(6, 20) ** 2
    inside = np.bincount(ground.objects.ravel(), disc.ravel(), len(ground.cover))
    neighbours = woods & (inside > 0.5 * ground.area) & (ground.area < 1500)
    return (mask | neighbours[ground.objects]) & free


def _place_burn(rng: np.random.Generator, ground: Ground, free: IntArray) -> IntArray:
    """A ragged patch of wood, heath and meadow."""
    fuel = free & np.isin(ground.pixel_cover, (*spectra.WOODS, Cover.MEADOW))
    rows, cols = np.nonzero(fuel)
    if len(rows) == 0:
        return np.zeros(free.shape, bool)
    k = rng.integers(len(rows))
    y, x = np.ogrid[: free.shape[0], : free.shape[1]]
    radius = rng.uniform(18, 42)
    r2 = ((y - rows[k]) ** 2 + 1.8 * (x - cols[k]) ** 2) / radius**2
    ragged = fractal(rng, ground.shape, 22, octaves=4, persistence=0.6)
    patch, _ = label(binary_opening(fuel & (r2 + 0.45 * ragged < 1)))
    return patch == (np.bincount(patch[patch > 0]).argmax() if patch.any() else -1)


def _place_flood(rng: np.random.Generator, ground: Ground, free: IntArray) -> IntArray:
    """Low ground along one reach of the river."""
    rows, cols = np.nonzero((ground.river_distance < 2) & free | (ground.pixel_cover == Cover.RIVER))
    if len(rows) == 0:
        return np.zeros(free.shape, bool)
    k = rng.integers(len(rows))
    y, x = np.ogrid[: free.shape[0], : free.shape[1]]
    reach = (y - rows[k]) ** 2 + (x - cols[k]) ** 2 < 150**2
    banks = ground.river_distance + 5 * fractal(rng, ground.shape, 30, octaves=4) < 19
    return np.asarray(reach & banks & free & ~np.isin(ground.pixel_cover, spectra.WOODS))


_PLACERS = {
    "construction": _place_construction,
    "clear-cut": _place_clear_cut,
    "burn": _place_burn,
    "flood": _place_flood,
}


def _appearance(rng: np.random.Generator, kind: str, ground: Ground, index: IntArray) -> tuple[Array, Array]:
    n = len(index)
    rough = rng.standard_normal(n).astype(np.float32)
    if kind == "construction":
        return np.ones(n, np.float32), _building_site(rng, ground, index)
    if kind == "clear-cut":
        return np.ones(n, np.float32), spectra.CUT[:, None] * (1 + 0.14 * rough)
    if kind == "burn":
        severity = np.clip(0.8 + 0.25 * ground.vigour.ravel()[index] + 0.08 * rough, 0.45, 1)
        return severity.astype(np.float32), spectra.BURNT[:, None] * (1 + 0.12 * rough)
    depth = np.clip(1.0 - (ground.river_distance.ravel()[index] - 16) / 14, 0.7, 1)
    return depth.astype(np.float32), spectra.FLOODWATER[:, None] * (1 + 0.05 * rough)


def _building_site(rng: np.random.Generator, ground: Ground, index: IntArray) -> Array:
    """Housing or halls between fresh asphalt and earth."""
    rows, cols = np.unravel_index(index, ground.shape)
    industrial = rng.random() < 0.5
    density = np.full(len(index), 0.5 if industrial else 0.95, np.float32)
    angle = np.full(len(index), rng.uniform(0, np.pi / 2), np.float32)
    seed = int(rng.integers(1 << 31))
    street, roof, colour = fabric(rows, cols, angle, density, seed, industrial=industrial)
    rest = np.clip(1 - street - roof, 0, 1)
    yard = spectra.EARTHWORKS[:, None] * (1 + 0.1 * ground.brightness.ravel()[index])
    return (spectra.ASPHALT[:, None] * street + colour * roof + yard * rest).astype(np.float32)


def truth_rasters(ground: Ground, events: Sequence[Event]) -> tuple[IntArray, IntArray]:
    """Number of the event per pixel (0 = none) and day of the year of the harvest (0 = none), (y, x) uint16."""
    numbers = np.zeros(ground.shape, np.uint16)
    for event in events:
        numbers.ravel()[event.index] = event.id
    harvest = ground.harvest[ground.objects]
    harvest.ravel()[ground.built[0]] = 0
    harvest[numbers > 0] = 0
    return numbers, harvest


def events_document(events: Sequence[Event]) -> str:
    """The events as JSON, without their pixels."""
    rows = [
        {
            "id": event.id,
            "kind": event.kind,
            "date": event.date.isoformat(),
            "end": event.end.isoformat() if event.end else None,
            "pixels": len(event.index),
        }
        for event in events
    ]
    return json.dumps({"events": rows}, indent=1)


def truth_between(
    out_dir: str | Path,
    t0: datetime | str,
    t1: datetime | str,
    kinds: Sequence[str] = CHANGE_KINDS,
) -> np.ndarray:
    """Return what changed between two dates in a simulated series: (y, x) uint8, 1 = changed, on the 10 m grid.

    A pixel changed if an event of one of the `kinds` was in effect at exactly one of the dates. "harvest" may be
    among the kinds: then fields cut between the dates count too. Dates without a time zone are UTC.

    Raises ConfigError for a kind or a date that is none, CatalogError if `out_dir` holds no simulated series or its
    events cannot be understood, ReadError if its rasters cannot be read.
    """
    if not set(kinds) <= {*CHANGE_KINDS, HARVEST}:
        raise ConfigError(f"kinds {kinds!r}: expected a sequence of {', '.join((*CHANGE_KINDS, HARVEST))}")
    first, last = sorted((as_utc(t0), as_utc(t1)))
    folder = Path(out_dir) / "truth"
    changed_ids = _changed_ids(folder / "events.json", kinds, first, last)
    changed = np.isin(_read(folder / "events.tif"), changed_ids)
    if HARVEST in kinds:
        changed |= _harvested(_read(folder / "harvest.tif"), first, last)
    return changed.astype(np.uint8)


def _changed_ids(path: Path, kinds: Sequence[str], first: datetime, last: datetime) -> list[int]:
    """Numbers of the events that were in effect at exactly one of two moments."""

    def in_effect(event: dict, when: datetime) -> bool:
        return as_utc(event["date"]) <= when and (event["end"] is None or when < as_utc(event["end"]))

    try:
        events = json.loads(path.read_text())["events"]
        return [e["id"] for e in events if e["kind"] in kinds and in_effect(e, first) != in_effect(e, last)]
    except (FileNotFoundError, NotADirectoryError):
        raise CatalogError(f"no truth in {path.parent.parent}: not a folder written by s2cd.simulate") from None
    except (OSError, ValueError, LookupError, TypeError, ConfigError) as error:
        raise CatalogError(f"{path}: not the events of a simulated series: {error!r}") from None


def _read(path: Path) -> IntArray:
    try:
        with rasterio.open(path) as source:
            return source.read(1)
    except RasterioError as error:
        raise ReadError(str(path), str(error)) from None


def _harvested(day: IntArray, first: datetime, last: datetime) -> IntArray:
    done = np.zeros(day.shape, bool)
    for year in range(first.year, last.year + 1):
        start = datetime(year, 1, 1, tzinfo=UTC)
        lowest, highest = ((t - start) / timedelta(days=1) + 1 for t in (first, last))
        done |= (day > 0) & (day > lowest) & (day <= highest)
    return done


def as_utc(when: datetime | str) -> datetime:
    """Return a moment in UTC, which it is in where it names no time zone.

    Raises ConfigError for what is neither a datetime nor a date as ISO 8601 has it.
    """
    try:
        moment = datetime.fromisoformat(when) if isinstance(when, str) else when
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, AttributeError, OverflowError):
        raise ConfigError(f"date {when!r}: expected a datetime or a text like '2021-04-10'") from None
