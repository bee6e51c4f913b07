"""map_blocks over the cube: the only place where the network and Dask meet.

Two forms of one computation, tested against each other. `detect_changes` takes any cube and lets Dask bring the
halos. `change_blocks` is what a run uses: a task reads its chunk of several consecutive dates with its halo (see
`s2cd.reader`), encodes each date once and keeps its features for both of its pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple
from uuid import uuid4

import dask
import dask.array as da
import numpy as np
import xarray as xr
from dask.array.overlap import overlap
from dask.typing import Key
from rasterio.transform import Affine

from s2cd.catalog.access import is_local
from s2cd.catalog.scene import Grid, Scene
from s2cd.cube import common_grid, cube_grid, parts_of
from s2cd.device_reader import read_dates
from s2cd.errors import ConfigError, GridError
from s2cd.lost import give_up
from s2cd.masks import Mask
from s2cd.model import EncodedDate, Model, ModelRef
from s2cd.model.device import current, failed, to_host, with_memory
from s2cd.model.normalise import Planes
from s2cd.pairs import Pair
from s2cd.reader import Tiling, read_bands
from s2cd.registration import Shift, middle_span, phase_shift, shift_band
from s2cd.survey import SceneInput, Survey, observed, scene_input, survey_scene

Image = tuple[Planes, np.ndarray, np.ndarray]
"""Pixels, affine and valid of a date, as `Model.encode` takes them."""
_Read = tuple[list[np.ndarray], np.ndarray | None]
"""Pixels, an array (y, x) a band, and values of the mask band."""
Finish = Callable[[np.ndarray, tuple[int, int]], Any]
_READERS = ThreadPoolExecutor(64, "s2cd-read")


@dataclass(frozen=True, slots=True)
class Series:
    """Dates in order of time and the pairs among them, by position: what one task works on.

    `statistics` has an entry for each date, `backgrounds` (see `Model.background`) for each pair.
    """

    dates: tuple[SceneInput, ...]
    statistics: tuple[np.ndarray, ...]
    pairs: tuple[tuple[int, int], ...]
    backgrounds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Levels:
    """What two dates are normalised with: the statistics of each, and their common background."""

    statistics: tuple[np.ndarray, np.ndarray]
    background: float

    @classmethod
    def of(cls, before: Survey, after: Survey, model: Model) -> Levels:
        """Return the levels of two dates as `model` tells them."""
        return cls((before.statistics, after.statistics), model.background(before.sketch, after.sketch))


def detect_changes(
    cube: xr.DataArray,
    pairs: Sequence[Pair],
    model: str = "generic",
    *,
    mask: Mask | None = None,
    device: str = "auto",
) -> xr.DataArray:
    """Probability of change for each pair, lazily.

    cube    as `s2cd.open_cube` returns it, or a part of it; its chunks may be arrays of CuPy
    pairs   pairs of scenes that the cube holds
    model   name of a shipped model, or path of an exported or trained one
    mask    which observations count; by default clouds, shadows and their rims do not

    Returns a DataArray (pair, y, x) float32 in [0, 1], NaN where either date has no valid observation, on the
    cube's grid. Statistics for the normalisation come from the overviews of the scenes' files. A part gives what its
    tile does, but for some 640 m along its edge: there the network does not see all that it would. Its attributes hold
    pairs, model and mask, for `s2cd.write_change_maps`; NetCDF takes it without: `change.drop_attrs().to_netcdf(...)`.

    Raises ConfigError for no pairs, and for a pair, a band of the model, the mask band or the other half of a split
    datatake that the cube lacks; GridError for a cube whose pixels are not those of its tile.
    """
    if not pairs:
        raise ConfigError("pairs: found none, expected at least one of what consecutive_pairs returns")
    cube, mask = _checked(cube), mask or Mask()
    if not isinstance(mask, Mask):
        raise ConfigError(f"mask: found {mask!r}, expected a Mask, such as Mask.parse({str(mask)!r})")
    ref = ModelRef.of(model, device)
    network = ref.load()
    scenes = {s.id: s for pair in pairs for s in (pair.before, pair.after)}
    told = [mask.band] if mask.function is None and any(mask.band in s.assets for s in scenes.values()) else []
    _require_bands(cube, (*network.bands, *mask.extra_assets, *told))
    positions = [_positions(cube, pair) for pair in pairs]
    _require_whole_dates(cube, scenes.values())
    grid, lead = _part_of_tile(cube, list(scenes.values()), network)
    inputs = {i: scene_input(s, network.bands, common_grid([s], network.bands), mask) for i, s in scenes.items()}
    surveys = {i: dask.delayed(survey_scene)(entry, mask, ref) for i, entry in inputs.items()}
    levels = [dask.delayed(_levels)(surveys[p.before.id], surveys[p.after.id], ref) for p in pairs]
    halo = _halo(network, mask, inputs.values())
    haloed, base = _with_halo(cube, lead, network, halo)
    probability = da.map_blocks(
        _infer_pair,
        haloed[[before for before, _ in positions]],
        haloed[[after for _, after in positions]],
        ids=[(pair.before.id, pair.after.id) for pair in pairs],
        inputs=inputs,
        levels=levels,
        mask=mask,
        ref=ref,
        bands=tuple(str(b) for b in cube.band.values),
        halo=halo,
        dtype=np.float32,
        drop_axis=1,
        chunks=((1,) * len(pairs), *base),
        meta=np.empty((0, 0, 0), np.float32),
    )
    return _labelled(probability[:, lead[0] :, lead[1] :], pairs, grid, cube, ref, mask)


def _levels(before: Survey, after: Survey, ref: ModelRef) -> Levels:
    return Levels.of(before, after, ref.load())


class Work(NamedTuple):
    """What all chunks of a unit of work share: it goes to a worker once, not with each."""

    series: Series
    tiling: Tiling
    mask: Mask
    ref: ModelRef
    finish: Finish
    reasons: bool


class Block(NamedTuple):
    """One chunk of several pairs of one field of view.

    parts   what was made of the codes of each pair
    shifts  of each pair, in the chunk in the middle of the tile; None in others
    """

    parts: tuple[Any, ...]
    shifts: tuple[Shift, ...] | None


def change_blocks(
    pairs: Sequence[Pair],
    levels: Sequence[Levels],
    ref: ModelRef,
    mask: Mask,
    chunk: int,
    finish: Finish,
    *,
    reasons: bool = False,
    workers: int = 1,
) -> tuple[dict[Key, Any], list[list[Key]], dict[Key, int]]:
    """Return a graph for several pairs of one field of view, its chunks, and which of the `workers` has each.

    `levels` has an entry for each pair. `finish` gets the codes of a pair in a chunk, uint16 (y, x) as `s2cd.codes`
    defines them, and the row and column of their first pixel.

    The keys of chunks lie in rows, as the chunks of `chunk` pixels along y and x do; each stands for a `Block` of all
    pairs. A worker reads each source block once, row by row. All wait for one short task: Dask starts what becomes
    ready at once by priority, but what it is given at once in any order, and blocks at the borders of a chunk far from
    the others are kept until these arrive there. With `reasons` the codes tell which date does not show a pixel. Tasks
    fail with ReadError or GridError where a source does.
    """
    network = replace(ref, device="cpu").load()  # the workers' device need not be here
    dates = {
        scene.id: (scene, statistics)
        for pair, level in zip(pairs, levels, strict=True)
        for scene, statistics in zip((pair.before, pair.after), level.statistics, strict=True)
    }
    ordered = sorted(dates.values(), key=lambda date: (date[0].time, date[0].id))
    grid = common_grid([scene for scene, _ in ordered], network.bands)
    order = {scene.id: index for index, (scene, _) in enumerate(ordered)}
    series = Series(
        dates=tuple(scene_input(scene, network.bands, grid, mask) for scene, _ in ordered),
        statistics=tuple(statistics for _, statistics in ordered),
        pairs=tuple((order[p.before.id], order[p.after.id]) for p in pairs),
        backgrounds=tuple(level.background for level in levels),
    )
    tiling = Tiling(grid.shape, chunk, _halo(network, mask, series.dates), network.stride, workers)
    number, (rows, cols) = uuid4().hex, tiling.blocks
    shared = ("unit_of_work", number)
    # The scheduler keeps a record of every first part of a key for good: the same for all units, or its memory grows.
    keys: list[list[Key]] = [[("infer_block", number, row, col) for col in range(cols)] for row in range(rows)]
    graph: dict[Key, Any] = {shared: (partial(Work, series, tiling, mask, ref, finish, reasons),)}
    graph |= {keys[row][col]: (_infer_block, shared, row, col) for row in range(rows) for col in range(cols)}
    return graph, keys, {keys[row][col]: tiling.turn(row, col) for row in range(rows) for col in range(cols)}


def encode_series(
    model: Model, images: Iterable[Image], pairs: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, EncodedDate, EncodedDate]]:
    """Yield (position in `pairs`, earlier date, later date), encoded, as the dates come in.

    images  pixels, affine and valid of each date, in order, as `Model.encode` takes them
    pairs   positions (before, after) of the dates, before < after

    Each date is encoded once; its features are kept until its last pair is done.
    """
    last_use = {date: max(pair[1] for pair in pairs if date in pair) for pair in pairs for date in pair}
    kept: dict[int, EncodedDate] = {}
    for date, image in enumerate(images):
        kept[date] = model.encode(*image)
        for position, (before, after) in enumerate(pairs):
            if after == date:
                yield position, kept[before], kept[after]
        kept = {d: encoded for d, encoded in kept.items() if last_use[d] > date}


def _infer_block(work: Work, row: int, col: int) -> Block:
    series, tiling, mask, ref, finish, reasons = work
    model, tiling = ref.load(), replace(tiling, worker=tiling.turn(row, col))
    window, core = tiling.read(row, col), tiling.core(row, col)
    rows, cols = (slice(c.start - w.start, c.stop - w.start) for c, w in zip(core, window, strict=True))
    inner = rows, cols
    views: list[_View] = []

    def images() -> Iterator[Image]:
        read = _read_dates(series.dates, window, tiling, model)
        for date, statistics, (pixels, classes) in zip(series.dates, series.statistics, read, strict=True):
            image = _image(model, date, statistics, mask, pixels, classes)
            if (row, col) == tiling.middle:
                views.append(_view(image[0], image[2], model.bands))
            yield image

    parts: dict[int, Any] = {}
    try:
        with current(model.device):
            for position, before, after in encode_series(model, images(), series.pairs):
                background = series.backgrounds[position]
                codes = model.decode_codes(before, after, background, inner, reasons=reasons)
                parts[position] = finish(codes, (core[0].start, core[1].start))
                del before, after, codes  # or the first would live on while the next date is encoded
    except RuntimeError as error:
        if failed(model.device):
            give_up(error)
        raise
    return Block(
        tuple(parts[position] for position in range(len(series.pairs))),
        _shifts(views, series.pairs) if views else None,
    )


_View = tuple[np.ndarray, np.ndarray]
"""Pixels (y, x) of the band that displacement is measured in, and which of them are valid observations."""


def _view(pixels: Planes, valid: np.ndarray, bands: Sequence[str]) -> _View:
    """Keep the middle of a chunk, in the band that displacement is measured in, until the next date comes."""
    middle = tuple(middle_span(size) for size in valid.shape)
    return to_host(pixels[bands.index(shift_band(bands))][middle]).copy(), to_host(valid[middle]).copy()


def _shifts(views: Sequence[_View], pairs: Sequence[tuple[int, int]]) -> tuple[Shift, ...]:
    return tuple(phase_shift(views[a][0], views[b][0], views[a][1] & views[b][1]) for a, b in pairs)


def _read_dates(
    dates: Sequence[SceneInput], window: tuple[slice, slice], tiling: Tiling, model: Model
) -> Iterator[_Read]:
    """Yield what a chunk needs of each date: onto a GPU where that is possible, else into the host's memory."""
    for number, there in enumerate(read_dates(dates, window, tiling, model.fine, model.device)):
        if there is None:
            yield from _read_on_host(dates[number:], window, tiling, model.fine)
            return
        yield there


