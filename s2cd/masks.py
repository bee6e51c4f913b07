"""What counts as a valid observation: by scene classification or another mask band, a spectral test, or a function."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from s2cd.catalog.bands import SCL
from s2cd.config import class_values
from s2cd.errors import ConfigError

# Classes of the Sen2Cor scene classification (Sentinel-2 L2A ATBD, S2-PDGS-MPC-ATBD-L2A): 0 no data, 1 saturated or
# defective, 2 dark or shadow of the terrain, 3 cloud shadow, 4 vegetation, 5 not vegetated, 6 water, 7 unclassified,
# 8 and 9 cloud of medium and high probability, 10 thin cirrus, 11 snow or ice.
INVALID_CLASSES = (0, 1, 3, 8, 9, 10)
GROWN_CLASSES = (3, 8, 9, 10)
NO_DATA, WATER = 0, 6
DILATION, MOST_DILATION = 6, 60
MOST_CLASS = 255
SMALL_RADIUS = 8  # up to here shifted copies of a mask are faster than a distance transform


@dataclass(frozen=True, slots=True)
class Mask:
    """How valid observations are told; small and picklable, so that tasks can carry it.

    invalid    values of the mask band that are no observation of the ground: classes, or percentages of a cloud
               probability
    dilation   pixels of 10 m by which clouds and shadows are widened, since their thin edges are missed: 6 are 60 m
    function   "package.module:name" of a function that takes the place of the mask band, and of the spectral test of
               scenes without one: called with float32 reflectance (band, y, x) and the names of its bands, it returns
               bool (y, x), True where there is cloud; it must look at each pixel by itself, and be importable on the
               workers
    band       key of the asset that holds the mask: the scene classification, or one that takes its place, of
               which every `invalid` value is widened
    """

    invalid: tuple[int, ...] = INVALID_CLASSES
    dilation: int = DILATION
    function: str | None = None
    band: str = SCL

    def __post_init__(self) -> None:
        """Raise ConfigError for values that no mask band holds, and for a dilation of no whole pixels up to 600 m."""
        if not all(isinstance(value, int) and 0 <= value <= MOST_CLASS for value in self.invalid):
            raise ConfigError(f"invalid: found {self.invalid!r}, expected whole numbers from 0 to {MOST_CLASS}")
        if not isinstance(self.dilation, int) or not 0 <= self.dilation <= MOST_DILATION:
            raise ConfigError(f"dilation: found {self.dilation!r}, expected 0 to {MOST_DILATION} pixels of 10 m")

    @classmethod
    def parse(cls, text: str, invalid: Sequence[int] | str | None = None, dilation: int = DILATION) -> Mask:
        """Return the mask that `text` names: "scl", the key of another asset, or "package.module:name".

        invalid    values of the band from 0 to 255, or a text such as "3,8-10"; those of INVALID_CLASSES by default, to
                   be given for a band other than SCL
        dilation   pixels of 10 m

        Raises ConfigError for a function that cannot be imported, a band without `invalid` values, values for a
        function, and what are no values.
        """
        if ":" in text:
            load_function(text)
            if invalid is not None:
                raise ConfigError(f"mask_classes {list(invalid)} mean nothing to the mask function {text!r}")
            return cls(dilation=dilation, function=text)
        if text != SCL and invalid is None:
            raise ConfigError(f"mask {text!r} needs mask_classes: the values that are no observation, such as 40-100")
        try:
            return cls(INVALID_CLASSES if invalid is None else class_values(invalid), dilation, band=text)
        except ValueError as error:
            raise ConfigError(f"mask_classes: found {invalid!r}, {error}") from None

    @property
    def extra_assets(self) -> tuple[str, ...]:
        """Keys of assets that this mask needs beside the bands and SCL."""
        return extra_assets(self.function or self.band)

    @property
    def description(self) -> dict[str, object]:
        """What a map's item says of the mask; the dilation in metres."""
        told = {"function": self.function} if self.function else {"band": self.band, "invalid": list(self.invalid)}
        return {**told, "dilation": 10 * self.dilation}

    @property
    def reach(self) -> int:
        """From how many 10 m pixels away a pixel's mask can change: the halo that exact chunks need."""
        return self.dilation + (2 * ROOF_RADIUS if self.function is None else 0)

    def from_classes(self, classes: np.ndarray, factor: int = 1) -> np.ndarray:
        """Return bool (y, x), True where the mask band (y, x), decimated by `factor` against 10 m, is valid."""
        grow = GROWN_CLASSES if self.band == SCL else self.invalid
        return valid_mask(classes, invalid=self.invalid, grow=grow, dilation=self.dilation / factor)

    @property
    def tells_water(self) -> bool:
        """Whether the mask band says what is water."""
        return self.function is None and self.band == SCL

    def black(self, classes: np.ndarray, factor: int = 1) -> np.ndarray:
        """Return bool (y, x), True where a band without any light is an observation all the same: on water.

        Atmospheric correction leaves water less than nothing in the infrared, which archives that took the offset out
        store as 0, their nodata. Beside pixels that were not observed a 0 is one of these: bands end at different ones.
        """
        return (classes == WATER) & ~dilate(classes == NO_DATA, self.dilation / factor)

    def from_reflectance(self, reflectance: np.ndarray, bands: Sequence[str], factor: int = 1) -> np.ndarray:
        """Return bool (y, x), True where `function`, or else `cloud_test`, finds no cloud within `dilation`.

        `reflectance` is float32 (band, y, x) of `bands`, NaN where there is no observation, decimated by
        `factor`. Raises ConfigError for a function that fails or returns something else.
        """
        if self.function is not None:
            cloud = _call(self.function, reflectance, tuple(bands))
        else:
            cloud = cloud_test(reflectance, bands, factor)
        return ~dilate(cloud, self.dilation / factor)


