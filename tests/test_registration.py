"""Displacement of image pairs: known shifts of simulated and of real pixels, measured to a tenth of a pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import fft, ndimage

from s2cd.registration import phase_shift


def scenery(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Smooth fields with edges and texture."""
    rng = np.random.default_rng(seed)
    fields = ndimage.zoom(rng.uniform(500, 4000, (12, 12)), (shape[0] / 12, shape[1] / 12), order=0)
    image = fields[: shape[0], : shape[1]] + ndimage.gaussian_filter(rng.normal(0, 900, fields.shape), 1.5)
    return ndimage.gaussian_filter(image, 1)


def move(image: np.ndarray, dy: float, dx: float) -> np.ndarray:
    """Shift an image by the Fourier theorem, exactly, round its edges."""
    return fft.ifft2(ndimage.fourier_shift(fft.fft2(image), (dy, dx))).real


@settings(max_examples=15)
@given(st.floats(-3, 3), st.floats(-3, 3), st.integers(0, 3))
def test_known_shifts(dy: float, dx: float, seed: int) -> None:
    image = scenery((200, 216), seed)
    found = phase_shift(image, move(image, dy, dx))
    assert found.dy == pytest.approx(dy, abs=0.1)
    assert found.dx == pytest.approx(dx, abs=0.1)
    assert found.quality > 0.7


@pytest.mark.parametrize("shape", [(64, 64), (127, 129), (255, 160), (1023, 1025)])
def test_awkward_sizes(shape: tuple[int, int]) -> None:
    image = scenery(shape)
    found = phase_shift(image, move(image, 0.6, -1.3))
    assert (found.dy, found.dx) == (pytest.approx(0.6, abs=0.1), pytest.approx(-1.3, abs=0.1))


def test_other_light_noise_and_clouds_do_not_matter() -> None:
    rng = np.random.default_rng(1)
    image = scenery((300, 300))
    after = move(image, -0.4, 0.7) * 0.6 + 350 + rng.normal(0, 40, image.shape)
    valid = np.ones(image.shape, dtype=bool)
    valid[40:120, 150:260] = False
    after[~valid] = 9000
    found = phase_shift(image, after, valid)
    assert (found.dy, found.dx) == (pytest.approx(-0.4, abs=0.1), pytest.approx(0.7, abs=0.1))
    after[~valid] = np.nan
    assert phase_shift(image, after) == pytest.approx(found, abs=0.02)


def test_clouds_that_hide_half_of_the_pair_do_not_hold_the_shift_back() -> None:
    rng = np.random.default_rng(3)
    image, cover = scenery((400, 416)), ndimage.gaussian_filter(rng.normal(size=(400, 416)), 8)
    moved, valid = move(image, 0.5, -0.5), cover < np.quantile(cover, 0.5)
    found = phase_shift(np.where(valid, image, 9000), np.where(valid, moved, 9000), valid)
    assert (found.dy, found.dx) == pytest.approx((0.5, -0.5), abs=0.04)


def test_the_same_image_is_not_displaced() -> None:
    image = scenery((100, 100))
    assert phase_shift(image, image) == pytest.approx((0, 0, 1), abs=1e-3)


@pytest.mark.parametrize("shape", [(15, 400), (17, 19)])
def test_nothing_to_compare(shape: tuple[int, int]) -> None:
    flat = phase_shift(np.full(shape, 7.0), np.full(shape, 9.0))
    assert np.isnan(flat.dy)
    assert flat.quality == 0
    hidden = phase_shift(scenery((100, 100)), scenery((100, 100)), np.zeros((100, 100), dtype=bool))
    assert np.isnan(hidden.dx)


@pytest.mark.filterwarnings("error")
def test_too_little_is_left_to_compare() -> None:
    """Three rows are valid, and once the second image is moved back none of them in both."""
    valid = np.zeros((16, 16), dtype=bool)
    valid[:3] = True
    images = np.random.default_rng(0).normal(size=(2, 16, 16))
    found = phase_shift(*images, valid)
    assert np.isnan(found.dy)
    assert found.quality == 0


def test_images_of_different_places_have_no_quality() -> None:
    assert phase_shift(scenery((200, 200), 1), scenery((200, 200), 2)).quality < 0.3


def real(shared_data: Path, city: str, date: str, band: str = "B04") -> np.ndarray:
    with rasterio.open(shared_data / "oscd" / "assets" / city / date / f"{band}.tif") as dataset:
        return dataset.read(1).astype(float)


def dates(shared_data: Path, city: str) -> list[str]:
    return sorted(p.name for p in (shared_data / "oscd" / "assets" / city).iterdir())


@pytest.mark.parametrize("city", ["nantes", "bercy", "pisa", "abudhabi"])
def test_real_pairs_moved_on_purpose(shared_data: Path, city: str) -> None:
    """What a further known shift of the second date adds to the measured one, years and seasons apart."""
    first, second = (real(shared_data, city, date) for date in dates(shared_data, city))
    base = phase_shift(first, second)
    assert base.quality > 0.3
    for dy, dx in ((0.5, -0.25), (-1.4, 0.8)):
        found = phase_shift(first, move(second, dy, dx))
        assert found.dy - base.dy == pytest.approx(dy, abs=0.1)
        assert found.dx - base.dx == pytest.approx(dx, abs=0.1)


def test_real_shifts_agree_between_bands_and_with_what_is_known(shared_data: Path) -> None:
    """Red and green are two measurements of one shift. The data's README states 1.5 px for abudhabi."""
    size = {}
    for folder in sorted((shared_data / "oscd" / "assets").iterdir()):
        found = [
            phase_shift(*(real(shared_data, folder.name, date, band) for date in dates(shared_data, folder.name)))
            for band in ("B04", "B03")
        ]
        assert found[0] == pytest.approx(found[1], abs=0.15), folder.name
        size[folder.name] = np.hypot(found[0].dy, found[0].dx)
    displaced = {name for name, pixels in size.items() if pixels > 0.9}
    assert displaced == {"abudhabi", "beihai", "saclay_e"}
    assert size["abudhabi"] == pytest.approx(1.4, abs=0.2)
    assert np.median(list(size.values())) < 0.65
