"""The network: one encoder for each date, the absolute difference at every scale, a light decoder.

Inside, everything lies on the 20 m grid: the four 10 m bands come as 2 x 2 blocks (16 channels) beside the three
20 m bands, so that no band is resampled. The head writes four values per 20 m pixel, one for each 10 m pixel: these are
trained, but their mean and the edges in the red band of either date tell more of 10 m pixels
(`s2cd.model.appearance.along_edges`).
It follows the FC-Siam-diff of Daudt et al. (ICIP 2018) at a ninth of its arithmetic; |a - b| makes the result
symmetric in time, to the bit.

There is no global context, and batch normalisation exists in training only (`ChangeNet.folded`), so a pixel depends
on nothing beyond `HALO` and a chunk gives what the whole image gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional

from s2cd.model import appearance
from s2cd.model.appearance import BAND_COUNT, INPUTS, shuffled

STRIDE = 16  # 10 m pixels that one pixel of the coarsest level covers
REACH = 52  # 10 m pixels beyond a multiple of STRIDE that what lies before it depends on
HALO = 64  # 10 m pixels; at least the radius of the receptive field, a multiple of STRIDE
STRIP = 128  # rows of 20 m that a CPU works on at a time at the finest level, so that little memory is touched
WIDTHS = (16, 32, 48, 64)  # channels at 20, 40, 80 and 160 m
DEPTHS = (1, 2, 1, 1)  # 3 x 3 convolutions at each level of the encoder

Features = tuple[Tensor, ...]


class Unit(nn.Sequential):
    """Convolution, in training batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, *, norm: bool, relu: bool = True):
        padding = size // 2 if stride == 1 else 0
        layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, size, stride, padding, bias=not norm)]
        layers += [nn.BatchNorm2d(outputs)] if norm else []
        layers += [nn.ReLU(inplace=True)] if relu else []
        super().__init__(*layers)
        self.plain = not norm

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Return the unit of `x`; with `add`, ReLU of its sum with that."""
        if self.plain and _fuses(x):
            relu = add is not None or isinstance(self[-1], nn.ReLU)
            return _fused(self.conv, x, add, relu=relu)
        x = super().forward(x)
        return x if add is None else functional.relu_(x.add_(add))

    @property
    def conv(self) -> nn.Conv2d:
        """The convolution."""
        assert isinstance(self[0], nn.Conv2d)
        return self[0]

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the one convolution that equals this unit in evaluation mode."""
        conv, norm = self.conv, self[1] if len(self) > 1 else None
        if not isinstance(norm, nn.BatchNorm2d):
            assert conv.bias is not None
            return conv.weight, conv.bias
        assert norm.running_mean is not None
        assert norm.running_var is not None
        gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        return conv.weight * gain[:, None, None, None], norm.bias - norm.running_mean * gain