def extra_assets(mask: str) -> tuple[str, ...]:
    """Return the keys of assets that a search has to keep for what `Mask.parse` understands."""
    return () if mask == SCL or ":" in mask else (mask,)


@cache
def load_function(name: str) -> Callable[[np.ndarray, tuple[str, ...]], np.ndarray]:
    """Import a mask function. Raises ConfigError if there is none of that name, or its module cannot be imported."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything
        hint = ": set PYTHONPATH" if isinstance(error, ModuleNotFoundError) else ""
        expected = f'expected "package.module:name" that can be imported{hint}'
        raise ConfigError(f"mask function {name!r}: {_one_line(error)}, {expected}") from error
    if not callable(function):
        raise ConfigError(f"mask function {name!r}: found {type(function).__name__}, expected a function")
    return function


def _call(name: str, reflectance: np.ndarray, bands: tuple[str, ...]) -> np.ndarray:
    """Return what a mask function finds. What could be taken for a mask, such as percentages, would hide anything."""
    function, shape = load_function(name), reflectance.shape[1:]
    try:
        cloud = function(reflectance, bands)
    except MemoryError:  # no fault of the function's
        raise
    except Exception as error:  # a function of the user's may raise anything
        raise ConfigError(f"mask function {name!r}: {_one_line(error)}, expected bool of shape {shape}") from error
    found = f"{cloud.dtype} of shape {cloud.shape}" if isinstance(cloud, np.ndarray) else type(cloud).__name__
    if found != f"bool of shape {shape}":
        raise ConfigError(f"mask function {name!r}: found {found}, expected bool of shape {shape}")
    return cloud


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def valid_mask(
    scl: np.ndarray,
    *,
    invalid: Collection[int] = INVALID_CLASSES,
    grow: Collection[int] = GROWN_CLASSES,
    dilation: float = 0,
) -> np.ndarray:
    """Tell valid observations from the scene classification layer, or from another mask band.

    Args:
        scl: class codes (y, x) of an unsigned type.
        invalid: classes that are no observation of the ground, 0 to 255.
        grow: those of them (clouds, shadows) that are widened.
        dilation: by how many pixels of `scl`, in a disc.

    Returns bool (y, x), True where the observation is valid.
    """
    grown = dilate(_isin(scl, set(grow) & set(invalid)), dilation)
    return ~(_isin(scl, invalid) | grown)


def dilate(mask: np.ndarray, radius: float) -> np.ndarray:
    """Widen a bool mask (y, x) by a disc of `radius` pixels; exact, and local to `radius` pixels."""
    if radius < 1 or not mask.any():
        return mask
    if radius > SMALL_RADIUS:
        return _distance(~mask) <= radius
    reach = int(radius)
    runs = [mask]  # runs[k]: widened by k pixels to the left and right
    for k in range(1, reach + 1):
        run = runs[-1].copy()
        run[:, k:] |= mask[:, :-k]
        run[:, :-k] |= mask[:, k:]
        runs.append(run)
    out = runs[reach].copy()
    for k in range(1, reach + 1):
        run = runs[int((radius**2 - k**2) ** 0.5)]
        out[k:] |= run[:-k]
        out[:-k] |= run[k:]
    return out


def _distance(mask: np.ndarray) -> np.ndarray:
    """Return the distance of each pixel to the nearest False, by SciPy or, for an array of CuPy, by CuPy."""
    if isinstance(mask, np.ndarray):
        return ndimage.distance_transform_edt(mask)
    from cupyx.scipy.ndimage import distance_transform_edt

    return distance_transform_edt(mask)


def _isin(scl: np.ndarray, classes: Collection[int]) -> np.ndarray:
    table = np.zeros(256 if scl.dtype == np.uint8 else 1 << 16, dtype=bool)
    table[list(classes)] = True
    return np.asarray(table, like=scl).take(scl)  # half of the time of table[scl]


# Thresholds of the spectral test, in reflectance, and the half-width in 10 m pixels of what a roof can be.
BRIGHT_BLUE = 0.22
WHITENESS = 0.25
HAZE = 0.08
CIRRUS = 0.02
ROOF_RADIUS = 8


def cloud_test(reflectance: np.ndarray, bands: Sequence[str], factor: int = 1) -> np.ndarray:
    """Find thick clouds by their spectrum where no scene classification exists (L1C).

    A simple test: it misses thin cloud and every cloud shadow, and takes bright snow for cloud. A pixel is cloud if it
    is bright in blue, white over the visible bands, hazy (blue well above half of red: the haze optimised transform of
    Zhang et al. 2002, with the threshold of Fmask, Zhu and Woodcock 2012), and part of something wider than a roof.
    Bright in the cirrus band is cloud as well.

    Args:
        reflectance: float32 (band, y, x) top-of-atmosphere reflectance, NaN where there is no observation.
        bands: their canonical names; without blue, green and red nothing is found but cirrus.
        factor: decimation against 10 m.

    Returns bool (y, x), True where there is cloud.
    """
    band = dict(zip(bands, reflectance, strict=True))
    cloud = np.zeros(reflectance.shape[1:], dtype=bool)
    if {"blue", "green", "red"} <= band.keys():
        blue, green, red = band["blue"], band["green"], band["red"]
        mean = (blue + green + red) / 3
        spread = abs(blue - mean) + abs(green - mean) + abs(red - mean)
        cloud = (blue > BRIGHT_BLUE) & (spread < WHITENESS * mean) & (blue - 0.5 * red > HAZE)
        cloud = _open(cloud, ROOF_RADIUS / factor)
    if "cirrus" in band:
        cloud |= band["cirrus"] > CIRRUS
    return cloud


def _open(mask: np.ndarray, radius: float) -> np.ndarray:
    """Drop what no disc of `radius` pixels fits into."""
    if radius < 1 or not mask.any():
        return mask
    inside = np.pad(mask, 1, mode="edge")
    core = ndimage.distance_transform_edt(inside)[1:-1, 1:-1] > radius
    return dilate(core, radius) & mask if core.any() else core
