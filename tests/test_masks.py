"""Valid observations: by class, by spectrum, by a function of one's own; alike in chunks and on the whole image."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import rasterio
import torch
from conftest import write_tiff
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import s2cd
from s2cd.catalog import search
from s2cd.catalog.scene import Grid, Scene
from s2cd.errors import ConfigError, ReadError
from s2cd.masks import GROWN_CLASSES, INVALID_CLASSES, Mask, cloud_test, dilate, valid_mask
from s2cd.model import ModelRef
from s2cd.radiometry import reflectance
from s2cd.reader import Source
from s2cd.survey import SceneInput, Survey, observed, scene_input, survey_scene

VISIBLE = ("blue", "green", "red")


def test_default_classes() -> None:
    scl = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert valid_mask(scl).ravel().tolist() == [n not in INVALID_CLASSES for n in range(12)]


def test_only_clouds_and_shadows_grow() -> None:
    scl = np.full((21, 21), 4, dtype=np.uint8)
    for value in range(12):
        scl[10, 10] = value
        bad = ~valid_mask(scl, dilation=3)
        expected = 29 if value in GROWN_CLASSES else int(value in INVALID_CLASSES)
        assert bad.sum() == expected, value
    scl[10, 10] = 8
    assert valid_mask(scl, invalid=(0,), dilation=3).all()


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(17, 19), (64, 65), (33, 1)]), st.integers(0, 6))
def test_dilation_is_that_of_a_disc(seed: int, shape: tuple[int, int], radius: int) -> None:
    mask = np.random.default_rng(seed).random(shape) < 0.02
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disc = y * y + x * x <= radius * radius
    assert np.array_equal(dilate(mask, radius), ndimage.binary_dilation(mask, disc))


@pytest.mark.gpu
@pytest.mark.parametrize("dilation", [0, 3, 12])
def test_masks_are_made_where_the_classes_lie(dilation: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    cupy = pytest.importorskip("cupy")
    classes = np.random.default_rng(0).integers(0, 12, (65, 130)).astype(np.uint8)
    found = valid_mask(cupy.asarray(classes), dilation=dilation)
    assert isinstance(found, cupy.ndarray)
    np.testing.assert_array_equal(cupy.asnumpy(found), valid_mask(classes, dilation=dilation))


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([None, f"{__name__}:bright"]))
def test_chunks_with_a_halo_of_reach_equal_the_whole(seed: int, spectral: bool, function: str | None) -> None:
    """What lies further away than `reach` does not matter."""
    rng = np.random.default_rng(seed)
    mask = Mask(dilation=5, function=function)
    size, halo = 150, mask.reach
    assert halo == (21 if function is None else 5)
    if spectral:
        cloud = ndimage.gaussian_filter(rng.random((size, size)), 7)
        image = np.repeat((0.1 + 0.4 * (cloud > np.quantile(cloud, 0.7)))[None], 3, axis=0).astype(np.float32)
        whole = mask.from_reflectance(image, VISIBLE)
    else:
        image = rng.choice(np.array([4, 5, 8, 3], np.uint8), (size, size), p=[0.6, 0.38, 0.01, 0.01])
        whole = mask.from_classes(image)
    core = slice(60, 90)
    read = slice(60 - halo, 90 + halo)
    part = image[..., read, read]
    found = mask.from_reflectance(part, VISIBLE) if spectral else mask.from_classes(part)
    assert np.array_equal(found[halo : halo + 30, halo : halo + 30], whole[core, core])


def test_decimated_masks_grow_by_the_same_distance() -> None:
    scl = np.full((200, 200), 4, dtype=np.uint8)
    scl[80:120, 80:120] = 9
    mask = Mask(dilation=20)
    full = (~mask.from_classes(scl)).sum()
    coarse = (~mask.from_classes(scl[::4, ::4], 4)).sum() * 16
    assert coarse == pytest.approx(full, rel=0.1)


def image_of(scene: Scene, bands: tuple[str, ...]) -> np.ndarray:
    planes = []
    for band in bands:
        asset = scene.assets[band]
        with rasterio.open(asset.href) as dataset:
            planes.append(reflectance(dataset.read(1), asset.scale, asset.offset))
    return np.stack(planes)


def test_spectral_test_leaves_cities_and_deserts_alone(shared_data: Path) -> None:
    """OSCD's scenes were chosen to be clear: bright roofs, sand and salt must pass."""
    for scene in search(shared_data / "oscd"):
        valid = Mask().from_reflectance(image_of(scene, VISIBLE), VISIBLE)
        assert valid.mean() > 0.995, scene.id


