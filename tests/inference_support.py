"""Scenes through the engine: what several tests compute."""

from __future__ import annotations

from typing import Any

import dask.threaded
import numpy as np
from dask.typing import Key

from s2cd.catalog.scene import Scene
from s2cd.cube import common_grid
from s2cd.inference import Levels, change_blocks
from s2cd.masks import Mask
from s2cd.model import ModelRef, load_model
from s2cd.pairs import consecutive_pairs
from s2cd.survey import Survey, scene_input, survey_scene

MODEL = load_model("generic", device="cpu")
REF = ModelRef.of("generic", "cpu")
MASK = Mask()


def surveys_of(scenes: list[Scene]) -> dict[str, Survey]:
    inputs = [scene_input(s, MODEL.bands, common_grid([s], MODEL.bands), MASK) for s in scenes]
    return {i.id: survey_scene(i, MASK, REF) for i in inputs}


def as_they_are(codes: np.ndarray, origin: tuple[int, int]) -> np.ndarray:
    return codes


def graph_of(
    scenes: list[Scene], chunk: int, ref: ModelRef = REF
) -> tuple[dict[Key, Any], list[list[Key]], dict[Key, int]]:
    """Return the graph of all consecutive pairs, its chunks, and which worker has each."""
    surveys, pairs = surveys_of(scenes), consecutive_pairs(scenes)
    levels = [Levels.of(surveys[pair.before.id], surveys[pair.after.id], MODEL) for pair in pairs]
    return change_blocks(pairs, levels, ref, MASK, chunk, as_they_are)


def run_codes(scenes: list[Scene], chunk: int) -> np.ndarray:
    """Return the codes of all pairs (pair, y, x)."""
    blocks = dask.threaded.get(*graph_of(scenes, chunk)[:2])
    return np.block([[np.stack(block.parts) for block in row] for row in blocks])
