"""From the codes of a pair to its finished map: the last task of a pair, and the last step of the public ones."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import numpy as np
import xarray as xr
from distributed import get_worker

from s2cd import outputs
from s2cd.catalog.scene import Grid, Scene
from s2cd.clusters.machine import available_cores
from s2cd.config import RunConfig
from s2cd.cube import cube_grid, window_of
from s2cd.errors import ConfigError, GridError, OutputError, ReadError, ShiftError
from s2cd.inference import Block
from s2cd.masks import Mask
from s2cd.model import ModelRef
from s2cd.pairs import Pair
from s2cd.plan import mask_of
from s2cd.reader import band_source, read_window
from s2cd.registration import Shift, middle_span, phase_shift, shift_band
from s2cd.thumbnails import thumbnail

LOG = logging.getLogger(__name__)
LEAST_QUALITY = 0.3
LARGEST_SHIFT = 0.5  # pixels: Sentinel-2's multi-temporal registration is specified to be better


def write_change_maps(
    change: xr.DataArray, out: str | Path, *, cog_profile: str = "default", quicklook: bool = True
) -> list[dict[str, Any]]:
    """Compute what `detect_changes` returned, or some of its pairs, and write COG, STAC item and quicklook of each.

    Runs on the Dask client that is active, else on threads. Returns the STAC items.

    A map that is there already is made anew. Raises ConfigError for an array that does not know its pairs, has other
    dimensions than theirs or holds no floating point numbers; OutputError for values outside [0, 1], for what cannot
    be written, and for a folder that holds maps of another model, mask or COG profile, with validity layers, or of
    another part of the tile; and what computing it raises.
    """
    if not {"pairs", "model", "mask"} <= change.attrs.keys():
        raise ConfigError(f"array {change.name!r} has no pairs and model, expected what detect_changes returns")
    if {*change.dims} != {"pair", "y", "x"}:
        raise ConfigError(f"array {change.name!r} has the dimensions {change.dims}, expected ('pair', 'y', 'x')")
    if change.dtype.kind != "f":
        raise ConfigError(
            f"array {change.name!r} holds {change.dtype}, expected probabilities as floating point numbers"
        )
    change = _north_up(change.transpose("pair", "y", "x"))
    out = outputs.absolute(str(out))
    outputs.check_writable(out)
    grid, ref = cube_grid(change), change.attrs["model"]
    config = RunConfig(catalog="", out=out, model=ref.name, cog_profile=cog_profile, quicklook=quicklook)
    mask = change.attrs["mask"]
    recipe = outputs.recipe(ref.name, ref.hash, mask.description, validity=False, cog_profile=cog_profile)
    finished, tile = outputs.finished(config.out), next(iter(change.attrs["pairs"].values())).before.tile
    outputs.require_recipe(config.out, finished, recipe)
    outputs.require_grids(config.out, finished, {tile: grid})
    write = dask.delayed(_write_array, pure=False)
    maps = [write(one.data, change.attrs["pairs"][str(one.pair.values)], grid, ref, config, mask) for one in change]
    with outputs.cataloguing(out) as listed:
        written = dask.compute(*maps)
    places: defaultdict[str, list[str]] = defaultdict(list)
    for item, place in written:
        places[place].append(item["id"])
    lost = outputs.lost_maps(out, listed, places)
    if lost:
        name, error = next(iter(lost.items()))
        raise OutputError(f"{name}: {error}")
    return [item for item, _ in written]


def _north_up(change: xr.DataArray) -> xr.DataArray:
    """Return an array whose rows run from north to south and columns from west to east, as those of its scenes do."""
    down, right = (change[axis].values for axis in ("y", "x"))
    rows, cols = (slice(None, None, -1 if backwards else 1) for backwards in (down[0] < down[-1], right[0] > right[-1]))
    turned = change[:, rows, cols]
    if rows.step < 0 or cols.step < 0:
        turned = turned.rio.write_transform(turned.rio.transform(recalc=True))
    return turned


def write_pair(
    blocks: list[list[Block]],
    *,
    position: int,
    pair: Pair,
    grid: Grid,
    ref: ModelRef,
    config: RunConfig,
) -> dict[str, Any]:
    """Put the chunks of one pair together and write its map; return the figures for the report, and the `place`.

    A map that was finished meanwhile, by another run or by a worker that was lost right after it, stays as it is; one
    that was made with other options raises OutputError. In strict mode raises ShiftError, before anything is written,
    if the images are displaced.
    """
    parts = [block.parts[position] for row in blocks for block in row]
    shift = next(block.shifts[position] for row in blocks for block in row if block.shifts)
    if config.strict and shifted(shift):
        raise ShiftError(f"strict: {pair.name}: {_displaced(shift)}, expected at most {LARGEST_SHIFT:g}")
    mask = mask_of(config)
    item = _finished_item(config.out, pair)
    if item is None:
        item = _write_map(parts, shift, pair, grid, ref, config, mask)
    else:
        recipe = outputs.recipe(
            ref.name, ref.hash, mask.description, validity=config.validity, cog_profile=config.cog_profile
        )
        outputs.require_recipe(config.out, [pair.name], recipe)
    properties = item["properties"]
    return {
        "valid_fraction": properties["s2cd:valid_fraction"],
        "changed_fraction": properties["s2cd:changed_fraction"],
        "shift": properties["s2cd:shift"],
        "place": outputs.place_of(config.out),
    }


def _finished_item(out: str, pair: Pair) -> dict[str, Any] | None:
    """Return the item of the pair's map, None if there is none yet that shows every piece of both dates."""
    pieces = 2 + len(pair.before.parts) + len(pair.after.parts)
    if outputs.is_done(out, pair.name) and outputs.count_inputs(out, pair.name) >= pieces:
        return outputs.item_of(out, pair.name)
    return None


