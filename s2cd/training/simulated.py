"""Training samples without labels: real images with simulated changes.

Two dates come from one image twice, from a real pair, or from a series; then changes of known outline
are put into one of them. Construction pastes built-up texture from elsewhere; clear-cut pastes bare ground onto
vegetation; burn and flood alter the spectrum. Crops that grow or are harvested alter whole fields too, and are
labelled as no change: most users, and OSCD's truth, do not count them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import uniform_filter

from s2cd.model import BANDS
from s2cd.model.normalise import Array, background
from s2cd.training.data import Image
from s2cd.training.nuisance import Nuisances, cloud_field
from s2cd.training.sampling import Sample, augmented, normalised, window

Rng = np.random.Generator
Mask = npt.NDArray[np.bool_]
BLOCK = 64  # edge of what a date of a series gives to a mosaic [px]
RED, NIR, SWIR = BANDS.index("red"), BANDS.index("nir"), BANDS.index("swir16")
WATER = np.array([0.07, 0.06, 0.04, 0.025, 0.02, 0.012, 0.01], np.float32)
SOIL = np.array([0.09, 0.11, 0.14, 0.20, 0.22, 0.30, 0.24], np.float32)
CROP = np.array([0.04, 0.07, 0.045, 0.42, 0.44, 0.20, 0.10], np.float32)
BURN = np.array([0.9, 0.8, 0.8, 0.4, 0.4, 0.85, 1.3], np.float32)
ROOFS = np.array(
    [
        [0.22, 0.24, 0.26, 0.29, 0.30, 0.32, 0.30],  # concrete
        [0.38, 0.39, 0.40, 0.42, 0.42, 0.40, 0.36],  # metal, white membrane
        [0.10, 0.12, 0.18, 0.24, 0.26, 0.30, 0.27],  # tile
        [0.09, 0.09, 0.10, 0.11, 0.12, 0.14, 0.13],  # asphalt
    ],
    np.float32,
)
KINDS = {"construction": 0.45, "buildings": 0.2, "clear": 0.08, "burn": 0.05, "flood": 0.07, "field": 0.15}
URBAN_KINDS = {"construction": 0.55, "buildings": 0.2, "field": 0.25}
STRONG = Nuisances(gain=0.12, bias=0.15, field=0.25, noise=0.08, shift=1.2, shift_chance=0.5)


@dataclass
class Place:
    """The dates of one place and, for each, where it looks built up: float32 (y, x) in [0, 1].

    `label` is what changed between its two dates, float32 (y, x) in [0, 1], NaN where that is not known; of a place
    without a label there may be any number of dates.
    """

    images: list[Image]
    built: list[Array]
    label: Array | None = None

    @classmethod
    def of(cls, images: list[Image], label: Array | None = None) -> Place:
        """Compute the built-up scores."""
        return cls(images, [built_up(image.reflectance) for image in images], label)


def vegetation(reflectance: Array) -> Array:
    """Return the normalised difference vegetation index of (band, y, x)."""
    red, nir = reflectance[RED], reflectance[NIR]
    return (nir - red) / np.maximum(nir + red, 1e-3)


def built_up(reflectance: Array) -> Array:
    """Return a score in [0, 1]: little vegetation, no water, rough at the scale of houses."""
    bright = np.nan_to_num(reflectance[:3].mean(axis=0))
    mean = uniform_filter(bright, 9)
    rough = np.sqrt(np.maximum(uniform_filter(bright**2, 9) - mean**2, 0)) / np.maximum(mean, 0.02)
    ndvi = uniform_filter(np.nan_to_num(vegetation(reflectance)), 9)
    dry = uniform_filter(np.nan_to_num(reflectance[SWIR]), 9) > 0.06
    return (np.clip(rough / 0.2, 0, 1) * np.clip((0.55 - ndvi) / 0.3, 0, 1) * dry).astype(np.float32)


class SimulatedSampler:
    """Crops of `places` with simulated changes, and of `series` (many dates, small images) without.

    quiet  share of the samples that come from `series`
    gap    how many dates two of them lie apart at most
    size   edge of a crop [px], a multiple of BLOCK where there are `series`
    """

    def __init__(
        self,
        places: list[Place],
        series: list[list[Image]],
        size: int,
        nuisances: Nuisances = STRONG,
        kinds: Mapping[str, float] = KINDS,
        *,
        quiet: float = 0.15,
        gap: int = 3,
    ):
        self._cities, self._series, self._size = places, series, size
        self._nuisances, self._kinds = nuisances, kinds
        self._quiet, self._gap = quiet if series else 0.0, gap

    def sample(self, rng: Rng) -> Sample:
        """Draw one augmented crop."""
        if rng.random() < self._quiet:
            return augmented(self._quiet_pair(rng), rng, self._nuisances)
        place = self._cities[rng.integers(len(self._cities))]
        rows, cols = window(place.images[0].reflectance.shape[1:], self._size, rng)
        first = int(rng.integers(len(place.images)))
        second = first if rng.random() < 0.53 else (first + 1) % len(place.images)
        before, after = (normalised(place.images[i], rows, cols) for i in (first, second))
        truth, weight = np.zeros(before.shape[1:], np.float32), np.ones(before.shape[1:], np.float32)
        if first != second and place.label is not None:
            label = place.label[rows, cols]
            truth, weight = np.nan_to_num(label), np.isfinite(label).astype(np.float32)
        elif first != second:
            weight = quiet_weight(before, after)
        level = 0.0 if first == second else background(place.images[first].sketch, place.images[second].sketch)
        sample = Sample(before, after, truth, weight, level)
        if rng.random() < (0.85 if place.label is None or first == second else 0.5):
            for _ in range(int(rng.integers(1, 6))):
                self._change(sample, place.images[second], rng)
        return augmented(sample, rng, self._nuisances)

    def _change(self, sample: Sample, image: Image, rng: Rng) -> None:
        """Put one change into the later date of `sample` and mark it."""
        ndvi = vegetation(sample.after * image.stats[:, 1, None, None] + image.stats[:, 0, None, None])
        kind = str(rng.choice(list(self._kinds), p=list(self._kinds.values())))
        outline = random_outline(sample.truth.shape, rng, small=kind == "buildings")
        if kind in {"clear", "burn", "field"}:
            outline &= ndvi > 0.35
        if outline.sum() < 4:
            return
        new = self._content(kind, sample, image, rng)
        edge = np.clip(uniform_filter(outline.astype(np.float32), 3) * 1.5 - 0.25, 0, 1)
        changed = np.where(edge > 0, sample.after + edge * (new - sample.after), sample.after)  # `new` may hold NaN
        strength = uniform_filter(np.nan_to_num(np.abs(changed - sample.after)).mean(axis=0), 3)
        sample.after = changed
        if kind == "field":
            return
        sample.truth[outline & (strength > 0.35)] = 1
        doubtful = (outline & (strength <= 0.35)) | ((edge > 0) != outline)
        sample.weight[doubtful & (strength > 0.05)] = 0
        sample.weight[outline & (strength > 0.35)] = 1

    def _content(self, kind: str, sample: Sample, image: Image, rng: Rng) -> Array:
        """Return what a change of `kind` puts there, normalised (band, y, x)."""
        centre, spread = image.stats.T[:, :, None, None]
        if kind in {"construction", "clear"}:
            return self._elsewhere(rng, built=kind == "construction")
        if kind == "burn":
            target = (sample.after * spread + centre) * BURN[:, None, None] ** np.float32(rng.uniform(0.6, 1.3))
        else:
            pure = {"buildings": ROOFS[rng.integers(len(ROOFS))], "flood": WATER}.get(kind)
            if pure is None:
                pure = (SOIL, CROP)[rng.integers(2)]
            texture = 1 + rng.uniform(0.02, 0.12) * rng.standard_normal(sample.truth.shape, np.float32)
            colour = pure * rng.uniform(0.7, 1.35) * rng.normal(1, 0.08, len(pure))
            target = colour.astype(np.float32)[:, None, None] * texture + haze_of(image)[:, None, None]
        return (target - centre) / spread

    def _elsewhere(self, rng: Rng, *, built: bool) -> Array:
        """Return a crop of another place; of a few candidates the most, or the least, built up."""
        best, crop = -np.inf, None
        for _ in range(4):
            place = self._cities[rng.integers(len(self._cities))]
            index = int(rng.integers(len(place.images)))
            rows, cols = window(place.built[index].shape, self._size, rng)
            score = place.built[index][rows, cols].mean() * (1 if built else -1)
            if score > best:
                best, crop = score, (place.images[index], rows, cols)
        assert crop is not None
        pixels = normalised(*crop)
        return np.ascontiguousarray(np.rot90(pixels, int(rng.integers(4)), axes=(1, 2)))

    def _quiet_pair(self, rng: Rng) -> Sample:
        """Return a mosaic of two dates of small images, taken as unchanged."""
        count = self._size // BLOCK
        before, after = (np.empty((len(BANDS), self._size, self._size), np.float32) for _ in range(2))
        for row in range(count):
            for col in range(count):
                images = self._series[rng.integers(len(self._series))]
                first = int(rng.integers(len(images) - 1))
                second = int(rng.integers(first + 1, min(first + self._gap, len(images) - 1) + 1))
                part = (..., slice(BLOCK * row, BLOCK * (row + 1)), slice(BLOCK * col, BLOCK * (col + 1)))
                for target, index in ((before, first), (after, second)):
                    target[part] = normalised(images[index], slice(0, BLOCK), slice(0, BLOCK))
        shape = before.shape[1:]
        return Sample(before, after, np.zeros(shape, np.float32), np.ones(shape, np.float32))


def haze_of(image: Image) -> Array:
    """Return a guess of the path reflectance of a scene: a part of its dark level."""
    dark = np.nanpercentile(image.reflectance[:, ::8, ::8], 1, axis=(1, 2))
    return (0.6 * np.maximum(dark - WATER, 0)).astype(np.float32)


def quiet_weight(before: Array, after: Array) -> Array:
    """Return the weight of a real pair's pixels as "unchanged": the tenth that differs most may have changed."""
    distance = uniform_filter(np.nan_to_num(np.abs(after - before)).mean(axis=0), 5)
    return (distance < max(0.5, float(np.quantile(distance, 0.9)))).astype(np.float32)


