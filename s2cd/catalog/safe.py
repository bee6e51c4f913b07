"""Folders of .SAFE products, read from their own metadata.

The elements are those of the Sentinel-2 Products Specification Document (S2-PDGS-TAS-DI-PSD). Up to its issue 14.2
(baselines 02.04 to 02.06, 2017 and 2018) those of L2A say so in their names: PRODUCT_URI_2A, L2A_Product_Info.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Collection
from pathlib import Path
from typing import Any

from s2cd.catalog.bands import BANDS, SCL
from s2cd.catalog.items import parse_time, scene_from_item
from s2cd.catalog.scene import Scene
from s2cd.errors import CatalogError

_BAND_FILE = re.compile(r"_(B\d{2}|B8A|SCL)(?:_(\d{2})m)?$")
_L2A = re.compile(r"^L2A_|_2A$")
_SUFFIXES = (".jp2", ".tif", ".tiff")
_GSD = {band.name: band.gsd for band in BANDS} | {SCL.upper(): 20}


def find_products(folder: Path) -> list[Path]:
    """Return the .SAFE products in `folder`, or `folder` itself if it is one."""
    return [folder] if folder.suffix == ".SAFE" else sorted(p for p in folder.glob("*.SAFE") if p.is_dir())


def scene_from_safe(product: Path, extra: Collection[str] = ()) -> Scene:
    """Read a scene from a .SAFE product: MTD_MSIL1C.xml or MTD_MSIL2A.xml, and the granule's MTD_TL.xml.

    `extra` are keys of assets to keep beside the bands: "cloud" is the cloud probability at 20 m (L2A).

    Raises CatalogError with the reason for a product that cannot be understood.
    """
    try:
        return scene_from_item(_item(product.absolute()), provider="static", extra=extra)
    except (ET.ParseError, KeyError, ValueError, TypeError, OSError) as error:
        raise CatalogError(f"{product}: cannot be understood: {error!r}") from error


def _item(product: Path) -> dict[str, Any]:
    """Say in STAC what the product's metadata say."""
    info = _parse(_only(product, "MTD_MSIL*.xml"))
    tile = _parse(_only(product, "GRANULE/*/MTD_TL.xml"))
    datatake = _find(info, "Datatake")
    granule = _find(info, "Granule")
    level = _text(info, "PROCESSING_LEVEL").removeprefix("Level-")[:2]  # of "Level-2Ap", too, as of 2017
    return {
        "type": "Feature",
        "id": _text(info, "PRODUCT_URI").removesuffix(".SAFE"),
        "collection": f"sentinel-2-l{level.lower()}",
        "geometry": {"type": "Polygon", "coordinates": [_footprint(_text(info, "EXT_POS_LIST"))]},
        "properties": {
            "datetime": parse_time(_text(tile, "SENSING_TIME")).isoformat(),
            "platform": _text(info, "SPACECRAFT_NAME").lower(),
            "s2:product_uri": _text(info, "PRODUCT_URI"),
            "s2:product_type": _text(info, "PRODUCT_TYPE"),
            "s2:processing_baseline": _text(info, "PROCESSING_BASELINE"),
            "s2:generation_time": _text(info, "GENERATION_TIME"),
            "s2:datatake_id": datatake.attrib["datatakeIdentifier"],
            "s2:datastrip_id": granule.attrib["datastripIdentifier"],
            "s2:tile_id": granule.attrib["granuleIdentifier"],
            "sat:relative_orbit": int(_text(info, "SENSING_ORBIT_NUMBER")),
            "eo:cloud_cover": float(_text(info, "Cloud_Coverage_Assessment")),
            "proj:code": _text(tile, "HORIZONTAL_CS_CODE"),
        },
        "assets": _assets(product, info, tile),
        "links": [{"rel": "self", "href": str(product)}],
    }


