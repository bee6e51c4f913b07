"""What materials reflect, and how crops, meadows and woods change through the year.

Surface reflectances of the seven bands, rounded from what Sentinel-2 L2A shows over western Europe; the order
is that of `BANDS`.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from s2cd.catalog.bands import BANDS as MSI_BANDS
from s2cd.simulate.texture import Array

BANDS = ("blue", "green", "red", "nir", "nir08", "swir16", "swir22")
GSD = tuple(next(b.gsd for b in MSI_BANDS if b.common_name == name) for name in BANDS)
WAVELENGTHS = np.array([next(b.wavelength for b in MSI_BANDS if b.common_name == n) for n in BANDS], "f4")


def _spectrum(*values: float) -> Array:
    return np.array(values, np.float32)


CROP = _spectrum(0.025, 0.062, 0.027, 0.460, 0.485, 0.200, 0.088)
MEADOW = _spectrum(0.032, 0.072, 0.040, 0.370, 0.395, 0.225, 0.115)
FLOWERING = _spectrum(0.045, 0.150, 0.125, 0.440, 0.460, 0.215, 0.105)
RIPE = _spectrum(0.065, 0.110, 0.150, 0.300, 0.325, 0.335, 0.215)
STUBBLE = _spectrum(0.084, 0.118, 0.152, 0.265, 0.290, 0.365, 0.275)
SOIL = _spectrum(0.080, 0.104, 0.130, 0.190, 0.210, 0.285, 0.245)
LEAVES = _spectrum(0.017, 0.038, 0.020, 0.390, 0.415, 0.175, 0.072)
TWIGS = _spectrum(0.035, 0.050, 0.056, 0.165, 0.185, 0.205, 0.130)
NEEDLES = _spectrum(0.014, 0.028, 0.016, 0.235, 0.250, 0.098, 0.042)
LAKE = _spectrum(0.026, 0.032, 0.017, 0.010, 0.010, 0.007, 0.005)
RIVER = _spectrum(0.040, 0.058, 0.042, 0.020, 0.018, 0.010, 0.007)
FLOODWATER = _spectrum(0.056, 0.075, 0.070, 0.042, 0.038, 0.014, 0.010)
GARDEN = _spectrum(0.042, 0.068, 0.055, 0.280, 0.300, 0.205, 0.125)
ASPHALT = _spectrum(0.080, 0.090, 0.095, 0.120, 0.128, 0.155, 0.145)
TRACK = _spectrum(0.110, 0.140, 0.170, 0.230, 0.245, 0.300, 0.265)
EARTHWORKS = _spectrum(0.145, 0.185, 0.235, 0.295, 0.315, 0.380, 0.335)
CUT = _spectrum(0.048, 0.068, 0.085, 0.190, 0.210, 0.275, 0.190)
BURNT = _spectrum(0.030, 0.035, 0.041, 0.075, 0.085, 0.150, 0.155)
ROOFS = np.stack(
    [
        _spectrum(0.085, 0.105, 0.160, 0.215, 0.225, 0.255, 0.235),  # clay tiles
        _spectrum(0.075, 0.082, 0.088, 0.110, 0.115, 0.130, 0.125),  # slate
        _spectrum(0.170, 0.185, 0.200, 0.230, 0.240, 0.260, 0.245),  # gravel, concrete
        _spectrum(0.290, 0.310, 0.325, 0.345, 0.345, 0.325, 0.290),  # light sheeting
    ]
)


class Cover(IntEnum):
    """Land cover of one object of the map."""

    WHEAT = 0
    BARLEY = 1
    RAPE = 2
    MAIZE = 3
    BEET = 4
    MEADOW = 5
    BROADLEAF = 6
    CONIFER = 7
    LAKE = 8
    RIVER = 9
    GARDEN = 10


WOODS = (Cover.BROADLEAF, Cover.CONIFER)

# Day of the year: green-up (half cover), its time constant, ripening, first and last harvest; winter cover.
_CALENDAR = np.array(
    [
        (96, 14, 188, 201, 228, 0.30),  # wheat
        (86, 13, 166, 184, 202, 0.35),  # barley
        (72, 14, 178, 192, 212, 0.45),  # rape
        (160, 8, 252, 262, 292, 0.00),  # maize
        (154, 10, 320, 272, 315, 0.00),  # beet
    ],
    np.float32,
)
_TEXTURE = np.array([0.03, 0.03, 0.03, 0.04, 0.04, 0.05, 0.17, 0.20, 0.02, 0.04, 0.22], np.float32)
_PATCHINESS = np.array([0.10, 0.10, 0.08, 0.14, 0.14, 0.12, 0.06, 0.0, 0.0, 0.0, 0.0], np.float32)


def texture_strength(cover: np.ndarray) -> Array:
    """Relative standard deviation of brightness from pixel to pixel, per object."""
    return _TEXTURE[cover]


def patchiness(cover: np.ndarray) -> Array:
    """Standard deviation of plant cover within an object."""
    return _PATCHINESS[cover]


def harvest_days(cover: np.ndarray, chance: Array) -> np.ndarray:
    """Day of the year at which each object is harvested, 0 for what is not; `chance` in [0, 1) spreads it."""
    crop = np.minimum(cover, Cover.BEET)
    first, last = _CALENDAR[crop, 3], _CALENDAR[crop, 4]
    return np.where(cover <= Cover.BEET, first + chance * (last - first), 0).astype(np.uint16)


def object_spectra(cover: np.ndarray, chance: Array, harvest: np.ndarray, day: float) -> tuple[Array, Array, Array]:
    """Return what lies bare and what grows at a day of the year: (object, band), (object, band), plant cover.

    cover (object,) is the Cover code, chance (object, 4) in [0, 1) individualises the objects and harvest
    (object,) is the day of harvest. Cover is in [0, 1]; a pixel shows bare + cover * (green - bare).
    """
    n = len(cover)
    bare = np.broadcast_to(SOIL, (n, 7)).copy()
    bare *= (0.72 + 0.5 * chance[:, 0])[:, None]
    green = np.broadcast_to(CROP, (n, 7)).copy()
    fraction = np.zeros(n, np.float32)
    is_crop = cover <= Cover.BEET
    _grow_crops(cover, chance, harvest, day, is_crop, (bare, green, fraction))
    meadow = cover == Cover.MEADOW
    green[meadow] = MEADOW
    fraction[meadow] = _meadow_cover(chance[meadow], day)
    leaf = _logistic((day - 112 - 14 * chance[:, 1]) / 5) - _logistic((day - 298 - 20 * chance[:, 2]) / 7)
    wood = cover == Cover.BROADLEAF
    bare[wood], green[wood], fraction[wood] = TWIGS, LEAVES, leaf[wood]
    for code, spectrum in ((Cover.CONIFER, NEEDLES), (Cover.LAKE, LAKE), (Cover.RIVER, RIVER), (Cover.GARDEN, GARDEN)):
        bare[cover == code] = green[cover == code] = spectrum
    tint = 1 + 0.16 * (chance[:, 3:4] - 0.5) * np.linspace(1.2, 0.4, 7, dtype=np.float32)
    return bare * tint, green * tint, fraction


def _grow_crops(
    cover: np.ndarray, chance: Array, harvest: np.ndarray, day: float, crop: np.ndarray, out: tuple[Array, ...]
) -> None:
    bare, green, fraction = out
    start, pace, ripening, _, _, winter = _CALENDAR[cover[crop]].T
    late = 12 * (chance[crop, 1] - 0.5)
    standing = day < harvest[crop]
    ploughed = day - harvest[crop] - 10 - 45 * chance[crop, 2]
    grown = winter + (0.95 - winter) * _logistic((day - start - late) / pace)
    regrowth = np.where(chance[crop, 3] < 0.45, 0.6 * _logistic((ploughed - 25) / 6), 0.0)
    fraction[crop] = np.where(standing, grown, regrowth)
    ripe = np.where(standing, _logistic((day - ripening - late) / 5), 0)[:, None]
    colour = CROP * (1 - ripe) + RIPE * (0.92 + 0.16 * chance[crop, 2:3]) * ripe
    bloom = np.exp(-(((day - 122 - late) / 11) ** 2)) * (cover[crop] == Cover.RAPE) * standing
    green[crop] = colour + (FLOWERING - colour) * 0.85 * bloom[:, None]
    straw = np.where(standing | (cover[crop] == Cover.BEET), 0, _logistic(-ploughed / 1.5))[:, None]
    bare[crop] = bare[crop] * (1 - straw) + STUBBLE * straw


def _meadow_cover(chance: Array, day: float) -> Array:
    """Mown two or three times a year where intensively used, grazed evenly elsewhere."""
    season = 0.55 + 0.33 * np.exp(-(((day - 160) / 75) ** 2))
    since = np.stack([day - first - 18 * chance[:, 1] for first in (136, 186, 236)])
    mown = np.exp(-np.maximum(since, 0) / 14) * (since >= 0)
    return (season * (1 - 0.5 * mown.max(axis=0) * (chance[:, 2] < 0.4))).astype(np.float32)


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -40, 40)))
