"""A plain loop over windows: rasterio reads them with overlap, torch compares them, rasterio writes the map.

One process; each core works on a window of its own, which is faster than one window at a time on all cores, and GDAL
compresses on every core.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.windows import Window

import s2cd
from s2cd.catalog.scene import Scene
from s2cd.masks import Mask, valid_mask
from s2cd.model import Model, ModelRef
from s2cd.survey import Survey, scene_input, survey_scene

WINDOW = 2048  # px; smaller ones spend more on the overlap, larger ones gain little
OVERLAP = 64  # px: what the network sees around a pixel, and the rim of a mask


def change_maps(scenes: list[Scene], out: Path, cores: int) -> int:
    """Write a COG for each two consecutive dates; return how many."""
    torch.set_num_threads(1)
    model = s2cd.load_model("generic")
    ref, mask = ModelRef.of("generic"), Mask()
    grid = scenes[0].assets["red"].grid
    surveys = [survey_scene(scene_input(s, model.bands, grid, mask), mask, ref) for s in scenes]
    pairs = s2cd.consecutive_pairs(scenes)
    number = {scene.id: index for index, scene in enumerate(scenes)}
    for pair in pairs:
        levels = surveys[number[pair.before.id]], surveys[number[pair.after.id]]
        write(out / f"{pair.name}.tif", compare(pair.before, pair.after, levels, model, cores), pair.before)
    return len(pairs)


def compare(before: Scene, after: Scene, levels: tuple[Survey, Survey], model: Model, cores: int) -> np.ndarray:
    """Return the probability of change of the whole tile, window by window on each core."""
    statistics = levels[0].statistics, levels[1].statistics
    background = model.background(levels[0].sketch, levels[1].sketch)
    height, width = before.assets["red"].grid.shape
    result = np.empty((height, width), np.float32)
    opened = opener((before, after), (*model.bands, "scl"))

    def infer(corner: tuple[int, int]) -> None:
        top, left = corner
        bottom, right = min(top + WINDOW, height), min(left + WINDOW, width)
        y0, x0 = max(0, top - OVERLAP), max(0, left - OVERLAP)
        y1, x1 = min(height, bottom + OVERLAP), min(width, right + OVERLAP)
        images = [
            read(d, s, model.bands, Window(x0, y0, x1 - x0, y1 - y0))
            for d, s in zip(opened(), (before, after), strict=True)
        ]
        probability = model.predict(images[0], images[1], statistics, background)
        result[top:bottom, left:right] = probability[top - y0 : bottom - y0, left - x0 : right - x0]

    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(infer, product(range(0, height, WINDOW), range(0, width, WINDOW))))
    return result


def opener(scenes: tuple[Scene, ...], bands: tuple[str, ...]) -> Callable[[], list[dict[str, rasterio.DatasetReader]]]:
    """Return what opens the bands of each scene once in each thread: no two may read one dataset."""
    local = threading.local()

    def opened() -> list[dict[str, rasterio.DatasetReader]]:
        if not hasattr(local, "dates"):
            local.dates = [{b: rasterio.open(scene.assets[b].href) for b in bands} for scene in scenes]
        return local.dates

    return opened


def read(
    datasets: dict[str, rasterio.DatasetReader], scene: Scene, bands: tuple[str, ...], window: Window
) -> np.ndarray:
    """Return reflectance (band, y, x), all bands at 10 m, NaN where there is no valid observation."""
    height, width = int(window.height), int(window.width)
    image = np.empty((len(bands), height, width), np.float32)
    coarse = Window(window.col_off // 2, window.row_off // 2, -(-width // 2), -(-height // 2))
    for index, band in enumerate(bands):
        asset, dataset = scene.assets[band], datasets[band]
        if dataset.res[0] == 10:
            numbers = dataset.read(1, window=window)
        else:
            numbers = dataset.read(1, window=coarse).repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
        image[index] = numbers * np.float32(asset.scale) + np.float32(asset.offset)
        image[index][numbers == 0] = np.nan
    classes = datasets["scl"].read(1, window=coarse)
    valid = valid_mask(classes, dilation=Mask().dilation / 2).repeat(2, axis=0).repeat(2, axis=1)
    image[:, ~valid[:height, :width]] = np.nan
    return image


def write(path: Path, probability: np.ndarray, scene: Scene) -> None:
    """Write the map as COG."""
    grid = scene.assets["red"].grid
    with rasterio.open(
        path,
        "w",
        driver="COG",
        height=probability.shape[0],
        width=probability.shape[1],
        count=1,
        dtype="float32",
        crs=f"EPSG:{grid.epsg}",
        transform=rasterio.Affine(*grid.transform),
        nodata=np.nan,
        compress="DEFLATE",
        num_threads="ALL_CPUS",
    ) as dataset:
        dataset.write(probability, 1)