def _assets(product: Path, info: ET.Element, tile: ET.Element) -> dict[str, Any]:
    quantification = float(_text(info, "BOA_QUANTIFICATION_VALUE", "QUANTIFICATION_VALUE"))
    offsets = _offsets(info)
    assets = {}
    for node in info.iter("IMAGE_FILE"):
        stem = (node.text or "").strip()
        found = _BAND_FILE.search(stem)
        if not found:
            continue
        name, metres = found[1], int(found[2] or _GSD[found[1]])
        raster: dict[str, Any] = {"nodata": 0}
        if name != SCL.upper():
            raster["scale"] = 1 / quantification
            raster["offset"] = offsets.get(name, 0.0) / quantification
        assets[f"{name}_{metres}m"] = _asset(_image(product, stem), tile, metres, raster)
    for path in sorted(product.glob("GRANULE/*/QI_DATA/*CLD*_20m.*")):
        if path.suffix in _SUFFIXES:
            assets["cloud"] = _asset(path, tile, 20, {})
    return assets


def _asset(path: Path, tile: ET.Element, metres: int, raster: dict[str, Any]) -> dict[str, Any]:
    return {
        "href": str(path),
        "gsd": metres,
        "proj:shape": [int(_at(tile, "Size", metres, n)) for n in ("NROWS", "NCOLS")],
        "proj:transform": _transform(tile, metres),
        "raster:bands": [raster],
    }


def _offsets(info: ET.Element) -> dict[str, float]:
    """Radiometric offset in digital numbers by band name.

    A band without one has none, whatever the baseline: Sen2Cor's toolbox writes 99.99 and adds the offset of its L1C.
    """
    names = {}
    for node in info.iter("Spectral_Information"):
        physical = node.attrib["physicalBand"]
        names[node.attrib["bandId"]] = physical if physical == "B8A" else f"B{int(physical[1:]):02d}"
    nodes = [*info.iter("BOA_ADD_OFFSET"), *info.iter("RADIO_ADD_OFFSET")]
    return {names[node.attrib["band_id"]]: float(node.text or "") for node in nodes}


def _image(product: Path, stem: str) -> Path:
    """The image file, which the metadata name without suffix; as the first kind if there is none."""
    candidates = [product / f"{stem}{suffix}" for suffix in _SUFFIXES]
    return next((c for c in candidates if c.is_file()), candidates[0])


def _transform(tile: ET.Element, metres: int) -> list[float]:
    x, y, width, height = (float(_at(tile, "Geoposition", metres, n)) for n in ("ULX", "ULY", "XDIM", "YDIM"))
    return [width, 0, x, 0, height, y]


def _footprint(positions: str) -> list[list[float]]:
    """The ring of "lat lon lat lon ...", which some products give with heights."""
    values = [float(v) for v in positions.split()]
    step = 3 if len(values) % 3 == 0 and values[0] == values[-3] and values[1] == values[-2] else 2
    return [[values[i + 1], values[i]] for i in range(0, len(values) - 1, step)]


def _only(product: Path, pattern: str) -> Path:
    found = sorted(product.glob(pattern))
    if len(found) != 1:
        raise CatalogError(f"{product}: found {len(found)} files {pattern}, expected one")
    return found[0]


def _parse(path: Path) -> ET.Element:
    """The document's root, its tags without namespaces and as they are since issue 14.3."""
    root = ET.parse(path).getroot()
    for node in root.iter():
        node.tag = _L2A.sub("", node.tag.rpartition("}")[2])
    return root


def _find(root: ET.Element, name: str) -> ET.Element:
    for node in root.iter(name):
        return node
    raise ValueError(f"no {name}")


def _text(root: ET.Element, *names: str) -> str:
    for name in names:
        for node in root.iter(name):
            if node.text:
                return node.text.strip()
    raise ValueError(f"no {' or '.join(names)}")


def _at(tile: ET.Element, group: str, metres: int, name: str) -> str:
    """Value of `name` in the group of one resolution."""
    for node in tile.iter(group):
        if node.attrib.get("resolution") == str(metres):
            return _text(node, name)
    raise ValueError(f"no {group} at {metres} m")