def random_outline(shape: tuple[int, ...], rng: Rng, *, small: bool) -> Mask:
    """Return the outline of one change (y, x): a blob, a turned rectangle, a strip, or a group of buildings."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    cy, cx = (rng.uniform(0, n) for n in shape)
    if small:
        outline = np.zeros(shape, bool)
        for _ in range(int(rng.integers(1, 8))):
            by, bx = cy + rng.normal(0, 12), cx + rng.normal(0, 12)
            outline |= turned_box(y - by, x - bx, rng.uniform(1, 5), rng.uniform(1, 5), rng.uniform(0, np.pi))
        return outline
    size, turn = np.exp(rng.uniform(np.log(3), np.log(30))), rng.uniform(0, np.pi)
    kind = rng.random()
    if kind < 0.45:
        distance = np.hypot(y - cy, x - cx) / size
        return distance + 0.35 * cloud_field(shape, rng) < 1
    if kind < 0.85:
        return turned_box(y - cy, x - cx, size, size * rng.uniform(0.3, 1), turn)
    return turned_box(y - cy, x - cx, 3 * size, rng.uniform(0.7, 2), turn)


def turned_box(y: Array, x: Array, half_length: float, half_width: float, turn: float) -> Mask:
    """Return where coordinates lie in a rectangle turned by `turn` [rad] about the origin."""
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    return (np.abs(along) < half_length) & (np.abs(across) < half_width)
