"""Networks that users bring: an exported program and a small description beside it.

`name.pt2` is what `torch.export.save` writes for a module that takes two dates, float32 (1, band, y, x) on the 10 m
grid with y and x any multiples of `stride` (dynamic shapes), and returns float32 (1, 1, y, x). `name.onnx` is the same
as an ONNX network in one file, run by onnxruntime (the extra `onnx`). `name.json` says

    {"bands": ["blue", "red"], "scale": 1.0, "stride": 16, "halo": 64, "output": "logits"}

bands   common names, in the program's order
scale   what reflectance is multiplied by: 1, or 10000 for a network trained on digital numbers
stride  edges of blocks are multiples of it; an even number [10 m pixels]
halo    how far a result depends on its input; a multiple of `stride` [10 m pixels]
output  "logits" (default) or "probability"

Pixels without observation arrive as 0.
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
from s2cd.errors import ConfigError, ModelError
from s2cd.model.device import EncodedDate, Engine, to_host
from s2cd.model.network import Features
from s2cd.model.normalise import Planes
from s2cd.model.registry import Model, read_json

Array = npt.NDArray[np.float32]


class _Program:
    """The exported program behind the interface of `Network`: a date's features are its pixels."""

    def __init__(self, call: Any, *, logits: bool):
        self._call, self._logits = call, logits

    def encode(self, x: Tensor) -> Features:
        return (x,)

    def decode(self, a: Features, b: Features, background: Tensor | float = 1.0) -> Tensor:
        result = self._call(a[0], b[0])
        return result if self._logits else torch.logit(result.clamp(0, 1))


class ExportedModel(Model):
    """A model whose network is an exported program; it normalises for itself."""

    scale: float

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


def load_exported(path: Path, device: torch.device) -> ExportedModel:
    """Return the model of `path` and the .json beside it.

    Raises ModelError if one of them is missing or damaged, or the program does not do what the description says.
    """
    if path.suffix not in {".pt2", ".onnx"}:
        kind = path.suffix or "none"
        raise ModelError(f"{path.name}: found a file of type {kind}, expected .pt2, .onnx or .safetensors")
    card = read_json(path.with_suffix(".json"))
    bands, scale, stride, halo, logits = _described(card, path)
    try:
        call = _onnx(path, device) if path.suffix == ".onnx" else torch.export.load(path).module().to(device)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"cannot load {path.name}: {type(error).__name__}: {_first_line(error)}") from None
    network = _Program(call, logits=logits)
    _try(network, path, len(bands), stride, device)
    digest = hashlib.sha256(path.read_bytes() + path.with_suffix(".json").read_bytes()).hexdigest()
    engine = Engine(network, device, stride=stride, halo=halo, bfloat16=False)
    model = ExportedModel(
        str(path), digest, engine, card, bands=bands, fine=len(bands), stride=stride, halo=halo, reach=halo
    )
    model.scale = scale
    return model


def _onnx(path: Path, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the ONNX network of `path` as a function of two tensors.

    Raises ModelError without onnxruntime, or if the network does not take two dates and return one image.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ModelError(
            f"{path.name} needs onnxruntime, which is not installed: pip install -e '.[onnx]' in the checkout of s2cd"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    wanted = ["CUDAExecutionProvider"] * (device.type == "cuda") + ["CPUExecutionProvider"]
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=providers)
    names, results = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))
    if (len(names), len(results)) != (2, 1):
        raise ModelError(f"{path.name} takes {names} and returns {results}, expected two dates and one image")

    def call(before: Tensor, after: Tensor) -> Tensor:
        dates = (np.ascontiguousarray(date.cpu().numpy()) for date in (before, after))
        (result,) = session.run(None, dict(zip(names, dates, strict=True)))
        return torch.from_numpy(result).to(before.device)

    return call


def _described(card: dict[str, Any], path: Path) -> tuple[tuple[str, ...], float, int, int, bool]:
    name = path.with_suffix(".json").name
    try:
        bands = tuple(canonical_band(b) for b in card["bands"])
        scale, stride, halo = float(card["scale"]), int(card["stride"]), int(card["halo"])
    except KeyError as error:
        raise ModelError(f"{name} lacks {error}, expected bands, scale, stride and halo") from None
    except (TypeError, ValueError, OverflowError, ConfigError) as error:
        raise ModelError(f"{name}: {_first_line(error)}") from None
    output = card.get("output", "logits")
    if not bands or stride < 2 or stride % 2 or halo < 0 or halo % stride or not np.isfinite(scale) or scale <= 0:
        raise ModelError(
            f"{name}: expected bands, a positive scale, an even stride and a halo that is a multiple of it, found "
            f"{len(bands)} bands, scale {scale:g}, stride {stride}, halo {halo}"
        )
    if output not in {"logits", "probability"}:
        raise ModelError(f"{name}: output is {output!r}, expected 'logits' or 'probability'")
    return bands, scale, stride, halo, output == "logits"


def _try(network: _Program, path: Path, bands: int, stride: int, device: torch.device) -> None:
    """Run the program on two small blocks of different shape."""
    for rows, cols in ((4 * stride, 4 * stride), (5 * stride, 6 * stride)):
        block = torch.zeros(1, bands, rows, cols, device=device)
        try:
            with torch.inference_mode():
                shape = tuple(network.decode((block,), (block,)).shape)
        except Exception as error:
            raise ModelError(
                f"{path.name} fails on two dates of shape {tuple(block.shape)}: {_first_line(error)}"
            ) from None
        if shape != (1, 1, rows, cols):
            raise ModelError(f"{path.name} returns {shape} for {tuple(block.shape)}, expected {(1, 1, rows, cols)}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
