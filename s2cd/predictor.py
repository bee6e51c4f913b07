"""TIFF's predictor 2: pixels are stored as differences along rows."""

from __future__ import annotations

from typing import Any

from s2cd.jit import compiled


@compiled()
def add_up(differences: Any, out: Any) -> None:
    """Write the sums along each row, which wrap as the differences did."""
    for i in range(out.shape[0]):
        total = differences[i, 0]
        out[i, 0] = total
        for j in range(1, out.shape[1]):
            total += differences[i, j]
            out[i, j] = total