class ChangeNet(nn.Module):
    """Siamese network of four levels, beside it the magnitude of the change vector as a second expert.

    `encode` takes (n, INPUTS, h, w) on the 20 m grid, h and w multiples of 8, and returns four tensors at strides 1,
    2, 4 and 8; `decode` takes two of those and returns logits (n, 1, 2h, 2w) on the 10 m grid.

    `metric` (bands, bands) tells which differences count: change vectors are multiplied with it before they are
    measured. Without labels all bands count alike; from labels `s2cd.training.metric` learns it.
    """

    discount: Tensor
    evidence: Tensor
    metric: Tensor

    def __init__(self, *, norm: bool = False, widths: tuple[int, ...] = WIDTHS, depths: tuple[int, ...] = DEPTHS):
        super().__init__()
        self.widths, self.depths = widths, depths
        levels = range(len(widths))
        self.stem = Unit(INPUTS, widths[0], 3, norm=norm)
        self.down = nn.ModuleList(Unit(widths[i - 1], widths[i], 2, 2, norm=norm) for i in levels if i)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(Unit(w, w, 3, norm=norm) for _ in range(d))) for w, d in zip(widths, depths, strict=True)
        )
        steps = [max(0, i - 1) for i in levels[:-1]]  # the width that a level of the decoder hands down
        self.lateral = nn.ModuleList(Unit(w, w, 1, norm=norm, relu=False) for w in widths[:-1])
        self.bottom = Unit(widths[-1], widths[-2], 1, norm=norm, relu=False)
        self.mix = nn.ModuleList(  # the coarsest is 1 x 1 to keep the receptive field within HALO
            Unit(widths[i], widths[j], 3 if i + 2 < len(widths) else 1, norm=norm)
            for i, j in zip(levels, steps, strict=False)
        )
        self.head = nn.Conv2d(widths[0], 4, 1)
        self.register_buffer("discount", torch.zeros(()))  # logits by which e times the usual difference counts less
        self.register_buffer("evidence", torch.zeros(()))  # logits that e times the magnitude adds
        self.register_buffer("metric", torch.eye(BAND_COUNT))

    def encode(self, x: Tensor) -> Features:
        """Return the features of one date at every level, and its `appearance`."""
        return (*self.levels(x), *_beside(x).appearance(x))

    def levels(self, x: Tensor) -> list[Tensor]:
        """Return the features of one date, finest first."""
        features = [self._finest_features(x)]
        for down, block in zip(self.down, self.blocks[1:], strict=True):
            features.append(block(down(features[-1])))
        return features

    def _finest_features(self, x: Tensor) -> Tensor:
        """Return the features of a date at 20 m."""

        def features(part: Tensor) -> Tensor:
            part = _as_bfloat16(part)  # in float32, too, so that maps of both are alike
            kind = part.dtype if torch.is_autocast_enabled(x.device.type) else self.stem.conv.weight.dtype
            return self.blocks[0](self.stem(part.to(kind)))

        return _by_strips(x, lambda rows: features(x[:, :, rows]), 1 + self.depths[0], whole=self.training)

    def decode(self, a: Features, b: Features, background: Tensor | float = 1.0) -> Tensor:
        """Return the logits of change between two dates, the same whichever comes first.

        `background` is `s2cd.model.normalise.background` of each of the n pairs, (n, 1, 1, 1), or of all.
        """
        logits = pooled(self.vote(a, b), a, b, background, [self])
        return shuffled(logits) if self.training else _beside(logits).finished(logits, a[-3], b[-3])

    def vote(self, a: Features, b: Features) -> Tensor:
        """Return what the network alone says: (n, 1, h, w) of 20 m pixels, in training (n, 4, h, w) of 10 m."""
        coarsest = len(self.mix)
        x = self.bottom((a[coarsest] - b[coarsest]).abs_())
        for level in reversed(range(1, len(self.mix))):
            x = self._merged(level, a[level], b[level], x)

        def finest(rows: slice) -> Tensor:
            below = x[:, :, rows.start // 2 : (rows.stop + 1) // 2]
            return self._finest(below, a[0][:, :, rows], b[0][:, :, rows])

        return _by_strips(a[0], finest, 2, whole=self.training)  # the convolution reaches a row; even

    def _merged(self, level: int, a: Tensor, b: Tensor, below: Tensor) -> Tensor:
        """Return what a level of the decoder hands up, from its features and from what the level below did."""
        up = functional.interpolate(below, scale_factor=2.0, mode="nearest")
        return self.mix[level](self.lateral[level]((a - b).abs_(), add=up))

    def _finest(self, below: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return the logits, float32 where the network computes in less."""
        weight, bias = self.head.weight, self.head.bias
        assert bias is not None
        if not self.training:  # the mean of what they give
            weight, bias = (x.mean(dim=0, keepdim=True).to(torch.bfloat16).to(x.dtype) for x in (weight, bias))
        logits = functional.conv2d(self._merged(0, a, b, below), weight, bias)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def forward(self, before: Tensor, after: Tensor, background: Tensor | float = 1.0) -> Tensor:
        """Return logits; both dates pass the encoder in one batch, so that its statistics are those of both."""
        features = self.encode(torch.cat([before, after]))
        n = len(before)
        return self.decode(tuple(f[:n] for f in features), tuple(f[n:] for f in features), background)

    def pool(self, discount: float, evidence: float) -> ChangeNet:
        """Set what the background takes from the logits and what the magnitude adds; these two are not trained."""
        self.discount.fill_(discount)
        self.evidence.fill_(evidence)
        return self

    @torch.no_grad()
    def scale(self, factor: float) -> ChangeNet:
        """Multiply the logits by `factor`."""
        assert self.head.bias is not None
        for part in (self.head.weight, self.head.bias, self.discount, self.evidence):
            part.mul_(factor)
        return self

    @torch.no_grad()
    def folded(self, temperature: float = 1.0, bias: float = 0.0) -> ChangeNet:
        """Return the network for inference: normalisation folded, logits / temperature + bias in the head."""
        net = ChangeNet(norm=False, widths=self.widths, depths=self.depths)
        units = {name: unit for name, unit in self.named_modules() if isinstance(unit, Unit)}
        for name, unit in net.named_modules():
            if isinstance(unit, Unit):
                weight, offset = units[name].folded()
                unit.conv.load_state_dict({"weight": weight, "bias": offset})
        net.head.load_state_dict(self.head.state_dict())
        net.pool(float(self.discount), float(self.evidence)).scale(1 / temperature)
        net.metric.copy_(self.metric)
        assert net.head.bias is not None
        net.head.bias += bias
        return net.eval()


class Committee(nn.Module):
    """Networks that look at the same dates; the mean of their logits counts (logarithmic opinion pool).

    Takes and gives what `ChangeNet` does; the features of a date are those of all members, its `appearance` once.
    """

    def __init__(self, members: Iterable[ChangeNet]):
        super().__init__()
        self.members = nn.ModuleList(members)

    @property
    def networks(self) -> list[ChangeNet]:
        """The members."""
        return [member for member in self.members if isinstance(member, ChangeNet)]

    def encode(self, x: Tensor) -> Features:
        """Return the features of one date, member by member, and its `appearance`."""
        features = itertools.chain.from_iterable(member.levels(x) for member in self.networks)
        return (*features, *_beside(x).appearance(x))

    def decode(self, a: Features, b: Features, background: Tensor | float = 1.0) -> Tensor:
        """Return the logits of change between two dates, the same whichever comes first."""
        size = (len(a) - 3) // len(self.members)
        parts = [slice(i * size, (i + 1) * size) for i in range(len(self.members))]
        dates = [((*a[part], *a[-3:]), (*b[part], *b[-3:])) for part in parts]
        votes = [member.vote(*pair) for member, pair in zip(self.networks, dates, strict=True)]
        logits = pooled(torch.stack(votes).mean(dim=0), a, b, background, self.networks)
        return shuffled(logits) if self.training else _beside(logits).finished(logits, a[-3], b[-3])

    def forward(self, before: Tensor, after: Tensor, background: Tensor | float = 1.0) -> Tensor:
        """Return logits."""
        return self.decode(self.encode(before), self.encode(after), background)

    def folded(self, temperature: float = 1.0, bias: float = 0.0) -> Committee:
        """Return the committee for inference, as `ChangeNet.folded` does."""
        return Committee(member.folded(temperature, bias) for member in self.networks).eval()


def _infers(x: Tensor) -> bool:
    """Tell whether a CPU is to compute as fast as it can."""
    return x.device.type == "cpu" and x.dtype != torch.float64 and not torch.is_grad_enabled()


def _beside(x: Tensor) -> ModuleType:
    """Return what computes that which stands beside the network."""
    if not _infers(x):
        return appearance
    from s2cd.model import compiled  # Numba: not for what only plans

    return compiled


def _as_bfloat16(x: Tensor) -> Tensor:
    """Return `x` rounded; on CPUs torch rounds float16 element by element, float32 five times as fast."""
    return (x.float() if x.device.type == "cpu" else x).to(torch.bfloat16)


def _fuses(x: Tensor) -> bool:
    """Tell whether oneDNN can add and apply ReLU as it convolves."""
    return _infers(x) and torch.backends.mkldnn.is_available()


def _fused(conv: nn.Conv2d, x: Tensor, add: Tensor | None, *, relu: bool) -> Tensor:
    """Return ReLU of (convolution + `add`), in one pass through memory."""
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    assert conv.bias is not None
    x, weight, bias = x.to(kind), conv.weight.to(kind), conv.bias.to(kind)
    how = conv.padding, conv.stride, conv.dilation, conv.groups
    call = torch.ops.mkldnn._convolution_pointwise  # what torch.compile makes of these
    if add is None:
        return call(x, weight, bias, *how, "relu" if relu else "none", [], "")
    return call.binary(x, add.to(kind), weight, bias, *how, "add", 1.0, "relu" if relu else None, [], "")


def _by_strips(like: Tensor, make: Callable[[slice], Tensor], margin: int, *, whole: bool) -> Tensor:
    """Return `make` of all rows of `like`: on a CPU a few at a time, with `margin` more on either side."""
    rows, result = like.shape[2], None
    if whole or like.is_cuda:
        return make(slice(0, rows))
    for top in range(0, rows, STRIP):
        start, stop = max(0, top - margin), min(top + STRIP + margin, rows)
        part = make(slice(start, stop))[:, :, top - start :][:, :, :STRIP]
        if result is None:
            n, channels, _, columns = part.shape
            result = part.new_empty((n, rows, columns, channels)).permute(0, 3, 1, 2)
        result[:, :, top : top + STRIP] = part
    assert result is not None
    return result


def pooled(
    logits: Tensor, a: Features, b: Features, background: Tensor | float, networks: Sequence[ChangeNet]
) -> Tensor:
    """Return logits of 20 m pixels with what the magnitude between two dates says against their background.

    How much either counts, and the metric, are the mean of those of `networks`.
    """
    names = "discount", "evidence", "metric"
    discount, evidence, metric = (torch.stack([getattr(n, name) for n in networks]).mean(dim=0) for name in names)
    (_, cells_a, means_a), (_, cells_b, means_b) = a[-3:], b[-3:]
    beside = _beside(logits)
    lengths = beside.magnitude(means_a, means_b, beside.haze_between(cells_a, cells_b), metric.float())
    usual = torch.log(torch.as_tensor(background, device=logits.device))
    return logits - discount * usual + evidence * (lengths - usual)


def network_of(weights: Mapping[str, Tensor], *, norm: bool = False) -> ChangeNet | Committee:
    """Return the network that has these weights, as its `state_dict` gives them.

    Raises RuntimeError if they fit neither a `ChangeNet` nor a `Committee` of such.
    """
    members = {name.split(".")[1] for name in weights if name.startswith("members.")}
    with torch.device("cpu"):  # whatever torch was told to prefer
        network = Committee(ChangeNet(norm=norm) for _ in members) if members else ChangeNet(norm=norm)
    network.float().load_state_dict(dict(weights))
    return network.eval()


def cost(net: ChangeNet | Committee) -> dict[str, float]:
    """Return the arithmetic of `encode` and `decode` [FLOP per 10 m pixel, a multiply-add is 2], and `parameters`."""
    if isinstance(net, Committee):
        costs = [cost(member) for member in net.networks]
        return {what: sum(part[what] for part in costs) for what in costs[0]}
    total = dict.fromkeys(("encode_flop_a_pixel", "decode_flop_a_pixel"), 0.0)
    for name, conv in net.named_modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        part, *rest = name.split(".")
        level = {"stem": 0, "head": 0, "bottom": len(net.mix)}.get(part)
        level = int(rest[0]) + (part == "down") if level is None else level
        what = "encode" if part in {"stem", "down", "blocks"} else "decode"
        total[f"{what}_flop_a_pixel"] += conv.weight.numel() / 4**level / 2
    return {**total, "parameters": sum(p.numel() for p in net.parameters())}