def test_spectral_test_finds_most_of_what_sen2cor_calls_cloud(shared_data: Path) -> None:
    found = clouds = taken = clear = 0
    for scene in search(shared_data / "flanders"):
        cloud = cloud_test(image_of(scene, VISIBLE), VISIBLE)
        with rasterio.open(scene.assets["scl"].href) as dataset:
            scl = dataset.read(1).repeat(2, axis=0).repeat(2, axis=1)
        is_cloud, is_clear = np.isin(scl, (8, 9)), np.isin(scl, (2, 4, 5, 6, 7))
        found, clouds = found + (cloud & is_cloud).sum(), clouds + is_cloud.sum()
        taken, clear = taken + (cloud & is_clear).sum(), clear + is_clear.sum()
    assert found / clouds > 0.7
    assert taken / clear < 0.005


def test_cirrus_band_counts() -> None:
    image = np.full((2, 9, 9), 0.05, dtype=np.float32)
    image[1, 4, 4] = 0.05
    image[1, :4] = 0.001
    assert cloud_test(image, ("red", "cirrus"))[4, 4]
    assert not cloud_test(image, ("red", "cirrus"))[0, 0]


def bright(reflectance: np.ndarray, bands: tuple[str, ...]) -> np.ndarray:
    """A mask function of a user's own."""
    return reflectance[bands.index("red")] > 0.5


def test_a_function_takes_the_place_of_both() -> None:
    mask = Mask(dilation=1, function=f"{__name__}:bright")
    image = np.zeros((3, 9, 9), dtype=np.float32)
    image[2, 4, 4] = 0.6
    assert (~mask.from_reflectance(image, VISIBLE)).sum() == 5
    assert pickle.loads(pickle.dumps(mask)) == mask


def percent(reflectance: np.ndarray, bands: tuple[str, ...]) -> np.ndarray:
    return np.full(reflectance.shape[1:], 0.01, np.float32)


def nowhere(reflectance: np.ndarray, bands: tuple[str, ...]) -> bool:
    return False


def one_row(reflectance: np.ndarray, bands: tuple[str, ...]) -> np.ndarray:
    return np.zeros((1, reflectance.shape[2]), bool)


def failing(reflectance: np.ndarray, bands: tuple[str, ...]) -> np.ndarray:
    return reflectance[bands.index("two\nlines")] > 0


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("percent", r"found float32 of shape \(9, 7\), expected bool of shape \(9, 7\)$"),
        ("nowhere", "found bool, expected bool of shape"),
        ("one_row", r"found bool of shape \(1, 7\), expected"),
        ("failing", r"ValueError: tuple\.index.*, expected bool of shape \(9, 7\)$"),
    ],
)
def test_a_function_that_gives_no_mask_is_refused(name: str, found: str) -> None:
    mask = Mask.parse(f"{__name__}:{name}")
    with pytest.raises(ConfigError, match=f"^mask function '{__name__}:{name}': {found}") as caught:
        mask.from_reflectance(np.zeros((3, 9, 7), np.float32), VISIBLE)
    assert isinstance(caught.value.__cause__, ValueError) == (name == "failing")


