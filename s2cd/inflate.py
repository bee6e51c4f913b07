"""DEFLATE streams decompressed on a GPU, some hundred at a time: nvCOMP's C interface.

A stream alone takes a GPU forty times as long as a core, but some hundred take no longer than one.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNED = 16
LIBRARY = "libnvcomp.so.6"


class InflateError(RuntimeError):
    """A stream could not be decompressed on the GPU."""


class _Options(ctypes.Structure):
    """nvcompBatchedDeflateDecompressOpts_t: all zeros are the defaults."""

    _fields_ = (("backend", ctypes.c_int), ("sort", ctypes.c_int), ("reserved", ctypes.c_char * 56))


class Inflater:
    """Decompresses on one GPU, for one thread at a time, on a stream of its own."""

    def __init__(self, device: torch.device):
        library = nvcomp()
        if library is None:
            raise InflateError(f"{LIBRARY} cannot be loaded, expected nvidia-libnvcomp")
        import cupy

        self._library, self._device = library, device
        with cupy.cuda.Device(device.index or 0):
            self._own = cupy.cuda.Stream(non_blocking=True)  # torch's streams are shared by whoever asks for one
        self._stream = torch.cuda.ExternalStream(self._own.ptr, device)

    def staging(self, size: int) -> Tensor:
        """Return uint8 (size,) in host memory that a GPU reads directly, for the bytes to be decompressed."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def __call__(self, staged: Tensor, starts: Sequence[int], lengths: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Return uint8 (bytes,) on the device: what raw DEFLATE streams hold, one after the other.

        staged           of `staging`; the streams lie at `starts`, multiples of ALIGNED, and have `lengths` bytes
        sizes            bytes that each stream holds, multiples of ALIGNED

        Returns when the work is done. Raises InflateError where a stream is damaged, as far as that is noticed.
        """
        with torch.cuda.device(self._device):
            packed = torch.empty(len(staged), dtype=torch.uint8, device=self._device)
            out = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
            addresses = [packed.data_ptr() + start for start in starts]
            targets = [out.data_ptr() + start for start in offsets(sizes)[:-1]]
            table = torch.tensor([addresses, lengths, targets, sizes]).pin_memory()
            found = self._run(staged, packed, table, max(sizes))
        wrong = np.flatnonzero((found[0] != sizes) | (found[1] != 0))
        if len(wrong):
            raise InflateError(f"{len(wrong)} of {len(sizes)} blocks are damaged")
        return out

    def _run(self, staged: Tensor, packed: Tensor, table: Tensor, largest: int) -> np.ndarray:
        """Send, decompress and wait; return the bytes found and the status of each stream."""
        count = table.shape[1]
        numbers = torch.empty_like(table, device=self._device)
        results = torch.zeros((2, count), dtype=torch.int64, device=self._device)
        found = torch.empty((2, count), dtype=torch.int64, pin_memory=True)
        temporary = ctypes.c_size_t()
        handle, options = ctypes.c_void_p(self._stream.cuda_stream), _Options()
        self._check(
            self._library.nvcompBatchedDeflateDecompressGetTempSize(
                ctypes.c_size_t(count), ctypes.c_size_t(largest), options, ctypes.byref(temporary),
                ctypes.c_size_t(largest * count), handle,
            )
        )  # fmt: skip
        scratch = torch.empty(max(1, temporary.value), dtype=torch.uint8, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream())  # who had this memory before may still use it
        with torch.cuda.stream(self._stream):
            packed.copy_(staged, non_blocking=True)
            numbers.copy_(table, non_blocking=True)
            rows = [ctypes.c_void_p(row.data_ptr()) for row in numbers]
            actual, status = (ctypes.c_void_p(row.data_ptr()) for row in results)
            self._check(
                self._library.nvcompBatchedDeflateDecompressAsync(
                    rows[0], rows[1], rows[3], actual, ctypes.c_size_t(count), ctypes.c_void_p(scratch.data_ptr()),
                    temporary, rows[2], options, status, handle,
                )
            )  # fmt: skip
            found.copy_(results, non_blocking=True)
            done = torch.cuda.Event(blocking=True)
            done.record(self._stream)
        done.synchronize()  # all memory is the calling thread's again
        actual_bytes, statuses = found.numpy()
        return np.stack([actual_bytes, statuses.view(np.int32)[:count]])

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise InflateError(f"nvCOMP failed with status {status}, expected 0")


_inflaters = threading.local()


def inflater(device: torch.device) -> Inflater:
    """Return this thread's inflater; streams and scratch memory live as long as the thread."""
    kept: dict[torch.device, Inflater] = _inflaters.__dict__.setdefault("kept", {})
    if device not in kept:
        kept[device] = Inflater(device)
    return kept[device]


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
