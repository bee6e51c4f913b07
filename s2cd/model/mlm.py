"""STAC metadata of a model: the Machine Learning Model extension, https://stac-extensions.github.io/mlm/."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2cd.model.exported import ExportedModel
    from s2cd.model.registry import Model

EXTENSION = "https://stac-extensions.github.io/mlm/v1.4.0/schema.json"


def mlm_properties(model: Model) -> dict[str, Any]:
    """Return the `mlm:` properties of `model`, for a STAC item or collection that lists `EXTENSION`."""
    return {
        **_common(model),
        **_total_parameters(model.card),
        "mlm:architecture": str(model.card.get("architecture", "siamese U-Net")),
        "mlm:framework": "pytorch",
        "mlm:framework_version": str(model.card.get("framework_version", "")),
        "mlm:pretrained": True,
        "mlm:accelerator": "cuda",
        "mlm:accelerator_constrained": False,
        "mlm:input": _inputs(
            model,
            description="Reflectance on the 10 m grid; the 20 m bands replicated.",
            value_scaling=[{"type": "processing", "format": "python", "expression": "s2cd.model.normalise:affine"}],
            pre_processing_function={"format": "python", "expression": "s2cd.model.normalise:network_input"},
        ),
    }


def exported_properties(model: ExportedModel) -> dict[str, Any]:
    """Return what `mlm_properties` does for a network that a user brought: no more than is known of it."""
    architecture = model.card.get("architecture")
    return {
        **_common(model),
        "mlm:architecture": architecture if architecture and isinstance(architecture, str) else "unknown",
        "mlm:framework": "ONNX" if model.name.endswith(".onnx") else "pytorch",
        "mlm:input": _inputs(
            model,
            description="Reflectance on the 10 m grid, coarser bands replicated; 0 where there is no observation.",
            value_scaling=None if model.scale == 1 else [{"type": "scale", "value": 1 / model.scale}],
            pre_processing_function=None,
        ),
    }


def _common(model: Model) -> dict[str, Any]:
    return {
        "mlm:name": model.name,
        "mlm:tasks": ["change-detection", "semantic-segmentation"],
        "mlm:output": [_output()],
        "mlm:hyperparameters": {"stride": model.stride, "halo": model.halo, "hash": model.hash},
    }


def _total_parameters(card: dict[str, Any]) -> dict[str, int]:
    cost = card.get("cost")
    count = cost.get("parameters") if isinstance(cost, dict) else None
    return {"mlm:total_parameters": count} if isinstance(count, int) else {}


def _inputs(model: Model, **how: Any) -> list[dict[str, Any]]:
    shape = {
        "shape": [-1, len(model.bands), -1, -1],
        "dim_order": ["batch", "bands", "height", "width"],
        "data_type": "float32",
    }
    return [{"name": date, "bands": list(model.bands), "input": shape, **how} for date in ("before", "after")]


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
