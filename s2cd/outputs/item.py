"""The STAC item of one map: what it shows, what it was made from and how."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np
from rasterio.warp import transform_geom

from s2cd.addresses import public_href
from s2cd.catalog.providers import PROVIDERS
from s2cd.catalog.scene import Grid, Scene
from s2cd.outputs.layout import COG_TYPE, COLLECTION_ID, ITEM_TYPE, ROOT, TILE_CATALOG, VALIDITY
from s2cd.outputs.parts import THRESHOLD
from s2cd.outputs.profiles import PROFILES, Profile
from s2cd.pairs import Pair

STAC_VERSION = "1.1.0"
EXTENSIONS = (
    "https://stac-extensions.github.io/projection/v1.2.0/schema.json",
    "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
    "https://stac-extensions.github.io/processing/v1.2.0/schema.json",
    "https://stac-extensions.github.io/file/v2.1.0/schema.json",
)
SAT_EXTENSION = "https://stac-extensions.github.io/sat/v1.0.0/schema.json"
CLASSIFICATION_EXTENSION = "https://stac-extensions.github.io/classification/v2.0.0/schema.json"
GRID_EXTENSION = "https://stac-extensions.github.io/grid/v1.1.0/schema.json"
LINEAGE = "Probability of change between two Sentinel-2 acquisitions of the same field of view, by a siamese network"
EDGE_POINTS = 4
VALIDITY_CLASSES = (
    (0, "seen", "a valid observation on both dates"),
    (1, "unseen_before", "none on the earlier date"),
    (2, "unseen_after", "none on the later date"),
    (3, "unseen", "none on either date"),
)


@dataclass(frozen=True)
class MapInfo:
    """What a map's item states beyond its pair and grid.

    model       name of the model
    model_hash  SHA-256 of its weights, in hexadecimal
    bands       canonical names of the bands the model saw
    extra       further properties, such as {"s2cd:shift": [0.1, -0.3]} in pixels
    """

    model: str
    model_hash: str
    bands: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)


def build_item(
    pair: Pair, grid: Grid, info: MapInfo, observed: int, changed: int, profile: str, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Return the STAC item (1.1.0) of a map.

    observed, changed  pixels of the map
    sizes              file extension (".tif", ".png") -> size in bytes, for the files that were written
    """
    geometry, bbox = footprint(grid)
    assets = {"change": _change_asset(pair.name, PROFILES[profile], sizes[".tif"])}
    if ".png" in sizes:
        assets["thumbnail"] = {
            "href": f"./{pair.name}.png",
            "type": "image/png",
            "title": "Before, after and probability of change",
            "roles": ["thumbnail"],
            "file:size": sizes[".png"],
        }
    if VALIDITY in sizes:
        assets["validity"] = {
            "href": f"./{pair.name}{VALIDITY}",
            "type": COG_TYPE,
            "title": "Why a pixel has no value",
            "roles": ["metadata"],
            "data_type": "uint8",
            "raster:bands": [{"data_type": "uint8"}],
            "classification:classes": [
                {"value": value, "name": name, "description": text} for value, name, text in VALIDITY_CLASSES
            ],
            "file:size": sizes[VALIDITY],
        }
    properties = _properties(pair, grid, info) | _fractions(grid, observed, changed)
    properties |= {"s2cd:cog_profile": profile, **info.extra}
    extensions = list(EXTENSIONS)
    extensions += [CLASSIFICATION_EXTENSION] if VALIDITY in sizes else []
    extensions += [SAT_EXTENSION] if "sat:relative_orbit" in properties else []
    extensions += [GRID_EXTENSION] if "grid:code" in properties else []
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": extensions,
        "id": pair.name,
        "geometry": geometry,
        "bbox": bbox,
        "properties": properties,
        "links": _links(pair),
        "assets": assets,
        "collection": COLLECTION_ID,
    }


def footprint(grid: Grid) -> tuple[dict[str, Any], list[float]]:
    """Return a grid's outline in longitude and latitude: GeoJSON geometry and bounding box.

    Across the antimeridian the geometry is cut in two and the box's west exceeds its east (RFC 7946, 3.1.9, 5.2).
    """
    rows, columns = grid.shape
    steps = np.arange(EDGE_POINTS) / EDGE_POINTS
    corners = [(0, 0), (0, rows), (columns, rows), (columns, 0), (0, 0)]
    a, b, c, d, e, f = grid.transform
    ring = []
    for (x0, y0), (x1, y1) in pairwise(corners):
        for step in steps:
            x, y = x0 + step * (x1 - x0), y0 + step * (y1 - y0)
            ring.append((a * x + b * y + c, d * x + e * y + f))
    outline = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
    geometry = transform_geom(f"EPSG:{grid.epsg}", "EPSG:4326", outline, antimeridian_cutting=True, precision=7)
    parts = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
    for part in parts:  # GDAL turns round what it cuts; RFC 7946 wants the outside anticlockwise
        part[0] = part[0] if _area(part[0]) > 0 else part[0][::-1]
    boxes = [(np.min(part[0], axis=0), np.max(part[0], axis=0)) for part in parts]
    west, east = min(low[0] for low, _ in boxes), max(high[0] for _, high in boxes)
    if len(parts) > 1:
        west = min(low[0] for low, _ in boxes if low[0] > 0)
        east = max(high[0] for _, high in boxes if high[0] < 0)
    south, north = min(low[1] for low, _ in boxes), max(high[1] for _, high in boxes)
    return {"type": geometry["type"], "coordinates": _listed(geometry["coordinates"])}, [
        float(v) for v in (west, south, east, north)
    ]


