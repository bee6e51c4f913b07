"""The network as CUDA graphs: one call of the driver replays what eager torch launches in some hundred calls.

Every launch of eager torch waits for Python's lock, which the threads that read and write keep busy; they would leave
the GPU idle. A graph has fixed buffers, so what goes in and out is copied, in one piece each: features are kept as one
flat tensor of bytes.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Function = Callable[[Sequence[Tensor]], Sequence[Tensor]]
MOST = 32  # graphs kept: a tile has up to nine shapes of chunks, for a date and for a pair
_ALIGNED = 16


class Piece(NamedTuple):
    """Where a tensor lies in a flat one: its first byte, dtype and shape; of four dimensions the channels lie last."""

    start: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def layout(tensors: Sequence[Tensor]) -> tuple[Piece, ...]:
    """Return where `flatten` puts tensors."""
    pieces, start = [], 0
    for tensor in tensors:
        pieces.append(Piece(start, tensor.dtype, tensor.shape))
        start += -(-pieces[-1].nbytes // _ALIGNED) * _ALIGNED
    return tuple(pieces)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors as one, uint8 (bytes,)."""
    pieces = layout(tensors)
    flat = torch.empty(pieces[-1].start + pieces[-1].nbytes, dtype=torch.uint8, device=tensors[0].device)
    for part, tensor in zip(unflatten(flat, pieces), tensors, strict=True):
        part.copy_(tensor)
    return flat


def unflatten(flat: Tensor, pieces: Sequence[Piece]) -> list[Tensor]:
    """Return the tensors that `flatten` made one of, without a copy."""
    return [_shaped(flat[p.start : p.start + p.nbytes].view(p.dtype), p.shape) for p in pieces]


def _shaped(values: Tensor, shape: torch.Size) -> Tensor:
    if len(shape) != 4:
        return values.view(shape)
    n, channels, rows, cols = shape
    return values.view(n, rows, cols, channels).permute(0, 3, 1, 2)


class Graphs:
    """Graphs of functions, by the shapes of their inputs; the least used ones are dropped.

    For one thread at a time, on one stream.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._pool: Any = None  # memory that all graphs share, for no result outlives the next call
        self._stream: Any = None  # one for all: torch has 32 to give, then it gives those that others use once more

    def __call__(
        self, name: Hashable, function: Function, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Piece, ...]]:
        """Return what `function` gives for `inputs`, flat, and its layout; the next call overwrites it.

        `name` tells functions apart. Raises torch.OutOfMemoryError where the graph does not fit into the device.
        """
        key = (name, *((t.dtype, t.shape, t.stride()) for t in inputs))
        if key not in self._kept:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._stream = self._stream or torch.cuda.Stream()
            try:
                self._kept[key] = _Graph(function, inputs, self._pool, self._stream)
            except BaseException:
                self._pool = None  # torch may refuse what a failed capture leaves of it
                raise
            if len(self._kept) > MOST:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key](inputs)

    def clear(self) -> None:
        """Give up all graphs and their memory."""
        self._kept.clear()
        self._pool = None  # torch refuses a pool that has lost its last graph


class _Graph:
    def __init__(self, function: Function, inputs: Sequence[Tensor], pool: Any, stream: torch.cuda.Stream):
        self._inputs = [t.clone() for t in inputs]
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                self._pieces = layout(function(self._inputs))  # what is set up once must not be captured
        finally:
            torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what was needed just now would lie idle: a graph takes its memory from its pool
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self._flat = flatten(function(self._inputs))
            except BaseException:
                with contextlib.suppress(RuntimeError):  # it may fail then too, and would hide what went wrong
                    self._graph.capture_end()
                raise
            self._graph.capture_end()

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, tuple[Piece, ...]]:
        torch._foreach_copy_(self._inputs, list(inputs))
        self._graph.replay()
        return self._flat, self._pieces
