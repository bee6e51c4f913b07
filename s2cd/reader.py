"""The one place that opens source rasters: windows on the cube's grid, each source block decoded once.

A task reads its chunk and a halo around it. The halo lies in source blocks that the neighbouring chunks need too, so
decoded blocks at chunk borders stay in `BlockCache` until every chunk that overlaps them has had them.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import rasterio
from rasterio.windows import Window

from s2cd.apart import Rooms
from s2cd.blocks import packing
from s2cd.catalog import access
from s2cd.catalog.bands import BANDS
from s2cd.catalog.scene import Asset, Grid, Scene
from s2cd.errors import ConfigError, GridError, ReadError

SPECTRAL = frozenset(band.common_name for band in BANDS)
SOURCE_BLOCK = 1024  # pixels along a side of a block, as most archives have them
Result = TypeVar("Result")
_Finish = Callable[[], np.ndarray]
Readers = Callable[[slice, slice], int]
"""Counts the chunks that read something of the pixels (rows, cols) of a raster."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where one band of one acquisition is read from: all that a task needs to know of it.

    `hrefs` has more than one entry for a split datatake: later ones fill what earlier ones do not cover.
    """

    band: str
    hrefs: tuple[str, ...]
    provider: str
    nodata: int = 0


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a grid is cut into chunks of `chunk` pixels, each read with `halo` pixels around it.

    The first of an axis is half a source block shorter where all borders would lie on those of source blocks, if that
    takes no more chunks: else two rows of blocks at each border are kept for the chunks on its other side, not one.

    `shape`, `chunk` and `halo` are in pixels of the cube's grid; so is `stride`, of which all borders are multiples if
    `chunk` is. `work` names the unit of work whose chunks share decoded blocks: what another one left behind may be of
    a file that was written anew since. Where several `workers` have a run of its chunks each, only those of one run
    share blocks: those of `worker`, from 0.
    """

    shape: tuple[int, int]
    chunk: int
    halo: int
    stride: int = 1
    workers: int = 1
    worker: int = 0
    work: str = field(default_factory=lambda: uuid4().hex, compare=False)

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of chunks along y and x."""
        return self._index(0, self.shape[0] - 1) + 1, self._index(1, self.shape[1] - 1) + 1

    @property
    def middle(self) -> tuple[int, int]:
        """The chunk that has the middle of the grid."""
        return self._index(0, self.shape[0] // 2), self._index(1, self.shape[1] // 2)

    def core(self, row: int, col: int) -> tuple[slice, slice]:
        """Pixels of chunk (row, col), without halo."""
        return self._span(0, row, 0), self._span(1, col, 0)

    def read(self, row: int, col: int) -> tuple[slice, slice]:
        """Pixels of chunk (row, col), with its halo, cut at the edges of the grid."""
        return self._span(0, row, self.halo), self._span(1, col, self.halo)

    def turn(self, row: int, col: int) -> int:
        """Return which of the workers has chunk (row, col).

        Each has a run of neighbours, row by row, since these share blocks; all runs have about as many pixels.
        """
        (top, bottom), (left, right) = ((s.start, s.stop) for s in self.core(row, col))
        before = top * self.shape[1] + (bottom - top) * (left + right) / 2  # up to the middle of the chunk
        return int(before * self.workers / math.prod(self.shape))

    def readers(self, rows: slice, cols: slice) -> int:
        """How many chunks of the worker's run read something of the pixels [rows, cols)."""
        down, across = self._readers(0, rows), self._readers(1, cols)
        if self.workers == 1:
            return len(down) * len(across)
        return sum(self.turn(row, col) == self.worker for row in down for col in across)

    def _readers(self, axis: int, span: slice) -> range:
        """Return which chunks along an axis read something of its pixels `span`."""
        first, last = max(span.start - self.halo, 0), min(span.stop + self.halo, self.shape[axis]) - 1
        return range(self._index(axis, first), self._index(axis, last) + 1)

    def _span(self, axis: int, index: int, halo: int) -> slice:
        start = index * self.chunk - self._lead(axis)
        stop = start + self.chunk
        return slice(max(0, start - halo), min(stop + halo, self.shape[axis]))

    def _index(self, axis: int, pixel: int) -> int:
        """Return which chunk has a pixel."""
        return (pixel + self._lead(axis)) // self.chunk

    def _lead(self, axis: int) -> int:
        """Return by how much the first chunk is shorter."""
        half, size = SOURCE_BLOCK // 2, self.shape[axis]
        no_more = math.ceil((size + half) / self.chunk) == math.ceil(size / self.chunk)
        return half if self.chunk % SOURCE_BLOCK == 0 and half % self.stride == 0 and no_more else 0


