"""One finished map: COG, quicklook and, last of all, the STAC item."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from s2cd.catalog.scene import Grid
from s2cd.codes import decode_codes, encode_codes
from s2cd.errors import ConfigError, GridError, OutputError
from s2cd.outputs.cog import map_cog, validity_cog
from s2cd.outputs.item import MapInfo, build_item
from s2cd.outputs.layout import VALIDITY, path_of
from s2cd.outputs.parts import MapPart, joined, joined_validity, map_part
from s2cd.outputs.profiles import PROFILES
from s2cd.outputs.quicklook import quicklook
from s2cd.outputs.store import open_store
from s2cd.pairs import Pair

Pictures = tuple[np.ndarray | None, np.ndarray | None]


def write_map(
    values: np.ndarray | Sequence[MapPart],
    pair: Pair,
    grid: Grid,
    info: MapInfo,
    out: str,
    *,
    quicklook_rgb: Pictures | None = None,
    profile: str = "default",
    threads: int = 1,
) -> dict[str, Any]:
    """Write the COG, the quicklook and the STAC item of one pair below `out`; return the item.

    values         uint16 (y, x) on `grid`: k means a probability of k/1024, 65535 no observation;
                   or float32 in [0, 1] with NaN, which is rounded to that; or all parts of such a map
    out            folder or URL such as s3://bucket/prefix
    quicklook_rgb  uint8 (y, x, 3) before and after, each may be None; without the tuple no quicklook is written
    profile        key of `s2cd.outputs.profiles.PROFILES`
    threads        how many threads compress what is not DEFLATE

    The item is written last: its presence means that the map is finished. Every file appears whole or not at all.
    Raises OutputError naming the file, or the pair if a value lies outside [0, 1]; GridError if the shape is not the
    grid's, ConfigError for the profile.
    """
    if profile not in PROFILES:
        raise ConfigError(f"unknown COG profile {profile!r}, expected one of {', '.join(PROFILES)}")
    parts = [_part(values, pair, grid, profile)] if isinstance(values, np.ndarray) else values
    store, sizes = open_store(out), {}
    item_path = path_of(pair.name, ".json")
    blocks, pyramid = joined(parts, grid.shape, profile)
    store.delete(item_path)  # a map that is made anew must not pass for finished in between
    with map_cog(blocks, pyramid, grid, profile=profile, threads=threads, tags=_tags(pair, info)) as pieces:
        sizes[".tif"] = sum(map(len, pieces))
        store.put(path_of(pair.name, ".tif"), iter(pieces))
    validity = joined_validity(parts, grid.shape)
    if validity is not None:
        layer = validity_cog(validity, grid)
        sizes[VALIDITY] = len(layer)
        store.put(path_of(pair.name, VALIDITY), layer)
    if quicklook_rgb is not None:
        png = quicklook(_small(pyramid), *quicklook_rgb, labels=_labels(pair, info))
        sizes[".png"] = len(png)
        store.put(path_of(pair.name, ".png"), png)
    observed, changed = (sum(counts) for counts in zip(*((p.observed, p.changed) for p in parts), strict=True))
    item = build_item(pair, grid, info, observed, changed, profile, sizes)
    store.put(item_path, json.dumps(item, indent=1, allow_nan=False).encode())
    return item


def _part(values: np.ndarray, pair: Pair, grid: Grid, profile: str) -> MapPart:
    """Return a whole map as its only part."""
    if values.shape != tuple(grid.shape):
        raise GridError(f"{pair.name}: a map of {values.shape} pixels, expected {tuple(grid.shape)}")
    codes = values if values.dtype == np.uint16 else _encoded(values, pair)
    return map_part(codes, (0, 0), shape=grid.shape, profile=profile)


def _encoded(probability: np.ndarray, pair: Pair) -> np.ndarray:
    try:
        return encode_codes(probability)
    except ValueError as error:
        raise OutputError(f"{pair.name}: {error}") from None


def _tags(pair: Pair, info: MapInfo) -> dict[str, str]:
    return {
        "BEFORE": pair.before.id,
        "AFTER": pair.after.id,
        "MODEL": info.model,
        "MODEL_HASH": info.model_hash,
        "TIFFTAG_SOFTWARE": "s2cd",
    }


def _small(pyramid: list[np.ndarray]) -> np.ndarray:
    """Return the probability at the finest level that is at most 1024 px: more than the picture shows."""
    fits = (level for level in pyramid if max(level.shape) <= 1024)
    return decode_codes(next(fits, pyramid[-1]))


def _labels(pair: Pair, info: MapInfo) -> tuple[str, str, str]:
    before, after = (f"{scene.time:%Y-%m-%d}" for scene in (pair.before, pair.after))
    return f"before {before}", f"after {after}", f"probability of change ({info.model})"
