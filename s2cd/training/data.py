"""Labelled pairs and unlabelled series from a static STAC catalogue, in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.transform import Affine

from s2cd.catalog.items import format_time, parse_time, radiometry_of, resolve_href
from s2cd.catalog.static import entry_document, links_of, read_document
from s2cd.errors import CatalogError, ReadError
from s2cd.model import BANDS
from s2cd.model.normalise import background, decimation, sketch, statistics
from s2cd.radiometry import reflectance

CLOUDY = (0, 1, 3, 8, 9, 10)  # classes of the scene classification that are no observation


@dataclass(frozen=True)
class Image:
    """One date: reflectance float32 (band, y, x) on the 10 m grid, NaN = no observation; normalised on demand."""

    place: str
    time: str
    reflectance: npt.NDArray[np.float32]
    stats: npt.NDArray[np.float32]

    @property
    def seen(self) -> npt.NDArray[np.bool_]:
        """Where all bands were observed, bool (y, x): the network takes no others."""
        return np.asarray(np.isfinite(self.reflectance).all(axis=0))

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
    """A labelled pair: two dates, where something changed and where that is known, both bool (y, x)."""

    name: str
    before: Image
    after: Image
    label: npt.NDArray[np.bool_]
    known: npt.NDArray[np.bool_]

    @cached_property
    def background(self) -> float:
        """How much the two dates differ everywhere."""
        return background(self.before.sketch, self.after.sketch)


def load_cities(root: Path) -> list[City]:
    """Return the labelled pairs of a catalogue: two dates of a place and `labels/<place>.tif`, in order of name.

    Raises CatalogError if a place has no two dates, or its label another grid, other values than 0 and 1, only changed
    pixels, or none that both dates show; ReadError for a raster that cannot be read; else as `load_series`.
    """
    cities = []
    for place, (grid, images) in _load(root).items():
        path = label_path(root, place)
        if not path.is_file():
            continue
        if len(images) != 2:
            raise CatalogError(
                f"{path.name}: found {len(images)} dates that show more than half of their pixels in all bands, "
                "expected two"
            )
        label, known = _read_label(path, grid)
        city = City(place, images[0], images[1], label, known)
        if not (known & city.before.seen & city.after.seen).any():
            raise CatalogError(f"{path.name}: found no labelled pixel that both dates show, expected some")
        cities.append(city)
    if not cities:
        raise CatalogError(f"{root}: no labelled pair found, expected labels/<place>.tif beside the catalogue")
    return cities


def label_path(root: Path, place: str) -> Path:
    """Return where the label of a place lies, if it has one."""
    return root / "labels" / f"{place}.tif"


def load_series(root: Path) -> dict[str, list[Image]]:
    """Return the dates of each place of a static catalogue, in order of time; those that show too little are left out.

    A place is the grid code of an item, with its relative orbit where it has one. Raises CatalogError for documents
    and bands that cannot be understood, and for dates of a place on different grids; ReadError for a raster that cannot
    be read.
    """
    return {place: images for place, (_, images) in _load(root).items() if images}


def digest(*arrays: np.ndarray | str) -> str:
    """Return the SHA-256 (hex) of arrays and texts."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(array.encode() if isinstance(array, str) else np.ascontiguousarray(array).data)
    return total.hexdigest()


class _Grid(NamedTuple):
    """Where the pixels of a raster lie."""

    crs: CRS | None
    transform: Affine
    shape: tuple[int, int]

    def require(self, expected: _Grid, what: str, of: str) -> None:
        """Raise CatalogError unless this is the grid `expected`, to a tenth of a pixel."""
        if self.shape != expected.shape:
            raise CatalogError(f"{what}: found {_size(self.shape)} pixels, expected {_size(expected.shape)} as {of}")
        if self.crs != expected.crs:
            raise CatalogError(f"{what}: found {_crs(self.crs)}, expected {_crs(expected.crs)} as {of}")
        for corner in ((0, 0), self.shape[::-1]):
            x, y = ~expected.transform * (self.transform * corner)
            if max(abs(x - corner[0]), abs(y - corner[1])) > 0.1:
                dx, dy = x - corner[0], y - corner[1]
                raise CatalogError(f"{what}: found a corner displaced by ({dx:.1f}, {dy:.1f}) px against {of}")


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _crs(crs: CRS | None) -> str:
    return crs.to_string() if crs else "no CRS"


