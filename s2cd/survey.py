"""A first, cheap look at a scene through its overviews: how much of it is valid, how bright it is.

The network normalises each date by robust statistics of the whole scene. They are computed here once, so that every
chunk uses the same few numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from s2cd.catalog.scene import Grid, Scene
from s2cd.errors import ReadError
from s2cd.masks import Mask
from s2cd.model import ModelRef
from s2cd.model.normalise import decimation
from s2cd.reader import Source, band_source, read_overview, require_asset


@dataclass(frozen=True, slots=True)
class SceneInput:
    """What a task needs of a scene: URLs and a few numbers, no STAC document.

    `scale` and `offset` have one entry per source: reflectance = scale * digital number + offset. `classes` is the
    mask band, if the scene has one, with pixels `classes_factor` times as large as those of `grid`.
    """

    id: str
    grid: Grid
    sources: tuple[Source, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    classes: Source | None
    classes_factor: int


@dataclass(frozen=True, slots=True)
class Survey:
    """Numbers about one scene.

    valid_fraction  share of the tile's pixels with a valid observation, in [0, 1]
    statistics      float32 (band, 2), centre and spread of valid reflectance, as `Model.statistics` gives them
    dark            float32 (band,), 0.5 percentile of valid reflectance, for the offset check
    sketch          float16 (band, y, x), a small picture as `Model.sketch` gives it
    """

    id: str
    valid_fraction: float
    statistics: np.ndarray
    dark: np.ndarray
    sketch: np.ndarray


def scene_input(scene: Scene, bands: Sequence[str], grid: Grid, mask: Mask) -> SceneInput:
    """Reduce `scene` to what reading `bands` and the mask band (SCL only where it has one) on `grid` takes.

    Raises ConfigError for a band the scene does not offer.
    """
    needed = mask.function is None and (mask.band in scene.assets or bool(mask.extra_assets))
    classes = require_asset(scene, mask.band) if needed else None
    sources = tuple(band_source(scene, band) for band in bands)
    assets = [scene.assets[band] for band in bands]
    return SceneInput(
        id=scene.id,
        grid=grid,
        sources=sources,
        scale=tuple(a.scale for a in assets),
        offset=tuple(a.offset for a in assets),
        classes=band_source(scene, mask.band) if classes else None,
        classes_factor=round(classes.grid.transform[0] / grid.transform[0]) if classes else 1,
    )


def survey_scene(scene: SceneInput, mask: Mask, model: ModelRef) -> Survey:
    """Survey one scene from its overviews.

    Raises ReadError and GridError as reading does, and ReadError for a mask band that holds no whole numbers.
    """
    factor = decimation(scene.grid.shape)
    pixels = np.stack([read_overview(source, scene.grid, factor) for source in scene.sources])
    classes = None if scene.classes is None else _read_classes(scene.classes, scene.grid, factor)
    valid = observed(pixels, classes, scene, mask, factor)
    reflectance = to_reflectance(pixels, scene, valid)
    network = model.load()
    statistics = network.statistics(reflectance)
    return Survey(
        id=scene.id,
        valid_fraction=float(valid.mean()),
        statistics=statistics,
        dark=np.nanpercentile(reflectance, 0.5, axis=(1, 2)).astype(np.float32)
        if valid.any()
        else np.full(len(pixels), np.nan, np.float32),
        sketch=network.sketch(reflectance, statistics),
    )


def _read_classes(source: Source, grid: Grid, factor: int) -> np.ndarray:
    classes = read_overview(source, grid, factor)
    if classes.dtype not in (np.uint8, np.uint16):
        raise ReadError(source.hrefs[0], f"a mask holds {classes.dtype}, expected uint8 or uint16")
    return classes


def observed(
    pixels: np.ndarray, classes: np.ndarray | None, scene: SceneInput, mask: Mask, factor: int = 1
) -> np.ndarray:
    """Return bool (y, x): True where every band has an observation and the mask lets it pass.

    `pixels` uint16 (band, y, x) and `classes` (y, x), those of the mask band, are decimated by `factor` against the
    10 m grid.
    """
    seen: np.ndarray = np.ones(pixels.shape[1:], bool)
    for plane, source in zip(pixels, scene.sources, strict=True):
        seen &= plane != source.nodata
    if classes is not None and factor == 1 and scene.classes_factor == 2:  # replicated: a quarter of the work at 20 m
        native = mask.from_classes(classes[::2, ::2], 2)
        return seen & native.repeat(2, axis=0).repeat(2, axis=1)[: seen.shape[0], : seen.shape[1]]
    if classes is not None:
        return seen & mask.from_classes(classes, factor)
    reflectance = to_reflectance(pixels, scene, seen)
    return seen & mask.from_reflectance(reflectance, [s.band for s in scene.sources], factor)


def to_reflectance(pixels: np.ndarray, scene: SceneInput, valid: np.ndarray) -> np.ndarray:
    """Return float32 reflectance (band, y, x), NaN where not `valid`."""
    scale, offset = (np.array(v, np.float32)[:, None, None] for v in (scene.scale, scene.offset))
    return np.where(valid, pixels * scale + offset, np.float32(np.nan)).astype(np.float32, copy=False)
