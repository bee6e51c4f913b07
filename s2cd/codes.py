"""Probabilities as uint16 codes: what the engine keeps in memory and what a map stores, at half the size."""

from __future__ import annotations

import numpy as np

QUANTUM = 1 / 1024
"""Precision of a stored probability; a power of two, so that every code is exact in float32."""
CODE_SCALE = 1024
CODE_NODATA = 65535
"""Code of a pixel without a valid observation on both dates."""
UNSEEN_BEFORE, UNSEEN_AFTER = 65533, 65534
"""Where reasons are kept: codes of a pixel that only the earlier or only the later date does not show."""


def encode_codes(probability: np.ndarray) -> np.ndarray:
    """Return uint16 codes of a float array in [0, 1]: k means k/1024 (nearest), 65535 means NaN.

    Raises ValueError if a value lies outside [0, 1].
    """
    scaled = np.multiply(probability, CODE_SCALE, dtype=np.float32)
    np.rint(scaled, out=scaled)
    low, high = (f.reduce(scaled, axis=None, initial=0) for f in (np.fmin, np.fmax))
    if low < 0 or high > CODE_SCALE:
        raise ValueError(f"probabilities from {low * QUANTUM:g} to {high * QUANTUM:g}, expected 0 to 1 or NaN")
    scaled[np.isnan(scaled)] = CODE_NODATA
    return scaled.astype(np.uint16)


def decode_codes(codes: np.ndarray) -> np.ndarray:
    """Return the float32 probability of uint16 codes, NaN where there is no observation."""
    return _LOOKUP[codes]


def _lookup() -> np.ndarray:
    """Table of all codes: one gather is faster than arithmetic and a mask."""
    table = np.full(CODE_NODATA + 1, np.nan, np.float32)
    table[: CODE_SCALE + 1] = np.arange(CODE_SCALE + 1, dtype=np.float32) / CODE_SCALE
    return table


_LOOKUP = _lookup()


def split_reasons(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split codes that keep reasons into plain codes and validity.

    Validity is uint8 (y, x): 0 = seen on both dates, 1 = not on the earlier, 2 = not on the later, 3 = on neither.
    """
    validity = np.zeros(codes.shape, np.uint8)
    missing = codes > CODE_SCALE
    validity[missing] = codes[missing] - (UNSEEN_BEFORE - 1)
    return np.where(missing, np.uint16(CODE_NODATA), codes), validity
