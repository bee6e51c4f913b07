"""DEFLATE streams decompressed on a GPU, some hundred at a time, by nvCOMP's C interface.

A stream alone takes a GPU forty times as long as a core, but a thousand take little longer than one.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

ALIGNED = 16
STAGED = 16 << 20  # bytes of pinned memory that an inflater has: to get more takes longer than to fill it
AT_ONCE, EACH = (
    16,
    4 << 30,
)  # inflaters of a GPU, and the bytes it must have for each: together they keep some thousand streams under way
GUARD, MARK = (
    1 << 20,
    0xA5,
)  # bytes behind what is decompressed, and what they hold: writing goes on from stream to stream
HEADER, CHECKSUM = 2, 4  # bytes of zlib's format (RFC 1950) around a stream
LIBRARY = "libnvcomp.so.6"
Result = TypeVar("Result")


class InflateError(RuntimeError):
    """A stream could not be decompressed on the GPU."""


class DamageError(InflateError):
    """A stream was decompressed there and turned out damaged."""


class OverrunError(InflateError):
    """Decompressing a damaged stream wrote beyond its place: what else lies on the GPU may be overwritten."""


class Packed(NamedTuple):
    """A stream in zlib's format: its `length`, what reads it into memory, and how many bytes it holds."""

    length: int
    read: Callable[[memoryview], None]
    size: int


class _Options(ctypes.Structure):
    """nvcompBatchedDeflateDecompressOpts_t: all zeros are the defaults."""

    _fields_ = (("backend", ctypes.c_int), ("sort", ctypes.c_int), ("reserved", ctypes.c_char * 56))


class Inflater:
    """Decompresses on one GPU, for one thread at a time, on a stream of its own."""

    def __init__(self, device: torch.device):
        library = nvcomp()
        if library is None:
            raise InflateError(f"{LIBRARY} cannot be loaded, expected nvidia-libnvcomp")
        self._library, self._device = library, device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
        self._staged = torch.empty(STAGED, dtype=torch.uint8, pin_memory=True)

    def __call__(self, streams: Sequence[Packed], use: Callable[[Tensor, list[int]], Result]) -> Result:
        """Return what `use` makes of what streams hold, and of their checksums (Adler-32), once all of it is done.

        `use` gets uint8 (bytes,) on the device, one stream after the other. What it does is queued on this inflater's
        own stream, and so is what it allocates.

        Raises InflateError for what is no stream, DamageError where one is damaged (`use` may, too), OverrunError where
        that did harm.
        """
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            packed, starts, checksums = self._send(streams)
            sizes = [stream.size for stream in streams]
            out = torch.empty(sum(sizes) + GUARD, dtype=torch.uint8, device=self._device)
            guard = out[-GUARD:].fill_(MARK)
            results = self._inflate(packed, starts, [s.length - HEADER - CHECKSUM for s in streams], out, sizes)
            self._wait()
            try:
                _require_sound(results.cpu(), sizes)
                result = use(out[:-GUARD], checksums)
            except DamageError as error:
                if not (guard == MARK).all():
                    raise OverrunError(f"{error}, and what lies behind them is overwritten") from error
                raise
            self._wait()
            return result

    @staticmethod
    def _wait() -> None:
        """Wait for all that was queued, without keeping a core busy."""
        done = torch.cuda.Event(blocking=True)
        done.record()
        done.synchronize()

    def _send(self, streams: Sequence[Packed]) -> tuple[Tensor, list[int], list[int]]:
        """Return the streams on the device, where each begins after its header, and their checksums."""
        *starts, total = offsets([s.length for s in streams], ALIGNED - HEADER)
        packed = torch.empty(total, dtype=torch.uint8, device=self._device)
        checksums = send(streams, starts, self._staged, packed, self._wait)
        return packed, [start + HEADER for start in starts], checksums

    def _inflate(
        self, packed: Tensor, starts: Sequence[int], lengths: Sequence[int], out: Tensor, sizes: Sequence[int]
    ) -> Tensor:
        """Queue the decompression; return int64 (2, n): the bytes found in each stream, and in n int32 its status."""
        count, largest = len(starts), max(sizes)
        addresses = [packed.data_ptr() + start for start in starts]
        targets = [out.data_ptr() + start for start in offsets(sizes)[:-1]]
        numbers = torch.tensor([addresses, lengths, targets, sizes]).to(self._device)
        results = torch.zeros((2, count), dtype=torch.int64, device=self._device)
        temporary = ctypes.c_size_t()
        handle, options = ctypes.c_void_p(self._stream.cuda_stream), _Options()
        self._check(
            self._library.nvcompBatchedDeflateDecompressGetTempSize(
                ctypes.c_size_t(count), ctypes.c_size_t(largest), options, ctypes.byref(temporary),
                ctypes.c_size_t(largest * count), handle,
            )
        )  # fmt: skip
        scratch = torch.empty(max(1, temporary.value), dtype=torch.uint8, device=self._device)
        source, length, target, size = (ctypes.c_void_p(row.data_ptr()) for row in numbers)
        actual, status = (ctypes.c_void_p(row.data_ptr()) for row in results)
        self._check(
            self._library.nvcompBatchedDeflateDecompressAsync(
                source, length, size, actual, ctypes.c_size_t(count), ctypes.c_void_p(scratch.data_ptr()),
                temporary, target, options, status, handle,
            )
        )  # fmt: skip
        return results

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise InflateError(f"nvCOMP failed with status {status}, expected 0")