def _read_on_host(
    dates: Sequence[SceneInput], window: tuple[slice, slice], tiling: Tiling, fine: int
) -> Iterator[_Read]:
    """Yield what a chunk needs of each date; from an archive the next date while the network works on this one."""
    read = partial(_read_date, window=window, tiling=tiling, fine=fine)
    return map(read, dates) if all(map(_is_local, dates)) else _ahead(read, dates)


def _is_local(date: SceneInput) -> bool:
    return all(is_local(href) for source in date.sources for href in source.hrefs)


def _ahead(read: Callable[[SceneInput], _Read], dates: Sequence[SceneInput]) -> Iterator[_Read]:
    following = [_READERS.submit(read, dates[0])]
    try:
        for date in (*dates[1:], None):
            now = following.pop().result()
            if date is not None:
                following.append(_READERS.submit(read, date))
            yield now
    finally:
        wait(following)  # else it would claim blocks for a task that has failed


def _read_date(date: SceneInput, window: tuple[slice, slice], tiling: Tiling, fine: int) -> _Read:
    """Read all that a chunk needs of a date; bands after the first `fine`, and classes, stay at 20 m."""
    if date.classes is None:  # the spectral test looks at each pixel of 10 m
        return read_bands(date.sources, date.grid, window, tiling, fine=len(date.sources)), None
    *pixels, classes = read_bands((*date.sources, date.classes), date.grid, window, tiling, fine=fine)
    return pixels, classes


