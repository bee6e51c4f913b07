"""A series from the landscape to the catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from s2cd.errors import ConfigError
from s2cd.simulate.acquisition import Overpass, observe, overpasses, swath
from s2cd.simulate.catalogue import FULL_TILE, Cut, Product, Writer, cut_of, mirrored
from s2cd.simulate.changes import draw_events, events_document, truth_rasters
from s2cd.simulate.ground import draw_ground

START = "2021-04-10"


def simulate(
    out_dir: str | Path,
    *,
    size: int | tuple[int, int] = 1024,
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
    orbits       relative orbits; the second sees only part of the cut (nodata towards the south-east)
    clouds       False leaves every sky clear
    draw_size    draw a landscape of that many (even) rows and columns and continue it by mirror images
    reprocessed  deliver the first acquisition a second time, as baseline 05.00 with the offset in its pixels
    split        deliver the second acquisition as two halves of one datatake

    Raises ConfigError for a size, tile, date or number of dates that cannot be.
    """
    shape = (size, size) if isinstance(size, int) else size
    cut = cut_of(tile, shape)
    first = _parse_start(start)
    if dates < 1 or not orbits:
        raise ConfigError(f"{dates} dates in orbits {tuple(orbits)}: expected one or more of each")
    if draw_size is not None and (draw_size < 2 or draw_size % 2):
        raise ConfigError(f"draw_size {draw_size} is not an even number: 20 m pixels would not repeat with it")
    drawn = (min(shape[0], draw_size), min(shape[1], draw_size)) if draw_size else shape
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lonlat = cut.lonlat([shape[1] / 2], [shape[0] / 2])[0]
    plan = overpasses(dates, orbits, first, step_days, (lonlat[0], lonlat[1]), clouds)
    rng = np.random.default_rng(seed)
    ground = draw_ground(rng, drawn)
    events = draw_events(rng, ground, [p.time for p in plan])
    writer = Writer(folder, cut, blocksize)
    for number, overpass in enumerate(plan):
        image, scl = observe(np.random.default_rng([seed, number]), ground, events, overpass)
        edge = swath(shape, overpass, shape[1])
        for product in _products(number, plan, overpass, cut, reprocessed, split):
            writer.write(product, image, scl, edge)
    _write_truth(writer, truth_rasters(ground, events), events_document(events))
    return writer.write_collection()


def simulate_full_tile(out_dir: str | Path, dates: int = 6, seed: int = 0, orbits: Sequence[int] = (51,)) -> Path:
    """Simulate a tile of full size, 10980 x 10980 px, for benchmarks, within 4 GB of memory.

    A quarter of its width and height is drawn and continued by mirror images. With one orbit, as by default, the
    series makes `dates` - 1 pairs. Returns the path of catalog.json.
    """
    return simulate(out_dir, size=FULL_TILE, dates=dates, seed=seed, orbits=orbits, draw_size=2746)


def _parse_start(start: str) -> datetime:
    try:
        return datetime.fromisoformat(start).replace(tzinfo=UTC)
    except ValueError:
        raise ConfigError(f"start {start!r} is not a date like {START}") from None


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
