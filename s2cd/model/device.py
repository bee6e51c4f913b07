"""Running a network on a device: memory layout, precision, one call at a time on a GPU, blocks split if need be.

On a GPU blocks travel through pinned memory on streams of their own, and a call only queues its work: while one thread
waits for its result, the network computes for another.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from s2cd.errors import ModelError
from s2cd.model.network import Features

if TYPE_CHECKING:
    from s2cd.model.registry import Network

_locks: dict[str, threading.Lock] = {}
_streams: dict[tuple[str, str], torch.cuda.Stream] = {}
_locks_guard = threading.Lock()


def choose_device(device: str) -> torch.device:
    """Return the device for "auto", "cpu", "cuda" or "cuda:N". Raises ModelError if it is not there."""
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ModelError(f"unknown device {device!r}, expected auto, cpu, cuda or cuda:N") from None
    if place.type not in {"cpu", "cuda"}:
        raise ModelError(f"device {device!r} is not supported, expected auto, cpu, cuda or cuda:N")
    if place.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (place.index or 0) >= count:
        raise ModelError(f"device {device!r} asked for, {count} CUDA devices found")
    return torch.device("cuda", place.index or 0)


def device_memory() -> int:
    """Bytes of this process's first GPU, 0 without one."""
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0


def fast_bfloat16(device: torch.device) -> bool:
    """Tell whether bfloat16 is native: on CUDA from compute capability 8, on processors with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


class Engine:
    """Calls `encode` and `decode` of a network on NumPy blocks.

    `stride` and `halo` are in pixels of the network's input; `bfloat16` is used where the device is fast at it.
    """

    def __init__(self, network: Network, device: torch.device, *, stride: int, halo: int, bfloat16: bool = True):
        if isinstance(network, torch.nn.Module):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
        self._network, self.device = network, device
        self._stride, self._halo = stride, halo
        self._bfloat16 = bfloat16 and fast_bfloat16(device)

    def encode(self, x: npt.NDArray[np.float32]) -> Features:
        """Return features of an input (h, w, channels) on the 20 m grid; they stay on the device."""
        sent, wait = self._send(torch.from_numpy(x))
        batch = sent.permute(2, 0, 1).unsqueeze(0)  # channels last, without a copy
        with self._running():
            wait()
            return self._split((batch,), lambda t: self._network.encode(t[0]))

    def decode(self, a: Features, b: Features, background: float) -> npt.NDArray[np.float32]:
        """Return probabilities (2h, 2w) float32 between two dates that differ by `background` everywhere."""
        count = len(a)

        def probability(t: Features) -> Features:
            return (torch.sigmoid_(self._network.decode(t[:count], t[count:], background).float()),)

        with self._running():
            (result,) = self._split((*a, *b), probability)
            fetched, wait = self._fetch(result[0, 0])
        wait()
        return fetched.numpy()

    def _send(self, block: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Return the block on the device, and what makes the network wait until it is there."""
        if self.device.type != "cuda":
            return block, _nothing
        stream = _stream(self.device, "up")
        with torch.cuda.stream(stream):
            there = block.pin_memory().to(self.device, non_blocking=True)
            arrived = stream.record_event()

        def wait() -> None:
            compute = torch.cuda.current_stream(self.device)
            compute.wait_event(arrived)
            there.record_stream(compute)  # or its memory would be given away while the network reads it

        return there, wait

    def _fetch(self, result: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Return the result in host memory, and what waits until it is there."""
        if self.device.type != "cuda":
            return result, _nothing
        stream = _stream(self.device, "down")
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            here = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
            here.copy_(result, non_blocking=True)
        result.record_stream(stream)
        return here, stream.record_event().synchronize

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(device_lock(self.device))
                stack.enter_context(torch.cuda.device(self.device))
            stack.enter_context(torch.inference_mode())
            if self._bfloat16:
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            yield

    def _split(self, inputs: Features, call: Callable[[Features], Features]) -> Features:
        """Call on the whole block; where the device runs out of memory, on two halves with their halo."""
        try:
            return call(inputs)
        except torch.OutOfMemoryError:
            pass  # outside the handler the traceback, which holds tensors, is gone
        torch.cuda.empty_cache()
        return split_rows(inputs, lambda part: self._split(part, call), self._stride, self._halo)


def split_rows(inputs: Features, call: Callable[[Features], Features], stride: int, halo: int) -> Features:
    """Return what `call` gives for the whole `inputs`, from two calls on the upper and the lower half.

    `inputs` are tensors (n, channels, rows, cols) of one field of view at any scales, the first at the finest, of
    which `stride` rows are the coarsest scale's one row and `halo` rows the reach of `call`.

    Raises ModelError if the block is too small to be split.
    """
    rows = inputs[0].shape[2]
    middle = rows // 2 // stride * stride
    if middle <= halo or rows - middle <= halo:
        raise ModelError(f"the device has no memory for a block of {2 * rows} rows, and it is too small to be split")

    def part(tensor: Tensor, start: int, stop: int) -> Tensor:
        return tensor[:, :, start * tensor.shape[2] // rows : stop * tensor.shape[2] // rows]

    upper = call(tuple(part(t, 0, middle + halo) for t in inputs))
    upper = tuple(u[:, :, : u.shape[2] * middle // (middle + halo)].clone() for u in upper)
    lower = call(tuple(part(t, middle - halo, rows) for t in inputs))
    lower = tuple(low[:, :, low.shape[2] * halo // (rows - middle + halo) :] for low in lower)
    return tuple(torch.cat(halves, dim=2) for halves in zip(upper, lower, strict=True))


def _nothing() -> None:
    """What is to be waited for on a CPU."""


def _stream(device: torch.device, direction: str) -> torch.cuda.Stream:
    """Return the stream of `device` that carries blocks "up" to it or "down" from it."""
    with _locks_guard:
        key = (str(device), direction)
        if key not in _streams:
            _streams[key] = torch.cuda.Stream(device)
        return _streams[key]


def device_lock(device: torch.device) -> threading.Lock:
    """Return the lock that lets one network call at a time run on `device`."""
    with _locks_guard:
        return _locks.setdefault(str(device), threading.Lock())
