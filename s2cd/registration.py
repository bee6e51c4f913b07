"""How far two images of one place are displaced against each other: sub-pixel phase correlation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import fft, ndimage, optimize

from s2cd.masks import dilate

MIN_SIZE = 16
SEARCH = 8
REFINEMENTS = 2  # of a shift where a part is masked, at most: each leaves about a third of the error, and takes 0.1 s
SETTLED = 0.05  # pixels: after a correction as small as that, half as much is left
SMALL = 0.15  # pixels: a shift that seems smaller is not worth that
AROUND = 17  # pixels along a side whose mean is taken from a pixel: what is left is detail
VIEW = 1024  # pixels along a side that are looked at
HIGHEST = 0.25  # frequency that is compared, in cycles a pixel
FREQUENCIES = (fft.fftfreq, fft.rfftfreq)


class Shift(NamedTuple):
    """Displacement of the later image in pixels: what lies at (y, x) before lies at (y + dy, x + dx) after.

    `quality` in [0, 1] is the correlation of the two images' detail once they are put in place; below about 0.3 the
    shift means little.
    """

    dy: float
    dx: float
    quality: float


def shift_band(bands: Sequence[str]) -> str:
    """Return the band in which displacement is measured: red, which has much detail, or else the first."""
    return "red" if "red" in bands else bands[0]


def middle_span(size: int) -> slice:
    """Return the middle of `size` pixels: VIEW of them, or all."""
    start = max(0, (size - VIEW) // 2)
    return slice(start, min(start + VIEW, size))


def phase_shift(before: np.ndarray, after: np.ndarray, valid: np.ndarray | None = None) -> Shift:
    """Measure the displacement between two images by phase correlation.

    The peak of the phase correlation gives whole pixels (Kuglin and Hines 1975); the rest is the slope of the phase of
    the cross-power spectrum over the frequencies that both images share, weighted by their power (Stone et al. 2001).
    Only edges are compared, not brightness, so that sun and season matter little.

    Args:
        before, after: one band of the two dates (y, x), any real dtype, the same shape.
        valid: bool (y, x), True where both have an observation; NaN is never valid.

    Returns the `Shift`; all NaN with quality 0 where there is too little to compare (fewer than 16 pixels along a side,
    less than a tenth valid, or no detail). Shifts beyond 8 pixels are not looked for.
    """
    first, second = (np.asarray(image, dtype=np.float32) for image in (before, after))
    usable = np.isfinite(first) & np.isfinite(second)
    if valid is not None:
        usable &= valid
    nothing = Shift(float("nan"), float("nan"), 0.0)
    if min(first.shape) < MIN_SIZE or usable.mean() < 0.1:
        return nothing
    detail, moved = _details(first, second, usable)
    if not detail.any() or not moved.any():
        return nothing
    whole = _whole_pixels(detail, moved)
    shift = np.add(whole, _rest(*_overlap(detail, moved, whole)))
    for _ in range(REFINEMENTS if not usable.all() and np.hypot(*shift) >= SMALL else 0):
        correction = _rest(*_put_in_place(first, second, usable, shift))
        shift = shift + correction
        if np.hypot(*correction) < SETTLED:
            break
    if np.isnan(shift).any():
        return nothing
    return Shift(float(shift[0]), float(shift[1]), _quality(detail, moved, (shift[0], shift[1])))


def _details(first: np.ndarray, second: np.ndarray, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Local contrast of two images, its outliers tamed, 0 where they are not usable.

    The mean around a pixel is that of usable ones: with others in it, the rims of a mask that both dates share would be
    detail that has not moved.
    """
    weight = np.maximum(ndimage.uniform_filter(usable.astype(np.float32), AROUND), 1e-6)
    kept = ~dilate(~usable, 2)

    def detail(image: np.ndarray) -> np.ndarray:
        mean = ndimage.uniform_filter(np.where(usable, image, 0), AROUND) / weight
        found = np.where(kept, image - mean, np.float32(0))
        some = found[::4][kept[::4]]  # rows enough for a median
        spread = np.median(np.abs(some)) * np.float32(1.4826) if some.size else 0
        return np.clip(found, -4 * spread, 4 * spread) if spread > 0 else np.zeros_like(found)

    return detail(first), detail(second)


