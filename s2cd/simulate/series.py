"""A series from the landscape to the catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from math import inf
from numbers import Real
from pathlib import Path

import numpy as np

from s2cd.errors import ConfigError, OutputError
from s2cd.simulate.acquisition import Overpass, observe, overpasses, swath
from s2cd.simulate.catalogue import FULL_TILE, Cut, Product, Writer, cut_of, item_name, mirrored
from s2cd.simulate.changes import as_utc, draw_events, events_document, truth_rasters
from s2cd.simulate.ground import draw_ground

START = "2021-04-10"
DRAW_SIZE = 2746  # even, a quarter of a tile: a larger landscape drawn whole takes 0.24 GB a million pixels
_MISSION = (datetime(2015, 6, 23, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))


def simulate(
    out_dir: str | Path,
    *,
    size: int | Sequence[int] = 1024,
    dates: int = 8,
    orbits: Sequence[int] = (51, 94),
    seed: int = 0,
    tile: str = "31UDS",
    start: str = START,
    step_days: float = 22.5,
    clouds: bool = True,
    blocksize: int = 512,
    draw_size: int | None = None,
    reprocessed: bool = False,
    split: bool = False,
) -> Path:
    """Draw a believable Sentinel-2 L2A series of a cut of one tile and return the path of its catalog.json.

    Writes one COG per band (blue, green, red, nir at 10 m; nir08, swir16, swir22 at 20 m; uint16) and the scene
    classification (20 m, uint8), nodata 0, a static STAC collection shaped like Earth Search v1
    `sentinel-2-l2a`, and the truth (see `truth_between`). The same arguments give the same pixels.

    size         rows and columns at 10 m, one number for a square; 1 to 10980
    dates        number of acquisitions, about `step_days` apart from `start`, the `orbits` taking turns; the last
                 two are of baseline 05.00: the last but one carries the offset of +1000 in its pixels, the last
                 had it taken out while `raster:bands` still states it, as both happens in the archive
    orbits       relative orbits, 1 to 143; the second sees only part of the cut (nodata towards the south-east)
    start        earliest date of the first acquisition, 2015-06-23 or later
    step_days    more than 0; one orbit is seen every 5 days, so that less needs several orbits
    clouds       False leaves every sky clear
    blocksize    rows and columns of a block of the COGs, a multiple of 16
    draw_size    draw a landscape of that many (even) rows and columns and continue it by mirror images
    reprocessed  deliver the first acquisition a second time, as baseline 05.00 with the offset in its pixels
    split        deliver the second acquisition as two halves of one datatake

    Raises ConfigError for an argument that cannot be, such as an empty `out_dir`, for acquisitions that would share an
    id (of one platform and day) and for some that would not follow each other in time; OutputError if `out_dir` cannot
    be written.
    """
    if not str(out_dir):
        raise ConfigError(f"out: found {out_dir!r}, expected a folder")
    rows, columns = size if isinstance(size, tuple | list) and len(size) == 2 else (size, size)
    shape = (_whole("size", rows, 1, FULL_TILE), _whole("size", columns, 1, FULL_TILE))
    cut = cut_of(tile, shape)
    drawn = _drawn_shape(shape, draw_size)
    if _whole("blocksize", blocksize, 16, 4096) % 16:
        raise ConfigError(f"blocksize {blocksize!r}: expected a multiple of 16")
    plan = _plan(cut, _whole("dates", dates, 1), orbits, start, step_days, clouds)
    rng = np.random.default_rng(_whole("seed", seed, 0))
    ground = draw_ground(rng, drawn)
    events = draw_events(rng, ground, [p.time for p in plan])
    writer = Writer(Path(out_dir), cut, blocksize)
    try:
        writer.folder.mkdir(parents=True, exist_ok=True)
        for number, overpass in enumerate(plan):
            image, scl = observe(np.random.default_rng([seed, number]), ground, events, overpass)
            edge = swath(shape, overpass, shape[1])
            for product in _products(number, plan, overpass, cut, reprocessed, split):
                writer.write(product, image, scl, edge)
        _write_truth(writer, truth_rasters(ground, events), events_document(events))
        return writer.write_collection()
    except OSError as error:
        raise OutputError(f"cannot write the series in {out_dir}: {error}") from None


def simulate_full_tile(out_dir: str | Path, dates: int = 6, seed: int = 0, orbits: Sequence[int] = (51,)) -> Path:
    """Simulate a tile of full size, 10980 x 10980 px, for benchmarks, within 4 GB of memory.

    A quarter of its width and height is drawn and continued by mirror images. With one orbit, as by default, the
    series makes `dates` - 1 pairs. Returns the path of catalog.json.
    """
    return simulate(out_dir, size=FULL_TILE, dates=dates, seed=seed, orbits=orbits, draw_size=DRAW_SIZE)


def _whole(name: str, value: object, lowest: int, highest: int | None = None) -> int:
    if isinstance(value, int | np.integer) and lowest <= value and (highest is None or value <= highest):
        return int(value)
    limits = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
    raise ConfigError(f"{name} {value!r}: expected a whole number {limits}")


def _drawn_shape(shape: tuple[int, int], draw_size: int | None) -> tuple[int, int]:
    if draw_size is None:
        return shape
    if _whole("draw_size", draw_size, 2) % 2:
        raise ConfigError(f"draw_size {draw_size} is not an even number: 20 m pixels would not repeat with it")
    return min(shape[0], draw_size), min(shape[1], draw_size)


def _plan(
    cut: Cut, dates: int, orbits: Sequence[int], start: str, step_days: float, clouds: bool
) -> Sequence[Overpass]:
    """Plan the overpasses; raises ConfigError for dates outside of the mission and as `_require_succession`."""
    if not isinstance(orbits, Sequence) or not orbits:
        raise ConfigError(f"orbits {orbits!r}: expected one or more relative orbits, such as (51, 94)")
    orbits = [_whole("orbit", orbit, 1, 143) for orbit in orbits]
    if not isinstance(step_days, Real) or not 0 < step_days < inf:  # not NaN either
        raise ConfigError(f"step_days {step_days!r}: expected a finite number above 0")
    first = as_utc(start)
    earliest, latest = _MISSION
    if first < earliest or step_days * (dates - 1) > (latest - first) / timedelta(days=1):
        raise ConfigError(
            f"start {start!r}, {dates} dates, {step_days:g} days apart: "
            f"expected acquisitions from {earliest:%Y-%m-%d} to {latest:%Y-%m-%d}"
        )
    middle = cut.lonlat([cut.shape[1] / 2], [cut.shape[0] / 2])[0]
    plan = overpasses(dates, orbits, first, step_days, (middle[0], middle[1]), clouds)
    _require_succession(plan, cut)
    return plan


def _require_succession(plan: Sequence[Overpass], cut: Cut) -> None:
    """Raise ConfigError for two acquisitions that one id would stand for, and for one before its predecessor."""
    orbits: dict[str, int] = {}
    for overpass in plan:
        name = item_name(Product(overpass), cut)
        if name in orbits:
            raise ConfigError(
                f"orbits {orbits[name]} and {overpass.orbit} would both be {name}: "
                "expected orbits, step_days and start that give each acquisition an id of its own"
            )
        orbits[name] = overpass.orbit
    for (before, after), (first, second) in zip(pairwise(plan), pairwise(orbits), strict=True):
        if after.time < before.time:
            raise ConfigError(f"{second} would follow {first}: expected orbits, step_days and start in order of time")


def _products(
    number: int, plan: Sequence[Overpass], overpass: Overpass, cut: Cut, reprocessed: bool, split: bool
) -> list[Product]:
    if split and number == 1:
        middle, rows = cut.shape[0] // 4 * 2, cut.shape[0]
        return [Product(overpass, 0, rows=(0, middle)), Product(overpass, 1, rows=(middle, rows))]
    products = [Product(overpass)]
    if len(plan) > 2 and number == len(plan) - 2:
        products = [Product(overpass, baseline="05.00", dn_offset=1000)]
    if len(plan) > 2 and number == len(plan) - 1:
        products = [Product(overpass, baseline="05.00", applied=True)]
    if reprocessed and number == 0:
        products.append(Product(overpass, 1, baseline="05.00", dn_offset=1000))
    return products


def _write_truth(writer: Writer, rasters: tuple[np.ndarray, np.ndarray], document: str) -> None:
    folder = writer.folder / "truth"
    folder.mkdir(exist_ok=True)
    for name, layer in zip(("events", "harvest"), rasters, strict=True):
        full = mirrored(layer, writer.cut.grid_shape(10))
        writer.write_cog(folder / f"{name}.tif", full, 10, resampling="nearest")
    (folder / "events.json").write_text(document)