def band_source(scene: Scene, band: str) -> Source:
    """Return where `band` of `scene` is read from. Raises ConfigError if the scene does not offer it."""
    assets = [require_asset(piece, band) for piece in (scene, *scene.parts)]
    return Source(band, tuple(a.href for a in assets), scene.provider, assets[0].nodata)


def require_asset(scene: Scene, band: str) -> Asset:
    """Return the asset of `band`. Raises ConfigError naming the scene and what it offers."""
    try:
        return scene.assets[band]
    except KeyError:
        offered = ", ".join(sorted(scene.assets))
        raise ConfigError(f"scene {scene.id} offers no band {band!r}, only {offered}") from None


def read_window(source: Source, grid: Grid, window: tuple[slice, slice], tiling: Tiling | None = None) -> np.ndarray:
    """Read a window of one band on the cube's grid.

    Bands of a coarser grid are replicated (nearest neighbour, exact). With `tiling` the blocks that other chunks
    need as well are kept for them.

    Returns an array (y, x) of the file's dtype. Raises ReadError if the asset cannot be read or has another nodata than
    `source` tells, and GridError if its grid is not the cube's grid or a whole-number coarsening of it.
    """
    return _start(source, grid, window, tiling)()


def read_bands(
    sources: Sequence[Source], grid: Grid, window: tuple[slice, slice], tiling: Tiling, *, fine: int
) -> list[np.ndarray]:
    """Read a window of several bands, as `read_window` does each; returns an array (y, x) for each source.

    Those after the first `fine` are left at 20 m where the files are. Blocks that another chunk is decoding are waited
    for last, when all others are there.
    """
    remote = not all(access.is_local(source.hrefs[0]) for source in sources)
    starts = [partial(_start, s, grid, window, tiling, native=n >= fine) for n, s in enumerate(sources)]
    finish, errors = at_once(starts, remote=remote)
    if errors:
        for complete in finish:  # so that nothing is kept for this chunk
            with contextlib.suppress(Exception):
                complete()
        raise errors[0]
    return [complete() for complete in finish]


def at_once(calls: Sequence[Callable[[], Result]], *, remote: bool) -> tuple[list[Result], list[Exception]]:
    """Return what calls that read files give, and what they raise.

    Those of remote files are made side by side, since it is the way to the archive that takes time; in turn, the
    others stop at the first error.
    """
    waiting = [_FETCHERS.submit(call).result for call in calls] if remote else calls
    results: list[Result] = []
    errors: list[Exception] = []
    for call in waiting:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)
            if not remote:
                break
    return results, errors


_FETCHERS = ThreadPoolExecutor(128, "s2cd-fetch")


def read_overviews(sources: Sequence[Source], grid: Grid, factor: int) -> list[np.ndarray]:
    """Read several bands, as `read_overview` does each."""
    remote = not all(access.is_local(source.hrefs[0]) for source in sources)
    found, errors = at_once([partial(read_overview, source, grid, factor) for source in sources], remote=remote)
    if errors:
        raise errors[0]
    return found