def _load(root: Path) -> dict[str, tuple[_Grid, list[Image]]]:
    """Return the grid and the dates of each place, also of one whose dates all show too little."""
    start = str(entry_document(root).resolve())
    places: dict[str, tuple[_Grid, list[Image]]] = {}
    for link in links_of(read_document(start), start, "item"):
        item = read_document(link["href"])
        place, time = _place_and_time(item, link["href"])
        grid, pixels = _read_item(item, link["href"])
        expected, images = places.setdefault(place, (grid, []))
        grid.require(expected, Path(link["href"]).name, f"other dates of {place}")
        image = Image.of(place, time, pixels)
        if image.seen.mean() > 0.5:
            images.append(image)
    return {place: (grid, sorted(images, key=lambda i: i.time)) for place, (grid, images) in sorted(places.items())}


def _place_and_time(item: Mapping[str, Any], address: str) -> tuple[str, str]:
    properties = item.get("properties") or {}
    try:
        place = properties["grid:code"].split("-")[-1]
        time = format_time(parse_time(properties["datetime"]))
    except (KeyError, AttributeError, TypeError, ValueError):
        found = f"{properties.get('grid:code')!r} and {properties.get('datetime')!r}"
        raise CatalogError(f"{address}: found grid:code and datetime {found}, expected a name and a time") from None
    if "sat:relative_orbit" in properties:
        place += f"_R{properties['sat:relative_orbit']}"
    return place, time


def _read_item(item: Mapping[str, Any], address: str) -> tuple[_Grid, npt.NDArray[np.float32]]:
    """Return the grid of `blue` and all bands on it; NaN = no observation."""
    assets = item.get("assets") or {}
    missing = [band for band in BANDS if not (assets.get(band) or {}).get("href")]
    if missing:
        raise CatalogError(f"{address}: found no asset {', '.join(missing)}, expected {', '.join(BANDS)}")
    named = {"id": Path(address).stem, **item}
    planes = []
    for band in BANDS:
        plane, grid = _read(resolve_href(assets[band]["href"], address))
        planes.append(reflectance(plane, *radiometry_of(named, band)))
        if band == BANDS[0]:
            fine = grid
    pixels = np.stack([_to_grid(plane, fine.shape, f"{address}: {b}") for b, plane in zip(BANDS, planes, strict=True)])
    if "scl" in assets:
        classes, _ = _read(resolve_href(assets["scl"]["href"], address))
        pixels[:, np.isin(_to_grid(classes, fine.shape, f"{address}: scl"), CLOUDY)] = np.nan
    return fine, pixels


def _read(path: str) -> tuple[np.ndarray, _Grid]:
    """Return the first band of a raster on this machine and where it lies."""
    if "://" in path:
        raise CatalogError(f"{path}: found an address, expected a file: training reads from disk")
    try:
        with rasterio.open(path) as dataset:
            return dataset.read(1), _Grid(dataset.crs, dataset.transform, dataset.shape)
    except RasterioError as error:
        raise ReadError(path, " ".join(str(error.__cause__ or error).split())) from None


def _read_label(path: Path, grid: _Grid) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return where something changed, and where the label tells, both bool (y, x)."""
    values, found = _read(str(path))
    found.require(grid, path.name, "blue")
    with rasterio.open(path) as dataset:
        known = dataset.read_masks(1) > 0
    others = np.setdiff1d(values[known], (0, 1))
    if len(others):
        raise CatalogError(
            f"{path.name}: found the value {others[0]:g}, expected 0 = unchanged, 1 = changed, or the declared nodata"
        )
    label = known & (values == 1)
    if label[known].all():
        raise CatalogError(f"{path.name}: found no unchanged pixel, expected some: 0 = unchanged, 1 = changed")
    return label, known


def _to_grid(plane: np.ndarray, shape: tuple[int, int], what: str) -> np.ndarray:
    """Replicate a 20 m plane on the 10 m grid; its last row or column serves twice where it is too short."""
    if plane.shape == shape:
        return plane
    if not all(m in {n // 2, -(-n // 2)} for n, m in zip(shape, plane.shape, strict=True)):
        raise CatalogError(f"{what}: found {_size(plane.shape)} pixels, expected {_size(shape)} of blue, or half of it")
    plane = plane.repeat(2, axis=0).repeat(2, axis=1)[: shape[0], : shape[1]]
    return np.pad(plane, [(0, n - m) for n, m in zip(shape, plane.shape, strict=True)], mode="edge")
