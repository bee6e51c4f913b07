"""What `s2cd.model.appearance` does, as CPUs do it, and the network's input: each compiled, in one pass through memory.

With torch or NumPy every step is a pass of its own, and together they took more time than all convolutions. What is
compiled outlives a change of other modules' constants (`s2cd.jit`), so that none of those is used inside.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s2cd.codes import CODE_NODATA, CODE_SCALE, UNSEEN_AFTER, UNSEEN_BEFORE
from s2cd.jit import compiled
from s2cd.model.appearance import AROUND, CELL, FLAT, HAZY, LEAST_SEEN, LEAST_SQUARE, OWN, RED, Appearance
from s2cd.model.tensors import Part

ROWS = 16  # of an input, widened to float32 at a time: they stay in the cache
FINE = 4  # bands of an input that have four pixels of 10 m in one of 20 m
CHANNELS = 20  # of an input
VALUES = 8  # of a pixel of 20 m: seven bands, then where it is seen
F = np.float32  # Numba takes a number of Python for float64
_empty = partial(torch.empty, dtype=torch.float32, device="cpu")  # whatever torch was told to prefer
SUMS = {"contract", "nsz", "reassoc"}  # liberties with the order of sums; NaN stays NaN


def appearance(x: Tensor) -> Appearance:
    """Return `s2cd.model.appearance.appearance` of an input; bands lie last in memory."""
    n, _, h, w = x.shape
    edges, means = _empty((n, 5, h, w)), _empty((n, h, w, VALUES))
    cells = _empty((n, h // CELL, w // CELL, VALUES))
    for image, *out in zip(x.permute(0, 2, 3, 1), edges.numpy(), cells.numpy(), means.numpy(), strict=True):
        for top in range(0, h, ROWS):
            _look(image[top : top + ROWS].float().contiguous().numpy(), top, RED.start, *out)
    return edges, cells.permute(0, 3, 1, 2), means.permute(0, 3, 1, 2)


def haze_between(a: Tensor, b: Tensor) -> Tensor:
    """Return `s2cd.model.appearance.haze_between` of two dates' cells; bands lie last in memory."""
    n, _, h, w = a.shape
    result = _empty((n, 2 * h, 2 * w, VALUES))
    for first, second, out in zip(_bands_last(a), _bands_last(b), result.numpy(), strict=True):
        around = np.empty_like(first)
        _smooth(first, second, AROUND // 2, F(HAZY), F(LEAST_SEEN), around)
        _enlarge(around, out)
    return result.permute(0, 3, 1, 2)


def magnitude(a: Tensor, b: Tensor, hazy: Tensor, metric: Tensor) -> Tensor:
    """Return `s2cd.model.appearance.magnitude` of two dates' bands."""
    squares = _empty((len(a), 1, *a.shape[2:]))
    columns = np.zeros((VALUES, VALUES), F)  # of the metric, and nothing of where a pixel is seen
    columns[:-1, :-1] = metric.T.numpy()
    plain = bool((columns[:-1, :-1] == np.eye(VALUES - 1, dtype=F)).all())
    dates = (_bands_last(x) for x in (a, b, hazy))
    for first, second, around, (out,) in zip(*dates, squares.numpy(), strict=True):
        _square(first, second, around, columns, plain, out)
    return squares.add_(LEAST_SQUARE).log_().mul_(0.5)


def finished(logits: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return `s2cd.model.appearance.finished` of logits and two dates' edges."""
    n, _, h, w = logits.shape
    result, fits = _empty((n, 1, 2 * h, 2 * w)), np.empty((4, h // 2, w // 2), F)
    pairs = zip(*(x.contiguous().numpy() for x in (logits, a, b)), result.numpy(), strict=True)
    for (vote,), first, second, (out,) in pairs:
        _fit(vote, first[4], F(FLAT), F(1 - OWN), *fits[:2])
        _fit(vote, second[4], F(FLAT), F(1 - OWN), *fits[2:])
        _apply(vote, first, second, fits[0], fits[2], fits[1] + fits[3], F(OWN), out)
    return result


def codes(probability: Tensor, before: Tensor, after: Tensor, part: Part, *, reasons: bool) -> Tensor:
    """Return what `s2cd.model.tensors.to_codes` does."""
    (top, bottom, _), (left, right, _) = (s.indices(n) for s, n in zip(part, before.shape, strict=True))
    out = torch.empty((bottom - top, right - left), dtype=torch.uint16, device="cpu")
    seen = (x.contiguous().numpy() for x in (before, after))
    unseen = (UNSEEN_BEFORE, UNSEEN_AFTER, CODE_NODATA) if reasons else (CODE_NODATA,) * 3
    lost = (np.uint16(code) for code in (CODE_NODATA, *unseen))
    _encode(probability.numpy(), *seen, top, left, F(CODE_SCALE), *lost, out.numpy())
    return out.view(torch.int16)


def _bands_last(x: Tensor) -> np.ndarray:
    """Return (n, values, h, w) as (n, h, w * values)."""
    return x.permute(0, 2, 3, 1).contiguous().numpy().reshape(len(x), x.shape[2], -1)


@compiled()
def put_fine(pixels: Any, gain: Any, bias: Any, limit: Any, seen: Any, channel: int, out: Any) -> None:
    """Write a band of 10 m, normalised, into four of out's channels, of an even number; 0 where it is not seen.

    pixels (2h, 2w) are of any type, seen is bool (h, w).
    """
    height, width, _ = out.shape
    upper, lower = np.empty(2 * width, F), np.empty(2 * width, F)
    upper_pairs, lower_pairs, pairs = upper.view(np.uint64), lower.view(np.uint64), out.view(np.uint64)
    for i in range(height):
        _normalise(pixels[2 * i], gain, bias, limit, upper)
        _normalise(pixels[2 * i + 1], gain, bias, limit, lower)
        for j in range(width):
            pairs[i, j, channel // 2] = upper_pairs[j] if seen[i, j] else np.uint64(0)
            pairs[i, j, channel // 2 + 1] = lower_pairs[j] if seen[i, j] else np.uint64(0)


@compiled()
def put_coarse(pixels: Any, gain: Any, bias: Any, limit: Any, seen: Any, channel: int, out: Any) -> None:
    """Write a band of 20 m, normalised: pixels (h, w) of any type, into a channel of out, as `put_fine` does."""
    height, width, _ = out.shape
    line = np.empty(width, F)
    for i in range(height):
        _normalise(pixels[i], gain, bias, limit, line)
        for j in range(width):
            out[i, j, channel] = line[j] if seen[i, j] else F(0)


@compiled()
def _normalise(pixels: Any, gain: Any, bias: Any, limit: Any, out: Any) -> None:
    """Write a row of pixels, scaled and between -limit and limit; NaN stays NaN."""
    for k in range(len(out)):
        level = F(pixels[k]) * gain + bias
        level = limit if level > limit else level
        level = -limit if level < -limit else level
        out[k] = level


@compiled(fastmath=SUMS)
def _look(part: Any, top: int, red: int, edges: Any, cells: Any, means: Any) -> None:
    """Write what rows of an input look like, (rows, w, CHANNELS); the first of them is row `top`."""
    rows, width, _ = part.shape
    side = width // cells.shape[1]
    for row in range(rows):
        i = top + row
        pixels, mean = part[row].reshape(width * CHANNELS), means[i].reshape(width * VALUES)
        for j in range(width):
            at, to = j * CHANNELS, j * VALUES
            for band in range(FINE):
                k = at + 4 * band
                mean[to + band] = (pixels[k] + pixels[k + 1] + pixels[k + 2] + pixels[k + 3]) * F(0.25)
            for value in range(VALUES - FINE):
                mean[to + FINE + value] = pixels[at + 4 * FINE + value]
        for j in range(width):
            at = j * CHANNELS + red
            quarters = pixels[at], pixels[at + 1], pixels[at + 2], pixels[at + 3]
            edges[0, i, j], edges[1, i, j], edges[2, i, j], edges[3, i, j] = quarters
            edges[4, i, j] = (quarters[0] + quarters[1] + quarters[2] + quarters[3]) * F(0.25)
        total = cells[i // side]
        if i % side == 0:
            total[:] = 0
        for j in range(cells.shape[1]):
            for k in range(j * side * VALUES, (j + 1) * side * VALUES, VALUES):
                for value in range(VALUES):
                    total[j, value] += mean[k + value]
        if i % side == side - 1:
            total *= F(1) / F(side * side)


@compiled(fastmath=SUMS)
def _smooth(a: Any, b: Any, reach: int, hazy: Any, least: Any, out: Any) -> None:
    """Write how cells (h, w * VALUES) differ on the mean within `reach` of each."""
    height, size = a.shape
    width = size // VALUES
    weighed, rows = np.empty_like(a), np.empty(size, F)
    for i in range(height):
        for k in range(0, size, VALUES):
            seen_a, seen_b = a[i, k + VALUES - 1], b[i, k + VALUES - 1]
            seen, share_a, share_b = min(seen_a, seen_b), F(1) / max(seen_a, least), F(1) / max(seen_b, least)
            for value in range(k, k + VALUES - 1):
                weighed[i, value] = seen * min(max(a[i, value] * share_a - b[i, value] * share_b, -hazy), hazy)
            weighed[i, k + VALUES - 1] = seen
    count = F((2 * reach + 1) ** 2)
    for i in range(height):
        rows[:] = 0
        for other in range(max(0, i - reach), min(height, i + reach + 1)):
            for k in range(size):
                rows[k] += weighed[other, k]
        for j in range(width):
            total = out[i, j * VALUES : (j + 1) * VALUES]
            total[:] = 0
            for other in range(max(0, j - reach), min(width, j + reach + 1)):
                for value in range(VALUES):
                    total[value] += rows[other * VALUES + value]
            total /= max(total[VALUES - 1], least * count)


@compiled()
def _enlarge(field: Any, out: Any) -> None:
    """Write a field (h, w * VALUES) at twice its size, (2h, 2w, VALUES), interpolated bilinearly."""
    height, size = field.shape
    line = np.empty(size + 2 * VALUES, F)
    for i in range(2 * height):
        near, far, row = field[i // 2], field[_beyond(i, height)], out[i]
        for k in range(size):
            line[k + VALUES] = F(0.75) * near[k] + F(0.25) * far[k]
        for k in range(VALUES):
            line[k], line[size + VALUES + k] = line[k + VALUES], line[size + k]
        for j in range(size // VALUES):
            for value in range(VALUES):
                k = j * VALUES + value
                row[2 * j, value] = F(0.75) * line[k + VALUES] + F(0.25) * line[k]
                row[2 * j + 1, value] = F(0.75) * line[k + VALUES] + F(0.25) * line[k + 2 * VALUES]


@compiled()
def _beyond(i: int, size: int) -> int:
    """Return which of `size` pixels lies on the other side of the half pixel `i`, beside its own."""
    return min(max(i // 2 - 1 + 2 * (i % 2), 0), size - 1)


@compiled(fastmath=SUMS)
def _square(a: Any, b: Any, hazy: Any, columns: Any, plain: bool, out: Any) -> None:
    """Write the squared length of the change vector of a pixel, and of its surroundings, together.

    a, b are (h, w * VALUES), hazy is (h / 2, w / 2 * VALUES); vectors are sums of `columns`, unless `plain`.
    """
    height, width = out.shape
    lines = np.empty((3, (width + 2) * VALUES), F)  # the differences of three rows, their ends repeated
    total = np.empty((width + 2) * VALUES, F)
    for ahead in range(height + 1):
        if ahead < height:
            line = lines[ahead % 3]
            _differ(a[ahead], b[ahead], hazy[ahead // 2], line)
            if not plain:
                _turn(line, columns)
        if ahead == 0:
            continue
        i = ahead - 1
        above, here, below = lines[max(i - 1, 0) % 3], lines[i % 3], lines[min(ahead, height - 1) % 3]
        for k in range(len(total)):
            total[k] = (above[k] + here[k] + below[k]) * F(1 / 9)
        for k in range(width * VALUES):
            around, itself = total[k] + total[k + VALUES] + total[k + 2 * VALUES], here[k + VALUES]
            total[k] = around * around + itself * itself
        for j in range(width):
            square = F(0)
            for value in range(VALUES - 1):
                square += total[j * VALUES + value]
            out[i, j] = square


@compiled()
def _differ(a: Any, b: Any, hazy: Any, line: Any) -> None:
    """Write the difference of two rows less what differs alike all around, 0 where one of them is not seen."""
    size = len(a)
    for k in range(size):
        line[k + VALUES] = a[k] - b[k]
    for k in range(0, size, 2 * VALUES):
        for value in range(VALUES):
            common = hazy[k // 2 + value]
            line[k + VALUES + value] -= common
            line[k + 2 * VALUES + value] -= common
    for k in range(0, size, VALUES):
        seen = min(a[k + VALUES - 1], b[k + VALUES - 1])
        if seen != 1:
            for value in range(k + VALUES, k + 2 * VALUES):
                line[value] *= seen
    for k in range(VALUES):
        line[k], line[size + VALUES + k] = line[k + VALUES], line[size + k]


@compiled(fastmath=SUMS)
def _turn(line: Any, columns: Any) -> None:
    """Make of each vector in a row the sum of `columns` (VALUES, VALUES) with its values as weights."""
    for k in range(0, len(line), VALUES):
        v = line[k : k + VALUES]
        p, q, r, s, t, u, w = v[0], v[1], v[2], v[3], v[4], v[5], v[6]
        for i in range(VALUES):
            first = p * columns[0, i] + q * columns[1, i] + r * columns[2, i] + s * columns[3, i]
            v[i] = first + t * columns[4, i] + u * columns[5, i] + w * columns[6, i]


@compiled(fastmath=SUMS)
def _fit(vote: Any, level: Any, flat: Any, keep: Any, slope: Any, offset: Any) -> None:
    """Write half of `vote` as `keep` of a linear function of `level`, fitted within 3 x 3 pixels of 40 m."""
    height, width = slope.shape
    lines = np.empty((3, 4, width + 2), F)  # the moments of three rows, their ends repeated
    total = np.empty((4, width + 2), F)
    for ahead in range(height + 1):
        if ahead < height:
            _moments(vote[2 * ahead : 2 * ahead + 2], level[2 * ahead : 2 * ahead + 2], lines[ahead % 3])
        if ahead == 0:
            continue
        i = ahead - 1
        above, here, below = lines[max(i - 1, 0) % 3], lines[i % 3], lines[min(ahead, height - 1) % 3]
        for kind in range(4):
            for k in range(width + 2):
                total[kind, k] = (above[kind, k] + here[kind, k] + below[kind, k]) * F(1 / 36)
        for j in range(width):
            mean = total[0, j] + total[0, j + 1] + total[0, j + 2]
            usual = total[1, j] + total[1, j + 1] + total[1, j + 2]
            product = total[2, j] + total[2, j + 1] + total[2, j + 2]
            square = total[3, j] + total[3, j + 1] + total[3, j + 2]
            gradient = (product - usual * mean) / (square - usual * usual + flat)
            slope[i, j], offset[i, j] = keep * gradient, keep * (mean - gradient * usual)


@compiled()
def _moments(vote: Any, level: Any, out: Any) -> None:
    """Write the sums over 2 x 2 pixels of half the vote, of the level, of their product and of the level's square."""
    width = out.shape[1] - 2
    for j in range(width):
        k = 2 * j
        p, q, r, s = level[0, k], level[0, k + 1], level[1, k], level[1, k + 1]
        t, u, v, w = F(0.5) * vote[0, k], F(0.5) * vote[0, k + 1], F(0.5) * vote[1, k], F(0.5) * vote[1, k + 1]
        out[0, j + 1] = t + u + v + w
        out[1, j + 1] = p + q + r + s
        out[2, j + 1] = t * p + u * q + v * r + w * s
        out[3, j + 1] = p * p + q * q + r * r + s * s
    for kind in range(4):
        out[kind, 0], out[kind, width + 1] = out[kind, 1], out[kind, width]


@compiled()  # no liberties here: the other date first must give the same to the bit
def _apply(vote: Any, a: Any, b: Any, slope_a: Any, slope_b: Any, offset: Any, own: Any, out: Any) -> None:
    """Write what the fits tell of pixels of 10 m, with `own` of the vote."""
    height, width = vote.shape
    base, of_a, of_b = np.empty(width, F), np.empty(width, F), np.empty(width, F)
    for i in range(height):
        for field, row in ((offset, base), (slope_a, of_a), (slope_b, of_b)):
            _between(field, i, row)
        for j in range(width):
            base[j] += own * vote[i, j]
        for half in range(2):
            row, k = out[2 * i + half], 2 * half
            for j in range(width):
                row[2 * j] = base[j] + (of_a[j] * a[k, i, j] + of_b[j] * b[k, i, j])
                row[2 * j + 1] = base[j] + (of_a[j] * a[k + 1, i, j] + of_b[j] * b[k + 1, i, j])


@compiled()
def _between(field: Any, i: int, out: Any) -> None:
    """Write row `i` of a field enlarged to twice its size, interpolated bilinearly."""
    height, width = field.shape
    near, far = field[i // 2], field[_beyond(i, height)]
    line = np.empty(width + 2, F)
    for j in range(width):
        line[j + 1] = F(0.75) * near[j] + F(0.25) * far[j]
    line[0], line[width + 1] = line[1], line[width]
    for j in range(width):
        out[2 * j] = F(0.75) * line[j + 1] + F(0.25) * line[j]
        out[2 * j + 1] = F(0.75) * line[j + 1] + F(0.25) * line[j + 2]


@compiled()
def _encode(
    probability: Any, before: Any, after: Any, top: int, left: int, scale: Any, nan: Any, earlier: Any, later: Any,
    both: Any, out: Any,
) -> None:  # fmt: skip
    """Write codes of what lies at (top, left); `earlier`, `later` and `both` of what these dates do not show."""
    height, width = out.shape
    for i in range(height):
        here = slice(left, left + width)
        levels, first, second, row = probability[top + i][here], before[top + i][here], after[top + i][here], out[i]
        for j in range(width):
            level = levels[j]
            code = np.uint16(np.int32(np.rint(level * scale)))
            code = nan if np.isnan(level) else code
            unseen = both if not second[j] else earlier
            row[j] = (code if second[j] else later) if first[j] else unseen
