"""Light, air, clouds, optics and noise as functions on reflectance."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import correlate

from s2cd.simulate import brdf, cirrus, clouds, gain, haze, noise, shadow, shift, sun_angle
from s2cd.simulate.__main__ import main
from s2cd.simulate.acquisition import sun_position
from s2cd.simulate.atmosphere import _kernels
from s2cd.simulate.spectra import WAVELENGTHS
from s2cd.simulate.texture import fractal, hash01


def image(shape: tuple[int, int] = (17, 19), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.01, 0.5, (7, *shape)).astype(np.float32)


EVERY = {
    "haze": lambda x: haze(x, WAVELENGTHS, 0.2),
    "cirrus": lambda x: cirrus(x, WAVELENGTHS, np.full(x.shape[1:], 0.1, np.float32)),
    "clouds": lambda x: clouds(x, WAVELENGTHS, *np.full((2, *x.shape[1:]), 0.5, np.float32)),
    "shadow": lambda x: shadow(x, WAVELENGTHS, np.full(x.shape[1:], 0.5, np.float32)),
    "sun_angle": lambda x: sun_angle(x, *np.full((2, *x.shape[1:]), 0.1, np.float32), 40.0, 160.0),
    "brdf": lambda x: brdf(x, WAVELENGTHS, np.full(x.shape[1:], 8.0, np.float32), 40.0, 120.0),
    "gain": lambda x: gain(x, np.linspace(0.9, 1.1, 7)),
    "shift": lambda x: shift(x, 0.3, -0.2),
    "noise": lambda x: noise(x, np.random.default_rng(1)),
}


@pytest.mark.parametrize("name", EVERY)
def test_keeps_shape_dtype_input_and_nan(name):
    before = image()
    before[:, 3, 4] = np.nan
    kept = before.copy()
    after = EVERY[name](before)
    assert after.shape == before.shape
    assert after.dtype == np.float32
    assert np.array_equal(before, kept, equal_nan=True)
    assert np.isnan(after[:, 3, 4]).all()
    assert np.isfinite(after[:, 12:, 12:]).all()


def test_haze_is_blue_and_brightens_the_dark_only():
    dark = haze(np.full((7, 2, 2), 0.01, np.float32), WAVELENGTHS, 0.3)[:, 0, 0]
    assert (np.diff(dark) < 0).all()
    assert dark[0] > 0.04
    assert haze(np.full((7, 2, 2), 0.9, np.float32), WAVELENGTHS, 0.3).max() < 0.9
    assert np.array_equal(haze(image(), WAVELENGTHS, 0.0), image())


def test_flat_ground_is_not_shaded_and_slopes_to_the_sun_are_brighter():
    x, flat = image(), np.zeros((17, 19), np.float32)
    np.testing.assert_allclose(sun_angle(x, flat, flat, 35, 160), x, rtol=1e-6)
    # Falling to the south: elevation decreases down the rows.
    assert (sun_angle(x, flat - 0.2, flat, 35, 180) > x).all()
    assert (sun_angle(x, flat + 0.2, flat, 35, 180) < x).all()
    assert (sun_angle(x, flat, flat - 0.2, 35, 90) > x).all()


def test_ground_is_brighter_seen_from_the_side_of_the_sun():
    x, zenith = image(), np.zeros((17, 19), np.float32)
    np.testing.assert_array_equal(brdf(x, WAVELENGTHS, zenith, 35, 0), x)
    back, forward = (brdf(x, WAVELENGTHS, zenith + 10, 35, azimuth) / x for azimuth in (0, 180))
    assert ((back > 1) & (back < 1.15)).all()
    assert ((forward > 0.85) & (forward < 1)).all()
    volume, shade = _kernels(0.0, np.zeros(()), 0.0)  # with the sun overhead the kernels are nought by definition
    assert (float(volume), float(shade)) == pytest.approx((0, 0), abs=1e-12)
    one, other = _kernels(0.5, np.array(0.3), 1.0), _kernels(0.3, np.array(0.5), 1.0)
    np.testing.assert_allclose(one, other)  # the light's way may be turned round


@given(st.integers(-1, 1), st.integers(-1, 1))
@settings(max_examples=9)
def test_shift_moves_down_and_right(dy, dx):
    point = np.zeros((1, 17, 19), np.float32)
    point[0, 8, 9] = 1
    moved = shift(point, dy, dx, sigma=0.5)[0]
    assert np.unravel_index(moved.argmax(), moved.shape) == (8 + dy, 9 + dx)
    assert moved.sum() == pytest.approx(1, abs=1e-5)


def test_subpixel_shift_moves_the_centre_of_mass():
    point = np.zeros((1, 21, 21), np.float32)
    point[0, 10, 10] = 1
    moved = shift(point, 0.25, -0.4, sigma=0.7)[0]
    y, x = np.indices(moved.shape)
    assert (moved * y).sum() == pytest.approx(10.25, abs=0.01)
    assert (moved * x).sum() == pytest.approx(9.6, abs=0.01)


@pytest.mark.parametrize(("dy", "dx"), [(0.5, -0.5), (0.0, 1.4), (-1.5, 0.3)])
@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0])
def test_shift_is_a_gaussian_and_takes_no_more_pixels_than_count(dy, dx, sigma):
    before, k = image((40, 41)), np.arange(-8, 9)
    kernels = [np.exp(-((k + d) ** 2) / (2 * sigma**2)) for d in (dy, dx)]
    whole = np.outer(*(kernel / kernel.sum() for kernel in kernels))
    expected = np.stack([correlate(band, whole, mode="nearest") for band in before.astype(np.float64)])
    np.testing.assert_allclose(shift(before, dy, dx, sigma), expected, atol=1e-4)
    before[:, 20, 20] = np.nan
    reach = np.argwhere(np.isnan(shift(before, dy, dx, sigma)[0])) - 20
    assert [0, 0] in reach.tolist()
    for offsets, d in zip(reach.T, (dy, dx), strict=True):
        assert np.abs(offsets[offsets != 0] - d).max(initial=0) < 4.4 * sigma


def test_shift_leaves_most_of_an_image_with_scattered_gaps():
    before = image((100, 100))
    before[:, np.random.default_rng(1).random((100, 100)) < 0.05] = np.nan
    assert np.isfinite(shift(before, 0.5, 0.0)).mean() > 0.3


def test_sun_over_greenwich_at_the_equinox():
    elevation, azimuth = sun_position(datetime(2021, 3, 20, 12, 7, tzinfo=UTC), 0.0, 51.48)
    assert elevation == pytest.approx(38.5, abs=0.5)
    assert azimuth == pytest.approx(180, abs=1)


@pytest.mark.parametrize("scale", [1, 4, 55, 240])
def test_fractal_noise_is_standard(scale):
    fields = [fractal(np.random.default_rng(seed), (300, 310), scale, octaves=5) for seed in range(12)]
    assert np.mean(fields) == pytest.approx(0, abs=0.35)
    assert np.std(fields) == pytest.approx(1, abs=0.25)


def test_hash_is_uniform_and_stable():
    numbers = hash01(7, np.arange(20_000), np.arange(20_000) % 3)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.histogram(numbers, 10, (0, 1))[0] == pytest.approx(np.full(10, 2000), rel=0.1)
    assert np.array_equal(numbers[:5], hash01(7, np.arange(5), np.arange(5) % 3))


def test_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, [str(tmp_path / "s"), "--size", "33", "--dates", "2", "--orbit", "51"])
    assert done.exit_code == 0, done.output
    assert done.output.strip() == str(tmp_path / "s" / "catalog.json")
    nowhere = CliRunner().invoke(main, ["", "--size", "16", "--dates", "1"])
    assert (nowhere.exit_code, nowhere.stderr) == (1, "error: out: found '', expected a folder\n")
    wrong = CliRunner().invoke(main, [str(tmp_path / "t"), "--tile", "00AAA"])
    assert wrong.exit_code == 1
    assert "unknown tile" in wrong.output
