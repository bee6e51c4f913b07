"""Chunks read onto a GPU: bytes go there as they lie in the files, and pixels never leave it.

A GPU works on a full tile in a tenth of the time that a dozen cores take to decode it, and it inflates a thousand
blocks in little more than the time of one (`s2cd.inflate`). That is for local TIFFs with DEFLATE, as archives hold
them; other files, and damaged ones, are left to `s2cd.reader`, which also says what is wrong with them.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s2cd.addresses import local_path
from s2cd.blocks import packing
from s2cd.catalog import access
from s2cd.catalog.scene import Grid
from s2cd.inflate import (
    ALIGNED,
    CHECKSUM,
    HEADER,
    STAGED,
    DamageError,
    InflateError,
    OverrunError,
    Packed,
    adler32,
    inflater,
    nvcomp,
)
from s2cd.lost import give_up, given_up
from s2cd.model.device import current, failed
from s2cd.reader import (
    CACHES,
    COUNTS,
    Block,
    BlockCache,
    Entry,
    Layout,
    Source,
    Tiling,
    coarsening,
    counter,
    paste,
    rectangles,
    within,
)
from s2cd.survey import SceneInput

SHARE = 1 / 256  # of a GPU's memory for the pixels that a thread reads at once
KEPT = 1 / 16  # of it at most for blocks that other chunks need too
Pixels = tuple[list[Any], Any]
"""CuPy's arrays (y, x): one for each band, as `s2cd.reader.read_bands` gives them, and values of the mask band."""
Inflate = Callable[[Sequence[Packed], Callable[[Tensor, list[int]], Any]], Any]
"""What `s2cd.inflate.Inflater` is for a GPU."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class BlockFile:
    """Where the blocks of a TIFF lie, and what it says of its grid: `starts` and `lengths` are int64 (rows, cols)."""

    path: str
    shape: tuple[int, int]
    transform: Any
    crs: Any
    layout: Layout
    dtype: np.dtype[Any]
    predictor: bool
    starts: np.ndarray
    lengths: np.ndarray

    @property
    def height(self) -> int:
        """Rows."""
        return self.shape[0]

    @property
    def width(self) -> int:
        """Columns."""
        return self.shape[1]

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of a block's pixels."""
        return math.prod(self.layout.block) * self.dtype.itemsize

    @cached_property
    def kind(self) -> tuple[Any, ...]:
        """What blocks must have in common to be restored together."""
        return self.dtype.str, self.layout.block, self.predictor

    def packed(self, block: Block) -> Packed:
        """Return a block as it lies in the file; reading it raises InflateError where the file ends before it does."""
        start, length = int(self.starts[block]), int(self.lengths[block])

        def read(into: memoryview) -> None:
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = os.preadv(file, [into], start)
            finally:
                os.close(file)
            if found != length:
                raise InflateError(f"{self.path}: block {block} has {found} bytes, expected {length}")

        return Packed(length, read, self.block_bytes)


def block_file(path: str) -> BlockFile | None:
    """Return where the blocks of a local file lie; None for a kind of file that is not inflated on the GPU."""
    with _looking:  # many threads come for the same file at once
        return _block_file(path, access.file_edition(path))


_looking = threading.Lock()


@lru_cache(4096)
def _block_file(path: str, _edition: tuple[object, ...]) -> BlockFile | None:
    with access.OPEN_FILES.dataset(path) as dataset:
        kind = packing(dataset)
        layout = Layout(dataset.shape, dataset.block_shapes[0])
        short = layout.block[1] == dataset.width and dataset.height % layout.block[0]  # the last of several strips
        if kind is None or short:
            return None
        blocks = layout.covering(slice(0, dataset.height), slice(0, dataset.width))
        edges = tuple(math.ceil(n / b) for n, b in zip(dataset.shape, layout.block, strict=True))
        ranges = np.array([access.block_range(dataset, block) or (0, 0) for block in blocks], np.int64)
        starts, lengths = ranges[:, 0].reshape(edges), (ranges[:, 1] - ranges[:, 0]).reshape(edges)
        file = BlockFile(
            path, dataset.shape, dataset.transform, dataset.crs, layout, kind.dtype, kind.predictor, starts, lengths
        )
    with open(path, "rb") as stream:
        little = stream.read(2) == b"II" or file.dtype.itemsize == 1
    whole = lengths.min() > HEADER + CHECKSUM and starts.min() > 0  # else some blocks are left out
    small = max(lengths.max(), file.block_bytes) <= STAGED
    return file if little and whole and small and file.block_bytes % (4 * ALIGNED) == 0 else None


