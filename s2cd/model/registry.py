"""Models by name: the two shipped ones and networks that users bring, loaded once per process."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from s2cd.errors import ModelError
from s2cd.model import normalise
from s2cd.model.appearance import FINE_BANDS
from s2cd.model.device import WHOLE, EncodedDate, Engine, Part, choose_device, on_gpu, to_host
from s2cd.model.labels import band_names, require_alike, require_bands_first
from s2cd.model.network import HALO, REACH, STRIDE, ChangeNet, Committee, Features, network_of

BANDS = ("blue", "green", "red", "nir", "nir08", "swir16", "swir22")
WEIGHTS = Path(__file__).parent / "weights"
_Edition = tuple[tuple[int, int], ...] | None  # of each file: when it was written, and its bytes
_cache: dict[tuple[str, str], tuple[_Edition, Model]] = {}
_lock = threading.Lock()


class Network(Protocol):
    """What a Model needs of a network: `encode` one date, `decode` two, as `ChangeNet` documents."""

    def encode(self, x: Tensor) -> Features:
        """Return the features of one date."""

    def decode(self, a: Features, b: Features, background: Tensor | float) -> Tensor:
        """Return logits between two dates that differ by `background` everywhere."""


class Model:
    """A siamese network with its weights on a device, and what it expects.

    name    as it was asked for
    hash    sha256 (hex) of the weights file
    bands   common names of the bands, in order
    fine    how many of them, the first, are at 10 m; the others are at 20 m
    stride  chunk edges are multiples of it [10 m pixels]
    halo    pixels around a chunk to be read with it, a multiple of `stride` [10 m pixels]
    reach   how many of them, from the chunk's edge, its result depends on [10 m pixels]
    card    the model card: data, licence, scores and cost

    Threads may call `encode` and `decode` at the same time; on a GPU one call runs at a time.
    """

    def __init__(
        self,
        name: str,
        digest: str,
        engine: Engine,
        card: dict[str, Any],
        *,
        bands: tuple[str, ...] = BANDS,
        fine: int = FINE_BANDS,
        stride: int = STRIDE,
        halo: int = HALO,
        reach: int = REACH,
    ):
        self.name, self.hash, self.card = name, digest, card
        self.bands, self.fine, self.stride, self.halo, self.reach = bands, fine, stride, halo, reach
        self._engine = engine

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        """Pickle as a name and a device: weights never travel."""
        return load_model, (self.name, str(self._engine.device))

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self._engine.device

    def misfit(self, size: float) -> str | None:
        """Say why the network cannot work on pixels of this size: one with bands of two sizes knows 10 m alone.

        Sizes below 1 are degrees, which tell nothing.
        """
        fits = abs(size - 10) < 0.01 or size < 1 or self.fine == len(self.bands)
        return None if fits else f"has pixels of {size:g} m, expected 10 m"

    @cached_property
    def feature_bytes(self) -> float:
        """Bytes that the features of a date take for each 10 m pixel."""
        edge, channels = 4 * self.stride, 3 * self.fine + len(self.bands) + 1
        return self._engine.feature_bytes(edge // 2, channels) / edge**2

    def statistics(self, reflectance: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return float32 (band, 2), centre and spread of reflectance (band, y, x) with NaN = no observation."""
        return normalise.statistics(reflectance)

    def affine(
        self, statistics: npt.NDArray[np.float32], scale: npt.ArrayLike = 1.0, offset: npt.ArrayLike = 0.0
    ) -> npt.NDArray[np.float32]:
        """Return float32 (band, 2), gain and bias, for pixels of which reflectance = scale * pixel + offset."""
        return normalise.affine(statistics, scale, offset)

    def sketch(self, reflectance: npt.NDArray[np.float32], statistics: npt.NDArray[np.float32]) -> np.ndarray:
        """Return a small picture of a date, float16 (band, y, x), of what `statistics` was given; for `background`."""
        return normalise.sketch(reflectance, statistics)

    def background(self, a: np.ndarray, b: np.ndarray) -> float:
        """Return how much two dates differ everywhere, from their sketches; 1 is usual."""
        return normalise.background(a, b)

    def encode(
        self, pixels: normalise.Planes, affine: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_]
    ) -> EncodedDate:
        """Return the features of one date, to be kept for all its pairs.

        pixels  (band, y, x) of any real type, in the order of `bands`, on the 10 m grid; or an array (y, x) for each
                band, of which those after the first `fine` may be half as large, on the 20 m grid
        affine  (band, 2) from `affine`
        valid   bool (y, x), False = no observation

        Raises ModelError if the shapes do not fit.
        """
        self._require_shapes(pixels, valid)
        return self._engine.encode(list(pixels), affine, valid, self.fine, self.stride)

    def decode(self, a: EncodedDate, b: EncodedDate, background: float) -> npt.NDArray[np.float32]:
        """Return the probability of change float32 (y, x) in [0, 1], NaN where either date is not valid.

        The order of the dates does not matter, unless to an exported network. `background` is that of the whole scenes,
        the same for every chunk.

        Raises ModelError if the two dates differ in shape.
        """
        return self._engine.fetch(self._decode(a, b, background, "probability"))

    def decode_codes(
        self,
        a: EncodedDate,
        b: EncodedDate,
        background: float,
        inner: Part = WHOLE,
        *,
        reasons: bool = False,
    ) -> npt.NDArray[np.uint16]:
        """Return what `decode` does as codes (see `s2cd.codes`), for the part `inner` of the pixels.

        With `reasons` the codes tell which date does not show a pixel, `a` being the earlier one.
        """
        finish = "codes with reasons" if reasons else "codes"
        return self._engine.fetch(self._decode(a, b, background, finish, inner)).view(np.uint16)

    def _decode(self, a: EncodedDate, b: EncodedDate, background: float, finish: str, part: Part = WHOLE) -> Tensor:
        if a.shape != b.shape:
            raise ModelError(f"model {self.name!r} compares dates of one shape, found {a.shape} and {b.shape}")
        return self._engine.decode(a, b, background, finish, part)

    def predict(
        self,
        before: npt.NDArray[np.float32],
        after: npt.NDArray[np.float32],
        statistics: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None = None,
        background: float | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return the probability of change float32 (y, x) in [0, 1], NaN where a band of either date is NaN.

        before, after  reflectance float32 (band, y, x), bands as in `bands`, all on the 10 m grid; what a masked array
                       hides is NaN, what is infinite no observation either; where the model is on a GPU they may lie
                       there too, as CuPy's arrays, and so does the result then
        statistics     of both dates, as from `statistics`; by default of the arrays themselves, decimated
        background     of both dates, as from `background`; by default of the arrays themselves, decimated

        Raises ModelError if the shapes do not fit, for arrays of no numbers, for labelled bands in another order, and
        for two labelled dates whose axes or coordinates differ.
        """
        for date in (before, after):
            require_bands_first(self.name, date)
        require_alike(self.name, before, after)
        there = on_gpu(before) and on_gpu(after) and self._engine.device.type == "cuda"
        dates = [date if there else self._numbers(date) for date in (before, after)]
        for date in dates:
            if date.ndim != 3 or date.shape != dates[0].shape or len(date) != len(self.bands) or not date.size:
                raise ModelError(
                    f"model {self.name!r} takes two arrays (band, y, x) of {len(self.bands)} bands, "
                    f"found {dates[0].shape} and {dates[1].shape}"
                )
        step = normalise.decimation(dates[0].shape[1:])
        small = [to_host(d[:, ::step, ::step]) for d in dates]
        stats = tuple(self.statistics(d) for d in small) if statistics is None else statistics
        if background is None:
            background = self.background(*(self.sketch(d, s) for d, s in zip(small, stats, strict=True)))
        valid: list[Any] = [np.isfinite(d).all(axis=0) for d in dates]
        a, b = (self.encode(d, self.affine(s), v) for d, s, v in zip(dates, stats, valid, strict=True))
        if there:
            import cupy

            with torch.cuda.device(self.device):  # torch gives no other device's memory away
                return cupy.from_dlpack(self._decode(a, b, background, "probability"))
        return self.decode(a, b, background)

    def _numbers(self, date: Any) -> np.ndarray:
        """Return a date as plain numbers, NaN where a masked array hides them."""
        named = band_names(date)
        if named and named != list(self.bands):
            raise ModelError(f"model {self.name!r}: found bands {', '.join(named)}, expected {', '.join(self.bands)}")
        array = np.ma.filled(date.astype(np.float32), np.nan) if np.ma.isMaskedArray(date) else self._array(date)
        if array.dtype.kind not in "fiu":
            raise ModelError(f"model {self.name!r}: found an array of {array.dtype}, expected reflectance float32")
        return array

    def _array(self, date: Any) -> np.ndarray:
        try:
            return to_host(date)
        except (TypeError, ValueError, RuntimeError):  # the last of a tensor that needs its gradient
            found = type(date).__name__
            raise ModelError(f"model {self.name!r}: found {found}, expected an array of reflectance float32") from None

    def _require_shapes(self, pixels: normalise.Planes, valid: np.ndarray) -> None:
        half = tuple(-(-n // 2) for n in valid.shape)
        found = [plane.shape for plane in pixels]
        coarse = all(shape in (valid.shape, half) for shape in found[self.fine :])
        fits = coarse and all(shape == valid.shape for shape in found[: self.fine])
        if valid.ndim != 2 or len(pixels) != len(self.bands) or not fits:
            raise ModelError(
                f"model {self.name!r} takes pixels (band, y, x) of {len(self.bands)} bands and valid (y, x), "
                f"found {len(found)} of {', '.join(map(str, sorted(set(found))))} and {valid.shape}"
            )

    def mlm(self) -> dict[str, Any]:
        """Return the properties of the STAC Machine Learning Model extension (v1.4) that describe this model."""
        from s2cd.model.mlm import mlm_properties

        return mlm_properties(self)


def list_models() -> list[str]:
    """Return the names of the shipped models, the default first."""
    names = sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))
    return sorted(names, key=lambda name: name != "generic")


def load_model(name: str = "generic", device: str = "auto") -> Model:
    """Return the model called `name`, or the exported or trained one at the path `name`.

    It is loaded once per process and device, and again when its files have changed.

    device: "auto" (a CUDA device where there is one), "cpu", "cuda", "cuda:1" ...

    Raises ModelError for an unknown name, a damaged file, or a device that is not there.
    """
    return load_expected(name, device)


def load_expected(name: str, device: str, expected: str | None = None) -> Model:
    """Return the model as `load_model` does, whose hash is `expected` if that is given.

    Raises ModelError for another one, before anything but its bytes is looked at; else as `load_model`.
    """
    name, place = plain_name(name), choose_device(device)
    key, edition = (name, str(place)), _edition(Path(name))
    with _lock:
        if key not in _cache or edition not in {None, _cache[key][0]}:
            _cache[key] = edition, _load(name, place, expected)
        model = _cache[key][1]
    require_hash(name, model.hash, expected)
    return model


def require_hash(name: str, found: str, expected: str | None) -> None:
    """Raise ModelError unless the model `name` has the hash `expected`, if that is given."""
    if expected not in {None, found}:
        raise ModelError(f"model {name!r} has weights {found[:12]} on this worker, expected {str(expected)[:12]}")


def _edition(path: Path) -> _Edition:
    """Tell an exported model from a later one of the same path; None where there is no file (any more)."""
    try:
        files = [os.stat(path), os.stat(path.with_suffix(".json"))]
    except (OSError, ValueError):
        return None
    return tuple((file.st_mtime_ns, file.st_size) for file in files)


def plain_name(name: str | os.PathLike[str]) -> str:
    """Return a model's name or path as text. Raises ModelError for anything else."""
    if not isinstance(name, str | os.PathLike):
        raise ModelError(f"model: found {type(name).__name__}, expected the name of a shipped model or a path")
    return os.fspath(name)


def _load(name: str, device: torch.device, expected: str | None) -> Model:
    if name in list_models():
        return _trained(name, WEIGHTS / f"{name}.safetensors", device, expected)
    path = Path(name)
    there = os.path.isfile(path)  # Path.is_file raises for a folder that may not be entered
    if path.suffix == ".safetensors" and there:
        return _trained(name, path, device, expected)
    if there:
        from s2cd.model.exported import load_exported

        return load_exported(path, device, expected)
    known = ", ".join(list_models())
    raise ModelError(
        f"unknown model {name!r}, expected one of {known}, or the path of an exported model (.pt2 or .onnx) "
        "or of one that was trained here (.safetensors)"
    )


def _trained(name: str, path: Path, device: torch.device, expected: str | None) -> Model:
    """Return the network of this package's own kind whose weights and card `python -m s2cd.training card` wrote."""
    data = content_of(path)
    digest = hashlib.sha256(data).hexdigest()
    require_hash(name, digest, expected)
    engine = Engine(_network(name, data).to(device), device, stride=STRIDE // 2, halo=HALO // 2)
    card = path.with_suffix(".json")
    return Model(name, digest, engine, card_of(card.name, content_of(card)))


def _network(name: str, data: bytes) -> ChangeNet | Committee:
    try:
        network = network_of(load_tensors(data))
    except (SafetensorError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"weights of model {name!r} are damaged or of another version: {reason}") from None
    strange = [key for key, value in network.state_dict().items() if not value.isfinite().all()]
    if strange:  # ReLU may make numbers of NaN
        raise ModelError(f"weights of model {name!r} are damaged: {strange[0]} is not finite")
    return network.requires_grad_(False)


def content_of(path: Path) -> bytes:
    """Return what a file of a model holds. Raises ModelError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path.name}: {error.strerror or error}") from None


def card_of(name: str, content: bytes) -> dict[str, Any]:
    """Return the object that the JSON file `name` holds. Raises ModelError if it does not hold one."""
    try:
        card = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {name}: {error}") from None
    if not isinstance(card, dict):
        raise ModelError(f"{name} holds a {type(card).__name__}, expected an object")
    return card
