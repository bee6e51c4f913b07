"""Dates of a chunk read onto the GPU: bytes go there as they lie in the files, pixels never leave it.

A GPU works on a full tile in a tenth of the time that a dozen cores take to decode it. It inflates some hundred blocks
in the time of one (`s2cd.inflate`), so dates are read AT_ONCE. That is for local TIFFs with DEFLATE, as
archives hold them; other files, and damaged ones, are left to `s2cd.reader`, which also says what is wrong with them.

An experiment: on only where the environment variable S2CD_GPU_DECODE is 1 (docs/performance.md says what it gave).
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import rasterio
import torch
from torch import Tensor

from s2cd.catalog import access
from s2cd.catalog.scene import Grid
from s2cd.inflate import ALIGNED, InflateError, adler32, inflater, nvcomp, offsets
from s2cd.reader import COUNTS, BlockCache, Layout, Source, Tiling, coarsening, counter, filled, paste
from s2cd.survey import SceneInput

SWITCH = "S2CD_GPU_DECODE"
AT_ONCE = 2  # dates: with a dozen threads enough blocks for a GPU, and little pinned memory, which is slow to get
BLOCKS = BlockCache()
Block = tuple[int, int]
Pixels = tuple[list[Any], Any]
"""CuPy's arrays (y, x): one for each band, as `s2cd.reader.read_bands` gives them, and values of the mask band."""
_HEADER, _CHECKSUM = 2, 4  # bytes of zlib's format around a stream
_LOG = logging.getLogger(__name__)


