"""Labelled pairs and unlabelled series from a static STAC catalogue, in memory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.transform import Affine

from s2cd.catalog.items import format_time, parse_time, radiometry_of, resolve_href, stated_scale
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

    @property
    def changed(self) -> npt.NDArray[np.bool_]:
        """Where something is known to have changed that both dates show, bool (y, x): what can be learnt from."""
        return self.label & self.known & self.before.seen & self.after.seen

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


def ground(place: str) -> str:
    """Return the name of the ground that a place shows, its own without the relative orbit: orbits share it."""
    return re.sub(r"_R\d+$", "", place)


def load_series(root: Path) -> dict[str, list[Image]]:
    """Return the dates of each place of a static catalogue, in order of time; those that show too little are left out.

    A place is the grid code of an item, with its relative orbit where it has one. Raises CatalogError for documents
    and bands that cannot be understood, bands that lie elsewhere than blue and dates of a place on different grids;
    ReadError for a raster that cannot be read.
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
        self._require_corners(expected, what, of, 0.1)

    def require_over(self, blue: _Grid, what: str) -> None:
        """Raise CatalogError unless this is the grid `blue`, or half of its size over it, to half a pixel of blue.

        Where half of an odd number is rounded up or down, the raster may end a pixel of blue off.
        """
        rows, cols = (2 * m - n for m, n in zip(self.shape, blue.shape, strict=True))
        same = self.shape == blue.shape
        if not same and max(abs(rows), abs(cols)) > 1:
            expected = f"{_size(blue.shape)} of blue, or half of it"
            raise CatalogError(f"{what}: found {_size(self.shape)} pixels, expected {expected}")
        self._require_corners(blue, what, "blue", 0.5, (0, 0) if same else (cols, rows))

    def _require_corners(
        self, expected: _Grid, what: str, of: str, tolerance: float, beyond: tuple[int, int] = (0, 0)
    ) -> None:
        """Raise CatalogError for another CRS, or a corner off by more than `tolerance` [px of `expected`].

        Right and bottom may lie anywhere between where they are expected and `beyond` (x, y) [px] of that.
        """
        if self.crs != expected.crs:
            raise CatalogError(f"{what}: found {_crs(self.crs)}, expected {_crs(expected.crs)} as {of}")
        for right, bottom in product((0, 1), repeat=2):
            corner = self.transform * (right * self.shape[1], bottom * self.shape[0])
            x, y = ~expected.transform * corner
            dx, dy = x - right * expected.shape[1], y - bottom * expected.shape[0]
            if max(_outside(dx, right * beyond[0]), _outside(dy, bottom * beyond[1])) > tolerance:
                raise CatalogError(f"{what}: found a corner displaced by ({dx:.1f}, {dy:.1f}) px against {of}")


def _outside(value: float, end: float) -> float:
    """Return how far a value lies outside what is between 0 and `end`."""
    return max(min(end, 0) - value, value - max(end, 0))


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


def _object(document: Mapping[str, Any], name: str, address: str) -> Mapping[str, Any]:
    """Return the JSON object of this name in a document, an empty one where there is none."""
    found = document.get(name) or {}
    if not isinstance(found, dict):
        raise CatalogError(f"{address}: {name}: found {found!r:.80}, expected an object")
    return found


def _place_and_time(item: Mapping[str, Any], address: str) -> tuple[str, str]:
    properties = _object(item, "properties", address)
    try:
        place = properties["grid:code"].split("-")[-1]
        time = format_time(parse_time(properties["datetime"]))
    except (KeyError, AttributeError, TypeError, ValueError):
        found = f"{properties.get('grid:code')!r} and {properties.get('datetime')!r}"
        raise CatalogError(f"{address}: found grid:code and datetime {found}, expected a name and a time") from None
    orbit = properties.get("sat:relative_orbit")
    try:
        return place if orbit is None else f"{place}_R{int(orbit)}", time
    except (TypeError, ValueError, OverflowError):
        raise CatalogError(f"{address}: found sat:relative_orbit {orbit!r:.80}, expected a number") from None


