"""Labelled pairs and unlabelled series from a static STAC catalogue, in memory."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import rasterio

from s2cd.errors import CatalogError
from s2cd.model import BANDS
from s2cd.model.normalise import background, decimation, sketch, statistics

CLOUDY = (0, 1, 3, 8, 9, 10)  # classes of the scene classification that are no observation


@dataclass(frozen=True)
class Image:
    """One date: reflectance float32 (band, y, x) on the 10 m grid, NaN = no observation; normalised on demand."""

    place: str
    time: str
    reflectance: npt.NDArray[np.float32]
    stats: npt.NDArray[np.float32]

    @cached_property
    def normalised(self) -> npt.NDArray[np.float32]:
        """(reflectance - centre) / spread."""
        centre, spread = self.stats.T[:, :, None, None]
        return (self.reflectance - centre) / spread

    @cached_property
    def sketch(self) -> npt.NDArray[np.float16]:
        """The small picture of the date that tells the background of its pairs."""
        step = decimation(self.reflectance.shape[1:])
        return sketch(self.reflectance[:, ::step, ::step], self.stats)

    @classmethod
    def of(cls, place: str, time: str, reflectance: npt.NDArray[np.float32]) -> Image:
        """Compute the statistics as `Model.predict` does."""
        step = decimation(reflectance.shape[1:])
        return cls(place, time, reflectance, statistics(reflectance[:, ::step, ::step]))


@dataclass(frozen=True)
class City:
    """A labelled pair: two dates and the truth, bool (y, x)."""

    name: str
    before: Image
    after: Image
    label: npt.NDArray[np.bool_]

    @cached_property
    def background(self) -> float:
        """How much the two dates differ everywhere."""
        return background(self.before.sketch, self.after.sketch)


def load_cities(root: Path) -> list[City]:
    """Return the labelled pairs of a catalogue: two dates of a place and `labels/<place>.tif`, in order of name.

    Raises CatalogError if a place has no two dates, or its label another size.
    """
    cities = []
    for place, images in load_series(root).items():
        path = root / "labels" / f"{place}.tif"
        if not path.is_file():
            continue
        with rasterio.open(path) as dataset:
            label = dataset.read(1) > 0
        if len(images) != 2 or label.shape != images[0].reflectance.shape[1:]:
            raise CatalogError(
                f"{path.name}: expected two dates of {label.shape} pixels, found {len(images)} dates of "
                f"{images[0].reflectance.shape[1:]}"
            )
        cities.append(City(place, images[0], images[1], label))
    if not cities:
        raise CatalogError(f"{root}: no labelled pair found, expected labels/<place>.tif beside the catalogue")
    return cities


def load_series(root: Path) -> dict[str, list[Image]]:
    """Return the dates of each place of a static catalogue, in order of time.

    A place is the grid code of an item, with its relative orbit where it has one. Raises CatalogError.
    """
    catalogue = next((root / n for n in ("catalog.json", "collection.json") if (root / n).is_file()), None)
    if catalogue is None:
        raise CatalogError(f"{root}: no catalog.json found")
    document = json.loads(catalogue.read_text())
    places: dict[str, list[Image]] = defaultdict(list)
    hrefs = [link["href"] for link in document["links"] if link["rel"] == "item"]
    for path in (catalogue.parent / href for href in hrefs):
        item = json.loads(path.read_text())
        properties = item["properties"]
        place = properties["grid:code"].split("-")[-1]
        if "sat:relative_orbit" in properties:
            place += f"_R{properties['sat:relative_orbit']}"
        pixels = _read_item(item, path.parent)
        if np.isfinite(pixels).mean() > 0.5:
            places[place].append(Image.of(place, properties["datetime"], pixels))
    return {place: sorted(images, key=lambda i: i.time) for place, images in sorted(places.items())}


def _read_item(item: dict, folder: Path) -> npt.NDArray[np.float32]:
    planes = [_read_band(item["assets"][band], folder) for band in BANDS]
    shape = planes[0].shape
    pixels = np.stack([_to_grid(plane, shape) for plane in planes])
    if "scl" in item["assets"]:
        with rasterio.open(folder / item["assets"]["scl"]["href"]) as dataset:
            classes = _to_grid(dataset.read(1), shape)
        pixels[:, np.isin(classes, CLOUDY)] = np.nan
    return pixels


def _read_band(asset: dict, folder: Path) -> npt.NDArray[np.float32]:
    info = asset["raster:bands"][0]
    with rasterio.open(folder / asset["href"]) as dataset:
        numbers = dataset.read(1)
    reflectance = numbers * np.float32(info.get("scale", 1e-4)) + np.float32(info.get("offset", 0))
    return np.where(numbers == info.get("nodata", 0), np.float32(np.nan), reflectance)


def _to_grid(plane: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Replicate a 20 m plane on the 10 m grid; its last row or column serves twice where it is too short."""
    if plane.shape == tuple(shape):
        return plane
    plane = plane.repeat(2, axis=0).repeat(2, axis=1)[: shape[0], : shape[1]]
    return np.pad(plane, [(0, n - m) for n, m in zip(shape, plane.shape, strict=True)], mode="edge")
