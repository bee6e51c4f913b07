"""What comes between the ground and the file: light, air, clouds, optics, noise.

Every function takes surface reflectance (band, y, x) float32 and returns a new array of the same shape and
dtype; NaN stays NaN (`shift` spreads it as far as its kernel reaches). They serve as nuisances in training as
well: none of them is a change.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import correlate1d

from s2cd.simulate.texture import Array


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


def gain(reflectance: Array, factors: npt.ArrayLike) -> Array:
    """Multiply each band by its factor (calibration, bidirectional reflectance)."""
    return reflectance * np.asarray(factors, np.float32)[:, None, None]


def shift(reflectance: Array, dy: float, dx: float, sigma: float = 0.5) -> Array:
    """Displace the image by (dy, dx) pixels, |d| < 1.5, while blurring it by a Gaussian of `sigma` pixels.

    A displaced Gaussian is the point spread function and the misregistration in one separable kernel.
    """
    radius = int(np.ceil(3 * sigma)) + 2
    k = np.arange(-radius, radius + 1)
    out = np.empty_like(reflectance)
    kernels = []
    for d in (dy, dx):
        weights = np.exp(-((k + d) ** 2) / (2 * sigma**2))
        kernels.append((weights / weights.sum()).astype(np.float32))
    for band in range(len(reflectance)):
        rows = correlate1d(reflectance[band], kernels[0], axis=0, mode="nearest")
        correlate1d(rows, kernels[1], axis=1, mode="nearest", output=out[band])
    return out


def noise(reflectance: Array, rng: np.random.Generator, level: float = 0.0012) -> Array:
    """Add sensor noise: a floor of `level` and as much again for each 0.2 of reflectance (shot noise)."""
    spread = level * np.sqrt(1 + np.maximum(reflectance, 0) / 0.2)
    return reflectance + spread * rng.standard_normal(reflectance.shape, np.float32)
