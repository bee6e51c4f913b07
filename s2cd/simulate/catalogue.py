"""Products to disk: COGs and a static STAC collection shaped like Earth Search v1 `sentinel-2-l2a`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from rasterio import Affine
from rasterio.io import MemoryFile
from rasterio.warp import transform as warp_points

from s2cd.catalog.bands import band_info
from s2cd.errors import ConfigError
from s2cd.simulate.acquisition import Overpass, halve
from s2cd.simulate.spectra import BANDS, GSD
from s2cd.simulate.texture import Array, IntArray

# EPSG code, easting and northing of the upper left corner of some MGRS tiles; tiles measure 109.8 km.
TILES = {
    "31UDS": (32631, 399960, 5700000),
    "31UES": (32631, 499980, 5700000),
    "31UDR": (32631, 399960, 5600040),
    "32TMT": (32632, 399960, 5300040),
    "32TNT": (32632, 499980, 5300040),
}
FULL_TILE = 10980
COLLECTION = "sentinel-2-l2a"
_EXTENSIONS = [
    f"https://stac-extensions.github.io/{name}/schema.json"
    for name in (
        "grid/v1.0.0",
        "mgrs/v1.0.0",
        "eo/v1.0.0",
        "view/v1.0.0",
        "sat/v1.0.0",
        "projection/v1.0.0",
        "raster/v1.1.0",
    )
]
_FWHM = {"blue": 0.098, "green": 0.045, "red": 0.038, "nir": 0.145, "nir08": 0.033, "swir16": 0.143, "swir22": 0.242}
_SCL_SHARES = {
    "dark_features": 2,
    "cloud_shadow": 3,
    "vegetation": 4,
    "not_vegetated": 5,
    "water": 6,
    "unclassified": 7,
    "medium_proba_clouds": 8,
    "high_proba_clouds": 9,
    "thin_cirrus": 10,
}


@dataclass(frozen=True)
class Cut:
    """The part of an MGRS tile that is simulated: rows and columns at 10 m, upper left corner [m]."""

    tile: str
    epsg: int
    west: float
    north: float
    shape: tuple[int, int]

    def transform(self, gsd: int) -> list[float]:
        """`proj:transform` of the grid of one resolution."""
        return [gsd, 0, self.west, 0, -gsd, self.north]

    def grid_shape(self, gsd: int) -> list[int]:
        """`proj:shape`: the 20 m grid covers an odd last row or column of the 10 m grid."""
        step = gsd // 10
        return [-(-n // step) for n in self.shape]

    def lonlat(self, cols: Sequence[float], rows: Sequence[float]) -> list[list[float]]:
        """Longitude and latitude of pixel corners."""
        xs = [self.west + 10 * c for c in cols]
        ys = [self.north - 10 * r for r in rows]
        lon, lat = warp_points(f"EPSG:{self.epsg}", "EPSG:4326", xs, ys)
        return [[round(a, 8), round(b, 8)] for a, b in zip(lon, lat, strict=True)]


def cut_of(tile: str, shape: tuple[int, int]) -> Cut:
    """Place a cut in the middle of a tile, aligned to 60 m so that every resolution shares its corner.

    Raises ConfigError for a tile that is not in TILES.
    """
    if tile not in TILES:
        raise ConfigError(f"unknown tile {tile!r}, expected one of {', '.join(TILES)}")
    epsg, west, north = TILES[tile]
    row, col = ((FULL_TILE - n) // 2 // 6 * 6 for n in shape)
    return Cut(tile, epsg, west + 10.0 * col, north - 10.0 * row, shape)


@dataclass(frozen=True)
class Product:
    """One file set of one overpass.

    sequence      number in the id, 0 for the first
    baseline      processing baseline
    dn_offset     what the digital numbers carry: 0 or 1000
    applied       whether the archive took the offset out again, as `earthsearch:boa_offset_applied` says
    rows          first and last + 1 row with pixels (a part of a split datatake), None for all
    """

    overpass: Overpass
    sequence: int = 0
    baseline: str = "03.00"
    dn_offset: int = 0
    applied: bool = False
    rows: tuple[int, int] | None = None

    @property
    def stated_offset(self) -> float:
        """`raster:bands` offset: Earth Search states -0.1 since 04.00, even where the pixels carry none."""
        return -0.1 if self.baseline >= "04.00" else 0


class Writer:
    """Writes products of one cut into a folder, then the collection."""

    def __init__(self, folder: Path, cut: Cut, blocksize: int):
        self.folder, self.cut, self.blocksize = folder, cut, blocksize
        self.items: list[dict[str, Any]] = []

    def write(self, product: Product, image: Array, scl: IntArray, edge: tuple[float, float]) -> None:
        """Write COGs and item of one product.

        image (band, y, x) reflectance and scl (y, x) may be smaller than the cut: they are then continued by
        mirror images. edge is the column where the swath ends, at the top and at the bottom of the cut.
        """
        item_id = item_name(product, self.cut)
        target = self.folder / item_id
        target.mkdir(parents=True, exist_ok=True)
        for band, gsd in enumerate(GSD):
            layer = image[band] if gsd == 10 else halve(image[band])
            numbers = np.rint(np.nan_to_num(layer) * 1e4).astype(np.int32) + product.dn_offset
            pixels = mirrored(np.clip(numbers, 1, 65535).astype(np.uint16), self.cut.grid_shape(gsd))
            self._mask(pixels, gsd, product, edge)
            self.write_cog(target / f"{band_info(BANDS[band]).name}.tif", pixels, gsd)
        classes = mirrored(scl, self.cut.grid_shape(20))
        self._mask(classes, 20, product, edge)
        self.write_cog(target / "SCL.tif", classes, 20, resampling="nearest")
        item = item_document(product, self.cut, classes, edge)
        (target / f"{item_id}.json").write_text(json.dumps(item, indent=1))
        self.items.append(item)

    def _mask(self, pixels: IntArray, gsd: int, product: Product, edge: tuple[float, float]) -> None:
        """Set what the product does not cover to 0, row block by row block."""
        step = gsd // 10
        if product.rows:
            first, last = (-(-r // step) for r in product.rows)
            pixels[:first] = 0
            pixels[last:] = 0
        if np.isinf(edge[0]):
            return
        rows = (np.arange(pixels.shape[0]) + 0.5) * step / self.cut.shape[0]
        ends = np.clip((edge[0] + (edge[1] - edge[0]) * rows) / step, 0, pixels.shape[1]).astype(int)
        for row, end in enumerate(ends):
            pixels[row, end:] = 0

    def write_cog(self, path: Path, pixels: IntArray, gsd: int, resampling: str = "average") -> None:
        """Write one layer (y, x) as a COG with overviews, nodata 0."""
        profile = {
            "driver": "COG",
            "width": pixels.shape[1],
            "height": pixels.shape[0],
            "count": 1,
            "dtype": pixels.dtype,
            "crs": f"EPSG:{self.cut.epsg}",
            "transform": Affine(*self.cut.transform(gsd)),
            "nodata": 0,
            "compress": "DEFLATE",
            "level": 1,
            "predictor": 2,
            "blocksize": self.blocksize,
            "overview_resampling": resampling,
            "num_threads": "ALL_CPUS",
        }
        # Through memory: GDAL reports no full disk, and cannot overwrite what an interrupted write left.
        with MemoryFile() as file:
            with file.open(**profile) as out:
                out.write(pixels, 1)
            path.write_bytes(file.getbuffer())

    def write_collection(self) -> Path:
        """Write catalog.json, a STAC Collection that links to all items written so far."""
        boxes = np.array([item["bbox"] for item in self.items])
        times = sorted(item["properties"]["datetime"] for item in self.items)
        box = [*boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist()]
        links = [{"rel": rel, "href": "./catalog.json", "type": "application/json"} for rel in ("root", "self")]
        links = links[:1] + [
            {"rel": "item", "href": f"./{item['id']}/{item['id']}.json", "type": "application/geo+json"}
            for item in self.items
        ]
        collection = {
            "type": "Collection",
            "stac_version": "1.0.0",
            "id": COLLECTION,
            "title": "Simulated Sentinel-2 Level-2A",
            "description": "A simulated series of Sentinel-2 L2A images with changes of known truth (s2cd.simulate).",
            "license": "Apache-2.0",
            "extent": {"spatial": {"bbox": [box]}, "temporal": {"interval": [[times[0], times[-1]]]}},
            "links": links,
        }
        path = self.folder / "catalog.json"
        path.write_text(json.dumps(collection, indent=1))
        return path


def mirrored(layer: IntArray, shape: Sequence[int]) -> IntArray:
    """Continue a layer (y, x) by mirror images until it has `shape`; always a copy."""
    margin = [(0, want - have) for have, want in zip(layer.shape, shape, strict=True)]
    return np.pad(layer, margin, mode="symmetric")


def item_name(product: Product, cut: Cut) -> str:
    """Identifier as Earth Search forms it: S2A_31UDS_20210412_0_L2A."""
    overpass = product.overpass
    return f"S2{overpass.platform[-1].upper()}_{cut.tile}_{overpass.time:%Y%m%d}_{product.sequence}_L2A"


def item_document(product: Product, cut: Cut, scl: IntArray, edge: tuple[float, float]) -> dict[str, Any]:
    """The STAC item of one product; cloud cover and class shares are counted in its `scl` (y, x)."""
    item_id = item_name(product, cut)
    ring = _footprint(product, cut, edge)
    lons, lats = zip(*ring, strict=True)
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": _EXTENSIONS,
        "id": item_id,
        "collection": COLLECTION,
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "bbox": [min(lons), min(lats), max(lons), max(lats)],
        "properties": _properties(product, cut, scl),
        "assets": {**{name: _band_asset(name, product, cut) for name in BANDS}, "scl": _scl_asset(cut)},
        "links": [
            {"rel": rel, "href": "../catalog.json", "type": "application/json"}
            for rel in ("root", "parent", "collection")
        ],
    }


def _properties(product: Product, cut: Cut, scl: IntArray) -> dict[str, Any]:
    overpass = product.overpass
    platform = f"S2{overpass.platform[-1].upper()}"
    nominal = overpass.time - timedelta(seconds=overpass.time.second % 30 + 290)
    sensing = overpass.time + timedelta(seconds=14 * product.sequence if product.rows else 0)
    made = overpass.time + timedelta(hours=3 + product.sequence, minutes=product.sequence)
    if product.baseline >= "04.00":
        made += timedelta(days=540)
    stamp, number = f"{nominal:%Y%m%dT%H%M%S}", product.baseline.replace(".", "")
    absolute = 24515 + (overpass.time.toordinal() - 737486) * 143 // 10
    counts = np.bincount(scl.ravel(), minlength=12)
    valid = max(int(counts[1:].sum()), 1)
    shares = {f"s2:{name}_percentage": round(100 * int(counts[code]) / valid, 6) for name, code in _SCL_SHARES.items()}
    return {
        "datetime": f"{sensing:%Y-%m-%dT%H:%M:%S}.024000Z",
        "created": f"{made:%Y-%m-%dT%H:%M:%S}.000Z",
        "updated": f"{made:%Y-%m-%dT%H:%M:%S}.000Z",
        "platform": overpass.platform,
        "constellation": "sentinel-2",
        "instruments": ["msi"],
        "eo:cloud_cover": round(100 * int(counts[8:11].sum()) / valid, 6),
        "proj:epsg": cut.epsg,
        "mgrs:utm_zone": int(cut.tile[:2]),
        "mgrs:latitude_band": cut.tile[2],
        "mgrs:grid_square": cut.tile[3:],
        "grid:code": f"MGRS-{cut.tile}",
        "sat:relative_orbit": overpass.orbit,
        "sat:orbit_state": "descending",
        "view:sun_azimuth": round(overpass.sun_azimuth, 6),
        "view:sun_elevation": round(overpass.sun_elevation, 6),
        "s2:nodata_pixel_percentage": round(100 * int(counts[0]) / scl.size, 6),
        **shares,
        "s2:product_type": "S2MSI2A",
        "s2:processing_baseline": product.baseline,
        "s2:product_uri": (
            f"{platform}_MSIL2A_{stamp}_N{number}_R{overpass.orbit:03d}_T{cut.tile}_{made:%Y%m%dT%H%M%S}.SAFE"
        ),
        "s2:generation_time": f"{made:%Y-%m-%dT%H:%M:%S}.000000Z",
        "s2:datatake_id": f"G{platform}_{stamp}_{absolute:06d}_N{product.baseline}",
        "s2:datatake_type": "INS-NOBS",
        "s2:datastrip_id": (
            f"{platform}_OPER_MSI_L2A_DS_SIMU_{made:%Y%m%dT%H%M%S}_S{sensing:%Y%m%dT%H%M%S}_N{product.baseline}"
        ),
        "s2:sequence": str(product.sequence),
        "earthsearch:boa_offset_applied": product.applied,
    }


def _band_asset(name: str, product: Product, cut: Cut) -> dict[str, Any]:
    info = band_info(name)
    wave = {"center_wavelength": round(info.wavelength / 1000, 3), "full_width_half_max": _FWHM[name]}
    return {
        "href": f"./{info.name}.tif",
        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
        "title": f"{name} ({info.name}) - {info.gsd}m",
        "eo:bands": [{"name": name, "common_name": name, "description": f"{name} ({info.name})", **wave}],
        "gsd": info.gsd,
        "proj:shape": cut.grid_shape(info.gsd),
        "proj:transform": cut.transform(info.gsd),
        "raster:bands": [
            {
                "nodata": 0,
                "data_type": "uint16",
                "bits_per_sample": 15,
                "spatial_resolution": info.gsd,
                "scale": 0.0001,
                "offset": product.stated_offset,
            }
        ],
        "roles": ["data", "reflectance"],
    }


def _scl_asset(cut: Cut) -> dict[str, Any]:
    return {
        "href": "./SCL.tif",
        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
        "title": "Scene classification map (SCL)",
        "proj:shape": cut.grid_shape(20),
        "proj:transform": cut.transform(20),
        "raster:bands": [{"nodata": 0, "data_type": "uint8", "spatial_resolution": 20}],
        "roles": ["data", "reflectance"],
    }


def _footprint(product: Product, cut: Cut, edge: tuple[float, float]) -> list[list[float]]:
    """Ring in longitude and latitude of what the product covers."""
    first, last = product.rows or (0, cut.shape[0])
    width = float(cut.shape[1])
    points = [(0.0, float(first)), (0.0, float(last))]
    if np.isinf(edge[0]):
        points += [(width, float(last)), (width, float(first))]
    else:

        def end(row: float) -> float:
            return edge[0] + (edge[1] - edge[0]) * row / cut.shape[0]

        points.append((min(max(end(last), 0.0), width), float(last)))
        crossing = (edge[0] - width) / (edge[0] - edge[1]) * cut.shape[0]
        if first < crossing < last:
            points.append((width, crossing))
        points.append((min(max(end(first), 0.0), width), float(first)))
    points.append(points[0])
    return cut.lonlat([p[0] for p in points], [p[1] for p in points])
