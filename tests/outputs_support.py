"""Scenes and grids for the tests of the outputs."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np

from s2cd.catalog.scene import Asset, Grid, Scene
from s2cd.codes import CODE_NODATA
from s2cd.outputs import MapInfo
from s2cd.pairs import Pair

UTM = (32631, (10.0, 0.0, 600000.0, 0.0, -10.0, 5700000.0))
LONLAT = (4326, (8.983152841195215e-05, 0.0, 0.1234567890123, 0.0, -8.983152841195215e-05, 51.98765432109876))
INFO = MapInfo(model="generic", model_hash="0" * 64, bands=("red", "green"))
BEFORE = datetime(2023, 1, 2, 10, 30, 1, tzinfo=UTC)
AFTER = datetime(2023, 2, 3, 10, 40, 2, tzinfo=UTC)


def make_grid(shape: tuple[int, int], system: tuple[int, tuple[float, ...]] = UTM) -> Grid:
    epsg, transform = system
    return Grid(epsg, transform, shape)  # type: ignore[arg-type]


def make_scene(grid: Grid, time: datetime, tile: str = "31UDS", **changes: object) -> Scene:
    name = f"S2A_{tile}_{time:%Y%m%d}"
    href = f"https://user:secret@store.example/{name}/{{}}.tif?sig=SECRET&se=2023"
    assets = {b: Asset(b, href.format(b), grid, 1e-4, -0.1, "raster:bands") for b in INFO.bands}
    footprint = {"type": "Polygon", "coordinates": [[(3, 51), (4, 51), (4, 52), (3, 52), (3, 51)]]}
    values = {
        "id": name, "provider": "static", "collection": "sentinel-2-l2a", "level": "L2A", "tile": tile, "orbit": 51,
        "time": time, "platform": "sentinel-2a", "baseline": "05.11", "cloud_cover": 3.0, "datatake": None,
        "footprint": footprint, "assets": assets,
    }  # fmt: skip
    return Scene(**{**values, **changes})  # type: ignore[arg-type]


def make_pair(grid: Grid, tile: str = "31UDS", after: datetime = AFTER, notes: tuple[str, ...] = ()) -> Pair:
    return Pair(make_scene(grid, BEFORE, tile), make_scene(grid, after, tile), notes)


def random_codes(shape: tuple[int, int], missing: float = 0.2, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1025, shape).astype(np.uint16)
    codes[rng.random(shape) < missing] = CODE_NODATA
    return codes
