"""STAC metadata of a model: the Machine Learning Model extension, https://stac-extensions.github.io/mlm/."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2cd.model.registry import Model

EXTENSION = "https://stac-extensions.github.io/mlm/v1.4.0/schema.json"


def mlm_properties(model: Model) -> dict[str, Any]:
    """Return the `mlm:` properties of `model`, for a STAC item or collection that lists `EXTENSION`."""
    return {
        "mlm:name": model.name,
        "mlm:architecture": str(model.card.get("architecture", "siamese U-Net")),
        "mlm:tasks": ["change-detection", "semantic-segmentation"],
        "mlm:framework": "pytorch",
        "mlm:framework_version": str(model.card.get("framework_version", "")),
        "mlm:total_parameters": int(model.card.get("cost", {}).get("parameters", 0)),
        "mlm:pretrained": True,
        "mlm:accelerator": "cuda",
        "mlm:accelerator_constrained": False,
        "mlm:input": [_input(model, date) for date in ("before", "after")],
        "mlm:output": [_output()],
        "mlm:hyperparameters": {"stride": model.stride, "halo": model.halo, "hash": model.hash},
    }


def _input(model: Model, date: str) -> dict[str, Any]:
    return {
        "name": date,
        "bands": list(model.bands),
        "input": {
            "shape": [-1, len(model.bands), -1, -1],
            "dim_order": ["batch", "bands", "height", "width"],
            "data_type": "float32",
        },
        "description": "Reflectance on the 10 m grid; the 20 m bands replicated.",
        "value_scaling": [
            {"type": "processing", "format": "python", "expression": "s2cd.model.normalise:affine"},
        ],
        "pre_processing_function": {"format": "python", "expression": "s2cd.model.normalise:network_input"},
    }


def _output() -> dict[str, Any]:
    return {
        "name": "change_probability",
        "tasks": ["change-detection"],
        "result": {
            "shape": [-1, -1, -1],
            "dim_order": ["batch", "height", "width"],
            "data_type": "float32",
        },
        "classification:classes": [
            {"value": 0, "name": "unchanged", "description": "No change of interest"},
            {"value": 1, "name": "changed", "description": "A change of interest between the two dates"},
        ],
    }
