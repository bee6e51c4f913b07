"""One acquisition of one tile, with everything a task needs to read it and nothing more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any


@dataclass(frozen=True, slots=True)
class Grid:
    """A pixel grid: EPSG code, affine transform (a, b, c, d, e, f) and shape (rows, columns)."""

    epsg: int
    transform: tuple[float, float, float, float, float, float]
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Asset:
    """One band file. Reflectance is `scale * digital_number + offset`; `reason` says how that was decided.

    `scale` and `offset` are 1 and 0 for class layers such as SCL. `nodata` is the digital number that
    means "no observation".
    """

    band: str
    href: str
    grid: Grid
    scale: float
    offset: float
    reason: str
    nodata: int = 0


@dataclass(frozen=True, slots=True)
class Scene:
    """One acquisition of one tile and orbit.

    id            the item's id
    provider      key of the provider the item came from ("earth-search", "static", ...)
    collection    STAC collection id
    level         "L1C" or "L2A"
    tile          MGRS tile ("31UDS"), or the item's grid code where it is none
    orbit         relative orbit 1..143, None where nothing states it
    time          sensing time, timezone-aware UTC
    platform      "sentinel-2a", ...
    baseline      processing baseline "05.11", None where nothing states it
    cloud_cover   percent, None where nothing states it
    datatake      datatake id, None where nothing states it
    footprint     GeoJSON geometry in longitude and latitude of what the swath covers
    assets        by canonical band name ("red", ..., "scl"); further ones, such as another mask, by the item's key
    parts         further pieces of the same acquisition (a split datatake), read where this one is nodata
    processed     when the product was generated, None where nothing states it
    strip_start   sensing start of the datastrip the product was cut from, None where nothing states it
    address       URL or path of the item (of the product, where there is no item), None where nothing states it
    editions      the same acquisition in other processing baselines, newest first, for dates that have no newer one
    """

    id: str
    provider: str
    collection: str
    level: str
    tile: str
    orbit: int | None
    time: datetime
    platform: str | None
    baseline: str | None
    cloud_cover: float | None
    datatake: str | None
    footprint: Mapping[str, Any] = field(repr=False)
    assets: Mapping[str, Asset] = field(repr=False)
    parts: tuple[Scene, ...] = ()
    processed: datetime | None = None
    strip_start: datetime | None = None
    address: str | None = None
    editions: tuple[Scene, ...] = ()