def _image(
    model: Model,
    date: SceneInput,
    statistics: np.ndarray,
    mask: Mask,
    pixels: Planes,
    classes: np.ndarray | None,
) -> Image:
    valid = with_memory(lambda: observed(pixels, classes, date, mask))
    affine = model.affine(statistics, np.array(date.scale, np.float32), np.array(date.offset, np.float32))
    return pixels, affine, valid


def _infer_pair(
    before: np.ndarray,
    after: np.ndarray,
    *,
    ids: list[tuple[str, str]],
    inputs: dict[str, SceneInput],
    levels: list[Levels],
    mask: Mask,
    ref: ModelRef,
    bands: tuple[str, ...],
    halo: int,
    block_info: dict[Any, Any] | None = None,
) -> np.ndarray:
    if not block_info:  # Dask asks for the meta
        return np.empty((0, 0, 0), np.float32)
    model = ref.load()
    images = []
    position = block_info[None]["chunk-location"][0]
    level = levels[position]
    blocks = (before, after) if model.device.type == "cuda" else (to_host(before), to_host(after))
    for scene_id, statistics, block in zip(ids[position], level.statistics, blocks, strict=True):
        pixels = block[0][[bands.index(b) for b in model.bands]]
        date = inputs[scene_id]
        classes = block[0][bands.index(mask.band)] if date.classes and mask.band in bands else None
        images.append(_image(model, date, statistics, mask, pixels, classes))
    ((_, earlier, later),) = encode_series(model, images, [(0, 1)])
    probability = model.decode(earlier, later, level.background)
    location, counts = block_info[0]["chunk-location"][2:], block_info[0]["num-chunks"][2:]
    inner = tuple(
        slice(halo if i else 0, size - halo if i < n - 1 else size)
        for i, n, size in zip(location, counts, probability.shape, strict=True)
    )
    return probability[inner][None]