def _put_in_place(
    first: np.ndarray, second: np.ndarray, usable: np.ndarray, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the detail of both images, the second moved back by `shift`, where both are usable then.

    A mask that stands still holds back what moves behind it; what is left of the shift it holds back less.
    """
    filled = np.where(usable, second, np.median(second[usable]))
    moved = ndimage.shift(filled, -shift, order=1, mode="nearest")
    both = usable & (ndimage.shift(usable.astype(np.float32), -shift, order=1, mode="constant") > 0.99)
    return _details(first, moved, both)


def _windowed(image: np.ndarray) -> np.ndarray:
    """Fade an image out towards its edges, which would else correlate with themselves."""
    rows, cols = (np.hanning(n + 2)[1:-1].astype(image.dtype) for n in image.shape)
    return image * rows[:, None] * cols


def _cross_power(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    shape = [fft.next_fast_len(n, real=True) for n in first.shape]
    return np.conj(fft.rfft2(_windowed(first), shape)) * fft.rfft2(_windowed(second), shape)


def _whole_pixels(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    cross = _cross_power(first, second)
    power = np.abs(cross)
    # Between phase only (sharp, noisy) and plain correlation (blunt, robust).
    cross /= np.sqrt(power) + 1e-12 * power.max()
    shape = [fft.next_fast_len(n, real=True) for n in first.shape]
    surface = fft.irfft2(cross, shape)
    reach = [min(SEARCH, n // 4) for n in first.shape]
    near = np.roll(surface, reach, axis=(0, 1))[: 2 * reach[0] + 1, : 2 * reach[1] + 1]
    peak = np.unravel_index(np.argmax(near), near.shape)
    return int(peak[0]) - reach[0], int(peak[1]) - reach[1]


def _overlap(first: np.ndarray, second: np.ndarray, shift: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Parts of two images that show the same pixels once the second is moved back by `shift`."""
    cuts = [
        (slice(max(0, -s), n - max(0, s)), slice(max(0, s), n + min(0, s)))
        for s, n in zip(shift, first.shape, strict=True)
    ]
    (rows, moved_rows), (cols, moved_cols) = cuts
    return first[rows, cols], second[moved_rows, moved_cols]


def _rest(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Shift of less than about a pixel, where the low frequencies' correlation is greatest; NaN if they share none."""
    cross = _cross_power(first, second)
    fy, fx = (
        frequencies(fft.next_fast_len(n, real=True)) for n, frequencies in zip(first.shape, FREQUENCIES, strict=True)
    )
    # High frequencies are aliased and noisy; above half of Nyquist two Sentinel-2 dates hardly agree.
    cross = cross[np.abs(fy) < HIGHEST][:, fx < HIGHEST].astype(np.complex128)
    fy, fx = fy[np.abs(fy) < HIGHEST], fx[fx < HIGHEST]
    radius = np.hypot(fy[:, None], fx[None, :])
    cross[(radius >= HIGHEST) | (radius == 0)] = 0
    power = np.abs(cross)
    if not power.any():
        return float("nan"), float("nan")
    cross /= np.sqrt(power) + 1e-12 * power.max()

    def negative(shift: np.ndarray) -> float:
        return -float(np.real(np.exp(2j * np.pi * fy * shift[0]) @ cross @ np.exp(2j * np.pi * fx * shift[1])))

    simplex = [(0.0, 0.0), (0.4, 0.0), (0.0, 0.4)]
    options = {"initial_simplex": simplex, "xatol": 1e-3, "fatol": 1e-9 * max(abs(negative(np.zeros(2))), 1e-300)}
    found = optimize.minimize(negative, np.zeros(2), method="Nelder-Mead", options=options)
    return float(found.x[0]), float(found.x[1])


def _quality(first: np.ndarray, second: np.ndarray, shift: tuple[float, float]) -> float:
    moved = ndimage.shift(second, (-shift[0], -shift[1]), order=1, mode="constant")
    known = (first != 0) & (moved != 0)
    if known.sum() < MIN_SIZE:
        return 0.0
    with np.errstate(invalid="ignore"):  # one of them may be the same everywhere
        correlation = np.corrcoef(first[known], moved[known])[0, 1]
    return float(np.clip(np.nan_to_num(correlation), 0, 1))