def _require_sound(results: Tensor, sizes: Sequence[int]) -> None:
    actual, status = results
    wrong = (actual != torch.tensor(sizes)) | (status.view(torch.int32)[: len(sizes)] != 0)
    if wrong.any():
        raise DamageError(f"{int(wrong.sum())} of {len(sizes)} blocks are damaged")


def send(
    streams: Sequence[Packed], starts: Sequence[int], staged: Tensor, packed: Tensor, wait: Callable[[], None]
) -> list[int]:
    """Read streams and copy each to its place in `packed`; return their checksums.

    `staged` is what they pass through, large enough for each of them; `wait` ends when it may be written to again.
    """
    host, checksums = staged.numpy(), []
    first = stop = 0  # bytes [first, stop) of `packed` are staged

    def copy() -> None:
        packed[first:stop].copy_(staged[: stop - first], non_blocking=True)
        wait()

    for start, stream in zip(starts, streams, strict=True):
        if start + stream.length - first > len(host):
            copy()
            first = start
        stop = start + stream.length
        part = host[start - first : stop - first]
        stream.read(part.data)
        checksums.append(_checksum(part))
    copy()
    return checksums


@contextmanager
def inflater(device: torch.device) -> Iterator[Inflater]:
    """Lend one of a device's inflaters, once one is free."""
    places = _places(device)
    found = places.get()
    try:
        found = found or Inflater(device)
        yield found
    finally:
        places.put(found)


@cache
def _places(device: torch.device) -> queue.LifoQueue[Inflater | None]:
    places: queue.LifoQueue[Inflater | None] = queue.LifoQueue()
    memory = torch.cuda.get_device_properties(device).total_memory
    for _ in range(min(max(1, memory // EACH), AT_ONCE)):
        places.put(None)
    return places


@cache
def nvcomp() -> Any:
    """Return the library, None where it is not installed."""
    try:
        spec = importlib.util.find_spec("nvidia.libnvcomp")
    except ModuleNotFoundError:
        spec = None
    folders = spec.submodule_search_locations if spec else None
    try:
        return ctypes.CDLL(str(Path(folders[0], "lib64", LIBRARY)) if folders else LIBRARY)
    except OSError:
        return None


def _checksum(stream: np.ndarray) -> int:
    """Return the checksum of a stream in zlib's format.

    Raises InflateError for what cannot be one, such as the zeros of a file that was never written to the end: nvCOMP
    may read where it should not when it is given that.
    """
    header, checksum = (int.from_bytes(part.tobytes(), "big") for part in (stream[:HEADER], stream[-CHECKSUM:]))
    if header % 31 or header >> 8 & 15 != 8 or header & 32 or not checksum:
        raise InflateError(f"a block begins with {header:#06x} and ends with {checksum:#010x}: no stream of zlib")
    return checksum


def offsets(sizes: Sequence[int], first: int = 0) -> list[int]:
    """Return where pieces begin that lie one after the other, aligned, and where the last one ends."""
    return list(itertools.accumulate((-(-size // ALIGNED) * ALIGNED for size in sizes), initial=first))


def adler32(pieces: Tensor) -> Tensor:
    """Return the checksum of RFC 1950, int64 (n,), of uint8 (n, bytes); bytes a multiple of 64."""
    size = pieces.shape[1]
    part = 64
    position = torch.arange(part, dtype=torch.float32, device=pieces.device)
    sums, weighted = [], []
    for piece in pieces.split(max(1, (1 << 26) // size)):  # as float32, exact: 64 bytes add up to less than 2^24
        values = piece.view(len(piece), size // part, part).float()
        sums.append(values.sum(dim=2).long())
        weighted.append((values * position).sum(dim=2).long())
    total, inner = torch.cat(sums), torch.cat(weighted)
    starts = part * torch.arange(size // part, device=pieces.device)
    low = 1 + total.sum(dim=1)
    high = size + size * total.sum(dim=1) - (starts * total + inner).sum(dim=1)
    return (high % 65521) * 65536 + low % 65521
