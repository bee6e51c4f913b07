"""Networks that users bring: an exported program and a small description beside it.

`name.pt2` is what `torch.export.save` writes for a module that takes two dates, float32 (1, band, y, x) on the 10 m
grid with y and x any multiples of `stride` (dynamic shapes), and returns float32 (1, 1, y, x). `name.onnx` is the same
as an ONNX network in one file, run by onnxruntime (the extra `onnx`). `name.json` says

    {"bands": ["blue", "red"], "scale": 1.0, "stride": 16, "halo": 64, "output": "logits"}

bands   common names, in the program's order
scale   what reflectance is multiplied by: 1, or 10000 for a network trained on digital numbers
stride  edges of blocks are multiples of it; an even number, at most 512 [10 m pixels]
halo    how far a result depends on its input; a multiple of `stride`, at most 4096 [10 m pixels]
output  "logits" (default) or "probability"

Two different tensors are to be the examples of `torch.export`: it takes one, given twice, for one input. The program
writes to neither date. Pixels without observation, and those beyond the edge of a tile, arrive as 0. Where both dates
show a pixel the result must be a number. A network that is loaded is tried on random blocks, each of which must give
the same as when it is cropped to its middle with the halo around it: what looks at the whole block (a mean, a
normalisation) does not.

A .pt2 is a program: load only files whose origin you trust, and ONNX where in doubt. One that holds pickled objects or
compiled libraries, which could do anything while they are loaded, is refused before torch sees it
(`s2cd/model/archive.py`); that does not make safe what a stranger wrote.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from s2cd.catalog.bands import canonical_band
from s2cd.codes import CODE_NODATA
from s2cd.errors import ConfigError, ModelError
from s2cd.model.archive import checked
from s2cd.model.device import WHOLE, EncodedDate, Engine, Part, failed, out_of_memory, to_host
from s2cd.model.mlm import exported_properties
from s2cd.model.network import Features
from s2cd.model.normalise import Planes
from s2cd.model.registry import Model, card_of, content_of, require_hash

Array = npt.NDArray[np.float32]
_SCALES, _LARGEST_STRIDE, _LARGEST_HALO = (1e-6, 1e6), 512, 4096
_ROUNDED = 1e-3  # by which a probability may lie beyond 0 or 1
_TOLERANCE = 2.0**-8  # of the largest result: the TF32 of GPUs rounds at 2**-11, and sums up in another order


class _Program:
    """The exported program behind the interface of `Network`: a date's features are its pixels."""

    def __init__(self, name: str, call: Any, *, logits: bool):
        self._name, self._call, self._logits = name, call, logits

    def encode(self, x: Tensor) -> Features:
        return (x,)

    def decode(self, a: Features, b: Features, background: Tensor | float = 1.0) -> Tensor:
        try:
            result = self._call(a[0], b[0])
        except Exception as error:  # a program of the user's may raise anything
            if isinstance(error, RuntimeError) and (out_of_memory(error) or failed(a[0].device)):
                raise  # the engine knows what to do
            raise self._refused(
                error, a[0], "if its sizes are bounded, export it with a larger Dim(max=...) or take a smaller --chunk"
            ) from None
        self._require_image(result, a[0])
        return result if self._logits else torch.logit(result.clamp(0, 1))

    def attempt(self, a: Tensor, b: Tensor, stride: int) -> Tensor:
        """Return what the program gives, float32 (y, x).

        Raises ModelError if that is no image or no probability, and for a program that writes to its input: a date
        is kept for its next pair.
        """
        given = [date.clone(memory_format=torch.channels_last) for date in (a, b)]  # as the engine's are
        try:
            with torch.inference_mode():
                result = self._call(*given)
        except Exception as error:  # likewise
            raise self._refused(error, a, f"expected to take all multiples of the stride, {stride}") from None
        self._require_image(result, a)
        if not all(torch.equal(date, kept) for date, kept in zip(given, (a, b), strict=True)):
            raise ModelError(
                f"{self._name} changes the dates that it is given, expected new tensors: x - y for x.sub_(y)"
            )
        least, most = result.nan_to_num(nan=0).aminmax()
        if not self._logits and (least < -_ROUNDED or most > 1 + _ROUNDED):
            raise ModelError(
                f"{self._name} returns {least:.3g} to {most:.3g}, expected a probability, 0 to 1: where these are "
                "logits, state output as 'logits'"
            )
        return result[0, 0].float()

    def _refused(self, error: Exception, date: Tensor, advice: str) -> ModelError:
        return ModelError(
            f"{self._name} fails on two dates of shape {tuple(date.shape)}: {_first_line(error)}; {advice}"
        )

    def _require_image(self, result: Any, date: Tensor) -> None:
        expected = (1, 1, *date.shape[2:])
        if not isinstance(result, Tensor):
            found = type(result).__name__
        elif tuple(result.shape) != expected or not result.is_floating_point():
            found = f"{result.dtype} {tuple(result.shape)}"
        else:
            return
        raise ModelError(f"{self._name} returns {found} for {tuple(date.shape)}, expected torch.float32 {expected}")


