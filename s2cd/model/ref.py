"""How a model travels to the workers: as a name and a hash, never as weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from s2cd.model.registry import Model, list_models, load_expected, load_model, plain_name


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model by name (or path) and the sha256 of its weights, to be loaded where it is used."""

    name: str
    hash: str
    device: str = "auto"

    @classmethod
    def of(cls, name: str, device: str = "auto") -> ModelRef:
        """Return the reference of the model called `name` here. Raises ModelError if there is none."""
        name = absolute_name(name)
        return cls(name, load_model(name, device=device).hash, device)

    def load(self) -> Model:
        """Return the model, loaded once per process. Raises ModelError if its weights are other ones here."""
        return load_expected(self.name, self.device, self.hash)


def absolute_name(name: str) -> str:
    """Return a model's name so that it means the same in every process: a file by its whole path."""
    name = plain_name(name)
    return name if name in list_models() or not os.path.isfile(name) else str(Path(name).absolute())
