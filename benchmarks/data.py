"""The data of a benchmark: one tile, several dates, real texture where it is at hand; its catalogue frozen.

Compression decides how long reading takes, so the pixels must carry the entropy of real Sentinel-2 images. A series
is a mosaic of random crops of a few places, of which two dates take turns: the OSCD cities in ../shared/data (source
"shared") or, for machines that do not have them, landscapes of `s2cd.simulate` (source "simulated").
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin
from scipy import ndimage

from s2cd.catalog import freeze, search
from s2cd.catalog.bands import band_info
from s2cd.catalog.scene import Scene
from s2cd.errors import ConfigError
from s2cd.simulate import simulate
from s2cd.simulate.acquisition import overpasses
from s2cd.simulate.catalogue import Cut, Product, Writer, cut_of, item_document, item_name
from s2cd.simulate.spectra import BANDS, GSD

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TILE, ORBIT, START = "31UDS", 51, datetime(2023, 4, 1, tzinfo=UTC)
CELL = 366  # px at 10 m; 30 of them make a tile
BLOCK = 1024  # of Earth Search's COGs
CLOUD, SHADOW = 9, 3
FIELD, FIELDS = 1098, 6  # px, and how many landscapes are simulated

Places = dict[str, list[Path]]
"""The folders of two dates of each place, with a file for each band."""


@dataclass(frozen=True)
class Data:
    """A prepared series: its scenes, and the bytes of pixels that the benchmark's bands and SCL hold."""

    scenes: list[Scene]
    source: str
    size: int

    @property
    def unique_bytes(self) -> int:
        """Bytes of all pixels, each counted once."""
        return sum(
            a.grid.shape[0] * a.grid.shape[1] * (1 if a.band == "scl" else 2)
            for s in self.scenes
            for a in s.assets.values()
            if a.band in (*BANDS, "scl")
        )


def prepare(folder: Path, *, size: int = 10980, dates: int = 6, source: str = "auto") -> Data:
    """Write the series into `folder` unless it is there, and return it.

    Raises ConfigError for source "shared" where ../shared/data is absent.
    """
    source = _choose(source)
    target = folder / f"{source}-{size}px-{dates}d"
    frozen = target / "scenes.parquet"
    if not frozen.exists():
        target.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
            places = _shared_places() if source == "shared" else _simulated_places(folder / "places", pool)
            catalog = _mosaic_series(target, size, dates, places, pool)
        freeze(search(str(catalog)), str(frozen))
    return Data(search(str(frozen)), source, size)


def repeated(data: Data, folder: Path, *, dates: int, tiles: int = 1) -> Data:
    """Return a longer series, over several tiles, made of the same files under other names.

    Every date of every tile gets hard links of its own, so that nothing that is kept by file name (GDAL's blocks,
    s2cd's) can be used twice: reading counts as it would for different files.
    """
    scenes = []
    for tile in range(tiles):
        for index in range(dates):
            scene = data.scenes[index % len(data.scenes)]
            target = folder / f"links-{data.source}-{data.size}px" / f"t{tile:03d}-d{index:03d}"
            target.mkdir(parents=True, exist_ok=True)
            assets = {b: replace(a, href=str(_link(Path(a.href), target))) for b, a in scene.assets.items()}
            scenes.append(
                replace(
                    scene,
                    id=f"S2A_{tile:03d}_{index:03d}",
                    tile=f"{31 + tile // 20}U{chr(65 + tile % 20)}S",
                    time=START + timedelta(days=5 * index),
                    datatake=None,
                    assets=assets,
                )
            )
    return Data(scenes, data.source, data.size)


def _link(path: Path, target: Path) -> Path:
    link = target / path.name
    if not link.exists():
        os.link(path, link)
    return link


def _choose(source: str) -> str:
    there = (SHARED / "oscd").is_dir()
    if source == "shared" and not there:
        raise ConfigError("source 'shared' asked for, but there is no ../shared/data beside the checkout")
    if source not in {"auto", "shared", "simulated"}:
        raise ConfigError(f"unknown source {source!r}, expected auto, shared or simulated")
    return ("shared" if there else "simulated") if source == "auto" else source


@dataclass(frozen=True)
class _Cell:
    """Which crop stands in one cell of the mosaic: of which place, where in it (fractions), how it is turned."""

    place: str
    row: float
    col: float
    turn: int


def _shared_places() -> Places:
    return {p.name: sorted(p.iterdir()) for p in sorted((SHARED / "oscd" / "assets").iterdir())}


def _simulated_places(folder: Path, pool: Executor) -> Places:
    draw = partial(simulate, size=FIELD, dates=2, orbits=(ORBIT,), clouds=False)
    catalogs = [pool.submit(draw, folder / f"field{seed}", seed=seed) for seed in range(FIELDS)]
    fields = [catalog.result().parent for catalog in catalogs]
    return {field.name: sorted(p.parent for p in field.glob("*/SCL.tif")) for field in fields}


