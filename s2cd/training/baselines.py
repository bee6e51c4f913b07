"""Unsupervised change detection by classical means, each a map of change magnitude, to compare with.

All take two normalised dates, float32 (band, y, x), and return float32 (y, x), larger where more changed.
"""

from __future__ import annotations

import numpy as np
from scipy import linalg, stats
from scipy.ndimage import uniform_filter

from s2cd.model.normalise import Array


def change_vector(before: Array, after: Array) -> Array:
    """Length of the change vector (Malila, 1980)."""
    return np.sqrt(((after - before) ** 2).sum(axis=0))


def pca_difference(before: Array, after: Array, block: int = 5, components: int = 6) -> Array:
    """Distance from the mean in the principal components of blocks of the difference (after Celik, GRSL 2009)."""
    difference = after - before
    smooth = np.stack([uniform_filter(band, block) for band in difference])
    vectors = np.concatenate([difference, smooth]).reshape(2 * len(before), -1)
    vectors = vectors - vectors.mean(axis=1, keepdims=True)
    _, axes = np.linalg.eigh(np.cov(vectors))
    scores = axes[:, -components:].T @ vectors
    return np.sqrt((scores**2).sum(axis=0)).reshape(before.shape[1:]).astype(np.float32)


def ir_mad(before: Array, after: Array, iterations: int = 20) -> Array:
    """Square root of the chi-squared statistic of the iteratively reweighted MAD variates (Nielsen, TIP 2007)."""
    bands = len(before)
    x, y = (date.reshape(bands, -1).astype(np.float64) for date in (before, after))
    weight, chi = np.ones(x.shape[1]), np.ones(x.shape[1])
    for _ in range(iterations):
        both = np.concatenate([x, y])
        mean = (both * weight).sum(axis=1, keepdims=True) / weight.sum()
        both = both - mean
        covariance = (both * weight) @ both.T / weight.sum() + 1e-9 * np.eye(2 * bands)
        xx, xy, yy = covariance[:bands, :bands], covariance[:bands, bands:], covariance[bands:, bands:]
        squares, a = linalg.eigh(xy @ np.linalg.solve(yy, xy.T), xx)
        rho = np.sqrt(np.clip(squares, 1e-12, 1 - 1e-12))
        b = np.linalg.solve(yy, xy.T @ a) / rho
        chi = ((a.T @ both[:bands] - b.T @ both[bands:]) ** 2 / (2 * (1 - rho))[:, None]).sum(axis=0)
        weight = stats.chi2.sf(chi, bands)
    return np.sqrt(chi).reshape(before.shape[1:]).astype(np.float32)


BASELINES = {"cva": change_vector, "pca-difference": pca_difference, "ir-mad": ir_mad}
