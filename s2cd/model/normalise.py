"""How a scene is normalised before the network sees it.

Each band of each scene becomes (reflectance - centre) / spread, with the median and a spread from the 10th and 90th
percentile of the scene's own valid pixels. What a homogeneous atmosphere and the sun do to a band is affine:

    measured = path reflectance + transmittance * cos(sun) / cos(sun of the other date) * ground

so haze, a gain of the sensor, another sun elevation over flat ground and a processing offset change centre and
spread in proportion and cancel exactly, band by band. What varies within a scene (shaded slopes, cirrus in parts of
it, a shift) does not cancel; the network learns to ignore it from simulated cases.

What two seasons do to a whole scene does not cancel either. Its strength, one number a pair (`background`), is taken
from the evidence of change: a difference counts by how far it exceeds what is usual between these two dates.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

LOW, HIGH = 10.0, 90.0
SIGMAS = 2.5631  # between the 10th and 90th percentile of a normal distribution
LEAST_SPREAD = 0.01  # reflectance; open sea would otherwise be stretched to noise
ROWS = 16  # of the 20 m grid, prepared at a time
LIMIT = 6.0  # normalised values are clipped at +- LIMIT
SKETCH = 128  # a sketch has at least so many pixels along a side, and less than twice as many
TYPICAL = 0.36  # normalised difference that is usual between two seasons
USUAL = 0.9  # share of the pixels, those that differ least, that tell what is usual: what changed is among the others
LEAST_BACKGROUND = 0.5  # of TYPICAL: less is as good as none, and noise must not be stretched to change
MOST_BACKGROUND = 2.0  # of TYPICAL: between two seasons, too, something may have changed
FEWEST = 64  # pixels seen on both dates that tell a background

DIGITAL = tuple(map(np.dtype, (np.uint8, np.uint16, np.int16, np.float32)))  # what rasters hold; code is compiled for

Array = npt.NDArray[np.float32]
Planes = Sequence[np.ndarray] | np.ndarray
"""(band, y, x), or an array (y, x) for each band."""


def statistics(reflectance: Array) -> Array:
    """Return float32 (band, 2): centre and spread [reflectance] of each band.

    `reflectance` is float32 (band, y, x), NaN or infinite = no observation, best decimated: a few 10,000 pixels are
    enough.
    A band without any observation gets centre 0 and spread 1.
    """
    flat = _finite(np.asarray(reflectance, np.float32)).reshape(len(reflectance), -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all-NaN bands are dealt with below
        low, centre, high = np.nanpercentile(flat, (LOW, 50, HIGH), axis=1)
    spread = np.maximum((high - low) / SIGMAS, LEAST_SPREAD)
    result = np.stack([centre, spread], axis=1).astype(np.float32)
    result[np.isnan(centre)] = (0, 1)
    return result


def _finite(reflectance: Array) -> Array:
    """Return pixels with NaN for what is infinite, as a division by zero leaves it."""
    return np.where(np.isfinite(reflectance), reflectance, np.float32(np.nan))


def affine(stats: Array, scale: npt.ArrayLike = 1.0, offset: npt.ArrayLike = 0.0) -> Array:
    """Return float32 (band, 2), gain and bias with normalised = gain * pixel + bias.

    reflectance = scale * pixel + offset; `scale` and `offset` are numbers or one number per band.
    """
    stats = np.asarray(stats, np.float64)
    centre, spread = stats[:, 0], stats[:, 1]
    gain = np.broadcast_to(np.asarray(scale, np.float64), centre.shape) / spread
    bias = (np.asarray(offset, np.float64) - centre) / spread
    return np.stack([gain, bias], axis=1).astype(np.float32)


def decimation(shape: tuple[int, ...]) -> int:
    """Return the power of two that leaves at least 256 pixels along the shorter side, as overviews do."""
    return 1 << max(0, (min(shape) // 256).bit_length() - 1)


def sketch(reflectance: Array, stats: Array) -> npt.NDArray[np.float16]:
    """Return a small picture of a date, normalised: float16 (band, y, x), NaN = no observation.

    `reflectance` is what `statistics` was given; sketches of two dates of one grid fit each other.
    """
    step = max(1, min(reflectance.shape[1:]) // SKETCH)
    centre, spread = np.asarray(stats, np.float32).T[:, :, None, None]
    seen = _finite(reflectance[:, ::step, ::step])
    return np.clip((seen - centre) / spread, -LIMIT, LIMIT).astype(np.float16)


def background(a: np.ndarray, b: np.ndarray) -> float:
    """Return how much two dates differ everywhere, in units of TYPICAL: what season and light do to a whole scene.

    The mean absolute difference over the bands of two sketches, and over the pixels seen on both, without the tenth
    that differs most; from LEAST_BACKGROUND to MOST_BACKGROUND, and 1 where too few pixels are seen on both.
    """
    difference = np.abs(a.astype(np.float32) - b.astype(np.float32)).mean(axis=0)
    difference = np.sort(difference[np.isfinite(difference)])
    if len(difference) < FEWEST:
        return 1.0
    usual = float(difference[: int(USUAL * len(difference))].mean()) / TYPICAL
    return min(max(LEAST_BACKGROUND, usual), MOST_BACKGROUND)


def network_input(
    pixels: Planes, gains: Array, valid: npt.NDArray[np.bool_], fine: int, stride: int
) -> npt.NDArray[np.float16]:
    """Return float16 (h, w, channels) on the 20 m grid: fine bands as 2 x 2 blocks, coarse bands (odd), observed.

    `pixels` holds an array (y, x) of any real type for each band: the first `fine` at 10 m, as `valid` is, the others
    at 20 m or replicated from it. Right and bottom are filled up to a multiple of `stride`: as not observed, after an
    odd edge was repeated once. So is a 20 m pixel of which only a part is observed: half of it against the whole of
    the other date would be change.
    """
    from s2cd.model.compiled import put_coarse, put_fine  # Numba: not for what only plans

    shape, edge = valid.shape, tuple((0, n % 2) for n in valid.shape)
    if any(n % 2 for n in shape):
        pixels = [np.pad(plane, edge, mode="edge") if plane.shape == shape else plane for plane in pixels]
        valid = np.pad(valid, edge, mode="edge")
    rows, cols = (-(-n // stride) * stride // 2 for n in shape)
    channels = 4 * fine + len(pixels) - fine + 1
    out = torch.empty((rows, cols, channels), dtype=torch.float16, device="cpu")  # numpy rounds slowly
    height, width = valid.shape[0] // 2, valid.shape[1] // 2
    coarse = [plane if plane.shape == (height, width) else plane[::2, ::2] for plane in pixels[fine:]]
    planes = [_compilable(plane) for plane in (*pixels[:fine], *coarse)]
    out[height:], out[:, width:] = 0, 0
    for top in range(0, height, ROWS):  # a few rows at a time stay in the cache while the channels are interleaved
        span = slice(top, min(top + ROWS, height))
        double = slice(2 * span.start, 2 * span.stop)
        strip, rows_seen = np.empty((span.stop - span.start, width, channels), np.float32), valid[double]
        pairs = rows_seen[::2] & rows_seen[1::2]
        seen = pairs[:, ::2] & pairs[:, 1::2]
        for band, (plane, (gain, bias)) in enumerate(zip(planes, gains, strict=True)):
            if band < fine:
                put_fine(plane[double], gain, bias, np.float32(LIMIT), seen, 4 * band, strip)
            else:
                put_coarse(plane[span], gain, bias, np.float32(LIMIT), seen, 3 * fine + band, strip)
        strip[..., -1] = seen
        out[span, :width] = torch.from_numpy(strip)
    return out.numpy()


def _compilable(plane: np.ndarray) -> np.ndarray:
    """Return a plane as it is, or as float32 if it has no type that code is compiled for."""
    plane = np.asarray(plane)
    return plane if plane.dtype in DIGITAL else plane.astype(np.float32)
