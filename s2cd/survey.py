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
from s2cd.model.device import to_host
from s2cd.model.normalise import Planes, decimation
from s2cd.radiometry import SCALE, is_scale_of_numbers
from s2cd.reader import Source, band_source, read_overviews, require_asset

BRIGHTEST = 20.0  # reflectance that nothing reaches, and that the brightest digital number of any scene exceeds


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

    Raises ReadError and GridError as reading does, and ReadError for a mask band that holds no whole numbers, and for
    another band that holds digital numbers with a scale of reflectance, or reflectance with one of digital numbers.
    """
    factor = decimation(scene.grid.shape)
    mask_band = () if scene.classes is None else (scene.classes,)
    planes = read_overviews((*scene.sources, *mask_band), scene.grid, factor)
    classes = _require_whole_numbers(planes.pop(), scene.classes) if scene.classes is not None else None
    _require_scales(planes, scene)
    pixels = np.stack(planes)
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


def _require_whole_numbers(classes: np.ndarray, source: Source) -> np.ndarray:
    if classes.dtype not in (np.uint8, np.uint16):
        raise ReadError(source.hrefs[0], f"a mask holds {classes.dtype}, expected uint8 or uint16")
    return classes


def _require_scales(planes: Planes, scene: SceneInput) -> None:
    """Documents need not say whether a raster holds digital numbers or reflectance: its pixels do."""
    for plane, source, scale in zip(planes, scene.sources, scene.scale, strict=True):
        if plane.dtype.kind in "iu":
            fits, what, expected = is_scale_of_numbers(scale), f"{plane.dtype}", SCALE
        else:
            largest = float(np.max(plane, initial=0, where=np.isfinite(plane)))
            fits = not 0 < largest < BRIGHTEST or not is_scale_of_numbers(scale)
            what, expected = f"{plane.dtype} up to {largest:.3g}", 1
        if not fits:
            raise ReadError(source.hrefs[0], f"holds {what}, but has the scale {scale:g}, expected about {expected:g}")


def observed(pixels: Planes, classes: np.ndarray | None, scene: SceneInput, mask: Mask, factor: int = 1) -> np.ndarray:
    """Return bool (y, x): True where every band has an observation and the mask lets it pass.

    `pixels`, an array (y, x) for each band, and `classes`, those of the mask band, are decimated by `factor` against
    the scene's grid; all but the first may be half as large, at 20 m. Arrays of CuPy give one of CuPy if classes do.
    """
    coarse = max(1, round(abs(scene.grid.transform[0]) / 10))  # pixels of 10 m in one of the grid, in which masks count
    seen: np.ndarray = np.ones_like(pixels[0], dtype=bool)
    half: np.ndarray = np.ones_like(seen, shape=tuple(-(-n // 2) for n in seen.shape))
    for plane, source in zip(pixels, scene.sources, strict=True):
        level = seen if plane.shape == seen.shape else half
        np.logical_and(level, plane != source.nodata, out=level)
        if plane.dtype.kind == "f":
            np.logical_and(level, np.isfinite(plane), out=level)
    if classes is not None:
        small = classes.shape != seen.shape  # at 20 m, whatever the scene says
        level, size = seen, factor * coarse
        if factor == 1 and (small or scene.classes_factor == 2):  # a quarter of the work
            level, size, classes = half, 2 * coarse, classes if small else classes[::2, ::2]
        if mask.tells_water and _has_black(pixels, scene) and not (seen.all() and half.all()):
            _add_black(seen, half, mask.black(classes, size), pixels, scene)
        level &= mask.from_classes(classes, size)
    if not half.all():
        seen &= _doubled(half, seen.shape)
    if classes is not None:
        return seen
    seen = to_host(seen)  # what looks at the spectrum is NumPy's and SciPy's, or a function of the user's
    reflectance = to_reflectance(to_host(pixels), scene, seen)
    return seen & mask.from_reflectance(reflectance, [s.band for s in scene.sources], factor * coarse)


def _has_black(pixels: Planes, scene: SceneInput) -> bool:
    """Tell whether the digital number of no observation can be the reflectance 0, too: where there is no offset."""
    whole = all(plane.dtype.kind in "iu" for plane in pixels)
    return whole and not any(scene.offset) and not any(source.nodata for source in scene.sources)


def _add_black(seen: np.ndarray, half: np.ndarray, black: np.ndarray, pixels: Planes, scene: SceneInput) -> None:
    """Mark as seen what may be black, bool at 10 or 20 m, and is not black in every band."""
    small = black.shape != seen.shape
    lit, half_lit = np.zeros_like(seen), np.zeros_like(half)
    for plane, source in zip(pixels, scene.sources, strict=True):
        np.logical_or(level := lit if plane.shape == lit.shape else half_lit, plane != source.nodata, out=level)
    if half_lit.any():
        lit |= _doubled(half_lit, lit.shape)
    seen |= lit & (_doubled(black, seen.shape) if small else black)
    half |= black if small else black[::2, ::2]


def _doubled(half: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return bool of `shape` with each pixel of `half` twice along both axes."""
    wide = (half.astype(np.uint16) * np.uint16(0x0101)).view(bool)[:, : shape[1]]
    result = np.empty_like(wide, shape=shape)
    result[::2], result[1::2] = wide, wide[: shape[0] // 2]
    return result


def to_reflectance(pixels: np.ndarray, scene: SceneInput, valid: np.ndarray) -> np.ndarray:
    """Return float32 reflectance (band, y, x), NaN where not `valid`."""
    scale, offset = (np.array(v, np.float32)[:, None, None] for v in (scene.scale, scene.offset))
    return np.where(valid, pixels * scale + offset, np.float32(np.nan)).astype(np.float32, copy=False)