class ExportedModel(Model):
    """A model whose network is an exported program; it normalises for itself."""

    scale: float

    def mlm(self) -> dict[str, Any]:
        """Return what is known of the network as properties of the STAC Machine Learning Model extension (v1.4)."""
        return exported_properties(self)

    def statistics(self, reflectance: Array) -> Array:
        """Return centre 0 and spread 1 for each band: nothing is normalised."""
        return np.tile(np.array([0, 1], np.float32), (len(reflectance), 1))

    def affine(self, statistics: Array, scale: npt.ArrayLike = 1.0, offset: npt.ArrayLike = 0.0) -> Array:
        """Return (band, 2) from pixels to reflectance times the model's scale."""
        return (super().affine(statistics, scale, offset) * np.float32(self.scale)).astype(np.float32)

    def encode(self, pixels: Planes, affine: Array, valid: npt.NDArray[np.bool_]) -> EncodedDate:
        """Return the date as the program takes it. Raises ModelError if the shapes do not fit."""
        self._require_shapes(pixels, valid)
        pixels, valid = [to_host(plane) for plane in pixels], to_host(valid)
        rows, cols = (-(-n // self.stride) * self.stride for n in valid.shape)
        x = np.zeros((rows, cols, len(pixels)), np.float32)
        gain, bias = affine.T[:, :, None, None]
        scaled = np.where(valid, np.asarray(pixels) * gain + bias, np.float32(0))
        x[: valid.shape[0], : valid.shape[1]] = scaled.transpose(1, 2, 0)
        return self._engine.encode_input(x, valid)

    def _decode(self, a: EncodedDate, b: EncodedDate, background: float, finish: str, part: Part = WHOLE) -> Tensor:
        """Return what `Model._decode` does. Raises ModelError for NaN, which would pass for a lack of observation."""
        result = super()._decode(a, b, background, finish, part)
        seen = (a.valid & b.valid)[part]
        blank = result.isnan() if finish == "probability" else result == np.uint16(CODE_NODATA).astype(np.int16)
        lost = int((blank & seen).sum())
        if lost:
            raise ModelError(
                f"model {self.name!r} gives NaN at {lost} of {int(seen.sum())} pixels that both dates show, expected a "
                "number at each; pixels without observation are 0 in its input"
            )
        return result


def load_exported(path: Path, device: torch.device, expected: str | None = None) -> ExportedModel:
    """Return the model of `path` and the .json beside it, whose hash is `expected` if that is given.

    Raises ModelError if one of them is missing, damaged or another one, or the program does not do what the description
    says: it fails, gives NaN, or its results depend on what lies beyond the halo.
    """
    if path.suffix not in {".pt2", ".onnx"}:
        kind = path.suffix or "none"
        raise ModelError(f"{path.name}: found a file of type {kind}, expected .pt2, .onnx or .safetensors")
    data, description = content_of(path), content_of(path.with_suffix(".json"))
    digest = hashlib.sha256(data + description).hexdigest()
    require_hash(str(path), digest, expected)
    card = card_of(path.with_suffix(".json").name, description)
    bands, scale, stride, halo, logits = _described(card, path)
    try:
        call = _onnx(path.name, data, device) if path.suffix == ".onnx" else _program(path.name, data, device)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"cannot load {path.name}: {type(error).__name__}: {_first_line(error)}") from None
    network = _Program(path.name, call, logits=logits)
    _try(network, path.name, len(bands), scale, stride, halo, device)
    engine = Engine(network, device, stride=stride, halo=halo, bfloat16=False)
    model = ExportedModel(
        str(path), digest, engine, card, bands=bands, fine=len(bands), stride=stride, halo=halo, reach=halo
    )
    model.scale = scale
    return model


def _program(name: str, data: bytes, device: torch.device) -> torch.nn.Module:
    """Return the program of a .pt2. Raises ModelError for what `checked` refuses, and what torch does for others."""
    return torch.export.load(checked(name, data)).module().to(device)


def _onnx(name: str, data: bytes, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return an ONNX network as a function of two tensors.

    Raises ModelError without onnxruntime, or if the network does not take two dates and return one image.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ModelError(
            f"{name} needs onnxruntime, which is not installed: pip install -e '.[onnx]' in the checkout of s2cd"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    wanted = ["CUDAExecutionProvider"] * (device.type == "cuda") + ["CPUExecutionProvider"]
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(data, options, providers=providers)
    names, results = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))
    if (len(names), len(results)) != (2, 1):
        raise ModelError(f"{name} takes {names} and returns {results}, expected two dates and one image")

    def call(before: Tensor, after: Tensor) -> Tensor:
        dates = (np.ascontiguousarray(date.cpu().numpy()) for date in (before, after))
        (result,) = session.run(None, dict(zip(names, dates, strict=True)))
        return torch.from_numpy(result).to(before.device)

    return call


def _described(card: dict[str, Any], path: Path) -> tuple[tuple[str, ...], float, int, int, bool]:
    name = path.with_suffix(".json").name
    try:
        bands = tuple(canonical_band(b) for b in _field(card, "bands", list))
        scale = float(_field(card, "scale", int, float))
        stride, halo = _field(card, "stride", int), _field(card, "halo", int)
    except KeyError as error:
        raise ModelError(f"{name} lacks {error}, expected bands, scale, stride and halo") from None
    except (OverflowError, ConfigError) as error:
        raise ModelError(f"{name}: {_first_line(error)}") from None
    fits = _SCALES[0] <= scale <= _SCALES[1] and 2 <= stride <= _LARGEST_STRIDE and 0 <= halo <= _LARGEST_HALO
    if not bands or len(set(bands)) < len(bands) or not fits or stride % 2 or halo % stride:
        raise ModelError(
            f"{name}: expected bands, each once, a positive scale ({_SCALES[0]:g} to {_SCALES[1]:g}), an even stride "
            f"(2 to {_LARGEST_STRIDE}) and a halo that is a multiple of it (0 to {_LARGEST_HALO}), found bands "
            f"{', '.join(bands) or 'none'}, scale {scale:g}, stride {stride!s:.20}, halo {halo!s:.20}"
        )
    output = card.get("output", "logits")
    if output not in ("logits", "probability"):
        raise ModelError(f"{name}: output is {output!r:.60}, expected 'logits' or 'probability'")
    return bands, scale, stride, halo, output == "logits"


def _field(card: dict[str, Any], key: str, *kinds: type) -> Any:
    """Return a field of one of these types; bool is not int here. Raises KeyError, and ConfigError for others."""
    value = card[key]
    if type(value) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ConfigError(f"{key} is {value!r:.60}, expected {expected}")
    return value


def _try(program: _Program, name: str, bands: int, scale: float, stride: int, halo: int, device: torch.device) -> None:
    """Run the program on a high and a wide block, whole and cropped by a stride at both ends of their length.

    Raises ModelError if it fails, gives NaN, the middle, `halo` from the ends, notices that the block was cropped, or
    it is all the same what one of the dates shows.
    """
    length, middle = 2 * halo + 6 * stride, 4 * stride
    for axis in (2, 3):
        before, after = (date.to(device) for date in _random_dates(length, bands, scale, stride, axis))
        whole = program.attempt(before, after, stride)
        seen = before[0, 0] != 0
        lost = int((whole.isnan() & seen).sum())
        if lost:
            raise ModelError(
                f"{name} gives NaN at {lost} of {int(seen.sum())} pixels of two dates of random reflectance that lack "
                "one pixel, which is 0 in its input; expected a number at all others"
            )
        for which, dates in {"first": (after, after), "second": (before, before)}.items():
            if torch.equal(program.attempt(*dates, stride).nan_to_num(), whole.nan_to_num()):
                raise ModelError(
                    f"{name} gives the same whatever the {which} date shows, expected to compare two: torch.export "
                    "takes two examples that are one tensor for one input"
                )
        before, after = (date.narrow(axis, stride, length - 2 * stride) for date in (before, after))
        part = program.attempt(before, after, stride).narrow(axis - 2, halo, middle)
        _require_same(whole.narrow(axis - 2, halo + stride, middle), part, name, halo)


def _random_dates(length: int, bands: int, scale: float, stride: int, axis: int) -> list[Tensor]:
    """Return two dates (1, band, y, x), `length` pixels along `axis` and 4 strides along the other.

    They are cells of a stride with noise, unlike each other to all degrees. The first one lacks a pixel, and the second
    one is bright at its ends: what looks beyond the halo notices when they are cropped.
    """
    rng = np.random.default_rng(0)
    cells = rng.uniform(0.05, 0.4, (2, bands, length // stride, 4)).repeat(stride, axis=2).repeat(stride, axis=3)
    cells[1, :, :stride] += 0.4
    cells[1, :, -stride:] += 0.4
    before, after = cells + rng.uniform(0, 0.1, cells.shape)
    after = before + np.linspace(0, 1, 4 * stride) * (after - before)
    before[:, length // 2, 2 * stride] = 0
    dates = [torch.from_numpy((date * scale).astype(np.float32))[None] for date in (before, after)]
    return [date if axis == 2 else date.transpose(2, 3) for date in dates]


def _require_same(whole: Tensor, part: Tensor, name: str, halo: int) -> None:
    whole, part = (result.nan_to_num(nan=0).clamp(-30, 30) for result in (whole, part))
    gap = float((whole - part).abs().max())
    if gap > _TOLERANCE * max(1, float(whole.abs().max())):
        raise ModelError(
            f"{name}: results differ by up to {gap:.2g} between a block and the same cropped to a halo of {halo} "
            "pixels, expected none: state the halo and stride that it needs; what looks at the whole block, such as a "
            "mean, makes maps that depend on --chunk"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