def read_overview(source: Source, grid: Grid, factor: int) -> np.ndarray:
    """Read one band decimated by `factor` against the cube's grid, from overviews where the file has them.

    Returns an array of shape ceil(shape / factor). Raises ReadError and GridError as `read_window` does.
    """
    shape = (math.ceil(grid.shape[0] / factor), math.ceil(grid.shape[1] / factor))

    def read_one(href: str) -> np.ndarray:
        def read(dataset: rasterio.DatasetReader) -> np.ndarray:
            coarsening(dataset, grid, href)
            _require_nodata(dataset, source, href)
            return dataset.read(1, out_shape=shape)

        return _with_dataset(href, source.provider, read)

    result = read_one(source.hrefs[0])
    for href in source.hrefs[1:]:
        np.copyto(result, read_one(href), where=result == source.nodata)
    return result


def _start(
    source: Source, grid: Grid, window: tuple[slice, slice], tiling: Tiling | None, *, native: bool = False
) -> _Finish:
    """Decode what `read_window` has to; what this returns waits for the rest and gives the pixels.

    With `native` those of a 20 m band on a 10 m grid stay as they are.
    """
    finish = _start_one(source.hrefs[0], source, grid, window, tiling, native=native)

    def complete() -> np.ndarray:
        result = finish()
        for href in source.hrefs[1:]:
            empty = result == source.nodata
            if not empty.any():
                break
            # Kept for nobody: which chunks need a later piece only its pixels tell.
            other = _start_one(href, source, grid, window, None, native=native)()
            np.copyto(result, other, where=empty)
        return result

    return complete