class Inflate(Protocol):
    """What `s2cd.inflate.Inflater` is for a GPU."""

    def staging(self, size: int) -> Tensor:
        """Return host memory for compressed bytes."""

    def __call__(self, staged: Tensor, starts: Sequence[int], lengths: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Return what the streams hold."""


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

    def read(self, block: Block, into: memoryview) -> None:
        """Read a block as it lies in the file. Raises InflateError where the file ends before it does."""
        with open(self.path, "rb", buffering=0) as stream:
            found = os.preadv(stream.fileno(), [into], int(self.starts[block]))
        if found != len(into):
            raise InflateError(f"{self.path}: block {block} has {found} bytes, expected {len(into)}")

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's pixels."""
        return math.prod(self.layout.block) * self.dtype.itemsize


def block_file(path: str) -> BlockFile | None:
    """Return where the blocks of a local file lie; None for a kind of file that is not inflated on the GPU."""
    return _block_file(path, access.file_edition(path))


@lru_cache(4096)
def _block_file(path: str, _edition: tuple[object, ...]) -> BlockFile | None:
    with access.OPEN_FILES.dataset(path) as dataset:
        kind = dataset.tags(ns="IMAGE_STRUCTURE")
        (dtype,), (block,) = map(set, (dataset.dtypes, dataset.block_shapes))
        predictor = kind.get("PREDICTOR", "1")
        plain = dataset.driver == "GTiff" and dataset.count == 1 and kind.get("COMPRESSION") == "DEFLATE"
        if not plain or "NBITS" in kind or dtype not in {"uint8", "uint16"} or predictor not in {"1", "2"}:
            return None
        layout = Layout(dataset.shape, block)
        blocks = list(layout.covering(slice(0, dataset.height), slice(0, dataset.width)))
        found = [[_tag(dataset, what, *at) for at in blocks] for what in ("OFFSET", "SIZE")]
        edges = tuple(math.ceil(n / b) for n, b in zip(dataset.shape, block, strict=True))
        starts, lengths = (np.array(numbers, np.int64).reshape(edges) for numbers in found)
        file = BlockFile(
            path,
            dataset.shape,
            dataset.transform,
            dataset.crs,
            layout,
            np.dtype(dtype),
            predictor == "2",
            starts,
            lengths,
        )
    with open(path, "rb") as stream:
        little = stream.read(2) == b"II" or file.dtype.itemsize == 1
    whole = lengths.min() > _HEADER + _CHECKSUM and starts.min() > 0  # else some blocks are left out
    return file if little and whole and file.block_bytes % (4 * ALIGNED) == 0 else None


def _tag(dataset: rasterio.DatasetReader, what: str, row: int, col: int) -> int:
    return int(dataset.get_tag_item(f"BLOCK_{what}_{col}_{row}", "TIFF", bidx=1) or 0)


def read_dates(
    dates: Sequence[SceneInput], window: tuple[slice, slice], tiling: Tiling, fine: int, device: torch.device
) -> list[Pixels] | None:
    """Read what a chunk needs of some dates, as arrays on a GPU.

    None where that is not asked for or not possible: without CuPy and nvCOMP, for other kinds of files, or after an
    error, which reading on the host will meet and tell.
    """
    if device.type != "cuda" or os.environ.get(SWITCH) != "1":
        return None
    arrays = cupy()
    if arrays is None or nvcomp() is None:
        return None
    with arrays.cuda.Device(device.index or 0):
        return read_arrays(dates, window, tiling, fine, inflater(device), arrays)


def cupy() -> Any:
    """Return CuPy, None where it is not installed."""
    try:
        import cupy as module
    except ImportError:
        return None
    return module


def read_arrays(
    dates: Sequence[SceneInput], window: tuple[slice, slice], tiling: Tiling, fine: int, inflate: Inflate, arrays: Any
) -> list[Pixels] | None:
    """Do what `read_dates` does; `arrays` is the module, CuPy or NumPy, of what `inflate` gives tensors for."""
    parts: list[list[_Part]] = []
    try:
        for date in dates:
            found = _parts(date, window, tiling, fine)
            if found is None:
                return None
            parts.append(found)
        every = [part for found in parts for part in found]
        for part in every:
            part.claim(arrays)
        _decode(every, inflate, arrays)
        return [_pixels([part.finish() for part in found], date) for found, date in zip(parts, dates, strict=True)]
    except Exception as error:
        _LOG.warning("a chunk is read on the host: %s", error)
        for found in parts:
            for part in found:
                part.abandon(error)
        return None


def _pixels(planes: list[Any], date: SceneInput) -> Pixels:
    return (planes[:-1], planes[-1]) if date.classes is not None else (planes, None)


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
    return None if others or not access.is_local(href) else block_file(href.removeprefix("file://"))


@lru_cache(4096)
def _factor(file: BlockFile, grid: Grid) -> int:
    return coarsening(file, grid, file.path)


class _Part:
    """A window of one file, from the blocks that this chunk decodes and those that others do."""

    def __init__(self, file: BlockFile, factor: int, window: tuple[slice, slice], tiling: Tiling):
        self.file = file
        self.rows, self.cols = (
            slice(s.start // factor, min(math.ceil(s.stop / factor), size))
            for s, size in zip(window, file.shape, strict=True)
        )
        self._shape = tuple(math.ceil((s.stop - s.start) / factor) for s in window)
        self._readers = counter(tiling, factor)
        self.mine: dict[Block, Any] = {}
        self._held: dict[Block, Any] = {}
        self._out: Any = None

    def claim(self, arrays: Any) -> None:
        """Tell other chunks which blocks this one decodes."""
        layout = self.file.layout
        blocks = list(layout.covering(self.rows, self.cols))
        wanted = {b: self._readers(0, layout.span(0, b[0])) * self._readers(1, layout.span(1, b[1])) for b in blocks}
        self._out = arrays.empty((self.rows.stop - self.rows.start, self.cols.stop - self.cols.start), self.file.dtype)
        self.mine, self._held = BLOCKS.claim(self.file.path, blocks, wanted)

    def take(self, block: Block, pixels: Any) -> None:
        """Take a decoded block, and keep it for others that want it."""
        span = self._span(block)
        pixels = pixels[: span[0].stop - span[0].start, : span[1].stop - span[1].start]
        COUNTS.add(pixels.nbytes)
        paste(self._out, self.rows, self.cols, pixels, span)
        BLOCKS.publish(self.file.path, self.file.layout, self.mine, pixels, span)

    def finish(self) -> Any:
        """Wait for the blocks of others and return the window."""
        for block, entry in self._held.items():
            paste(self._out, self.rows, self.cols, entry.pixels.result(), self._span(block))
        self._release()
        return filled(self._out, self._shape)

    def abandon(self, error: Exception) -> None:
        """Tell others that this chunk decodes nothing more."""
        BLOCKS.abandon(self.file.path, self.mine, error)
        self._release()

    def _release(self) -> None:
        had = {block: entry for block, entry in {**self.mine, **self._held}.items() if entry and entry.pixels.done()}
        BLOCKS.release(self.file.path, had)
        self.mine, self._held = {}, {}

    def _span(self, block: Block) -> tuple[slice, slice]:
        return self.file.layout.span(0, block[0]), self.file.layout.span(1, block[1])


def _decode(parts: Sequence[_Part], inflate: Inflate, arrays: Any) -> None:
    """Read, decompress and check the blocks that are not there yet, all at once."""
    wanted = sorted(((part, block) for part in parts for block in part.mine), key=lambda one: _kind(one[0]))
    if not wanted:
        return
    lengths = [int(part.file.lengths[block]) for part, block in wanted]
    *starts, total = offsets(lengths, ALIGNED - _HEADER)  # so that the streams after the headers are aligned
    staged = inflate.staging(total)
    host = staged.numpy().data
    for (part, block), start, length in zip(wanted, starts, lengths, strict=True):
        part.file.read(block, host[start : start + length])
    sums = [int.from_bytes(host[s + n - _CHECKSUM : s + n], "big") for s, n in zip(starts, lengths, strict=True)]
    streams = [start + _HEADER for start in starts], [n - _HEADER - _CHECKSUM for n in lengths]
    flat = inflate(staged, *streams, [part.file.block_bytes for part, _ in wanted])
    first = 0
    for _, group in itertools.groupby(zip(wanted, sums, strict=True), key=lambda one: _kind(one[0][0])):
        members = list(group)
        file = members[0][0][0].file
        pieces = flat[first : first + len(members) * file.block_bytes].view(len(members), file.block_bytes)
        first += pieces.numel()
        if adler32(pieces).tolist() != [expected for _, expected in members]:
            raise InflateError(f"blocks of {file.path} or others read with it do not match their checksums")
        for ((part, block), _), pixels in zip(members, arrays.from_dlpack(_restored(pieces, file)), strict=True):
            part.take(block, pixels)


def _kind(part: _Part) -> tuple[Any, ...]:
    return part.file.dtype.str, part.file.layout.block, part.file.predictor


def _restored(pieces: Tensor, file: BlockFile) -> Tensor:
    """Return the pixels (n, y, x) of blocks; predictor 2 of TIFF 6.0 stores differences along rows."""
    signed = {1: torch.int8, 2: torch.int16}[file.dtype.itemsize]
    values = pieces.view(signed).view(len(pieces), *file.layout.block)
    if file.predictor:
        torch.cumsum(values, 2, dtype=signed, out=values)  # sums wrap as the differences did
    return values.view(torch.uint8 if file.dtype.itemsize == 1 else torch.uint16)
