"""How much change a model sees where there is none: one date of an unchanged pair under another atmosphere, light, ...

The disturbances are those of `s2cd.simulate.atmosphere`, applied to reflectance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from s2cd.catalog.bands import band_info
from s2cd.errors import CatalogError
from s2cd.model import BANDS, Model
from s2cd.model.normalise import Array
from s2cd.simulate import brdf, cirrus, gain, haze, noise, shift, sun_angle
from s2cd.simulate.texture import fractal
from s2cd.training.data import City, Image
from s2cd.training.metrics import Histogram
from s2cd.training.scoring import judged, magnitude, mapping, scaled

WAVELENGTHS = [band_info(band).wavelength for band in BANDS]
Rng = np.random.Generator


def _cirrus(image: Array, rng: Rng) -> Array:
    field = fractal(rng, image.shape[1:], 300.0)
    opacity = 0.06 * np.clip(0.5 + 0.5 * field, 0, 2)
    return cirrus(image, WAVELENGTHS, opacity.astype(np.float32))


def _sun(image: Array, rng: Rng) -> Array:
    """Light gentle hills, slopes of about 5 %, by another sun."""
    height = fractal(rng, image.shape[1:], 200.0) * np.float32(25.0)
    slope_y, slope_x = (np.asarray(slope, np.float32) for slope in np.gradient(height, 10.0))
    sunny = sun_angle(image, slope_y, slope_x, 60.0, 150.0)
    low = sun_angle(image, slope_y, slope_x, 30.0, 165.0)
    ratio = np.float32(np.sin(np.radians(30)) / np.sin(np.radians(60)))
    return np.asarray(image * low / np.maximum(sunny, 1e-4) * ratio, np.float32)


def _brdf(image: Array, rng: Rng) -> Array:
    """Look from the far end of the swath, the zenith angle falling by nearly as much as across a tile."""
    view = np.linspace(10.5, 4.0, image.shape[2], dtype=np.float32) * np.ones((image.shape[1], 1), np.float32)
    return brdf(image, WAVELENGTHS, view, 35.0, rng.choice([30.0, 150.0]))


def _gain(image: Array, rng: Rng) -> Array:
    return gain(image, rng.choice([0.8, 1.2]) * np.ones(len(image)))


def _shift(image: Array, rng: Rng) -> Array:
    turn = rng.uniform(0, 2 * np.pi)
    return shift(image, 0.5 * np.sin(turn), 0.5 * np.cos(turn))


NUISANCES: Mapping[str, Callable[[Array, Rng], Array]] = {
    "none": lambda image, rng: image,
    "haze": lambda image, rng: haze(image, WAVELENGTHS, 0.4),
    "cirrus": _cirrus,
    "sun": _sun,
    "brdf": _brdf,
    "gain": _gain,
    "shift": _shift,
    "noise": lambda image, rng: noise(image, rng, 0.002),
    "all": lambda image, rng: noise(
        _shift(_gain(_brdf(_sun(_cirrus(haze(image, WAVELENGTHS, 0.3), rng), rng), rng), rng), rng), rng
    ),
}


def disturbed(image: Image, kind: str, seed: int) -> Array:
    """Return the reflectance of `image` under one of `NUISANCES`, the 20 m bands replicated as they were."""
    result = NUISANCES[kind](image.reflectance, np.random.default_rng(seed)).astype(np.float32)
    coarse = result[4:, ::2, ::2].repeat(2, axis=1).repeat(2, axis=2)
    result[4:] = coarse[:, : result.shape[1], : result.shape[2]]
    return result


Predict = Callable[[City, Array, Array], Array]
"""A map (y, x) of two dates (band, y, x) of reflectance of a city."""


def of_model(model: Model) -> Predict:
    """Return what maps with a model."""
    predict = mapping(model)
    return lambda _, before, after: predict(before, after)


def of_baseline(name: str) -> Predict:
    """Return what maps with a classical method, 0.5 where the most changed 2.5 % of the city's real pair begin."""

    def predict(city: City, before: Array, after: Array) -> Array:
        found = magnitude(name, *(Image.of(city.name, "", date) for date in (before, after)))
        return scaled(found, magnitude(name, city.before, city.after))

    return predict


def false_change(predict: Predict, cities: list[City]) -> dict[str, tuple[float, float, float]]:
    """Return for each nuisance, over the first dates of `cities` against themselves disturbed: the mean probability,
    the share of pixels above 0.5, and the largest probability, of the pixels that are mapped.

    Raises CatalogError if none is.
    """
    found = {}
    for kind in NUISANCES:
        maps = [
            predict(c, c.before.reflectance, disturbed(c.before, kind, seed)).ravel() for seed, c in enumerate(cities)
        ]
        values: npt.NDArray[np.float32] = np.concatenate(maps)
        values = values[np.isfinite(values)]
        if not len(values):
            names = ", ".join(city.name for city in cities)
            raise CatalogError(f"{names}: found no pixel that is seen under {kind!r}, expected some")
        found[kind] = (float(values.mean()), float((values > 0.5).mean()), float(values.max()))
    return found


def f1_under(predict: Predict, cities: list[City]) -> dict[str, float]:
    """Return the pooled F1 at 0.5 on labelled pairs whose later date is disturbed, for each nuisance."""
    found = {}
    for kind in NUISANCES:
        counts = np.sum(
            [
                Histogram.of(
                    judged(predict(c, c.before.reflectance, disturbed(c.after, kind, seed)), c), c.label
                ).counts
                for seed, c in enumerate(cities)
            ],
            axis=0,
        )
        found[kind] = Histogram(counts).scores().f1
    return found


def table(predict: Predict, cities: list[City]) -> str:
    """Return both as a Markdown table."""
    unchanged, labelled = false_change(predict, cities), f1_under(predict, cities)
    rows = [
        f"| {kind} | {mean:.5f} | {share:.4%} | {top:.3f} | {labelled[kind]:.3f} |"
        for kind, (mean, share, top) in unchanged.items()
    ]
    return "\n".join([HEADER, *rows])


HEADER = """| disturbance of the later date | mean probability | above 0.5 | largest | F1, labelled pairs |
|---|---|---|---|---|"""
