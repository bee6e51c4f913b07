"""What comes between the ground and the file: light, air, clouds, optics, noise.

Every function takes surface reflectance (band, y, x) float32 and returns a new array of the same shape and
dtype; NaN stays NaN (`shift` spreads it as far as its kernel reaches). None of them is a change: they are what
`s2cd.training.robustness` disturbs images with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import correlate1d

from s2cd.simulate.texture import Array

LEAST_WEIGHT = 1e-4  # of a kernel's sum; what is less moves reflectance by less than noise does


def haze(reflectance: Array, wavelengths: npt.ArrayLike, tau: float) -> Array:
    """Scatter light in an aerosol layer of optical depth `tau` at 550 nm.

    Angstrom's law with exponent 1.3, single scattering: path reflectance tau/8 at 550 nm, two-way transmittance
    exp(-tau/4) (forward scattering returns most of what is removed). A negative tau over-corrects.
    """
    depth = tau * (np.asarray(wavelengths, np.float64) / 550.0) ** -1.3
    path = (depth / 8).astype(np.float32)[:, None, None]
    transmittance = np.exp(-depth / 4).astype(np.float32)[:, None, None]
    return reflectance * transmittance + path


def cirrus(reflectance: Array, wavelengths: npt.ArrayLike, opacity: Array) -> Array:
    """Veil the ground by ice cloud of `opacity` (y, x) in [0, 1]: white up to 1 um, darker in the SWIR."""
    wave = np.asarray(wavelengths, np.float32)
    bright = np.where(wave < 1000, 0.55, 0.32).astype(np.float32)[:, None, None]
    return reflectance + opacity * (bright - reflectance)


def clouds(reflectance: Array, wavelengths: npt.ArrayLike, opacity: Array, brightness: Array) -> Array:
    """Cover the ground by water cloud of `opacity` (y, x) in [0, 1] whose relative `brightness` (y, x) is about 1."""
    wave = np.asarray(wavelengths, np.float32)
    colour = np.interp(wave, (490, 865, 1610, 2200), (0.66, 0.68, 0.48, 0.36)).astype(np.float32)
    out = np.empty_like(reflectance)
    for band in range(len(reflectance)):
        out[band] = reflectance[band] + opacity * (colour[band] * brightness - reflectance[band])
    return out


def shadow(reflectance: Array, wavelengths: npt.ArrayLike, depth: Array) -> Array:
    """Take away the direct light where `depth` (y, x) in [0, 1] says so; the sky's light, bluish, remains."""
    wave = np.asarray(wavelengths, np.float32)
    direct = np.interp(wave, (490, 560, 665, 850, 1610, 2200), (0.55, 0.62, 0.68, 0.76, 0.85, 0.88))
    return reflectance * (1 - direct.astype(np.float32)[:, None, None] * depth)


def sun_angle(
    reflectance: Array, slope_y: Array, slope_x: Array, elevation: float, azimuth: float, strength: float = 0.8
) -> Array:
    """Shade relief: multiply by (cos i / cos z) ** strength, i the sun's incidence on the slope, z its zenith angle.

    slope_y and slope_x (y, x) are dz/dy towards the south (down the rows) and dz/dx towards the east, in metres
    per metre; elevation and azimuth (clockwise from north) of the sun are in degrees.
    """
    up, turn = np.radians(elevation), np.radians(azimuth)
    tilt = 1 / (np.tan(up) * np.ones_like(slope_x))
    cos_ratio = (1 + tilt * (slope_y * np.cos(turn) - slope_x * np.sin(turn))) / np.sqrt(1 + slope_y**2 + slope_x**2)
    factor = np.maximum(cos_ratio, 0.15) ** strength
    return reflectance * factor.astype(np.float32)


# Weights of the isotropic, volumetric and geometric kernel by wavelength in nm, a global mean of MODIS (Roy et al.,
# Remote Sensing of Environment 176, 2016).
_BRDF_AT = (482, 561, 655, 865, 1610, 2200)
_BRDF = (
    (0.0774, 0.1306, 0.1690, 0.3093, 0.3430, 0.2658),
    (0.0372, 0.0580, 0.0574, 0.1535, 0.1154, 0.0639),
    (0.0079, 0.0178, 0.0227, 0.0330, 0.0453, 0.0387),
)