class DeviceReader:
    """Reads dates onto a GPU.

    inflating  lends what decompresses there
    blocks     decoded blocks that more than one chunk needs
    at_once    bytes of pixels that are read at once
    """

    def __init__(self, device: torch.device, inflating: Any, blocks: BlockCache, at_once: float):
        self._device, self._inflating, self.blocks, self._at_once = device, inflating, blocks, at_once

    def groups(
        self, dates: Sequence[SceneInput], window: tuple[slice, slice], fine: int
    ) -> Iterator[Sequence[SceneInput]]:
        """Yield the dates in groups that may be read at once."""
        pixels = math.prod(s.stop - s.start for s in window)
        each = pixels * 2 * (fine + (len(dates[0].sources) - fine + 1) / 4)
        most = max(1, int(self._at_once / each))
        for first in range(0, len(dates), most):
            yield dates[first : first + most]

    def read(
        self, dates: Sequence[SceneInput], window: tuple[slice, slice], tiling: Tiling, fine: int
    ) -> list[list[Tensor]] | None:
        """Return tensors (y, x) of what a chunk needs of some dates, the bands' and the classes'.

        Of whole numbers with a sign, whatever the files': torch does little with others. Bands after the first `fine`,
        and classes, stay at 20 m. None where that is not possible, or after an error, which reading on the host will
        meet and tell.
        """
        parts: list[list[_Part]] = []
        try:
            with self._inflating() as inflate:
                for date in dates:
                    found = _parts(date, window, tiling, fine)
                    if found is None:
                        return None
                    parts.append(found)
                every = [part for found in parts for part in found]
                for part in every:
                    part.claim(self.blocks)
                self._decode(every, inflate)
            # Only now, when no inflater is held: who decodes them may be waiting for one.
            return [[part.finish(self.blocks) for part in found] for found in parts]
        except BaseException as error:
            if isinstance(error, OverrunError) or failed(self._device):
                give_up(error)
            for part in itertools.chain(*parts):
                part.abandon(self.blocks, error)
            if not isinstance(error, Exception):
                raise
            _LOG.warning("a chunk is read on the host: %s", error)
            return None

    def _decode(self, parts: Sequence[_Part], inflate: Inflate) -> None:
        """Read, decompress and check the blocks that are not there yet, all at once."""
        ordered = sorted((part for part in parts if part.mine), key=lambda part: part.file.kind)
        if not ordered:
            return
        streams = [stream for part in ordered for stream in part.packed()]
        for entry, pixels in inflate(streams, partial(_placed, ordered)):
            self.blocks.publish(entry, pixels)


def _placed(parts: Sequence[_Part], flat: Tensor, checksums: Sequence[int]) -> list[tuple[Entry, Tensor]]:
    """Give each of the parts its blocks, which lie one after the other; return copies of those that others want."""
    kept: list[tuple[Entry, Tensor]] = []
    first = done = 0
    for _, group in itertools.groupby(parts, key=lambda part: part.file.kind):
        members = list(group)
        file, count = members[0].file, sum(len(part.mine) for part in members)
        pieces = flat[first : first + count * file.block_bytes].view(count, file.block_bytes)
        if adler32(pieces).tolist() != checksums[done : done + count]:
            raise DamageError(f"blocks of {file.path} or others read with it do not match their checksums")
        first, done = first + pieces.numel(), done + count
        pixels = _restored(pieces, file).split([len(part.mine) for part in members])
        for part, blocks in zip(members, pixels, strict=True):
            kept += part.take(blocks)
    return kept


def _restored(pieces: Tensor, file: BlockFile) -> Tensor:
    """Return the pixels (n, y, x) of blocks; predictor 2 of TIFF 6.0 stores differences along rows."""
    signed = {1: torch.int8, 2: torch.int16}[file.dtype.itemsize]
    values = pieces.view(signed).view(len(pieces), *file.layout.block)
    if file.predictor:
        torch.cumsum(values, 2, dtype=signed, out=values)  # sums wrap as the differences did
    return values


def _parts(date: SceneInput, window: tuple[slice, slice], tiling: Tiling, fine: int) -> list[_Part] | None:
    """Return the parts of files that a chunk needs of a date, None if one of them has to be read on the host."""
    if date.classes is None or any(s.start % 2 for s in window):
        return None
    parts = []
    for number, source in enumerate((*date.sources, date.classes)):
        file = _usable(source)
        if file is None:
            return None
        factor = _factor(file, date.grid)
        if factor != (1 if number < fine else 2):
            return None
        parts.append(_Part(file, factor, window, tiling))
    return parts


def _usable(source: Source) -> BlockFile | None:
    """Return the file of a source that is one local file; a split datatake has several."""
    (href, *others) = source.hrefs
    return None if others or not access.is_local(href) else block_file(local_path(href))


@lru_cache(4096)
def _factor(file: BlockFile, grid: Grid) -> int:
    return coarsening(file, grid, file.path)


