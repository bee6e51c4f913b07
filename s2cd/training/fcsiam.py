"""FC-Siam-diff of Daudt et al. (ICIP 2018), width 16, all bands at 10 m: the network that ours is compared with.

Their channels, convolutions and dropout; the three 20 m bands are replicated. 131 kFLOP a pixel pair at 10 m.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from s2cd.model.appearance import COARSE_BANDS, FINE_BANDS
from s2cd.model.network import Features

WIDTHS, DEPTHS = (16, 32, 64, 128), (2, 2, 3, 3)
DROPOUT = 0.2


def _block(widths: list[int]) -> nn.Sequential:
    """Convolutions of 3 x 3, each with normalisation, ReLU and dropout of whole channels."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        layers.append(nn.Dropout2d(DROPOUT))
    return nn.Sequential(*layers)


class FCSiamDiff(nn.Module):
    """Takes and gives what `ChangeNet` does; heights and widths on the 20 m grid are multiples of 8.

    The deepest features are those of the second date alone, as published: swapping the dates changes the map.
    """

    def __init__(self) -> None:
        super().__init__()
        inputs = FINE_BANDS + COARSE_BANDS
        levels = range(len(WIDTHS))
        starts = (inputs, *WIDTHS)
        self.encoder = nn.ModuleList(_block([starts[i], *[WIDTHS[i]] * DEPTHS[i]]) for i in levels)
        self.up = nn.ModuleList(nn.ConvTranspose2d(w, w, 3, 2, 1, output_padding=1) for w in WIDTHS)
        ends = (WIDTHS[0], *WIDTHS)
        self.decoder = nn.ModuleList(
            _block([2 * WIDTHS[i], *[WIDTHS[i]] * (DEPTHS[i] - 1), *([ends[i]] if i else [])]) for i in levels
        )
        self.head = nn.Conv2d(WIDTHS[0], 1, 3, padding=1)

    def encode(self, x: Tensor) -> Features:
        """Return the features of one date before each pooling, and the last after it."""
        x = x.float()
        fine = functional.pixel_shuffle(x[:, : 4 * FINE_BANDS], 2)
        coarse = functional.interpolate(x[:, 4 * FINE_BANDS : -1], scale_factor=2.0, mode="nearest")
        x, features = torch.cat([fine, coarse], dim=1), []
        for block in self.encoder:
            features.append(block(x))
            x = functional.max_pool2d(features[-1], 2)
        return (*features, x)

    def decode(self, a: Features, b: Features, background: Tensor | float = 1.0) -> Tensor:
        """Return the logits of change between two dates; this network does not look at `background`."""
        x = b[-1]
        for level in reversed(range(len(WIDTHS))):
            x = self.decoder[level](torch.cat([self.up[level](x), (a[level] - b[level]).abs()], dim=1))
        return self.head(x)

    def forward(self, before: Tensor, after: Tensor, background: Tensor | float = 1.0) -> Tensor:
        """Return logits; both dates pass the encoder in one batch."""
        features = self.encode(torch.cat([before, after]))
        n = len(before)
        return self.decode(tuple(f[:n] for f in features), tuple(f[n:] for f in features), background)

    @torch.no_grad()
    def folded(self, temperature: float = 1.0, bias: float = 0.0) -> FCSiamDiff:
        """Return a copy for inference, logits / temperature + bias in the head."""
        net = copy.deepcopy(self)
        assert net.head.bias is not None
        net.head.weight.div_(temperature)
        net.head.bias.div_(temperature).add_(bias)
        return net.eval()