def _start_one(
    href: str,
    source: Source,
    grid: Grid,
    window: tuple[slice, slice],
    tiling: Tiling | None,
    *,
    native: bool,
) -> _Finish:
    def start(dataset: rasterio.DatasetReader) -> _Finish:
        factor = coarsening(dataset, grid, href)
        _require_nodata(dataset, source, href)
        rows, cols = (  # a coarse grid may end before the first pixel: its last one serves then
            slice(min(s.start // factor, size - 1), min(math.ceil(s.stop / factor), size))
            for s, size in zip(window, dataset.shape, strict=True)
        )
        finish = _start_blocks(href, dataset, rows, cols, tiling, factor)
        if native and factor == 2 and not any(s.start % 2 for s in window):
            return lambda: _filled(finish(), tuple(-(-(s.stop - s.start) // 2) for s in window))
        return lambda: _replicate(finish(), factor, window)

    finish = _with_dataset(href, source.provider, start)

    def complete() -> np.ndarray:
        try:
            return finish()
        except NeighbourFailed:  # whatever the reason was, this chunk now meets it itself, or does not
            return _with_dataset(href, source.provider, lambda dataset: start(dataset)())

    return complete


def _start_blocks(
    href: str, dataset: rasterio.DatasetReader, rows: slice, cols: slice, tiling: Tiling | None, factor: int
) -> _Finish:
    if tiling is not None:
        return BLOCKS.start((tiling.work, href), dataset, rows, cols, counter(tiling, factor))
    data = _decode(dataset, rows, cols)
    return lambda: data


def counter(tiling: Tiling, factor: int) -> Readers:
    """Return what counts the chunks that read pixels of a raster `factor` times as coarse as the grid."""

    def readers(rows: slice, cols: slice) -> int:
        fine = (
            slice(s.start * factor, min(s.stop * factor, size))
            for s, size in zip((rows, cols), tiling.shape, strict=True)
        )
        return tiling.readers(*fine)

    return readers


def _replicate(data: np.ndarray, factor: int, window: tuple[slice, slice]) -> np.ndarray:
    rows, cols = window
    if factor > 1:
        data = np.repeat(np.repeat(data, factor, axis=1), factor, axis=0)
        top, left = rows.start % factor, cols.start % factor
        data = data[top : top + rows.stop - rows.start, left : left + cols.stop - cols.start]
    return _filled(data, tuple(s.stop - s.start for s in window))


def _filled(data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Repeat the last row and column where a coarse grid ends before the fine one."""
    short = [(0, n - found) for n, found in zip(shape, data.shape, strict=True)]
    return np.pad(data, short, mode="edge") if any(n for _, n in short) else data


def _with_dataset(href: str, provider: str, read: Callable[[rasterio.DatasetReader], Result]) -> Result:
    def attempt() -> Result:
        with access.open_dataset(provider, href) as dataset:
            return read(dataset)

    return access.with_retries(attempt, href)


def coarsening(dataset: rasterio.DatasetReader, grid: Grid, href: str) -> int:
    """How many pixels of the grid one pixel of the dataset spans, after asserting that the two fit."""
    found, expected = dataset.transform, grid.transform
    factor = max(1, round(found.a / expected[0]))
    # A coarse grid over an odd number of fine pixels may be rounded down, and may end exactly where they do.
    excess = [n * factor - fine for n, fine in zip(dataset.shape, grid.shape, strict=True)]
    fits = (
        max(abs(n) for n in excess) < factor
        and found.b == found.d == expected[1] == expected[3] == 0
        and abs(found.c - expected[2]) < 0.01 * abs(expected[0])
        and abs(found.f - expected[5]) < 0.01 * abs(expected[4])
        and abs(found.a / expected[0] - factor) * dataset.width < 0.01 + abs(excess[1])
        and abs(found.e / expected[4] - factor) * dataset.height < 0.01 + abs(excess[0])
        and dataset.crs == rasterio.crs.CRS.from_epsg(grid.epsg)
    )
    if not fits:
        raise GridError(
            f"{href}: file has {dataset.crs} {tuple(found)[:6]} {dataset.shape}, "
            f"expected EPSG:{grid.epsg} {grid.transform} {grid.shape} or a whole-number coarsening of it",
            href,
        )
    return factor


def _require_nodata(dataset: rasterio.DatasetReader, source: Source, href: str) -> None:
    """Raise ReadError where a file tells another number that means no observation than the item of its scene."""
    found = dataset.nodata
    if found is not None and math.isfinite(found) and found != source.nodata and source.band in SPECTRAL:
        raise ReadError(href, f"has nodata {found:g}, but its item {source.nodata}; expected the same of both")


def _decode(dataset: rasterio.DatasetReader, rows: slice, cols: slice) -> np.ndarray:
    access.prefetch(dataset, (rows, cols))
    data = dataset.read(1, window=Window.from_slices(rows, cols))
    COUNTS.add(data.nbytes)
    return data


def decoded(dataset: rasterio.DatasetReader, layout: Layout, blocks: set[Block]) -> Iterator[tuple[Block, np.ndarray]]:
    """Yield the pixels of blocks, each in memory of its own (`s2cd.apart`)."""
    kind = packing(dataset)
    for corners in rectangles(blocks):
        members = list(within(*corners))
        packed = access.packed_blocks(dataset, members) if kind else None
        if kind is None or packed is None:
            span = layout.union(*corners)
            whole = _decode(dataset, *span)
            yield from ((block, ROOMS.copy(_cut(whole, span, layout.spans(block)))) for block in members)
            continue
        for block, data in zip(members, packed, strict=True):
            rows, cols = layout.spans(block)
            pixels = ROOMS.empty((rows.stop - rows.start, cols.stop - cols.start), kind.dtype)
            kind.unpack(data, pixels)
            COUNTS.add(pixels.nbytes)
            yield block, pixels


@dataclass
class Counts:
    """Bytes of pixels decoded by this process (uncompressed), for the benchmark and the read-once test."""

    decoded: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, nbytes: int) -> None:
        """Count `nbytes` more."""
        with self._lock:
            self.decoded += nbytes


COUNTS = Counts()


@dataclass
class Entry:
    """A block that more than one chunk reads: its pixels once decoded, how many chunks still want it, its last use."""

    pixels: Future[Any]
    wanted: int
    used: float = field(default_factory=time.monotonic)

    def result(self) -> Any:
        """Wait for the pixels. Raises NeighbourFailed if who was to decode them could not."""
        failure = self.pixels.exception()
        if failure is not None:
            raise NeighbourFailed(str(failure)) from failure
        return self.pixels.result()


Block = tuple[int, int]
File = tuple[str, str]
"""The unit of work that reads a file, and its address."""


class NeighbourFailed(Exception):
    """Another chunk was to decode a block that this one waits for, and could not."""


class BlockCache:
    """Decoded source blocks at chunk borders, shared by the threads of one process.

    A block is decoded by the first chunk of a unit of work that needs it, while others wait for it, and dropped when
    the last one has had it. `max_bytes` bounds what a lost neighbour would leave behind: the oldest go first and are
    read again; `drop` forgets what waits in vain, for a neighbour on another worker or of a run that was broken off.
    """

    def __init__(self, max_bytes: int = 3 << 30):
        self.max_bytes = max_bytes
        self._entries: OrderedDict[tuple[File, int, int], Entry] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def start(
        self,
        file: File,
        dataset: rasterio.DatasetReader,
        rows: slice,
        cols: slice,
        readers: Readers,
    ) -> _Finish:
        """Read pixels [rows, cols) of `dataset`; `readers(rows, cols)` counts who reads something of such pixels.

        Decodes the blocks that nobody else has; what this returns waits for those that others decode.
        """
        layout = Layout(dataset.shape, dataset.block_shapes[0])
        blocks = list(layout.covering(rows, cols))
        wanted = layout.wanted(blocks, readers)
        out = np.empty((rows.stop - rows.start, cols.stop - cols.start), dataset.dtypes[0])
        mine, held = self.claim(file, blocks, wanted)
        try:
            for block, pixels in decoded(dataset, layout, set(mine)):
                paste(out, rows, cols, pixels, layout.spans(block))
                if (entry := mine[block]) is not None:
                    self.publish(entry, pixels)
        except BaseException as error:
            self.abandon(file, mine, error)
            raise

        def finish() -> np.ndarray:
            for block, entry in held.items():
                paste(out, rows, cols, entry.result(), layout.spans(block))
            self.release(file, {**mine, **held})
            return out

        return finish

    def claim(
        self, file: File, blocks: list[Block], wanted: dict[Block, int]
    ) -> tuple[dict[Block, Entry | None], dict[Block, Entry]]:
        """Split blocks into those this call decodes (with an entry if others want them) and those it gets."""
        mine: dict[Block, Entry | None] = {}
        held: dict[Block, Entry] = {}
        with self._lock:
            for block in blocks:
                entry = self._entries.get((file, *block))
                if entry is not None:
                    held[block], entry.used = entry, time.monotonic()
                elif wanted[block] > 1:
                    mine[block] = self._entries[(file, *block)] = Entry(Future(), wanted[block])
                else:
                    mine[block] = None
        return mine, held

    def publish(self, entry: Entry, pixels: Any) -> None:
        """Give others the pixels of a block that this call was to decode; they are kept for them."""
        with self._lock:
            self._bytes += pixels.nbytes
        entry.pixels.set_result(pixels)
        self._evict()

    def drop(self, idle: float) -> None:
        """Forget the blocks that nobody has asked for in so many seconds."""
        since = time.monotonic() - idle
        with self._lock:
            for key in [k for k, e in self._entries.items() if e.pixels.done() and e.used <= since]:
                self._forget(key)

    def _evict(self) -> None:
        with self._lock:
            while self._bytes > self.max_bytes:
                key = next((k for k, e in self._entries.items() if e.pixels.done()), None)
                if key is None:
                    return
                self._forget(key)

    def _forget(self, key: tuple[File, int, int]) -> None:
        self._bytes -= self._entries.pop(key).pixels.result().nbytes

    def abandon(self, file: File, mine: Mapping[Block, Entry | None], error: BaseException) -> None:
        """Tell who waits for the blocks of `mine` that they are not coming, and keep none of them."""
        with self._lock:
            for block, entry in mine.items():
                if entry is None:
                    continue
                if not entry.pixels.done():
                    self._entries.pop((file, *block), None)
                    entry.pixels.set_exception(error)
                elif self._entries.get((file, *block)) is entry:
                    self._forget((file, *block))

    def release(self, file: File, had: Mapping[Block, Entry | None]) -> None:
        """Count those that a chunk has had, and drop those that it was the last to want."""
        with self._lock:
            for block, entry in had.items():
                if entry is None:
                    continue
                entry.wanted -= 1
                if entry.wanted <= 0 and self._entries.get((file, *block)) is entry:
                    self._forget((file, *block))


@dataclass(frozen=True, slots=True)
class Layout:
    """The blocks of a raster of `shape`, each of `block` pixels."""

    shape: tuple[int, int]
    block: tuple[int, int]

    def span(self, axis: int, index: int) -> slice:
        """Return the pixels of the blocks `index` along an axis."""
        start = index * self.block[axis]
        return slice(start, min(start + self.block[axis], self.shape[axis]))

    def spans(self, block: Block) -> tuple[slice, slice]:
        """Return the pixels of a block."""
        return self.span(0, block[0]), self.span(1, block[1])

    def wanted(self, blocks: Sequence[Block], readers: Readers) -> dict[Block, int]:
        """Return how many chunks read each block, as `readers` counts them."""
        return {block: readers(*self.spans(block)) for block in blocks}

    def covering(self, rows: slice, cols: slice) -> Iterator[Block]:
        """Yield the blocks that have something of the pixels [rows, cols)."""
        for i in range(rows.start // self.block[0], math.ceil(rows.stop / self.block[0])):
            for j in range(cols.start // self.block[1], math.ceil(cols.stop / self.block[1])):
                yield i, j

    def union(self, first: Block, last: Block) -> tuple[slice, slice]:
        """Return the pixels of the blocks from `first` to `last`."""
        rows, cols = (slice(self.span(axis, first[axis]).start, self.span(axis, last[axis]).stop) for axis in (0, 1))
        return rows, cols


def rectangles(blocks: set[Block]) -> Iterator[tuple[Block, Block]]:
    """Cover a set of blocks with few disjoint rectangles, each given by its first and last block."""
    left = set(blocks)
    while left:
        i, j = min(left)
        width = 1
        while (i, j + width) in left:
            width += 1
        height = 1
        while all((i + height, j + k) in left for k in range(width)):
            height += 1
        left -= {(i + a, j + b) for a in range(height) for b in range(width)}
        yield (i, j), (i + height - 1, j + width - 1)


def within(first: Block, last: Block) -> Iterator[Block]:
    """Yield the blocks of a rectangle, row by row."""
    return ((i, j) for i in range(first[0], last[0] + 1) for j in range(first[1], last[1] + 1))


def paste(out: Any, rows: slice, cols: slice, data: Any, span: tuple[slice, slice]) -> None:
    """Copy what `data`, lying at `span`, has of the window (rows, cols) into `out`."""
    top, bottom = max(rows.start, span[0].start), min(rows.stop, span[0].stop)
    left, right = max(cols.start, span[1].start), min(cols.stop, span[1].stop)
    out[top - rows.start : bottom - rows.start, left - cols.start : right - cols.start] = data[
        top - span[0].start : bottom - span[0].start, left - span[1].start : right - span[1].start
    ]


def _cut(data: np.ndarray, span: tuple[slice, slice], part: tuple[slice, slice]) -> np.ndarray:
    """Return the `part` of pixels that lie at `span`."""
    rows, cols = (slice(p.start - s.start, p.stop - s.start) for p, s in zip(part, span, strict=True))
    return data[rows, cols]


ROOMS = Rooms()
"""Memory of the blocks that this process keeps."""
BLOCKS = BlockCache()
CACHES = [BLOCKS]
"""All that this process has: a GPU has one of its own."""


def drop_blocks(idle: float) -> None:
    """Forget the decoded blocks that nobody has asked for in so many seconds."""
    for cache in CACHES:
        cache.drop(idle)
