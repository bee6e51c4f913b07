"""Which differences between two spectra count as change, learnt from labels: 28 numbers for all places.

So few that they carry over to places that were not seen, where a network that learns from a dozen cities does not. For
OSCD's labels it is the shape of the spectrum that counts, red and blue against green first, and hardly near infrared.
Each pair is learnt from twice, once with its later date under another sky; and that a veil of cirrus is no change.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from s2cd.model.appearance import BAND_COUNT, LEAST_SQUARE, appearance, box, change_vectors, haze_between
from s2cd.model.network import STRIDE
from s2cd.training.data import City, Image
from s2cd.training.fitting import Plan, loss_of
from s2cd.training.robustness import disturbed
from s2cd.training.sampling import to_tensor

STEPS, RATE = 200, 0.05  # of Adam; twice the steps, another seed give the same scores
SAMPLE = 60_000  # pixels of 20 m in a step, at most
SKIES = 1000  # seed of the first sky: not those that a network is tried under
VEILED = 0.5  # weight of a pixel that cirrus alone changes: at 1 it costs twice as much F1

Pixels = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def spectral_metric(cities: Sequence[City], evidence: float) -> Tensor:
    """Return a symmetric matrix (bands, bands) float32 for `ChangeNet.metric`, of the scale of no matrix at all.

    It is what best tells the changed pixels of `cities` by the length of the change vector against the background
    alone, where e times that length adds `evidence` to the logit; the unit matrix where no change is seen.
    """
    if not any(city.changed.any() for city in cities):
        return torch.eye(BAND_COUNT)
    pixels = [part for seed, city in enumerate(cities, SKIES) for part in _lessons(city, seed)]
    vectors, around, truth, weight, usual = map(torch.cat, zip(*pixels, strict=True))
    generator = torch.Generator().manual_seed(0)
    metric, bias = torch.eye(BAND_COUNT, requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([metric, bias], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        drawn = torch.randint(len(truth), (min(SAMPLE, len(truth)),), generator=generator)
        scaled = _scaled(metric)
        squares = (vectors[drawn] @ scaled).square().sum(dim=1) + (around[drawn] @ scaled).square().sum(dim=1)
        logits = bias + evidence * (0.5 * torch.log(squares + LEAST_SQUARE) - usual[drawn])
        loss = loss_of(logits, truth[drawn], weight[drawn], Plan())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        values, directions = torch.linalg.eigh(_scaled(metric) @ _scaled(metric).T)
        return directions @ torch.diag(values.clamp(min=0).sqrt()) @ directions.T


def _scaled(metric: Tensor) -> Tensor:
    """Return a matrix with the sum of squares of the unit matrix."""
    return metric * torch.sqrt(BAND_COUNT / metric.square().sum())


def _lessons(city: City, seed: int) -> list[Pixels]:
    """Return the pixels of a city, the same with the later date under another sky, and of one date through cirrus."""
    other, veiled = (
        Image.of(city.name, date.time, disturbed(date, kind, seed))
        for date, kind in ((city.after, "all"), (city.before, "cirrus"))
    )
    calm = dataclasses.replace(city, after=veiled, label=np.zeros_like(city.label))
    return [_pixels(city), _pixels(dataclasses.replace(city, after=other)), _pixels(calm, VEILED)]


@torch.no_grad()
def _pixels(city: City, weight: float = 1.0) -> Pixels:
    """Return for each 20 m pixel of a city its change vector and that of its surroundings, (n, bands), the share of it
    that changed, `weight` times the share that is known, and the logarithm of the city's background, (n,)."""
    margin = [(0, -n % STRIDE) for n in city.label.shape]
    dates = [np.pad(image.normalised, [(0, 0), *margin], constant_values=np.nan) for image in (city.before, city.after)]
    (_, cells_a, means_a), (_, cells_b, means_b) = (appearance(to_tensor([date])) for date in dates)
    vectors = change_vectors(means_a, means_b, haze_between(cells_a, cells_b))
    known = city.known & city.before.seen & city.after.seen
    truth, share = (
        functional.avg_pool2d(torch.from_numpy(np.pad(plane, margin).astype(np.float32))[None], 2).ravel()
        for plane in (city.label & known, known)
    )
    own, around = (part[0].flatten(1).T.contiguous() for part in (vectors, box(vectors)))
    return own, around, truth, weight * share, torch.full_like(truth, math.log(city.background))
