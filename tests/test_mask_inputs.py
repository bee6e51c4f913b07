"""A run with another mask than SCL: a band of the items, or a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pystac
import pytest
import rasterio
from click.testing import CliRunner
from conftest import write_tiff
from distributed import Client
from rasterio.transform import Affine

import s2cd
from s2cd.catalog import freeze
from s2cd.catalog.scene import Asset, Grid, Scene
from s2cd.cli import main
from s2cd.errors import ConfigError
from s2cd.runner import run

CLOUD = slice(40, 80)  # of 20 m pixels


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        yield client


@pytest.fixture
def cloudy(make_series: Callable[..., list[Scene]]) -> list[Scene]:
    """Three dates, the second with a cloud that its SCL knows."""
    scenes = make_series(shape=(200, 240), dates=3)
    with rasterio.open(scenes[1].assets["scl"].href, "r+") as dataset:
        classes = dataset.read(1)
        classes[CLOUD, CLOUD] = 9
        dataset.write(classes, 1)
    return scenes


def with_probability(scenes: list[Scene], metres: int, dtype: str = "uint8") -> list[Scene]:
    """Put the cloud into a file of percentages beside a SCL that knows of none."""
    result = []
    for scene in scenes:
        with rasterio.open(scene.assets["scl"].href, "r+") as dataset:
            classes = dataset.read(1)
            dataset.write(np.full_like(classes, 4), 1)
        size = (2000 // metres, 2400 // metres)
        fine = np.where(classes == 9, 65, 12).repeat(2, axis=0).repeat(2, axis=1)
        step = metres // 10
        data = fine[::step, ::step][: size[0], : size[1]].astype(dtype)
        transform = Affine(metres, 0, 499980.0, 0, -metres, 5700000.0)
        path = Path(scene.assets["scl"].href).with_name("probability.tif")
        write_tiff(path, data, transform, 64)
        asset = Asset("cloud", str(path), Grid(32631, tuple(transform)[:6], data.shape), 1.0, 0.0, "class codes")
        result.append(replace(scene, assets={**scene.assets, "cloud": asset}))
    return result


def maps(folder: Path) -> list[np.ndarray]:
    paths = sorted(folder.rglob("S2CD_*.tif"))
    assert len(paths) == 2
    found = []
    for path in paths:
        with rasterio.open(path) as dataset:
            found.append(dataset.read(1))
    return found


def settings(folder: Path, **options: object) -> s2cd.RunConfig:
    return s2cd.RunConfig(**{"catalog": "given", "out": str(folder), "device": "cpu", "chunk": 104, **options})


@pytest.mark.parametrize(("metres", "dtype", "dilation"), [(20, "uint8", 60), (10, "uint8", 0), (40, "uint16", 0)])
def test_a_cloud_probability_masks_what_scl_would(
    cloudy: list[Scene], client: Client, tmp_path: Path, metres: int, dtype: str, dilation: int
) -> None:
    run(settings(tmp_path / "scl", mask_dilation=dilation), client, scenes=cloudy)
    scenes = with_probability(cloudy, metres, dtype)
    run(settings(tmp_path / "blind"), client, scenes=scenes)
    config = settings(tmp_path / "cloud", mask="cloud", mask_classes="40-100", mask_dilation=dilation)
    assert run(config, client, scenes=scenes).ok
    for expected, blind, found in zip(*(maps(tmp_path / n) for n in ("scl", "blind", "cloud")), strict=True):
        assert np.isnan(expected).sum() >= 80 * 80
        assert not np.isnan(blind).any()
        np.testing.assert_array_equal(found, expected)
    item = pystac.Item.from_file(str(next((tmp_path / "cloud").rglob("S2CD_*.json"))))
    assert item.properties["s2cd:mask"] == {"band": "cloud", "invalid": list(range(40, 101)), "dilation": dilation}


def test_the_command_line_and_the_steps_take_a_mask_band(cloudy: list[Scene], tmp_path: Path) -> None:
    """Frozen scenes keep the mask, and so does the cube."""
    freeze(with_probability(cloudy, 20), tmp_path / "scenes.parquet")
    words = ["run", str(tmp_path / "scenes.parquet"), "--out", str(tmp_path / "out"), "--mask", "cloud", "-q"]
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 1
    assert CliRunner().invoke(main, [*words, "--mask-classes", "40-100"]).exit_code == 0
    scenes = s2cd.search(tmp_path / "scenes.parquet")
    cube = s2cd.open_cube(scenes, bands=[*s2cd.load_model("generic").bands, "cloud"], chunk=104)
    mask = s2cd.Mask(tuple(range(40, 101)), band="cloud")
    change = s2cd.detect_changes(cube, s2cd.consecutive_pairs(scenes), mask=mask, device="cpu").values
    for expected, found in zip(maps(tmp_path / "out"), change, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-3)
    with pytest.raises(ConfigError, match="the cube lacks cloud"):
        s2cd.detect_changes(s2cd.open_cube(scenes), s2cd.consecutive_pairs(scenes), mask=mask, device="cpu")


def bright(reflectance: np.ndarray, bands: tuple[str, ...]) -> np.ndarray:
    """A mask function of a user's own."""
    return reflectance[bands.index("red")] > 0.25


def test_the_command_line_takes_a_function(
    make_series: Callable[..., list[Scene]], client: Client, tmp_path: Path
) -> None:
    freeze(make_series(dates=2), tmp_path / "scenes.parquet")
    catalog = str(tmp_path / "scenes.parquet")
    config = settings(tmp_path / "out", catalog=catalog, mask=f"{__name__}:bright", mask_dilation=0)
    assert run(config, client).ok
    (path,) = (tmp_path / "out").rglob("S2CD_*.tif")
    red = s2cd.open_cube(s2cd.search(catalog), bands=["red"]).values[:, 0] * 1e-4
    with rasterio.open(path) as dataset:
        np.testing.assert_array_equal(np.isnan(dataset.read(1)), (red > 0.25).any(axis=0))
    words = ["run", catalog, "--out", str(tmp_path / "x"), "--mask", "nowhere:f"]
    assert CliRunner().invoke(main, words).exit_code == 1


def test_a_mask_that_is_not_there_or_no_classes(cloudy: list[Scene], client: Client, tmp_path: Path) -> None:
    config = settings(tmp_path / "out", mask="cloud", mask_classes=(1,))
    with pytest.raises(ConfigError, match="the first: scene-000 offers no cloud, only blue"):
        run(config, client, scenes=cloudy)
    report = run(config, client, scenes=with_probability(cloudy, 20, "float32"))
    assert not report.ok
    assert all("probability.tif: a mask holds float32, expected uint8 or uint16" in r.error for r in report.maps)


@pytest.mark.parametrize("values", ["3;4", "40-", "3,10-8", (300,), ()])
def test_classes_that_are_none(values: object) -> None:
    with pytest.raises(ConfigError, match=r"^mask_classes: .*expected values from 0 to 255, .*, found ."):
        s2cd.RunConfig(catalog="x", out="y", mask_classes=values)


def test_recorded_items_offer_their_cloud_probability(shared_data: Path) -> None:
    page = shared_data / "stac" / "earth-search" / "search_10items_0e1c59b2.json"
    plain, extended = s2cd.search(page), s2cd.search(page, extra=("cloud",))
    assert not any("cloud" in s.assets for s in plain)
    clouds = [s.assets["cloud"] for s in extended if "cloud" in s.assets]
    assert clouds
    assert {(a.scale, a.grid.transform[0]) for a in clouds} == {(1.0, 20.0)}