def brdf(
    reflectance: Array, wavelengths: npt.ArrayLike, view_zenith: Array, sun_zenith: float, relative_azimuth: float
) -> Array:
    """Look at ground seen from the zenith from `view_zenith` (y, x) instead; across Sentinel-2's swath up to 10.5.

    Angles in degrees; at a relative azimuth of 0 the sun stands behind the viewer. The ratio of reflectances is that
    of the kernels Ross-Thick and Li-Sparse-Reciprocal (Lucht et al., IEEE TGRS 38, 2000).
    """
    sun, azimuth = np.radians(sun_zenith), np.radians(relative_azimuth)
    seen = _kernels(sun, np.radians(np.asarray(view_zenith, np.float64)), azimuth)
    above = _kernels(sun, np.zeros(()), azimuth)
    weights = [np.interp(np.asarray(wavelengths, np.float64), _BRDF_AT, row)[:, None, None] for row in _BRDF]
    oblique, straight = (weights[0] + weights[1] * volume + weights[2] * shade for volume, shade in (seen, above))
    return reflectance * (oblique / straight).astype(np.float32)


def _kernels(sun: float, view: npt.NDArray[np.float64], azimuth: float) -> tuple[Any, Any]:
    """Volumetric and geometric kernel; angles in radians."""
    across = np.tan(sun) * np.tan(view)
    phase = np.cos(sun) * np.cos(view) + np.sin(sun) * np.sin(view) * np.cos(azimuth)
    angle = np.arccos(np.clip(phase, -1, 1))
    volume = ((np.pi / 2 - angle) * phase + np.sin(angle)) / (np.cos(sun) + np.cos(view)) - np.pi / 4
    secants = 1 / np.cos(sun) + 1 / np.cos(view)
    distance = np.tan(sun) ** 2 + np.tan(view) ** 2 - 2 * across * np.cos(azimuth)
    t = np.arccos(np.clip(2 * np.sqrt(distance + (across * np.sin(azimuth)) ** 2) / secants, -1, 1))
    overlap = (t - np.sin(t) * np.cos(t)) * secants / np.pi
    return volume, overlap - secants + 0.5 * (1 + phase) / (np.cos(sun) * np.cos(view))


def gain(reflectance: Array, factors: npt.ArrayLike) -> Array:
    """Multiply each band by its factor (calibration)."""
    return reflectance * np.asarray(factors, np.float32)[:, None, None]


def shift(reflectance: Array, dy: float, dx: float, sigma: float = 0.5) -> Array:
    """Displace the image by (dy, dx) pixels, |d| < 1.5, while blurring it by a Gaussian of `sigma` pixels.

    A displaced Gaussian is the point spread function and the misregistration in one separable kernel.
    """
    radius = int(np.ceil(3 * sigma)) + 2
    k = np.arange(-radius, radius + 1)
    out = np.empty_like(reflectance)
    (down, top), (along, left) = (_cut(np.exp(-((k + d) ** 2) / (2 * sigma**2)), radius) for d in (dy, dx))
    for band in range(len(reflectance)):
        rows = correlate1d(reflectance[band], down, axis=0, mode="nearest", origin=top)
        correlate1d(rows, along, axis=1, mode="nearest", output=out[band], origin=left)
    return out


def _cut(weights: npt.NDArray[np.float64], middle: int) -> tuple[Array, int]:
    """Return a kernel of the sum 1 without the weights that hardly count at its ends, and its origin for SciPy.

    A pixel that is not observed would spread NaN as far as they reach. The weight in the middle stays.
    """
    counts = np.flatnonzero(weights > LEAST_WEIGHT * weights.sum())
    first, last = min(counts[0], middle), max(counts[-1], middle)
    kept = weights[first : last + 1]
    return (kept / kept.sum()).astype(np.float32), int(middle - first - len(kept) // 2)


def noise(reflectance: Array, rng: np.random.Generator, level: float = 0.0012) -> Array:
    """Add sensor noise: a floor of `level` and as much again for each 0.2 of reflectance (shot noise)."""
    spread = level * np.sqrt(1 + np.maximum(reflectance, 0) / 0.2)
    return reflectance + spread * rng.standard_normal(reflectance.shape, np.float32)
