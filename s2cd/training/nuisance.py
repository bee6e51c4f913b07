"""What differs between two dates without being a change, on normalised crops.

`s2cd.simulate.atmosphere` has the physics (path radiance, transmittance, cirrus, shaded slopes, BRDF, point spread,
noise), on the reflectance of whole scenes; `s2cd.training.robustness` measures networks with it. Crops are normalised
before they are disturbed, since what is homogeneous over a scene cancels there but for the error of the statistics:
`Nuisances.disturb` draws that error, and what varies within a scene.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from s2cd.model.normalise import Array

Rng = np.random.Generator


@dataclass(frozen=True)
class Nuisances:
    """Strength of the disturbances, in units of a band's spread where not said otherwise.

    gain, bias     standard deviation of a factor and an offset of each band of each date
    common         the same for both dates at once
    contrast       standard deviation of the logarithm of a factor on both dates: places differ in how far
                   the bulk of their pixels spreads, which is what normalisation divides by
    field          standard deviation of a smooth additive and multiplicative field (haze, cirrus, slopes)
    noise          largest standard deviation of white noise
    shift          largest displacement between the dates [px]; `shift_chance` of one
    hidden_chance  chance that a part of one date is not observed
    """

    gain: float = 0.08
    bias: float = 0.1
    common: float = 0.1
    contrast: float = 0.0
    field: float = 0.1
    noise: float = 0.05
    shift: float = 0.7
    shift_chance: float = 0.3
    hidden_chance: float = 0.1

    def disturb(self, x: Array, rng: Rng) -> Array:
        """Return `x` (band, y, x) as another atmosphere and another sensor state would have shown it."""
        bands = len(x)
        gain = 1 + rng.normal(0, self.gain / 2) + rng.normal(0, self.gain, (bands, 1, 1))
        bias = rng.normal(0, self.bias / 2) + rng.normal(0, self.bias, (bands, 1, 1))
        x = x * gain.astype(np.float32) + bias.astype(np.float32)
        if rng.random() < 0.5:
            tilt = np.linspace(1, rng.uniform(-0.5, 1), bands, dtype=np.float32)[:, None, None]
            smooth = self.field * cloud_field(x.shape[1:], rng)
            x = x + tilt * smooth if rng.random() < 0.5 else x * (1 + smooth)
        if rng.random() < 0.5:
            x = x + rng.uniform(0, self.noise) * rng.standard_normal(x.shape, np.float32)
        return x


def cloud_field(shape: tuple[int, ...], rng: Rng) -> Array:
    """Return a smooth random field (y, x) of mean 0 and standard deviation about 1."""
    cells = int(rng.integers(2, 8))
    coarse = torch.from_numpy(rng.standard_normal((1, 1, cells, cells)).astype(np.float32))
    field = torch.nn.functional.interpolate(coarse, size=(shape[0], shape[1]), mode="bilinear", align_corners=True)
    return field[0, 0].numpy() * np.float32(1.4)


def displaced(x: Array, dy: float, dx: float) -> Array:
    """Return `x` (band, y, x) displaced by (dy, dx) pixels, bilinear; edges are repeated."""
    for axis, distance in ((1, dy), (2, dx)):
        whole = int(np.floor(distance))
        part = np.float32(distance - whole)
        x = _rolled(x, whole, axis) * (1 - part) + _rolled(x, whole + 1, axis) * part
    return x


def _rolled(x: Array, count: int, axis: int) -> Array:
    index = np.clip(np.arange(x.shape[axis]) - count, 0, x.shape[axis] - 1)
    return np.take(x, index, axis=axis)
