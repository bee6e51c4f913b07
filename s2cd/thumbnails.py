"""Small true-colour pictures of a scene, for quicklooks; read from overviews."""

from __future__ import annotations

import numpy as np

from s2cd.catalog.scene import Scene
from s2cd.cube import finest_grid
from s2cd.reader import band_source, read_overviews

RGB = ("red", "green", "blue")
BRIGHTEST = 0.28
GAMMA = 1.5


def thumbnail(scene: Scene, max_pixels: int = 512) -> np.ndarray | None:
    """Return uint8 (y, x, 3) of at most about `max_pixels` along the longer side, black where unobserved.

    None for a scene that lacks a visible band. Raises ReadError and GridError as reading does.
    """
    if any(band not in scene.assets for band in RGB):
        return None
    grid = finest_grid(scene, RGB)
    factor = max(1, -(-max(grid.shape) // max_pixels))
    channels = []
    planes = read_overviews([band_source(scene, band) for band in RGB], grid, factor)
    for band, pixels in zip(RGB, planes, strict=True):
        asset = scene.assets[band]
        shown = np.clip((pixels * asset.scale + asset.offset) / BRIGHTEST, 0, 1) ** (1 / GAMMA) * 255
        channels.append(np.where(pixels == asset.nodata, 0, np.maximum(shown, 1)))
    return np.stack(channels, axis=-1).astype(np.uint8)
