"""How maps can be stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from s2cd.codes import CODE_NODATA, QUANTUM

BLOCK = 512
"""Pixels along a side of a block of a map."""


@dataclass(frozen=True, slots=True)
class Profile:
    """How a map is stored: probability = scale * stored value, and `nodata` means no observation."""

    dtype: str
    scale: float
    nodata: float
    options: Mapping[str, str]

    @property
    def quantum(self) -> float:
        """Step between two probabilities that can be stored, of 0 to 1."""
        return QUANTUM if self.dtype == "float32" else self.scale

    @property
    def deflated(self) -> bool:
        """Whether blocks are plain DEFLATE streams."""
        return self.options == _DEFLATE

    def stored(self, codes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """Return what is stored for codes (y, x), in a block of `shape` that has no observation beyond them."""
        values = np.multiply(codes, np.float32(QUANTUM / self.scale), dtype=np.float32, order="C")
        if self.dtype != "float32":
            np.rint(values, out=values)
        np.copyto(values, np.float32(self.nodata), where=codes == CODE_NODATA)
        if codes.shape == shape:
            return values.astype(self.dtype, copy=False)
        block = np.full(shape, self.nodata, self.dtype)
        block[: codes.shape[0], : codes.shape[1]] = values
        return block


def _float32(**options: str) -> Profile:
    return Profile("float32", 1.0, np.nan, options)


_DEFLATE = {"COMPRESS": "DEFLATE", "PREDICTOR": "NO"}
# Chosen by measurement on full tiles, see docs/decisions.md.
PROFILES: Mapping[str, Profile] = {
    "default": _float32(**_DEFLATE),
    "zstd": _float32(COMPRESS="ZSTD", LEVEL="1", PREDICTOR="FLOATING_POINT"),
    # Its error counts from a block's smallest value, a multiple of QUANTUM, and so hits every other one exactly.
    "lerc": _float32(COMPRESS="LERC_DEFLATE", MAX_Z_ERROR=str(QUANTUM / 2)),
    "uint8": Profile("uint8", 1 / 254, 255, _DEFLATE),
}
