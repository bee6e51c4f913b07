"""What the tests share: where the real data lie, and small series of real files with known pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import requests
from hypothesis import settings
from rasterio.transform import Affine

from s2cd.catalog.bands import BANDS, SCL
from s2cd.catalog.scene import Asset, Grid, Scene

settings.register_profile("s2cd", deadline=None)  # tests tell nothing of time
settings.load_profile("s2cd")
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
GSD = {band.common_name: band.gsd for band in BANDS} | {SCL: 20}
SEVEN_BANDS = ("blue", "green", "red", "nir", "nir08", "swir16", "swir22")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real Sentinel-2 data beside the checkout; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return SHARED


@pytest.fixture
def make_series(tmp_path: Path) -> Callable[..., list[Scene]]:
    """Write a series of small scenes as tiled GeoTIFFs; see `write_series`."""

    def make(**options: object) -> list[Scene]:
        return write_series(tmp_path / "series", **options)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """Address of a real S3 server in this process, without any bucket."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    requests.post(f"{url}/moto-api/reset", timeout=10)  # servers of one process share their buckets
    yield url
    server.stop()


@pytest.fixture(scope="module")
def bucket(s3_server: str) -> Iterator[SimpleNamespace]:
    """The bucket `maps` of a real S3 server; credentials come from the environment only."""
    settings = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_server,
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings.items():
            patch.setenv(key, value)
        import boto3

        client = boto3.client("s3", endpoint_url=s3_server)
        client.create_bucket(Bucket="maps")
        yield SimpleNamespace(url="s3://maps/europe/2023", client=client, address=s3_server)


def write_series(
    folder: Path,
    *,
    shape: tuple[int, int] = (200, 232),
    dates: int = 3,
    bands: tuple[str, ...] = SEVEN_BANDS,
    scl: bool = True,
    block: int = 64,
    change: bool = True,
    seed: int = 0,
    **stored: object,
) -> list[Scene]:
    """Fields of random brightness, a little noise a date, and a block that turns bright on every second date."""
    rng = np.random.default_rng(seed)
    cells = rng.uniform(300, 3000, (len(bands), shape[0] // 16 + 2, shape[1] // 16 + 2))
    ground = cells.repeat(16, axis=1).repeat(16, axis=2)
    scenes = []
    for index in range(dates):
        image = ground + rng.normal(0, 20, ground.shape)
        if change and index % 2:
            image[:, 32:96, 32:96] += 2500
        names = (*bands, SCL) if scl else bands
        pixels = dict(zip(bands, image, strict=True))
        scenes.append(_write_scene(folder / f"{index:03d}", index, names, pixels, shape, block, stored))
    return scenes


def _write_scene(
    folder: Path,
    index: int,
    names: tuple[str, ...],
    pixels: dict[str, np.ndarray],
    shape: tuple[int, int],
    block: int,
    stored: dict[str, object],
) -> Scene:
    folder.mkdir(parents=True)
    assets = {}
    for name in names:
        factor = GSD[name] // 10
        size = tuple(math.ceil(n / factor) for n in shape)
        data = (
            np.full(size, 4, np.uint8)
            if name == SCL
            else pixels[name][::factor, ::factor][: size[0], : size[1]].round().astype(np.uint16)
        )
        transform = Affine(10.0 * factor, 0, 499980.0, 0, -10.0 * factor, 5700000.0)
        href = folder / f"{name}.tif"
        write_tiff(href, data, transform, block, **stored)
        grid = Grid(32631, tuple(transform)[:6], data.shape)
        scale, reason = (1.0, "class layer") if name == SCL else (1e-4, "test")
        assets[name] = Asset(name, str(href), grid, scale, 0.0, reason)
    return Scene(
        id=f"scene-{index:03d}",
        provider="static",
        collection="test",
        level="L2A",
        tile="31UDS",
        orbit=51,
        time=datetime(2023, 5, 1, 10, 50, tzinfo=UTC) + timedelta(days=5 * index),
        platform="sentinel-2a",
        baseline="02.14",
        cloud_cover=1.0,
        datatake=None,
        footprint={"type": "Polygon", "coordinates": [[[3, 51.4], [3.1, 51.4], [3.1, 51.5], [3, 51.5], [3, 51.4]]]},
        assets=assets,
    )


def write_tiff(
    path: Path, data: np.ndarray, transform: Affine, block: int, epsg: int = 32631, **stored: object
) -> None:
    """Write a tiled GeoTIFF of one band."""
    options = {"tiled": True, "blockxsize": block, "blockysize": block, **stored}
    with rasterio.open(
        path, "w", driver="GTiff", height=data.shape[0], width=data.shape[1], count=1, dtype=data.dtype,
        crs=f"EPSG:{epsg}", transform=transform, nodata=0, compress="deflate", **options,
    ) as dataset:  # fmt: skip
        dataset.write(data, 1)