def _area(ring: Sequence[Sequence[float]]) -> float:
    """Area of a closed ring, below 0 if it runs clockwise."""
    return 0.5 * sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise(ring))


def _properties(pair: Pair, grid: Grid, info: MapInfo) -> dict[str, Any]:
    scenes = (pair.before, pair.after)
    platforms = sorted({s.platform for s in scenes if s.platform})
    properties: dict[str, Any] = {
        "datetime": None,
        "start_datetime": _rfc3339(pair.before.time),
        "end_datetime": _rfc3339(pair.after.time),
        "created": _rfc3339(datetime.now(UTC)),
        "constellation": "sentinel-2",
        "instruments": ["msi"],
        "proj:code": f"EPSG:{grid.epsg}",
        "proj:epsg": grid.epsg,
        "proj:shape": list(grid.shape),
        "proj:transform": list(grid.transform),
        "processing:lineage": LINEAGE,
        "processing:software": {"s2cd": version("s2cd")},
        "s2cd:tile": pair.tile,
        "s2cd:model": info.model,
        "s2cd:model_hash": info.model_hash,
        "s2cd:bands": list(info.bands),
        "s2cd:threshold": THRESHOLD,
        "s2cd:platforms": platforms,
        "s2cd:levels": [s.level for s in scenes],
        "s2cd:baselines": [s.baseline for s in scenes],
        "s2cd:applied_offsets": {
            date: {band: _applied(scene, band) for band in info.bands if band in scene.assets}
            for date, scene in zip(("before", "after"), scenes, strict=True)
        },
        "s2cd:notes": list(pair.notes),
    }
    if len(platforms) == 1:
        properties["platform"] = platforms[0]
    if pair.before.orbit is not None and pair.before.orbit == pair.after.orbit:
        properties["sat:relative_orbit"] = pair.before.orbit
    if re.fullmatch(r"\d{2}[A-Z]{3}", pair.tile):
        properties["grid:code"] = f"MGRS-{pair.tile}"
    return properties


def _applied(scene: Scene, band: str) -> dict[str, Any]:
    asset = scene.assets[band]
    return {"scale": asset.scale, "offset": asset.offset, "reason": asset.reason}


def _fractions(grid: Grid, observed: int, changed: int) -> dict[str, float | None]:
    return {
        "s2cd:valid_fraction": round(observed / (grid.shape[0] * grid.shape[1]), 6),
        "s2cd:changed_fraction": round(changed / observed, 6) if observed else None,
    }


def _change_asset(name: str, profile: Profile, size: int) -> dict[str, Any]:
    """Describe the COG, as STAC 1.1 has it and, in `raster:bands`, for readers that know STAC 1.0 only."""
    values = {
        "data_type": profile.dtype,
        "nodata": "nan" if np.isnan(profile.nodata) else profile.nodata,
        "unit": "1",
    }
    steps = f"1/{round(1 / profile.quantum)}"
    return {
        "href": f"./{name}.tif",
        "type": COG_TYPE,
        "title": "Probability of change",
        "description": f"0 to 1 in steps of {steps}; nodata where either date has no valid observation",
        "roles": ["data"],
        "file:size": size,
        **values,
        "raster:bands": [{**values, "scale": profile.scale, "offset": 0.0}],
    }


def _links(pair: Pair) -> list[dict[str, str]]:
    links = [
        {"rel": "root", "href": f"../{ROOT}", "type": "application/json"},
        {"rel": "parent", "href": f"./{TILE_CATALOG}", "type": "application/json"},
        {"rel": "collection", "href": f"../{ROOT}", "type": "application/json"},
    ]
    inputs = (piece for scene in (pair.before, pair.after) for piece in (scene, *scene.parts))
    return links + [_derived_from(scene) for scene in inputs]


def _derived_from(scene: Scene) -> dict[str, str]:
    """Link to the input's item: where it says it lies, else where its provider's API has it, else to its first file."""
    link = {"rel": "derived_from", "type": ITEM_TYPE, "title": scene.id}
    provider = PROVIDERS.get(scene.provider)
    if scene.address:
        return link | {"href": public_href(scene.address)}
    if provider is not None:
        return link | {"href": f"{provider.url}/collections/{scene.collection}/items/{scene.id}"}
    asset = next(iter(scene.assets.values()))
    return {"rel": "derived_from", "href": public_href(asset.href), "title": scene.id}


def _rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _listed(coordinates: Iterable[Any]) -> list[Any]:
    return [_listed(c) if isinstance(c, (list, tuple)) else c for c in coordinates]
