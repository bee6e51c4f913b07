"""The network, its weights, and how its inputs are normalised. The only place that knows torch."""

from s2cd.model.device import EncodedDate
from s2cd.model.ref import ModelRef
from s2cd.model.registry import BANDS, Model, list_models, load_model

__all__ = ["BANDS", "EncodedDate", "Model", "ModelRef", "list_models", "load_model"]
