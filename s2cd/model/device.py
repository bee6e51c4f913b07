"""Running a network on a device: memory layout, precision, one call at a time on a GPU, blocks split if need be.

On a GPU blocks travel through pinned memory on streams of their own, and a call only queues its work: while one thread
waits for its result, the network computes for another.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from s2cd.errors import ModelError
from s2cd.model.network import Features
from s2cd.model.normalise import network_input
from s2cd.model.tensors import FINISHES, Part, to_input

if TYPE_CHECKING:
    from s2cd.model.registry import Network

_locks: dict[str, threading.RLock] = {}
_streams: dict[tuple[str, str], torch.cuda.Stream] = {}
_locks_guard = threading.Lock()


def choose_device(device: str) -> torch.device:
    """Return the device for "auto", "cpu", "cuda" or "cuda:N". Raises ModelError if it is not there."""
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        raise ModelError(f"unknown device {device!r}, expected auto, cpu, cuda or cuda:N") from None
    if place.type not in {"cpu", "cuda"}:
        raise ModelError(f"device {device!r} is not supported, expected auto, cpu, cuda or cuda:N")
    if place.type == "cpu":
        return torch.device("cpu")
    if (place.index or 0) >= device_count():
        raise ModelError(f"device {device!r} asked for, {device_count()} CUDA devices found")
    return torch.device("cuda", place.index or 0)


def device_count() -> int:
    """How many GPUs this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def first_device() -> tuple[str, int] | None:
    """What identifies this process's first GPU, the same in all processes, and its bytes; None without one."""
    if not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_properties(0)
    return str(card.uuid), int(card.total_memory)


def fast_bfloat16(device: torch.device) -> bool:
    """Tell whether bfloat16 is native: on CUDA from compute capability 8, on processors with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


@torch.no_grad()
def _round(network: torch.nn.Module) -> None:
    for parameter in network.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))


@dataclass(frozen=True, slots=True)
class EncodedDate:
    """Features of one date, and where it is valid, bool (y, x) at 10 m, on the device of the model."""

    features: Features
    valid: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns at 10 m."""
        return self.valid.shape[0], self.valid.shape[1]


Result = TypeVar("Result")
WHOLE: Part = (slice(None), slice(None))


class Engine:
    """Calls `encode` and `decode` of a network on blocks.

    To a GPU digital numbers go as they are, and codes come back: what lies between (scaling, masks, rounding) is done
    there. What lies there already (CuPy's arrays, say) is taken as it is.

    `stride` and `halo` are in pixels of the network's input; `bfloat16` is used where the device is fast at it. The
    weights become what it holds on every device, so that maps differ by 0.01 or so: oneDNN rounds biases, too.

    Raises ModelError where torch was given another allocator of a GPU's memory: it may not heed that several streams
    use a tensor, and give memory away too early.
    """

    def __init__(self, network: Network, device: torch.device, *, stride: int, halo: int, bfloat16: bool = True):
        if device.type == "cuda" and torch.cuda.get_allocator_backend() == "pluggable":
            raise ModelError("torch was given an allocator that may mix up what streams use, expected its own")
        if isinstance(network, torch.nn.Module):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
            if bfloat16:
                _round(network)
        self._network, self.device = network, device
        self._stride, self._halo = stride, halo
        self._bfloat16 = bfloat16 and fast_bfloat16(device)

    def encode(
        self, planes: Sequence[Any], gains: npt.NDArray[np.float32], valid: Any, fine: int, stride: int
    ) -> EncodedDate:
        """Return a date encoded; what is given is as `s2cd.model.normalise.network_input` takes it."""
        if self.device.type != "cuda":
            return self.encode_input(network_input(planes, gains, valid, fine, stride), valid)

        def encoded() -> EncodedDate:
            sent, wait = self._send([*planes, gains, valid])
            with self._running():
                wait()
                x, seen = to_input(sent[:-2], sent[-2], sent[-1], fine, stride), sent[-1].clone()
                del sent, wait  # all pixels are in one tensor, which a date would keep with its mask
                return EncodedDate(self._split((x,), lambda t: self._network.encode(t[0])), seen)

        return with_memory(encoded)

    def encode_input(self, x: npt.NDArray[np.floating], valid: npt.NDArray[np.bool_]) -> EncodedDate:
        """Return a date encoded, of an input (h, w, channels) on the network's grid."""
        (sent, seen), wait = self._send([x, valid])
        batch = sent.permute(2, 0, 1).unsqueeze(0)  # channels last, without a copy
        with self._running():
            wait()
            return EncodedDate(self._split((batch,), lambda t: self._network.encode(t[0])), seen)

    def feature_bytes(self, edge: int, channels: int) -> int:
        """Return the bytes of the features of a date whose input is `edge` pixels high and wide."""
        x = torch.zeros((1, channels, edge, edge), dtype=torch.float16, device=self.device)
        with self._running(), torch.enable_grad():  # as in training: to load compiled code takes a third of a second
            features = self._network.encode(x.contiguous(memory_format=torch.channels_last))
        return sum(f.numel() * f.element_size() for f in features)

    def decode(self, a: EncodedDate, b: EncodedDate, background: float, finish: str, part: Part = WHOLE) -> Tensor:
        """Return what `finish` of `s2cd.model.tensors.FINISHES` makes of a part of a pair; it stays on the device.

        The dates differ by `background` everywhere.
        """
        with self._running():
            count, usual = len(a.features), torch.full((), background, dtype=torch.float32, device=self.device)

            def probability(t: Features) -> Features:
                return (torch.sigmoid_(self._network.decode(t[:count], t[count:], usual).float()),)

            result = self._split((*a.features, *b.features), probability)[0][0, 0]
            return FINISHES[finish](result, a.valid, b.valid, part)

    def fetch(self, result: Tensor) -> npt.NDArray[Any]:
        """Return a result in host memory, once it is there."""
        if self.device.type != "cuda":
            return result.numpy()
        stream = _stream(self.device, "down")
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            here = torch.empty(result.shape, dtype=result.dtype, device="cpu", pin_memory=True)
            here.copy_(result, non_blocking=True)
            arrived = torch.cuda.Event(blocking=True)  # a thread that spins would take a core from those that decode
            arrived.record(stream)
        result.record_stream(stream)
        arrived.synchronize()
        return here.numpy()

    def _send(self, arrays: Sequence[Any]) -> tuple[list[Tensor], Callable[[], None]]:
        """Return arrays on the device, and what makes the network wait until they are there."""
        if self.device.type != "cuda":
            return [torch.from_numpy(array) for array in arrays], _nothing
        away = [array for array in arrays if not on_gpu(array)]
        staged = _staged(away)
        stream = _stream(self.device, "up")
        with torch.cuda.stream(stream):
            there = staged.to(self.device, non_blocking=True)
            arrived = stream.record_event()
        parts = iter(_parts(there, away))

        def wait() -> None:
            compute = torch.cuda.current_stream(self.device)
            compute.wait_event(arrived)
            there.record_stream(compute)  # or its memory would be given away while the network reads it

        with torch.cuda.device(self.device):
            return [torch.from_dlpack(array) if on_gpu(array) else next(parts) for array in arrays], wait

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
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        torch.cuda.empty_cache()  # outside the handler: the traceback, which holds tensors, is gone
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

    whole: list[Tensor] = []
    for first, last, start, stop in ((0, middle, 0, middle + halo), (middle, rows, middle - halo, rows)):
        half = call(tuple(part(t, start, stop) for t in inputs))
        whole = whole or [_taller(h, h.shape[2] * rows // (stop - start)) for h in half]
        for into, found in zip((part(w, first, last) for w in whole), half, strict=True):
            above = found.shape[2] * (first - start) // (stop - start)
            into.copy_(found[:, :, above : above + into.shape[2]])
        del half, found  # or the lower half would be worked on while the upper one is there twice
    return tuple(whole)


def _taller(tensor: Tensor, rows: int) -> Tensor:
    shape = (*tensor.shape[:2], rows, tensor.shape[3])
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=torch.channels_last)


def with_memory(call: Callable[[], Result]) -> Result:
    """Return what `call` gives; where a GPU's memory is full, free what torch keeps for later, and call once more."""
    try:
        return call()
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or out_of_memory(error)):  # the first is CuPy's, which cannot free that
            raise
    torch.cuda.empty_cache()
    return call()


