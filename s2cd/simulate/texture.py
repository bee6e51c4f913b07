"""Random fields: fractal noise, and noise that belongs to a cell rather than to a pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]  # float32 throughout
IntArray = npt.NDArray[Any]


def resample(grid: Array, shape: tuple[int, int], step: float, start: float = 1.0) -> Array:
    """Interpolate `grid` (rows, columns) by cubic B-splines at `start + i / step`, i = 0 ... shape - 1."""
    rows = _interpolate(grid, shape[0], step, start)
    return np.ascontiguousarray(_interpolate(rows.T, shape[1], step, start).T)


def _interpolate(grid: Array, count: int, step: float, start: float) -> Array:
    position = start + np.arange(count) / step
    base = np.floor(position).astype(np.intp)
    t = (position - base).astype(np.float32)[:, None]
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    last = grid.shape[0] - 1
    out = np.zeros((count, grid.shape[1]), np.float32)
    for k, weight in enumerate(weights):
        out += weight / 6 * grid[np.clip(base - 1 + k, 0, last)]
    return out


def fractal(
    rng: np.random.Generator,
    shape: tuple[int, int],
    scale: float,
    octaves: int = 4,
    persistence: float = 0.5,
    stretch: float = 1.0,
) -> Array:
    """Fractal noise (y, x) of zero mean and unit variance; its largest structures measure `scale` pixels.

    Each octave halves the size and multiplies the amplitude by `persistence`; `stretch` elongates along x.
    """
    count = sum(1 for k in range(octaves) if scale / 2**k >= 2)
    spacing = [scale / 2**k for k in range(count)]
    amplitudes = [persistence**k for k in range(count)]
    field = np.zeros((1, 1), np.float32)
    for k, (step, amplitude) in enumerate(zip(spacing, amplitudes, strict=True)):
        nodes = (int(shape[0] / step) + 6, int(shape[1] / (step * stretch)) + 6)
        finer = amplitude * rng.standard_normal(nodes, np.float32)
        field = finer + resample(field, nodes, 2.0) if k else finer
    if count:
        field = _interpolate(field, shape[0], spacing[-1], 1.0).T
        field = _interpolate(np.ascontiguousarray(field), shape[1], spacing[-1] * stretch, 1.0).T
    power = 0.18 * sum(a**2 for a in amplitudes)  # what repeated cubic B-splines leave of white noise's variance
    if count < octaves:
        field = field + persistence**count * rng.standard_normal(shape, np.float32)
        power += persistence ** (2 * count)
    return np.ascontiguousarray(field) / np.float32(np.sqrt(power))


def hash01(seed: int, *keys: IntArray) -> Array:
    """Uniform numbers in [0, 1) that depend on the integer `keys` alone (splitmix64 finaliser)."""
    state = np.uint64(seed * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
    mixed: IntArray = np.broadcast_to(state, np.broadcast_shapes(*(np.shape(k) for k in keys)))
    for key in keys:
        mixed = mixed ^ np.asarray(key).astype(np.int64).view(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return ((mixed >> np.uint64(40)).astype(np.float32)) / np.float32(1 << 24)


def cells(rng: np.random.Generator, y: Array, x: Array, spacing: float) -> tuple[IntArray, Array]:
    """Voronoi cells of a jittered grid: the cell's number per pixel, and the distance to its border [px]."""
    rows, cols = int(y.max() / spacing) + 4, int(x.max() / spacing) + 4
    centre_y = ((np.arange(rows)[:, None] - 1.5 + rng.uniform(-0.42, 0.42, (rows, cols))) * spacing).astype("f4")
    centre_x = ((np.arange(cols)[None] - 1.5 + rng.uniform(-0.42, 0.42, (rows, cols))) * spacing).astype("f4")
    home_y = np.clip(np.floor(y / spacing).astype(np.int32) + 2, 1, rows - 2)
    home_x = np.clip(np.floor(x / spacing).astype(np.int32) + 2, 1, cols - 2)
    nearest = np.full(y.shape, np.inf, np.float32)
    second = np.full(y.shape, np.inf, np.float32)
    cell = np.zeros(y.shape, np.int32)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            number = (home_y + dy) * cols + home_x + dx
            d = np.hypot(y - centre_y.ravel()[number], x - centre_x.ravel()[number])
            closer = d < nearest
            second = np.where(closer, nearest, np.minimum(second, d))
            cell[closer] = number[closer]
            nearest = np.where(closer, d, nearest)
    return cell, (second - nearest) / 2
