"""Checks of an output folder: are the maps what their items say, and is the catalogue whole?"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader, MemoryFile
from rasterio.windows import Window

from s2cd.addresses import public_href
from s2cd.codes import CODE_NODATA, decode_codes, encode_codes
from s2cd.errors import OutputError
from s2cd.outputs.layout import ROOT, is_map_name
from s2cd.outputs.overviews import code_pyramid
from s2cd.outputs.profiles import BLOCK
from s2cd.outputs.store import Store, open_store, require_there

Document = dict[str, Any]
Files = Mapping[str, int]
OVERVIEW_TOLERANCE = 0.01  # rounding to uint8 and LERC's error add up over the levels


def validate(out: str, threads: int = 2) -> list[str]:
    """Return what is wrong with an output folder, one line a problem; an empty list means that all is well.

    Every map is read whole: it must be a COG with full overviews on the grid of its item, with values in [0, 1] or
    no observation. The links and assets of every item must resolve, and the catalogue must list every finished map
    and no other. Raises OutputError if the folder itself cannot be read.
    """
    require_there(out)
    store = open_store(out)
    files = dict(store.list())
    names = {path: path.rpartition("/")[2].rpartition(".") for path in files}
    items = sorted(p for p, (stem, _, kind) in names.items() if kind == "json" and is_map_name(stem))
    maps = {p for p, (stem, _, kind) in names.items() if kind == "tif" and is_map_name(stem)}
    problems = [] if items else [f"{public_href(out)}: no maps"]
    problems += [f"{p}: no item, the map is not finished" for p in sorted(maps) if p[:-4] + ".json" not in files]
    with ThreadPoolExecutor(threads) as pool:
        for found in pool.map(lambda path: list(_item_problems(store, path, files)), items):
            problems += found
    return problems + list(_catalog_problems(store, items, files))


def _item_problems(store: Store, path: str, files: Files) -> Iterator[str]:
    item, problem = _document(store, path)
    if problem:
        yield problem
        return
    stem = path.rpartition("/")[2].removesuffix(".json")
    if item.get("id") != stem:
        yield f"{path}: id {item.get('id')!r}, expected {stem!r}"
    for link in item.get("links", []):
        target = _resolve(path, link["href"])
        if link["rel"] != "derived_from" and target not in files:
            yield f"{path}: {link['rel']} link to {target}, which does not exist"
    for key, asset in item.get("assets", {}).items():
        target = _resolve(path, asset["href"])
        expected = asset.get("file:size")
        if target not in files:
            yield f"{path}: asset {key} at {target} does not exist"
        elif expected is not None and files[target] != expected:
            yield f"{target}: {files[target]} bytes, expected {expected}"
        elif key == "change":
            yield from _map_problems(store, target, item, asset)


def _map_problems(store: Store, path: str, item: Document, asset: Document) -> Iterator[str]:
    try:
        scale = float(asset["raster:bands"][0]["scale"])
        with MemoryFile(store.get(path)) as file:
            with file.open() as dataset:
                found = [*_layout_problems(dataset), *_grid_problems(dataset, item["properties"])]
                codes, outside = _read_codes(dataset, scale)
                levels = len(dataset.overviews(1))
            found += [f"{outside} values are neither in [0, 1] nor nodata"] if outside else []
            for level, expected in zip(range(levels), code_pyramid(codes)[1:], strict=False):
                with file.open(overview_level=level) as overview:
                    found += _overview_problems(overview, scale, expected, level)
    except (RasterioError, KeyError, ValueError, OutputError) as error:
        found = [f"cannot be checked: {type(error).__name__}: {' '.join(str(error).split())}"]
    yield from (f"{path}: {problem}" for problem in found)


def _layout_problems(dataset: DatasetReader) -> Iterator[str]:
    """What keeps the file from being a COG: https://gdal.org/drivers/raster/cog.html, "File format details"."""
    levels: list[int | None] = [None, *range(len(dataset.overviews(1)))]
    headers = [_offset(dataset, "IFD_OFFSET", level) for level in levels]
    blocks = [_offset(dataset, "BLOCK_OFFSET_0_0", level) for level in levels]
    if headers != sorted(headers) or blocks != sorted(blocks, reverse=True) or headers[-1] > blocks[-1]:
        yield "not laid out as a cloud-optimised GeoTIFF: headers, then overviews, then the map"
    if dataset.count != 1 or dataset.nodata is None:
        yield f"{dataset.count} bands with nodata {dataset.nodata}, expected one with nodata"
    if max(dataset.shape) > BLOCK and ((BLOCK, BLOCK) not in dataset.block_shapes or len(levels) == 1):
        yield f"{dataset.shape} pixels without tiles of {BLOCK} or without overviews"