def _read_item(item: Mapping[str, Any], address: str) -> tuple[_Grid, npt.NDArray[np.float32]]:
    """Return the grid of `blue` and all bands on it; NaN = no observation."""
    assets, of = _object(item, "assets", address), f"{address}: assets"
    missing = [band for band in BANDS if not _object(assets, band, of).get("href")]
    if missing:
        raise CatalogError(f"{address}: found no asset {', '.join(missing)}, expected {', '.join(BANDS)}")
    rasters = {name: _read(_path(assets, name, address)) for name in (*BANDS, "scl") if name in assets}
    blue = rasters[BANDS[0]][2]
    for name, (_, _, grid) in rasters.items():
        grid.require_over(blue, f"{address}: {name}")
    named = {"id": Path(address).stem, **item}
    pixels = np.stack([_on_grid(_plane(named, band, *rasters[band][:2]), blue.shape) for band in BANDS])
    if "scl" in rasters:
        classes, seen, _ = rasters["scl"]
        pixels[:, _on_grid(np.isin(classes, CLOUDY) | ~seen, blue.shape)] = np.nan
    return blue, pixels


def _plane(item: Mapping[str, Any], band: str, codes: np.ndarray, seen: npt.NDArray[np.bool_]) -> np.ndarray:
    """Return the reflectance of a band of an item, float32, NaN where the raster itself says that it shows nothing."""
    plane = reflectance(codes, *radiometry_of(item, band))
    if codes.dtype.kind == "f" and stated_scale(item["assets"][band]) is None:  # it may be reflectance already
        found = f"found {codes.dtype} without a scale, expected raster:bands to state it"
        raise CatalogError(f"item {item['id']}, band {band}: {found}")
    plane[~seen] = np.nan
    return plane


def _path(assets: Mapping[str, Any], name: str, address: str) -> str:
    """Return where the raster of an asset lies."""
    href = _object(assets, name, f"{address}: assets").get("href")
    if not isinstance(href, str) or not href:
        raise CatalogError(f"{address}: asset {name}: found href {href!r:.80}, expected a path")
    return resolve_href(href, address)


def _read(path: str) -> tuple[np.ndarray, npt.NDArray[np.bool_], _Grid]:
    """Return the first band of a raster on this machine, where its own nodata and masks show it, and where it lies."""
    if "://" in path:
        raise CatalogError(f"{path}: found an address, expected a file: training reads from disk")
    try:
        with rasterio.open(path) as dataset:
            grid = _Grid(dataset.crs, dataset.transform, dataset.shape)
            return dataset.read(1), dataset.read_masks(1) > 0, grid
    except RasterioError as error:
        raise ReadError(path, " ".join(str(error.__cause__ or error).split())) from None


def _read_label(path: Path, grid: _Grid) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return where something changed, and where the label tells, both bool (y, x)."""
    values, known, found = _read(str(path))
    found.require(grid, path.name, "blue")
    others = np.setdiff1d(values[known], (0, 1))
    if len(others):
        raise CatalogError(
            f"{path.name}: found the value {others[0]:g}, expected 0 = unchanged, 1 = changed, or the declared nodata"
        )
    label = known & (values == 1)
    if label[known].all():
        raise CatalogError(f"{path.name}: found no unchanged pixel, expected some: 0 = unchanged, 1 = changed")
    return label, known


def _on_grid(plane: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Replicate a 20 m plane on the 10 m grid; its last row or column serves twice where it is too short."""
    if plane.shape == shape:
        return plane
    plane = plane.repeat(2, axis=0).repeat(2, axis=1)[: shape[0], : shape[1]]
    return np.pad(plane, [(0, n - m) for n, m in zip(shape, plane.shape, strict=True)], mode="edge")