class _Part:
    """A window of one file, from the blocks that this chunk decodes and those that others do."""

    def __init__(self, file: BlockFile, factor: int, window: tuple[slice, slice], tiling: Tiling):
        self.file, self._key = file, (tiling.work, file.path)
        self._rows, self._cols = (
            slice(s.start // factor, min(math.ceil(s.stop / factor), size))
            for s, size in zip(window, file.shape, strict=True)
        )
        self._shape = tuple(math.ceil((s.stop - s.start) / factor) for s in window)
        self._readers = counter(tiling, factor)
        self.mine: dict[Block, Entry | None] = {}
        self._rectangles: list[tuple[Block, Block]] = []
        self._held: dict[Block, Entry] = {}
        self._out: Tensor | None = None

    def claim(self, blocks: BlockCache) -> None:
        """Tell other chunks which blocks this one decodes."""
        layout = self.file.layout
        needed = list(layout.covering(self._rows, self._cols))
        self.mine, self._held = blocks.claim(self._key, needed, layout.wanted(needed, self._readers))
        self._rectangles = list(rectangles(set(self.mine)))

    def packed(self) -> Iterator[Packed]:
        """Yield the blocks that this chunk decodes, as they lie in the file, in the order that `take` expects."""
        return (self.file.packed(block) for rectangle in self._rectangles for block in within(*rectangle))

    def take(self, blocks: Tensor) -> Iterator[tuple[Entry, Tensor]]:
        """Take decoded blocks (n, y, x), and yield copies for others who want some of them."""
        layout, first = self.file.layout, 0
        # Few calls, each of many blocks: Python runs one thread at a time.
        for start, stop in self._rectangles:
            rows, cols = (b - a + 1 for a, b in zip(start, stop, strict=True))
            grid = blocks[first : first + rows * cols].view(rows, cols, *layout.block)
            first += rows * cols
            span = layout.union(start, stop)
            pixels = grid.transpose(1, 2).reshape(rows * layout.block[0], cols * layout.block[1])
            COUNTS.add(math.prod(s.stop - s.start for s in span) * self.file.dtype.itemsize)
            self._paste(pixels, span)
        for number, block in enumerate(block for pair in self._rectangles for block in within(*pair)):
            if (entry := self.mine[block]) is not None:
                yield entry, blocks[number].clone()

    def finish(self, blocks: BlockCache) -> Tensor:
        """Wait for the blocks of others and return the window."""
        if self._out is not None:
            _used_here(self._out)
        for block, entry in self._held.items():
            pixels = entry.result()
            _used_here(pixels)
            self._paste(pixels, self.file.layout.spans(block))
        self._release(blocks)
        assert self._out is not None
        rows, cols = self._rows.stop - self._rows.start, self._cols.stop - self._cols.start
        self._out[rows:] = self._out[rows - 1]  # a coarse grid may end before the fine one
        self._out[:, cols:] = self._out[:, cols - 1 : cols]
        return self._out

    def _paste(self, pixels: Tensor, span: tuple[slice, slice]) -> None:
        if self._out is None:
            self._out = pixels.new_empty(self._shape)
        paste(self._out, self._rows, self._cols, pixels, span)

    def abandon(self, blocks: BlockCache, error: BaseException) -> None:
        """Tell others that this chunk decodes nothing more."""
        blocks.abandon(self._key, self.mine, error)
        self._release(blocks)

    def _release(self, blocks: BlockCache) -> None:
        had = {block: entry for block, entry in {**self.mine, **self._held}.items() if entry and entry.pixels.done()}
        blocks.release(self._key, had)
        self.mine, self._held = {}, {}


def _used_here(tensor: Tensor) -> None:
    """Keep memory that was taken for another stream from it until this thread's has done with it."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


def read_dates(
    dates: Sequence[SceneInput], window: tuple[slice, slice], tiling: Tiling, fine: int, device: torch.device
) -> Iterator[Pixels | None]:
    """Yield what a chunk needs of each date as arrays on a GPU; None for the first that is to be read on the host.

    That is the first of all on CPUs, without CuPy and nvCOMP, for other kinds of files, and after an error.
    """
    arrays = _cupy() if device.type == "cuda" and nvcomp() is not None and not given_up() else None
    if arrays is None:
        yield None
        return
    reader = _reader(device)
    for group in reader.groups(dates, window, fine):
        found = reader.read(group, window, tiling, fine)
        if found is None:
            yield None
            return
        with current(device):
            there = [_arrays(planes, arrays) for planes in found]
        del found
        while there:
            yield there.pop(0)


def _arrays(planes: Sequence[Tensor], arrays: Any) -> Pixels:
    unsigned = {torch.int8: torch.uint8, torch.int16: torch.uint16}
    *bands, classes = (arrays.from_dlpack(plane.view(unsigned[plane.dtype])) for plane in planes)
    return bands, classes


def _cupy() -> Any:
    """Return CuPy, None where it is not installed."""
    try:
        import cupy
    except ImportError:
        return None
    return cupy


_readers: dict[torch.device, DeviceReader] = {}


def _reader(device: torch.device) -> DeviceReader:
    """Return the reader of all threads of this process."""
    with _looking:
        if device not in _readers:
            memory = torch.cuda.get_device_properties(device).total_memory
            blocks = BlockCache(int(memory * KEPT))
            CACHES.append(blocks)
            _readers[device] = DeviceReader(device, partial(inflater, device), blocks, memory * SHARE)
        return _readers[device]