def test_parse_tells_bands_from_functions() -> None:
    assert Mask.parse("scl") == Mask()
    assert Mask.parse("scl", (9,), 3) == Mask((9,), 3)
    assert Mask.parse("cloud", (40, 41), 3) == Mask((40, 41), 3, band="cloud")
    assert Mask.parse(f"{__name__}:bright").function == f"{__name__}:bright"
    with pytest.raises(ConfigError, match="mask 'cloud' needs mask_classes"):
        Mask.parse("cloud")
    with pytest.raises(ConfigError, match="'nowhere:x': ModuleNotFoundError: No module named 'nowhere'"):
        Mask.parse("nowhere:x")
    with pytest.raises(ConfigError, match=r"mask_classes \[3\] mean nothing to the mask function"):
        Mask.parse(f"{__name__}:bright", (3,))


def test_every_value_of_another_band_grows() -> None:
    probability = np.zeros((9, 9), np.uint16)
    probability[4, 4], probability[0, 0] = 80, 300
    assert (~Mask((80,), 1, band="cloud").from_classes(probability)).sum() == 5
    assert (~Mask((4,), 1).from_classes(probability)).sum() == 0


def test_values_are_told_one_by_one_or_as_a_text() -> None:
    for given_values in ("3,8-10", [3, 8, 9, 10], np.array([3, 8, 9, 10])):
        assert Mask.parse("cloud", given_values).invalid == (3, 8, 9, 10)


@pytest.mark.parametrize("values", [[300], [-1], [40.5], "3,10-8", "40-", "4 0", "", [], ["3"], 3])
def test_values_that_no_band_has_are_refused(values: object) -> None:
    found = f"mask_classes: found {re.escape(repr(values))}, expected values from 0 to 255, and ranges such as 3,8-10$"
    for name in ("scl", "cloud"):
        with pytest.raises(ConfigError, match=found):
            Mask.parse(name, values)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["nowhere.at.all:x", "s2cd.masks:nothing", "s2cd.masks", ""])
def test_a_function_that_is_none_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match="mask function"):
        Mask(function=name).from_reflectance(np.zeros((1, 3, 3), np.float32), ("red",))