_SHORTAGES = ("out of memory", "unable to find an engine", "ALLOC_FAILED")  # of CUDA, cuDNN and cuBLAS


def out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an error of torch says that a GPU's memory is full; its libraries say so in their own words."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _SHORTAGES)


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which `device` is the one that CUDA, and so CuPy, works on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def failed(device: torch.device) -> bool:
    """Tell whether a GPU does nothing more for this process, as after an illegal access."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def on_gpu(array: Any) -> bool:
    """Tell whether an array lies on a GPU: CuPy's, Numba's, torch's."""
    return hasattr(array, "__cuda_array_interface__")


def to_host(array: Any) -> np.ndarray:
    """Return an array in host memory."""
    return torch.from_dlpack(array).cpu().numpy() if on_gpu(array) else np.asarray(array)


_ALIGNED = 16


def _staged(arrays: Sequence[np.ndarray]) -> Tensor:
    """Copy arrays into one piece of pinned memory: one transfer for all."""
    *starts, total = _starts(arrays)
    staged = torch.empty(total, dtype=torch.uint8, device="cpu", pin_memory=torch.cuda.is_available())
    for array, start in zip(arrays, starts, strict=True):
        np.copyto(staged.numpy()[start : start + array.nbytes].view(array.dtype).reshape(array.shape), array)
    return staged


def _parts(staged: Tensor, arrays: Sequence[np.ndarray]) -> list[Tensor]:
    """Return the tensors that `_staged` made one of."""
    kinds = [torch.from_numpy(np.empty(0, array.dtype)).dtype for array in arrays]
    return [
        staged[start : start + array.nbytes].view(kind).view(array.shape)
        for array, start, kind in zip(arrays, _starts(arrays), kinds, strict=False)
    ]


def _starts(arrays: Sequence[np.ndarray]) -> list[int]:
    """Return where each array begins, aligned, and where the last one ends."""
    return list(itertools.accumulate((-(-array.nbytes // _ALIGNED) * _ALIGNED for array in arrays), initial=0))


def _nothing() -> None:
    """What is to be waited for on a CPU."""


def _stream(device: torch.device, direction: str) -> torch.cuda.Stream:
    """Return the stream of `device` that carries blocks "up" to it or "down" from it."""
    with _locks_guard:
        key = (str(device), direction)
        if key not in _streams:
            _streams[key] = torch.cuda.Stream(device)
        return _streams[key]


def device_lock(device: torch.device) -> threading.RLock:
    """Return the lock that lets one network call at a time run on `device`."""
    with _locks_guard:
        return _locks.setdefault(str(device), threading.RLock())
