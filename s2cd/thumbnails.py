"""Small true-colour pictures of a scene, for quicklooks; read from overviews."""

from __future__ import annotations

import numpy as np

from s2cd.catalog.scene import Grid, Scene
from s2cd.cube import finest_grid, window_of
from s2cd.reader import band_source, read_overviews, read_window

RGB = ("red", "green", "blue")
BRIGHTEST = 0.28
GAMMA = 1.5


def thumbnail(scene: Scene, part: Grid | None = None, max_pixels: int = 512) -> np.ndarray | None:
    """Return uint8 (y, x, 3) of at most about `max_pixels` along the longer side, black where unobserved.

    part  a grid within that of the scene: what to show of it

    None for a scene that lacks a visible band. Raises ReadError and GridError as reading does.
    """
    if any(band not in scene.assets for band in RGB):
        return None
    grid = finest_grid(scene, RGB)
    window = window_of(part or grid, grid)
    shape = [span.stop - span.start for span in window]
    factor = max(1, -(-max(shape) // max_pixels))
    channels, sources = [], [band_source(scene, band) for band in RGB]
    if shape == list(grid.shape):
        planes = read_overviews(sources, grid, factor)
    else:
        planes = [read_window(source, grid, window)[::factor, ::factor] for source in sources]
    for band, pixels in zip(RGB, planes, strict=True):
        asset = scene.assets[band]
        shown = np.clip((pixels * asset.scale + asset.offset) / BRIGHTEST, 0, 1) ** (1 / GAMMA) * 255
        channels.append(np.where((pixels == asset.nodata) | np.isnan(shown), 0, np.maximum(shown, 1)))
    return np.stack(channels, axis=-1).astype(np.uint8)
