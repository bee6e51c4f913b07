"""The overviews of a map, averaged in codes."""

from __future__ import annotations

import numpy as np

from s2cd.codes import CODE_NODATA
from s2cd.outputs.profiles import BLOCK


def code_pyramid(codes: np.ndarray) -> list[np.ndarray]:
    """Return the codes and their overviews: each half the size of the one before, down to one block."""
    levels = [codes]
    while max(levels[-1].shape) > BLOCK:
        levels.append(halved(levels[-1]))
    return levels


def halved(codes: np.ndarray) -> np.ndarray:
    """Return uint16 codes (y, x) at half the size, rounded up.

    A pixel is the mean of the observed ones of the four below it, rounded to a code; it is without observation where
    all of them are.
    """
    from s2cd.outputs.halving import halve  # Numba takes a third of a second to load: not for `s2cd status`

    out = np.empty(coarser(codes.shape, 1), np.uint16)
    halve(codes, np.uint16(CODE_NODATA), out)
    return out


def coarser(shape: tuple[int, ...], level: int) -> tuple[int, int]:
    """Return the shape (y, x) of a level of a map of `shape`; 0 is the map itself."""
    rows, columns = (-(-n // (1 << level)) for n in shape)
    return rows, columns