def _offset(dataset: DatasetReader, tag: str, level: int | None) -> int:
    return int(dataset.get_tag_item(tag, "TIFF", bidx=1, ovr=level) or 0)


def _grid_problems(dataset: DatasetReader, properties: Document) -> Iterator[str]:
    found = {
        "proj:shape": list(dataset.shape),
        "proj:transform": list(dataset.transform)[:6],
        "proj:epsg": dataset.crs.to_epsg() if dataset.crs else None,
    }
    for key, value in found.items():
        if value != properties[key]:
            yield f"{key} {value}, expected the item's {properties[key]}"


def _read_codes(dataset: DatasetReader, scale: float) -> tuple[np.ndarray, int]:
    """Return a map as codes, and how many of its values are no probability."""
    codes = np.full(dataset.shape, CODE_NODATA, np.uint16)
    outside = 0
    for top in range(0, dataset.height, BLOCK):
        rows = slice(top, min(top + BLOCK, dataset.height))
        values = _probability(dataset, scale, Window(0, top, dataset.width, rows.stop - top))
        wrong = (values < 0) | (values > 1)
        outside += int(np.count_nonzero(wrong))
        with np.errstate(invalid="ignore"):  # damaged bytes may be signalling NaNs
            codes[rows] = encode_codes(np.where(wrong, np.float32(np.nan), values))
    return codes, outside


def _overview_problems(overview: DatasetReader, scale: float, expected: np.ndarray, level: int) -> Iterator[str]:
    values, means = _probability(overview, scale), decode_codes(expected)
    if values.shape != means.shape:
        yield f"overview {level} of {values.shape} pixels, expected {means.shape}"
    elif not np.array_equal(np.isnan(values), np.isnan(means)):
        holes = int(np.count_nonzero(np.isnan(values) != np.isnan(means)))
        yield f"overview {level}: {holes} pixels are observed where the map is not, or the reverse"
    elif np.nanmax(np.abs(values - means), initial=0) > OVERVIEW_TOLERANCE:
        yield f"overview {level} does not show the mean of the map"


def _probability(dataset: DatasetReader, scale: float, window: Window | None = None) -> np.ndarray:
    stored = dataset.read(1, window=window)
    if dataset.nodata is None or np.isnan(dataset.nodata):
        return stored.astype(np.float32, copy=False)
    return np.where(stored == dataset.nodata, np.float32(np.nan), stored * np.float32(scale))


def _catalog_problems(store: Store, items: list[str], files: Files) -> Iterator[str]:
    listed: set[str] = set()
    root, problem = _document(store, ROOT)
    yield from [problem] if problem else []
    for child in _targets(ROOT, root, "child"):
        catalog, problem = _document(store, child)
        yield from [problem] if problem else []
        listed.update(_targets(child, catalog, "item"))
    for path in sorted(listed - set(files)):
        yield f"{path}: listed in the catalogue, but does not exist"
    for path in sorted(set(items) - listed):
        yield f"{path}: not listed in the catalogue"


def _document(store: Store, path: str) -> tuple[Document, str]:
    """Return a JSON document, or an empty one and what is wrong with it."""
    try:
        document = json.loads(store.get(path))
    except (OutputError, ValueError) as error:
        return {}, f"{path}: {' '.join(str(error).split())}"
    return (document, "") if isinstance(document, dict) else ({}, f"{path}: not a JSON object")


def _targets(path: str, document: Document, rel: str) -> list[str]:
    links = document.get("links", [])
    return [_resolve(path, link["href"]) for link in links if link.get("rel") == rel]


def _resolve(path: str, href: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), href))
