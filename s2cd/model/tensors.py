"""What is done with a date and a pair around the network, on the device that the network runs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from s2cd.codes import CODE_NODATA, CODE_SCALE, UNSEEN_BEFORE
from s2cd.model.normalise import LIMIT

Part = tuple[slice, slice]


def to_input(planes: Sequence[Tensor], gains: Tensor, valid: Tensor, fine: int, stride: int) -> Tensor:
    """Return what `s2cd.model.normalise.network_input` does, to the bit, as (1, channels, h, w), channels last."""
    height, width = (-(-n // 2) for n in valid.shape)
    rows, cols = (-(-n // stride) * stride // 2 for n in valid.shape)
    seen = _even(valid[None].float())[0].view(height, 2, width, 2).amin(dim=(1, 3))
    hidden = seen == 0
    level = _even(_scaled(planes[:fine], gains[:fine], valid.shape))
    coarse = [p if p.shape == (height, width) else p[::2, ::2] for p in planes[fine:]]
    low = _scaled(coarse, gains[fine:], (height, width)).masked_fill_(hidden, 0)
    out = torch.zeros((rows, cols, 4 * fine + len(coarse) + 1), dtype=torch.float16, device=valid.device)
    inner = out[:height, :width]
    blocks = level.view(fine, height, 2, width, 2).permute(1, 3, 0, 2, 4)
    inner[..., : 4 * fine].unflatten(2, (fine, 2, 2)).copy_(blocks)
    inner[..., : 4 * fine].masked_fill_(hidden[..., None], 0)
    inner[..., 4 * fine : -1] = low.permute(1, 2, 0)
    inner[..., -1] = seen
    return out.permute(2, 0, 1)[None]


def _scaled(planes: Sequence[Tensor], gains: Tensor, shape: Sequence[int]) -> Tensor:
    """Return float32 (band, y, x), clamped: all bands in few calls, each of which takes a GPU's thread a while."""
    level = torch.empty((len(planes), *shape), dtype=torch.float32, device=gains.device)
    for out, plane in zip(level, planes, strict=True):
        out.copy_(plane)
    return level.mul_(gains[:, 0, None, None]).add_(gains[:, 1, None, None]).clamp_(-LIMIT, LIMIT)


def _even(planes: Tensor) -> Tensor:
    """Return planes (n, y, x) with even sides: an odd edge is repeated."""
    rows, cols = planes.shape[1:]
    return functional.pad(planes, (0, cols % 2, 0, rows % 2), mode="replicate") if rows % 2 or cols % 2 else planes


def masked(probability: Tensor, before: Tensor, after: Tensor, part: Part) -> Tensor:
    """Return a part of the probability (y, x), NaN where either date is not valid."""
    probability, before, after = _cut(probability, before, after, part)
    return probability.masked_fill_(~(before & after), torch.nan)


def _cut(probability: Tensor, before: Tensor, after: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = before.shape
    return probability[:rows, :cols][part], before[part], after[part]


def to_codes(probability: Tensor, before: Tensor, after: Tensor, part: Part, *, reasons: bool) -> Tensor:
    """Return codes of a part as `s2cd.codes` defines them, the bits of a uint16 in an int16.

    probability    float32 (y, x) in [0, 1], or larger at the right and the bottom; NaN counts as no observation
    before, after  bool (y, x), False where that date has no observation
    reasons        whether codes tell which of them it is
    """
    if probability.device.type == "cpu":
        from s2cd.model.compiled import codes  # Numba: not for what only plans

        return codes(probability, before, after, part, reasons=reasons)
    return codes_by_torch(*_cut(probability, before, after, part), reasons=reasons)


def codes_by_torch(probability: Tensor, before: Tensor, after: Tensor, *, reasons: bool) -> Tensor:
    """Return what `to_codes` does of a whole."""
    codes = (probability * CODE_SCALE).round_()
    if reasons:
        missing = (~before).float() + 2 * (~after).float()
        codes = torch.where(missing > 0, missing + (UNSEEN_BEFORE - 1 - (CODE_NODATA + 1)), codes)
    else:
        codes.masked_fill_(~(before & after), -1)
    return codes.nan_to_num_(nan=-1).to(torch.int16)


FINISHES: Mapping[str, Callable[[Tensor, Tensor, Tensor, Part], Tensor]] = {
    "probability": masked,
    "codes": partial(to_codes, reasons=False),
    "codes with reasons": partial(to_codes, reasons=True),
}
"""What can be made of a part of a probability and of where its two dates are valid.

The probability may be larger than these at the right and the bottom.
"""
