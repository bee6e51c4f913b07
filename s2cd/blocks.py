"""Blocks of TIFFs with DEFLATE, which archives hold, decoded from their bytes.

GDAL takes a third longer, most of it for copies from cache to cache. Files of other kinds are left to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import rasterio
from isal import isal_zlib
from isal.igzip_lib import IsalError

_ZLIB = 15  # a stream with a header and a checksum, RFC 1950


@dataclass(frozen=True, slots=True)
class Packing:
    """How the blocks (y, x) of a file are stored: `predictor` is TIFF's 2, differences along rows."""

    block: tuple[int, int]
    dtype: np.dtype[Any]
    predictor: bool

    def unpack(self, data: bytes, pixels: np.ndarray) -> None:
        """Write the upper left pixels (y, x) of a block. Raises OSError for one that is damaged."""
        shape = pixels.shape
        size = math.prod(self.block) * self.dtype.itemsize
        try:
            flat = isal_zlib.decompress(data, _ZLIB, size)
        except IsalError as error:  # type: ignore[misc]  # its stub takes it for an instance
            raise OSError(f"a block of {len(data)} bytes is damaged: {error}") from None
        rows = len(flat) * self.block[0] // size
        if rows * size != len(flat) * self.block[0] or not shape[0] <= rows <= self.block[0]:  # a last strip is short
            raise OSError(f"a block holds {len(flat)} bytes, expected {size}")
        stored = np.frombuffer(flat, self.dtype).reshape(rows, self.block[1])[: shape[0], : shape[1]]
        if not self.predictor:
            pixels[...] = stored
            return
        from s2cd.predictor import add_up  # Numba: not for what only plans

        add_up(stored, pixels)


def packing(dataset: rasterio.DatasetReader) -> Packing | None:
    """Return how an open file's blocks are stored, None for what is left to GDAL."""
    kind = dataset.tags(ns="IMAGE_STRUCTURE") | dataset.tags(1, ns="IMAGE_STRUCTURE")
    predictor, dtype = kind.get("PREDICTOR", "1"), np.dtype(dataset.dtypes[0])
    plain = dataset.driver == "GTiff" and dataset.count == 1 and kind.get("COMPRESSION") == "DEFLATE"
    if not plain or dtype not in (np.uint8, np.uint16) or predictor not in {"1", "2"} or "NBITS" in kind:
        return None
    return Packing(dataset.block_shapes[0], dtype, predictor == "2")
