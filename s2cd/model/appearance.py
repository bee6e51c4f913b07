"""What stands beside the network, untrained but for a metric: the magnitude of change, and the edges maps follow.

Like this in training and on GPUs; on CPUs `s2cd.model.compiled` does the same in fewer passes through memory.
"""

from __future__ import annotations

import itertools
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

FINE_BANDS = 4  # the first bands, at 10 m
COARSE_BANDS = 3  # the others, at 20 m
BAND_COUNT = FINE_BANDS + COARSE_BANDS
INPUTS = 4 * FINE_BANDS + COARSE_BANDS + 1  # the last channel tells where there is an observation
RED = slice(8, 12)  # channels of the input: the band whose edges the logits follow, four 10 m pixels
FLAT = 0.3  # variance of that band around a pixel, in squares of its spread, below which edges count less and less
OWN = 0.25  # share of a 20 m pixel's own logits beside what is fitted around it, in which small changes fade
CELL = 4  # 20 m pixels along a side of a cell of 80 m
AROUND = 9  # cells along a side of what tells how much a place differs as its surroundings do
HAZY = 1.0  # normalised difference of a cell that counts there at most: what differs more is no air
LEAST_SEEN = 1e-3  # share of a cell, so that nothing is divided by zero
LEAST_SQUARE = 1e-3  # added to a squared length before its logarithm is taken

Appearance = tuple[Tensor, Tensor, Tensor]


def appearance(x: Tensor) -> Appearance:
    """Return what a date looks like: its `edges`, the means of cells of 80 m, its `band_means`.

    x is an input of the network, (n, INPUTS, h, w). The means of cells are those of `band_means`,
    (n, bands + 1, h / CELL, w / CELL) float32.
    """
    means = band_means(x)
    with torch.autocast(x.device.type, enabled=False):
        return edges(x), functional.avg_pool2d(means, CELL), means


def edges(x: Tensor) -> Tensor:
    """Return what `along_edges` follows of an input of the network, (n, 5, h, w) float32.

    The red pixels of 10 m, four of each of 20 m, and their mean.
    """
    red = x[:, RED].contiguous(memory_format=torch.contiguous_format).float()
    return torch.cat([red, red.mean(dim=1, keepdim=True)], dim=1)


def band_means(x: Tensor) -> Tensor:
    """Return each band's mean over the 20 m pixels of an input of the network, last where there is an observation.

    (n, bands + 1, h, w) float32.
    """
    with torch.autocast(x.device.type, enabled=False):  # differences of these matter: bfloat16 would not do
        return functional.linear(x.permute(0, 2, 3, 1).float(), _means(x.device)).permute(0, 3, 1, 2)


def haze_between(a: Tensor, b: Tensor) -> Tensor:
    """Return what differs alike all around, (n, bands + 1, h, w) float32 for pixels of 40 m: veils, slopes, seasons.

    a, b are the means of cells of two dates, as `appearance` has them. A cell counts by what both dates show of it, and
    up to HAZY, so that a large flood stays one. The last channel means nothing.
    """
    seen = torch.minimum(a[:, -1:], b[:, -1:])
    shown = (x / x[:, -1:].clamp(min=LEAST_SEEN) for x in (a, b))
    difference = torch.sub(*shown).clamp_(-HAZY, HAZY)
    around = torch.cat([difference[:, :-1] * seen, seen], dim=1).contiguous(memory_format=torch.channels_last)
    for size, margin in (((AROUND, 1), (AROUND // 2, 0)), ((1, AROUND), (0, AROUND // 2))):
        around = functional.avg_pool2d(around, size, 1, margin)
    around /= around[:, -1:].clamp(min=LEAST_SEEN)
    return functional.interpolate(around, scale_factor=CELL / 2, mode="bilinear")


def magnitude(a: Tensor, b: Tensor, hazy: Tensor, metric: Tensor) -> Tensor:
    """Return the logarithm of the length of the change vector, of each 20 m pixel and of its surroundings of 60 m.

    a, b are the `band_means` of two dates, `hazy` is their `haze_between`; `metric` (bands, bands) float32 is what
    vectors are multiplied with before they are measured, see `ChangeNet`; the result is float32 (n, 1, h, w).
    Change-vector analysis: Malila, 1980.
    """
    vectors = change_vectors(a, b, hazy)
    with torch.autocast(vectors.device.type, enabled=False):  # as for `band_means`
        vectors = functional.linear(vectors.permute(0, 2, 3, 1), metric).permute(0, 3, 1, 2)
    squares = (vectors.square() + box(vectors).square()).sum(dim=1, keepdim=True)
    return 0.5 * torch.log(squares + LEAST_SQUARE)


def change_vectors(a: Tensor, b: Tensor, hazy: Tensor) -> Tensor:
    """Return how two dates differ beyond what differs alike all around, (n, bands, h, w) float32, as `magnitude`.

    What either date does not show counts as unchanged.
    """
    difference, seen = a - b, torch.minimum(a[:, -1:], b[:, -1:])
    for row, col in itertools.product((0, 1), repeat=2):
        difference[:, :, row::2, col::2] -= hazy
    return (difference * seen)[:, :-1]


def finished(logits: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return logits of 20 m pixels (n, 1, h, w) on the 10 m grid (n, 1, 2h, 2w), along the `edges` of both dates."""
    return shuffled(along_edges(logits / 2, a).add_(along_edges(logits / 2, b)))


def along_edges(logits: Tensor, guide: Tensor) -> Tensor:
    """Return logits (n, 1, h, w) for 10 m pixels, (n, 4, h, w): smooth but for the edges in `guide`, see `edges`.

    Within 120 m around each pixel of 40 m they are fitted as a linear function of the guide; the fits, interpolated,
    tell those of its 10 m pixels: fast guided filter (He and Sun, arXiv:1505.00996). OWN of its logits a pixel keeps.
    """
    pixels, level = guide[:, :4], guide[:, 4:]
    moments = torch.cat([logits, level, level * logits, level.square()], dim=1)
    mean, usual, product, square = box(functional.avg_pool2d(moments, 2)).split(1, dim=1)
    slope = (product - usual * mean) / (square - usual.square() + FLAT)
    fits = torch.cat([slope, mean - slope * usual], dim=1).mul_(1 - OWN)
    slope, offset = functional.interpolate(fits, scale_factor=2.0, mode="bilinear").split(1, dim=1)
    return torch.addcmul(offset + OWN * logits, slope, pixels)


def box(x: Tensor) -> Tensor:
    """Return the mean of 3 x 3 pixels of (n, channels, h, w); the outermost pixels are repeated."""
    return functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)


def shuffled(x: Tensor) -> Tensor:
    """Return `pixel_shuffle(x, 2)` of (n, 4, h, w): several times faster where channels lie last."""
    n, _, h, w = x.shape
    out = x.new_empty((n, 1, 2 * h, 2 * w))
    for k in range(4):
        out[..., k // 2 :: 2, k % 2 :: 2] = x[:, k : k + 1]
    return out


@cache
def _means(device: torch.device) -> Tensor:
    """Return the matrix that makes of the channels of a 20 m pixel each band's mean and where that is seen."""
    with torch.inference_mode(False):  # or it could not be used in training
        quarter = torch.full((1, 4), 0.25, dtype=torch.float32, device=device)
        ones = torch.eye(COARSE_BANDS + 1, dtype=torch.float32, device=device)
        return torch.block_diag(*[quarter] * FINE_BANDS, ones)