def _write_array(
    probability: np.ndarray, pair: Pair, grid: Grid, ref: ModelRef, config: RunConfig, mask: Mask
) -> tuple[dict[str, Any], str]:
    shift = measure_shift(pair, ref.load().bands, grid)
    probability = probability.astype(np.float32, copy=False)  # integers would pass for codes
    return _write_map(probability, shift, pair, grid, ref, config, mask), outputs.place_of(config.out)


def _write_map(
    values: np.ndarray | Sequence[outputs.MapPart],
    shift: Shift,
    pair: Pair,
    grid: Grid,
    ref: ModelRef,
    config: RunConfig,
    mask: Mask,
) -> dict[str, Any]:
    bands = ref.load().bands
    if shifted(shift):
        pair = replace(pair, notes=(*pair.notes, _displaced(shift)))
    known = shift.quality >= LEAST_QUALITY
    extra = {
        "s2cd:shift": [round(shift.dy, 2), round(shift.dx, 2)] if known else None,
        "s2cd:shift_quality": round(shift.quality, 2),
        "s2cd:mask": mask.description,
    }
    info = outputs.MapInfo(model=Path(ref.name).name, model_hash=ref.hash, bands=bands, extra=extra)
    rgb = (_picture(pair.before, grid), _picture(pair.after, grid)) if config.quicklook else None
    return outputs.write_map(
        values,
        pair,
        grid,
        info,
        config.out,
        quicklook_rgb=rgb,
        profile=config.cog_profile,
        threads=_threads(),  # GDAL has one pool for all maps: as large as the largest that is asked for
    )


def _picture(scene: Scene, grid: Grid) -> np.ndarray | None:
    """Return a scene's part of the quicklook, None where bands that the map does not need cannot be read."""
    try:
        return thumbnail(scene, grid)
    except (ReadError, GridError) as error:
        LOG.warning("%s: no picture of it: %s", scene.id, error)
        return None


def _threads() -> int:
    """Threads of the Dask worker that this runs on, or the cores of a process that is none."""
    try:
        return int(get_worker().state.nthreads)
    except ValueError:
        return available_cores()


def measure_shift(pair: Pair, bands: Sequence[str], part: Grid) -> Shift:
    """Measure how far the two images are displaced, in pixels of the finest grid, in the middle of a part of the tile.

    For maps of any array: a run measures it on the pixels that it has read anyway (`s2cd.inference.Block`).
    Raises ReadError and GridError as reading does.
    """
    band = shift_band(bands)
    grid = pair.before.assets[band].grid
    rows, cols = (_middle(span) for span in window_of(part, grid))
    before, after = (read_window(band_source(scene, band), grid, (rows, cols)) for scene in (pair.before, pair.after))
    return phase_shift(before, after, (before > 0) & (after > 0))


def _middle(span: slice) -> slice:
    inner = middle_span(span.stop - span.start)
    return slice(span.start + inner.start, span.start + inner.stop)


def shifted(shift: Shift) -> bool:
    """Tell whether a shift is large enough to be read as change, and certain enough to be spoken of."""
    return shift.quality >= LEAST_QUALITY and _length(shift) > LARGEST_SHIFT


def _displaced(shift: Shift) -> str:
    return f"the images are displaced by {_length(shift):.2f} pixels of 10 m"


def _length(shift: Shift) -> float:
    return math.hypot(shift.dy, shift.dx)