def test_a_module_that_is_not_found_is_looked_for_in_pythonpath() -> None:
    """Python itself looks into the working directory, the command `s2cd` does not."""
    with pytest.raises(ConfigError, match=r"No module named 'nowhere', expected .* can be imported: set PYTHONPATH$"):
        Mask.parse("nowhere:cloud")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def cloud(:", "SyntaxError: invalid syntax"),
        ("nothing_here", "NameError: name 'nothing_here' is not defined"),
        ("import sys; sys.exit(2)", "SystemExit: 2"),
        ("cloud = 3", "found int, expected a function"),
    ],
)
def test_a_function_that_cannot_be_had_is_named(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"mask_of_{len(source)}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"mask function '{name}:cloud': {message}"):
        Mask.parse(f"{name}:cloud")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"invalid": (3, 300)}, r"invalid: found \(3, 300\), expected whole numbers from 0 to 255"),
        ({"invalid": "3,8"}, "invalid: found '3,8', expected whole numbers"),
        ({"dilation": -2}, "dilation: found -2, expected 0 to 60 pixels of 10 m"),
        ({"dilation": 2.5}, "dilation: found 2.5"),
    ],
)
def test_a_mask_that_can_be_none_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mask(**options)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(17, 19), (64, 66), (1, 5)]), st.sampled_from([0.0, -0.1]))
def test_bands_and_classes_at_20_m_hide_the_same_pixels_as_replicated_ones(
    seed: int, shape: tuple[int, int], offset: float
) -> None:
    rng = np.random.default_rng(seed)
    half = tuple(-(-n // 2) for n in shape)
    fine = (rng.random((2, *shape)) < 0.9).astype(np.uint16)
    coarse = (rng.random(half) < 0.9).astype(np.uint16)
    classes = rng.choice(np.array([4, 6, 9, 0], np.uint8), half, p=[0.5, 0.4, 0.05, 0.05])
    full, full_classes = (a.repeat(2, 0).repeat(2, 1)[: shape[0], : shape[1]] for a in (coarse, classes))
    sources = tuple(Source(band, (), "static") for band in ("red", "nir", "swir16"))
    grid = Grid(32631, (10.0, 0, 0, 0, -10.0, 0), shape)
    scene = SceneInput("a", grid, sources, (1,) * 3, (offset,) * 3, sources[0], 2)

    def wide(small: np.ndarray) -> np.ndarray:
        return small.repeat(2, 0).repeat(2, 1)[: shape[0], : shape[1]]

    water = wide((classes == 6) & ~dilate(classes == 0, 3)) & np.logical_or.reduce([*fine, full])
    lit = np.logical_and.reduce([*fine, full]) | (water & (offset == 0))
    expected = lit & wide(Mask().from_classes(classes, 2))
    for planes, given_classes in (([*fine, coarse], classes), ([*fine, full], full_classes)):
        assert np.array_equal(observed(planes, given_classes, scene, Mask()), expected)
    # An SCL whose item has one grid for all assets: the file is as it is.
    assert np.array_equal(observed([*fine, coarse], classes, replace(scene, classes_factor=1), Mask()), expected)


def test_black_water_is_observed_and_what_bands_do_not_show_is_not(make_series: Callable[..., list[Scene]]) -> None:
    """A flood without any light in the infrared; and a swath at whose edge the infrared bands end first."""
    scenes = make_series(dates=2, change=False)
    for band in ("green", "nir", "nir08", "swir16", "swir22", "scl"):
        with rasterio.open(scenes[1].assets[band].href, "r+") as dataset:
            pixels, k = dataset.read(1), round(10 / dataset.res[0] * 2)  # 2 at 10 m, 1 at 20 m
            flood, edge = (slice(20 * k, 40 * k), slice(20 * k, 50 * k)), (slice(None), slice(100 * k, None))
            if band == "scl":
                pixels[flood], pixels[edge] = 6, 6
                pixels[:, 110:] = 0
            elif band != "green":
                pixels[flood], pixels[edge] = 0, 0
            else:
                pixels[:, 110 * k :] = 0
            dataset.write(pixels, 1)
    pairs = s2cd.consecutive_pairs(scenes)
    (change,) = s2cd.detect_changes(s2cd.open_cube(scenes), pairs, device="cpu").values
    assert (change[40:80, 40:100] > 0.5).mean() > 0.9
    assert np.isnan(change[:, 214:]).all()  # as far from what is not observed as clouds grow
    assert np.isfinite(change[:, :198]).all()


def test_clouds_grow_by_metres_whatever_the_size_of_pixels() -> None:
    """A network of one's own may have bands of 20 m alone."""
    sources = (Source("nir08", (), "static"),)
    scene = SceneInput("a", Grid(32631, (20.0, 0, 0, 0, -20.0, 0), (41, 41)), sources, (1,), (0,), sources[0], 1)
    classes = np.full((41, 41), 4, np.uint8)
    classes[20, 20] = 9
    seen = observed([np.ones((41, 41), np.uint16)], classes, scene, Mask(dilation=6))
    assert np.flatnonzero(~seen[20]).tolist() == [*range(17, 24)]


def surveyed(scene: Scene, band: str, scale: float) -> Survey:
    """Survey a scene of which one band has another scale."""
    model, assets = ModelRef.of("generic", "cpu"), {**scene.assets, band: replace(scene.assets[band], scale=scale)}
    taken = scene_input(replace(scene, assets=assets), model.load().bands, assets["red"].grid, Mask())
    return survey_scene(taken, Mask(), model)


def test_what_means_no_observation_is_what_the_scene_says() -> None:
    sources = tuple(Source(band, (), "static", nodata=65535) for band in ("red", "swir16"))
    scene = SceneInput("a", Grid(32631, (10.0, 0, 0, 0, -10.0, 0), (4, 6)), sources, (1,) * 2, (0,) * 2, sources[0], 2)
    fine, coarse, classes = np.full((4, 6), 7, np.uint16), np.full((2, 3), 7, np.uint16), np.full((2, 3), 4, np.uint8)
    fine[0, :2] = 65535, 0
    coarse[1, 1:] = 65535, 0
    expected = np.ones((4, 6), bool)
    expected[0, 0] = expected[2:, 2:4] = False
    for kind in (4, 6):  # water, too: 65535 is no reflectance
        assert np.array_equal(observed([fine, coarse], np.full_like(classes, kind), scene, Mask()), expected)


def test_a_survey_tells_the_darkest_of_what_is_seen(make_series: Callable[..., list[Scene]]) -> None:
    (scene,) = make_series(dates=1)
    with rasterio.open(scene.assets["red"].href, "r+") as dataset:
        red = dataset.read(1)
        red[:50] = 0
        dataset.write(red, 1)
    model = ModelRef.of("generic", "cpu")
    found = survey_scene(scene_input(scene, ("red", "nir"), scene.assets["red"].grid, Mask()), Mask(), model)
    with rasterio.open(scene.assets["nir"].href) as dataset:
        seen = np.stack([red, dataset.read(1)])[:, 50:]
    assert found.valid_fraction == 0.75
    np.testing.assert_allclose(found.dark, np.percentile(seen, 0.5, axis=(1, 2)) * 1e-4, rtol=1e-5)


def test_whole_numbers_with_the_scale_of_reflectance_are_refused(make_series: Callable[..., list[Scene]]) -> None:
    """As where an item states a scale of 1, and not what its pixels are."""
    (scene,) = make_series(dates=1)
    assert surveyed(scene, "nir", 1e-4).valid_fraction == 1
    with pytest.raises(ReadError, match=r"nir\.tif: holds uint16, but has the scale 1, expected about 0\.0001"):
        surveyed(scene, "nir", 1.0)


def test_reflectance_with_the_scale_of_digital_numbers_is_refused(make_series: Callable[..., list[Scene]]) -> None:
    """As where an item states no scale. Digital numbers may be stored as float32."""
    (scene,) = make_series(dates=1)
    numbers = surveyed(scene, "nir", 1e-4)
    for factor, scale in ((1.0, 1e-4), (1e-4, 1.0)):
        with rasterio.open(scene.assets["nir"].href) as dataset:
            pixels, transform = dataset.read(1).astype(np.float32) * np.float32(factor), dataset.transform
        write_tiff(Path(scene.assets["nir"].href), pixels, transform, 64)
        np.testing.assert_allclose(surveyed(scene, "nir", scale).statistics, numbers.statistics, rtol=1e-4)
    with pytest.raises(
        ReadError, match=r"nir\.tif: holds float32 up to 0\.\d+, but has the scale 0\.0001, expected about 1"
    ):
        surveyed(scene, "nir", 1e-4)


class _Away(np.ndarray):
    """Stands for an array of CuPy: it lies on a GPU, and no function takes it together with NumPy's arrays."""

    __cuda_array_interface__: ClassVar = {}

    def __array_function__(self, func, types, args, kwargs):  # type: ignore[no-untyped-def]
        if np.ndarray in types:
            raise TypeError(f"{func.__name__}: unsupported type {np.ndarray}")
        return super().__array_function__(func, types, args, kwargs)


@pytest.mark.parametrize("mask", [Mask(), Mask(function=f"{__name__}:bright")])
def test_scenes_without_classes_are_masked_on_the_host_wherever_their_pixels_lie(mask: Mask) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 2000, (3, 1, 1)).repeat(64, 1).repeat(65, 2).astype(np.uint16)
    pixels[:, 5:50, 7:50] = 8000
    pixels[:, :3] = 0
    sources = tuple(Source(band, (), "static") for band in VISIBLE)
    scene = SceneInput("a", Grid(32631, (10.0, 0, 0, 0, -10.0, 0), (64, 65)), sources, (1e-4,) * 3, (0,) * 3, None, 1)
    expected = observed(pixels, None, scene, mask)
    assert 0 < expected.mean() < 1 - 3 / 64
    found = observed(pixels.view(_Away), None, scene, mask)
    assert type(found) is np.ndarray
    np.testing.assert_array_equal(found, expected)