def _mosaic_series(folder: Path, size: int, dates: int, places: Places, pool: Executor) -> Path:
    cut = cut_of(TILE, (size, size))
    lonlat = cut.lonlat([size / 2], [size / 2])[0]
    plan = overpasses(dates, (ORBIT,), START, 10, (lonlat[0], lonlat[1]), False)
    cells = _draw_cells(size, sorted(places))
    writer = Writer(folder, cut, BLOCK)
    products = [Product(overpass, baseline="05.00", applied=True) for overpass in plan]
    waiting = []
    for number, product in enumerate(products):
        target = folder / item_name(product, cut)
        target.mkdir(parents=True, exist_ok=True)
        waiting += [
            pool.submit(_write_band, target, cut, cells, places, number, band, gsd)
            for band, gsd in zip(BANDS, GSD, strict=True)
        ]
    for number, product in enumerate(products):
        name = item_name(product, cut)
        classes = _classes(cut.grid_shape(20), number, places)
        write_cog(folder / name / "SCL.tif", classes, cut, 20, "nearest")
        item = item_document(product, cut, classes, (np.inf, np.inf))
        (folder / name / f"{name}.json").write_text(json.dumps(item, indent=1))
        writer.items.append(item)
    for written in waiting:
        written.result()
    return writer.write_collection()


def _draw_cells(size: int, places: Sequence[str]) -> list[list[_Cell]]:
    rng = np.random.default_rng(0)
    count = -(-size // CELL)
    return [
        [_Cell(str(rng.choice(places)), rng.random(), rng.random(), int(rng.integers(8))) for _ in range(count)]
        for _ in range(count)
    ]


def _write_band(
    target: Path, cut: Cut, cells: list[list[_Cell]], places: Places, number: int, band: str, gsd: int
) -> None:
    gain = 1 + 0.05 * np.sin(number)  # another sun, another sky
    file = band_info(band).name
    pixels = _mosaic(cells, places, file, number % 2, gsd, cut.grid_shape(gsd))
    pixels = np.clip(np.rint(pixels * np.float32(gain)), 1, 65535).astype(np.uint16)
    write_cog(target / f"{file}.tif", pixels, cut, gsd)


def _mosaic(
    cells: list[list[_Cell]], places: Places, file: str, date: int, gsd: int, shape: Sequence[int]
) -> np.ndarray:
    names = {c.place for row in cells for c in row}
    images = {name: _read(places[name][date] / f"{file}.tif") for name in names}
    halves = {name: tuple(n // 2 for n in _read(places[name][date] / "B02.tif").shape) for name in names}
    rows = [np.hstack([_crop(images[c.place], halves[c.place], c, 20 // gsd) for c in row]) for row in cells]
    return np.vstack(rows)[: shape[0], : shape[1]]


def _crop(image: np.ndarray, half: tuple[int, ...], cell: _Cell, step: int) -> np.ndarray:
    """Cut a cell from an image of which `step` pixels are one at 20 m; `half` is its size there."""
    edge = CELL // 2
    top, left = (int(share * max(0, n - edge)) * step for share, n in zip((cell.row, cell.col), half, strict=True))
    crop = image[top : top + edge * step, left : left + edge * step]
    crop = np.pad(crop, [(0, edge * step - n) for n in crop.shape], mode="symmetric")
    crop = np.rot90(crop, cell.turn % 4)
    return crop[:, ::-1] if cell.turn >= 4 else crop


def _read(path: Path) -> np.ndarray:
    with rasterio.open(path) as dataset:
        return dataset.read(1)


def _classes(shape: Sequence[int], number: int, places: Places) -> np.ndarray:
    """Scene classification: one that was there, mirrored, under some clouds and their shadows of this date."""
    simulated = next(iter(places.values()))[0] / "SCL.tif"
    if simulated.exists():
        real = _read(simulated)
    else:
        with rasterio.open(SHARED / "bolzano_l2a_20220612.tif") as dataset:
            real = dataset.read(5)[::2, ::2].astype(np.uint8)
    classes = np.pad(real, [(0, max(0, n - m)) for n, m in zip(shape, real.shape, strict=True)], mode="symmetric")
    classes = np.ascontiguousarray(np.roll(classes, 97 * number, axis=1)[: shape[0], : shape[1]])
    noise = np.random.default_rng(number).normal(size=[n // 80 + 4 for n in shape])
    field = ndimage.zoom(ndimage.gaussian_filter(noise, 1), 80, order=1)[: shape[0], : shape[1]]
    cloudy = field > np.quantile(field[::16, ::16], 0.92)
    classes[np.roll(cloudy, (25, -20), axis=(0, 1))] = SHADOW
    classes[cloudy] = CLOUD
    return classes


def write_cog(path: Path, pixels: np.ndarray, cut: Cut, gsd: int, resampling: str = "average") -> None:
    """Write one layer as Earth Search stores it: COG, blocks of 1024, DEFLATE with predictor 2."""
    with rasterio.open(
        path,
        "w",
        driver="COG",
        width=pixels.shape[1],
        height=pixels.shape[0],
        count=1,
        dtype=pixels.dtype,
        crs=f"EPSG:{cut.epsg}",
        transform=from_origin(cut.west, cut.north, gsd, gsd),
        nodata=0,
        compress="DEFLATE",
        predictor=2,
        blocksize=BLOCK,
        overview_resampling=resampling,
        num_threads="ALL_CPUS",
    ) as out:
        out.write(pixels, 1)
