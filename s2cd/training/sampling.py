"""Training samples: crops of labelled pairs with augmentation, as tensors that the network takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from s2cd.model.appearance import FINE_BANDS
from s2cd.model.normalise import LIMIT, Array, background
from s2cd.training.data import City, Image
from s2cd.training.nuisance import Nuisances, cloud_field, displaced

Rng = np.random.Generator
LIGHT = Nuisances(
    gain=0.03, bias=0.04, common=0.15, contrast=0.15, field=0.05, noise=0.02, shift=0.5, shift_chance=0.2,
    hidden_chance=0.05,
)  # fmt: skip


@dataclass
class Sample:
    """A crop: two dates normalised (band, y, x), truth (y, x) in [0, 1], weight (y, x), 0 = does not count.

    `background` is that of the scenes that it was cut from, or 0: of the crop itself.
    """

    before: Array
    after: Array
    truth: Array
    weight: Array
    background: float = 0.0


def normalised(image: Image, rows: slice, cols: slice) -> Array:
    """Return a crop of `image` as (reflectance - centre) / spread, NaN = no observation; a copy."""
    return image.normalised[:, rows, cols].copy()


def to_tensor(crops: list[Array]) -> Tensor:
    """Return the network's input (n, channels, h/2, w/2) of normalised crops (band, y, x) of one even size."""
    x = torch.from_numpy(np.stack(crops))
    pixels = torch.isfinite(x).all(dim=1, keepdim=True).float()
    seen = (torch.nn.functional.avg_pool2d(pixels, 2) == 1).float()  # 20 m pixels of which all is observed
    hidden = torch.nn.functional.interpolate(seen, scale_factor=2) == 0
    x = x.clamp(-LIMIT, LIMIT).masked_fill(hidden, 0.0)
    fine = torch.nn.functional.pixel_unshuffle(x[:, :FINE_BANDS], 2)
    coarse = x[:, FINE_BANDS:, ::2, ::2]
    return torch.cat([fine, coarse, seen], dim=1).contiguous(memory_format=torch.channels_last)


def window(shape: tuple[int, ...], size: int, rng: Rng, centre: tuple[int, int] | None = None) -> tuple[slice, slice]:
    """Return an even window of edge `size`, near `centre` if given, else anywhere in `shape`."""
    starts = []
    for axis, extent in enumerate(shape):
        top = extent - size
        start = rng.integers(0, top + 1) if centre is None else centre[axis] - rng.integers(size // 8, size * 7 // 8)
        starts.append(int(np.clip(start, 0, top)) // 2 * 2)
    return slice(starts[0], starts[0] + size), slice(starts[1], starts[1] + size)


class Sampler(Protocol):
    """Draws training samples."""

    def sample(self, rng: Rng) -> Sample:
        """Draw one."""


class LabelledSampler:
    """Random crops of labelled cities, six in ten around a changed pixel where a city shows one."""

    def __init__(self, cities: list[City], size: int, nuisances: Nuisances = LIGHT):
        self._cities, self._size = cities, size
        self._changed = [np.argwhere(c.changed) for c in cities]
        area = np.array([c.label.size for c in cities], np.float64) ** 0.5
        self._chance = area / area.sum()
        self._nuisances = nuisances

    def sample(self, rng: Rng) -> Sample:
        """Draw one augmented crop."""
        sample = self._crop(rng)
        if rng.random() < 0.25:
            sample = mixed(sample, self._crop(rng), rng)
        if rng.random() < 0.05:
            sample.after, sample.truth, sample.background = sample.before.copy(), np.zeros_like(sample.truth), 0.0
        return augmented(sample, rng, self._nuisances)

    def _crop(self, rng: Rng) -> Sample:
        index = rng.choice(len(self._cities), p=self._chance)
        city, changed = self._cities[index], self._changed[index]
        centre = tuple(changed[rng.integers(len(changed))]) if len(changed) and rng.random() < 0.6 else None
        rows, cols = window(city.label.shape, self._size, rng, centre)
        truth = city.label[rows, cols].astype(np.float32)
        images = [normalised(image, rows, cols) for image in (city.before, city.after)]
        return Sample(images[0], images[1], truth, city.known[rows, cols].astype(np.float32), city.background)


class Mixture:
    """Draws from `first`, with chance `share` from `second`."""

    def __init__(self, first: Sampler, second: Sampler, share: float):
        self._samplers, self._share = (first, second), share

    def sample(self, rng: Rng) -> Sample:
        """Draw one."""
        return self._samplers[int(rng.random() < self._share)].sample(rng)


def mixed(a: Sample, b: Sample, rng: Rng) -> Sample:
    """Paste a rectangle of `b` into `a`, in both dates (CutMix, Yun et al., ICCV 2019): its edge is no change."""
    height, width = a.truth.shape
    h, w = (int(n * rng.uniform(0.3, 0.7)) // 2 * 2 for n in (height, width))
    y, x = int(rng.integers(0, height - h)) // 2 * 2, int(rng.integers(0, width - w)) // 2 * 2
    part = (..., slice(y, y + h), slice(x, x + w))
    for name in ("before", "after", "truth", "weight"):
        getattr(a, name)[part] = getattr(b, name)[part]
    return a


def augmented(sample: Sample, rng: Rng, nuisances: Nuisances) -> Sample:
    """Turn, mirror, displace, and disturb both dates on their own; sometimes hide a part of one date."""
    turns, mirror = int(rng.integers(4)), rng.random() < 0.5

    def turned(x: Array) -> Array:
        x = np.rot90(x, turns, axes=(-2, -1))
        return np.ascontiguousarray(x[..., ::-1] if mirror else x)

    before, after, truth, weight = (turned(x) for x in (sample.before, sample.after, sample.truth, sample.weight))
    if rng.random() < nuisances.shift_chance:
        after = displaced(after, *rng.uniform(-nuisances.shift, nuisances.shift, 2))
    shared = rng.normal(0, nuisances.common, (2, len(before), 1, 1)).astype(np.float32)
    factor = 1 + shared[0]
    if nuisances.contrast:
        factor = factor * np.float32(np.exp(rng.normal(0, nuisances.contrast)))
    before, after = (nuisances.disturb(x * factor + shared[1], rng) for x in (before, after))
    if rng.random() < nuisances.hidden_chance:
        hidden = cloud_field(truth.shape, rng) > rng.uniform(0.5, 1.5)
        (before if rng.random() < 0.5 else after)[:, hidden] = np.nan
    weight = weight * (np.isfinite(before).all(axis=0) & np.isfinite(after).all(axis=0))
    return Sample(before, after, truth, weight.astype(np.float32), sample.background)


def batch(sampler: Sampler, count: int, rng: Rng) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return before, after (inputs of the network), background (n, 1, 1, 1), truth and weight (n, 1, y, x)."""
    samples = [sampler.sample(rng) for _ in range(count)]
    levels = [s.background or background(s.before[:, ::3, ::3], s.after[:, ::3, ::3]) for s in samples]
    level = torch.tensor(levels, dtype=torch.float32)[:, None, None, None]
    before, after = (to_tensor([getattr(s, name) for s in samples]) for name in ("before", "after"))
    truth, weight = (torch.from_numpy(np.stack([getattr(s, n) for s in samples]))[:, None] for n in ("truth", "weight"))
    return before, after, level, truth, weight
