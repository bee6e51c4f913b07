"""Memory apart from the allocator's heap, for what waits while chunks come and go.

What a chunk works with is large and soon gone; decoded blocks and finished parts of maps lie between for seconds and
minutes. In one heap these leave gaps in which the next features find no room, and it grew with each unit of work.
"""

from __future__ import annotations

import math
import mmap
import time
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

_ALIGNED = 8  # bytes: multiples at which buffers begin


def apart(buffers: Sequence[bytes | np.ndarray]) -> list[np.ndarray]:
    """Return copies of arrays, and of bytes as uint8, side by side in memory of their own; it goes with the last."""
    arrays = [b if isinstance(b, np.ndarray) else np.frombuffer(b, np.uint8) for b in buffers]
    *starts, total = accumulate((-(-array.nbytes // _ALIGNED) * _ALIGNED for array in arrays), initial=0)
    memory = _fresh(total)
    return [_filled(memory[start : start + a.nbytes], a) for start, a in zip(starts, arrays, strict=True)]


class Rooms:
    """Arrays that wait, many of a few sizes: the memory of one that is gone serves the next of its size.

    Fresh memory costs a page fault per 4 KiB, which is more than to copy it.
    """

    def __init__(self) -> None:
        self._spare: dict[int, deque[tuple[float, np.ndarray]]] = {}  # when each became free; the last is used first

    def copy(self, array: np.ndarray) -> np.ndarray:
        """Return a copy, as `empty` returns an array."""
        copy = self.empty(array.shape, array.dtype)
        copy[...] = array
        return copy

    def empty(self, shape: tuple[int, ...], kind: np.dtype[Any]) -> np.ndarray:
        """Return an array of any values, whose memory comes back when it and all views of it are gone."""
        return np.asarray(_Room(self, self.take(math.prod(shape) * kind.itemsize))).view(kind).reshape(shape)

    def take(self, size: int) -> np.ndarray:
        """Return memory of so many bytes."""
        try:
            return self._spare[size].pop()[1]
        except (KeyError, IndexError):
            return _fresh(size)

    def give(self, memory: np.ndarray) -> None:
        """Take back memory that nobody uses any more."""
        self._spare.setdefault(memory.nbytes, deque()).append((time.monotonic(), memory))

    def free(self, idle: float = 0) -> None:
        """Return to the kernel what was used by nothing in so many seconds."""
        since = time.monotonic() - idle
        for spare in list(self._spare.values()):
            try:
                while spare[0][0] <= since:
                    spare.popleft()
            except IndexError:  # none is left, or another thread took it
                pass

    @property
    def spare_bytes(self) -> int:
        """Bytes that are held for later."""
        return sum(size * len(spare) for size, spare in list(self._spare.items()))


class _Room:
    """What NumPy keeps as long as anything looks at the memory: it goes back with the last view."""

    def __init__(self, rooms: Rooms, memory: np.ndarray) -> None:
        self._rooms, self._memory = rooms, memory

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._memory.__array_interface__  # by address: of a buffer NumPy would keep that, and not the room

    def __del__(self) -> None:
        self._rooms.give(self._memory)


def _filled(memory: np.ndarray, array: np.ndarray) -> np.ndarray:
    copy = memory.view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _fresh(size: int) -> np.ndarray:
    try:
        memory = mmap.mmap(-1, max(1, size), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # neighbours become one mapping
    except OSError as error:
        raise MemoryError(f"{size} bytes of memory: {error.strerror}") from None
    return np.frombuffer(memory, np.uint8, size)