def _halo(model: Model, mask: Mask, dates: Iterable[SceneInput]) -> int:
    """Pixels around a chunk that its result depends on: of the network, and of the mask that its input depends on."""
    reach = model.reach + (mask.dilation if all(date.classes is not None for date in dates) else mask.reach)
    return -(-reach // model.stride) * model.stride


def _with_halo(
    cube: xr.DataArray, lead: tuple[int, int], model: Model, halo: int
) -> tuple[da.Array, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the cube's array after `lead` rows and columns without observation, with overlapping chunks, and these."""
    array = cube.data if isinstance(cube.data, da.Array) else da.from_array(cube.data, chunks=-1)
    if any(lead):
        array = da.pad(array, ((0, 0), (0, 0), *((n, 0) for n in lead)), constant_values=cube.attrs.get("nodata", 0))
    spatial = [
        _aligned_chunks(size, max(chunks), model.stride, halo)
        for size, chunks in zip(array.shape[2:], array.chunks[2:], strict=True)
    ]
    array = array.rechunk((1, -1, *spatial))
    depth = {0: 0, 1: 0} | {axis + 2: halo if len(chunks) > 1 else 0 for axis, chunks in enumerate(spatial)}
    return overlap(array, depth=depth, boundary="none"), (spatial[0], spatial[1])


def _aligned_chunks(size: int, wish: int, stride: int, halo: int) -> tuple[int, ...]:
    """Cut `size` pixels into chunks of about `wish`, multiples of `stride`, none smaller than the halo."""
    chunk = max(-(-wish // stride), -(-halo // stride)) * stride
    sizes = [chunk] * (size // chunk)
    rest = size - sum(sizes)
    if rest and sizes and rest < halo:
        sizes[-1] += rest
    elif rest:
        sizes.append(rest)
    return tuple(sizes)


def _checked(cube: xr.DataArray) -> xr.DataArray:
    """Return the cube with its axes in order; raise ConfigError for one that `open_cube` cannot have made."""
    axes = ("time", "band", "y", "x")
    if set(cube.dims) != set(axes) or not {*axes, "id"} <= set(cube.coords):
        raise ConfigError(
            f"cube: found dimensions {cube.dims} and coordinates {', '.join(map(str, cube.coords))}, expected {axes} "
            "and id as open_cube gives them"
        )
    if cube.dtype.kind not in "iu":
        raise ConfigError(
            f"cube: found {cube.dtype}, expected the digital numbers of open_cube (uint16): scale and "
            "offset are applied here"
        )
    return cube.transpose(*axes)


def _require_bands(cube: xr.DataArray, bands: Sequence[str]) -> None:
    missing = [b for b in bands if b not in cube.band.values]
    if missing:
        raise ConfigError(f"model and mask need the bands {', '.join(bands)}, the cube lacks {', '.join(missing)}")


def _require_whole_dates(cube: xr.DataArray, scenes: Iterable[Scene]) -> None:
    """Make sure that the cube holds the same halves of a split datatake as the pairs: they are one date there."""
    found = dict(zip(cube["id"].values, cube["parts"].values, strict=True)) if "parts" in cube.coords else {}
    for scene in scenes:
        parts, expected = found.get(scene.id, ""), parts_of(scene)
        if parts != expected:
            raise ConfigError(
                f"{scene.id}: found {parts or 'no other half'} in the cube, expected {expected or 'none'}, since pairs "
                "join the halves of a split datatake: open the cube of the pairs' scenes, open_cube(pairs.scenes)"
            )


def _positions(cube: xr.DataArray, pair: Pair) -> tuple[int, int]:
    ids = list(cube["id"].values)
    try:
        return ids.index(pair.before.id), ids.index(pair.after.id)
    except ValueError:
        raise ConfigError(
            f"pair {pair.name} needs {pair.before.id} and {pair.after.id}, the cube holds {len(ids)} other dates"
        ) from None


def _part_of_tile(cube: xr.DataArray, scenes: Sequence[Scene], model: Model) -> tuple[Grid, tuple[int, int]]:
    """Return the cube's grid, a part of its tile's, and how far before it pixels of the coarsest scale begin.

    The network puts 16 x 16 pixels of a tile together at that scale: in a part that begins between them it would put
    others together, and give something else.
    """
    grid, whole = cube_grid(cube), common_grid(scenes, model.bands)
    if reason := model.misfit(abs(whole.transform[0])):
        raise GridError(f"{scenes[0].id} {reason} by {model.name}")
    found, expected = ((g.transform[0], g.transform[4]) for g in (grid, whole))
    if any(abs(a - b) > 1e-6 * abs(b) for a, b in zip(found, expected, strict=True)):
        raise GridError(
            f"the cube has a pixel every {found[0]:g}, {found[1]:g}, expected {expected[0]:g}, {expected[1]:g}"
        )
    starts = {
        axis: (grid.transform[origin] - whole.transform[origin]) / whole.transform[step]
        for axis, (origin, step) in {"row": (5, 4), "column": (2, 0)}.items()
    }
    for axis, start in starts.items():
        if abs(start - round(start)) > 0.01:
            raise GridError(f"the cube starts at {axis} {start:g} of its tile, expected a whole number")
    top, left = (round(start) % model.stride for start in starts.values())
    return grid, (top, left)


def _labelled(
    probability: da.Array, pairs: Sequence[Pair], grid: Grid, cube: xr.DataArray, ref: ModelRef, mask: Mask
) -> xr.DataArray:
    result = xr.DataArray(
        probability,
        dims=("pair", "y", "x"),
        coords={
            "pair": [pair.name for pair in pairs],
            "before": ("pair", [np.datetime64(p.before.time.replace(tzinfo=None), "ns") for p in pairs]),
            "after": ("pair", [np.datetime64(p.after.time.replace(tzinfo=None), "ns") for p in pairs]),
            "y": cube.y,
            "x": cube.x,
        },
        name="change_probability",
        attrs={"pairs": {pair.name: pair for pair in pairs}, "model": ref, "mask": mask, "units": "1"},
    )
    return result.rio.write_crs(grid.epsg).rio.write_transform(Affine(*grid.transform))
