"""The Dask script of today: stackstac opens the series, `xr.apply_ufunc` compares two dates, rioxarray writes a COG.

Written as one would who knows Dask: float32 and all bands in one chunk, chunks of 2048 px, halos by
`dask.array.overlap`, one pair computed at a time so that memory stays bounded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import rioxarray  # noqa: F401
import stackstac
import xarray as xr
from dask.array.overlap import overlap, trim_overlap
from distributed import Client

import s2cd
from s2cd.catalog.scene import Scene
from s2cd.masks import Mask, valid_mask
from s2cd.model import ModelRef
from s2cd.survey import scene_input, survey_scene

CHUNK = 2048
OVERLAP = 64
Date = tuple[np.ndarray, tuple[float, ...], tuple[float, ...]]
"""What one date is normalised with: its statistics, and scale and offset of each band."""


def change_maps(scenes: list[Scene], out: Path, client: Client) -> int:
    """Write a COG for each two consecutive dates; return how many."""
    model = s2cd.load_model("generic")
    bands = model.bands
    grid = scenes[0].assets["red"].grid
    left, top = grid.transform[2], grid.transform[5]
    bounds = (left, top - 10 * grid.shape[0], left + 10 * grid.shape[1], top)
    cube = stackstac.stack(
        [plain_item(s, (*bands, "scl")) for s in scenes],
        assets=[*bands, "scl"],
        epsg=grid.epsg,
        resolution=10,
        bounds=bounds,
        snap_bounds=False,
        chunksize=(1, -1, CHUNK, CHUNK),
        dtype=np.dtype("float32"),
        fill_value=np.float32(np.nan),
        rescale=False,  # stackstac refuses to scale into float32
        xy_coords="center",
    )
    inputs = [scene_input(s, bands, grid, Mask()) for s in scenes]
    surveys = client.gather(client.map(survey_scene, inputs, mask=Mask(), model=ModelRef.of("generic")))
    pairs = s2cd.consecutive_pairs(scenes)
    number = {scene.id: index for index, scene in enumerate(scenes)}
    for pair in pairs:
        first, second = number[pair.before.id], number[pair.after.id]
        dates = [(surveys[i].statistics, inputs[i].scale, inputs[i].offset) for i in (first, second)]
        background = model.background(surveys[first].sketch, surveys[second].sketch)
        change = compare(cube[first], cube[second], dates, background).compute()
        change.rio.write_crs(grid.epsg).rio.write_nodata(np.nan).rio.to_raster(
            out / f"{pair.name}.tif", driver="COG", compress="DEFLATE", num_threads="ALL_CPUS"
        )
    return len(pairs)


def compare(before: xr.DataArray, after: xr.DataArray, dates: list[Date], background: float) -> xr.DataArray:
    """Return the probability of change (y, x), lazily."""
    depth = {0: 0, 1: OVERLAP, 2: OVERLAP}
    wide = [
        xr.DataArray(overlap(image.data, depth=depth, boundary="none"), dims=("band", "y", "x"))
        for image in (before, after)
    ]
    probability = xr.apply_ufunc(
        predict,
        *wide,
        input_core_dims=[["band"], ["band"]],
        kwargs={"dates": dates, "background": background},
        dask="parallelized",
        output_dtypes=[np.float32],
    )
    trimmed = trim_overlap(probability.data, depth={0: OVERLAP, 1: OVERLAP}, boundary="none")
    return xr.DataArray(trimmed, dims=("y", "x"), coords={"y": before.y, "x": before.x})


def predict(before: np.ndarray, after: np.ndarray, dates: list[Date], background: float) -> np.ndarray:
    """Compare two blocks (y, x, band) of digital numbers, the last band being the scene classification."""
    model = s2cd.load_model("generic")
    images = []
    for block, (_, scale, offset) in zip((before, after), dates, strict=True):
        factors, terms = (np.array(v, np.float32)[:, None, None] for v in (scale, offset))
        image = np.moveaxis(block, -1, 0)[:-1] * factors + terms
        classes = np.nan_to_num(block[::2, ::2, -1]).astype(np.uint8)
        valid = valid_mask(classes, dilation=Mask().dilation / 2).repeat(2, axis=0).repeat(2, axis=1)
        image[:, ~valid[: image.shape[1], : image.shape[2]]] = np.nan
        images.append(image)
    return model.predict(images[0], images[1], (dates[0][0], dates[1][0]), background)


def plain_item(scene: Scene, bands: tuple[str, ...]) -> dict[str, Any]:
    """What stackstac reads of a STAC item."""
    assets = {}
    for band in bands:
        asset = scene.assets[band]
        assets[band] = {
            "href": asset.href,
            "type": "image/tiff",
            "proj:epsg": asset.grid.epsg,
            "proj:transform": list(asset.grid.transform),
            "proj:shape": list(asset.grid.shape),
        }
    properties = {"datetime": scene.time.replace(tzinfo=None).isoformat()}
    return {"id": scene.id, "type": "Feature", "properties": properties, "assets": assets}
