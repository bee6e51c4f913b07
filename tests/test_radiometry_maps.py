"""Invariant 3 on maps: however a provider stores and describes an image, its map is that of the harmonised pixels."""

from __future__ import annotations

import contextlib
import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from conftest import write_tiff
from distributed import Client
from rasterio.transform import Affine

import s2cd
from s2cd.catalog import search
from s2cd.catalog.bands import canonical_band
from s2cd.catalog.static import read_document
from s2cd.errors import BaselineWarning, ConfigError, OffsetWarning, S2cdError
from s2cd.model.device import fast_bfloat16
from s2cd.runner import run
from s2cd.simulate import simulate

CLOSE = 0.01 if fast_bfloat16(torch.device("cpu")) else 1.5 / 1024  # bfloat16 has three digits
TIMES = ("20230501T105031", "20230531T105031")

# Recorded document, the item's id or its collection, and what the provider leaves added to the digital numbers.
KINDS: dict[str, tuple[str, str, int]] = {
    "02.14": ("earth-search/search_10items_548f14c6", "S2A_32TMT_20200305_0_L2A", 0),
    "05.00 taken out but stated": ("earth-search/search_10items_548f14c6", "S2A_32TMT_20200305_1_L2A", 0),
    "04.00 not stated": (
        "planetary-computer/S2B_MSIL2A_20220612T182919_R027_T24XWR_20220613T123251_2c8cbcf9",
        "S2B_MSIL2A_20220612T182919_R027_T24XWR_20220613T123251",
        1000,
    ),
    "05.00 stated, STAC 1.1": (
        "cdse/S2A_MSIL2A_20200703T103031_N0500_R108_T32TMT_20230613T212700_a89862f1",
        "S2A",
        1000,
    ),
    "05.11 stated": ("earth-search/search_10items_a8dc97a1", "sentinel-2-c1-l2a", 1000),
}


@pytest.fixture(scope="module")
def client():
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        yield client


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[np.ndarray, tuple[float, ...]]]]:
    """Two dates between which something changed: digital numbers without offset, and the transform, of each band."""
    dates = []
    for scene in search(simulate(tmp_path_factory.mktemp("ground"), size=256, dates=2, orbits=(51,), clouds=False)):
        pixels = {}
        for band, asset in scene.assets.items():
            with rasterio.open(asset.href) as dataset:
                numbers = dataset.read(1)
            if band != "scl":
                numbers = np.maximum(1, (numbers * asset.scale + asset.offset) * 1e4).round().astype(np.uint16)
            pixels[band] = numbers, asset.grid.transform
        dates.append(pixels)
    return dates


@pytest.fixture(scope="module")
def documents(shared_data: Path) -> dict[str, dict[str, Any]]:
    """The recorded items by kind."""
    found = {}
    for kind, (file, item_id, _) in KINDS.items():
        document = read_document(str(shared_data / "stac" / f"{file}.json"))
        items = document.get("features") or [document]
        found[kind] = next(i for i in items if len(items) == 1 or item_id in (i["id"], i["collection"]))
    return found


def provide(folder: Path, document: dict[str, Any], number: int, pixels: dict[str, Any], added: int) -> dict[str, Any]:
    """Store a date as the provider of `document` would and return its item, all it says of offsets as recorded."""
    item = deepcopy(document)
    time = TIMES[number]
    item["id"] = f"{number}-{document['id'][:3]}"
    stated = item["properties"]
    for name in ("s2:datastrip_id", "s2:mgrs_tile", "proj:code"):
        stated.pop(name, None)
    stated |= {"grid:code": "MGRS-31UDS", "sat:relative_orbit": 51, "eo:cloud_cover": 1.0, "proj:epsg": 32631}
    stated |= {"datetime": f"{time[:4]}-{time[4:6]}-{time[6:8]}T10:50:31Z", "s2:datatake_id": f"GS2A_{time}_041000_N"}
    assets = {}
    for key, asset in document["assets"].items():
        name, _, metres = key.partition("_")
        with contextlib.suppress(ConfigError, KeyError):  # no band, or none that is needed
            data, transform = pixels[canonical_band(name)]
            if metres in {"", f"{transform[0]:.0f}m"}:
                stored = data if canonical_band(name) == "scl" else data + np.uint16(added)
                path = folder / f"{number}-{key}.tif"
                write_tiff(path, stored, Affine(*transform), 128)
                size = {"proj:shape": list(data.shape), "proj:transform": list(transform)}
                assets[key] = asset | size | {"href": path.name}
    return item | {"assets": assets, "geometry": GEOMETRY, "bbox": [3, 50.5, 3.1, 50.6]}


GEOMETRY = {"type": "Polygon", "coordinates": [[[3, 50.5], [3.1, 50.5], [3.1, 50.6], [3, 50.6], [3, 50.5]]]}


def catalogue(folder: Path, kinds: tuple[str, str], documents: dict[str, Any], ground: list[Any]) -> str:
    folder.mkdir()
    dates = enumerate(zip(kinds, ground, strict=True))
    items = [provide(folder, documents[kind], n, pixels, KINDS[kind][2]) for n, (kind, pixels) in dates]
    (folder / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    return str(folder / "items.json")


def change_map(catalog: str, out: Path, client: Client, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
    report = run(s2cd.RunConfig(catalog=catalog, out=str(out), device="cpu", quicklook=False, **options), client)
    assert report.ok
    (path,) = out.rglob("S2CD_*.tif")
    with rasterio.open(path) as dataset:
        return dataset.read(1), json.loads(path.with_suffix(".json").read_text())["properties"]


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory, documents: Any, ground: Any, client: Client) -> np.ndarray:
    """The map of the harmonised pixels: both dates as baselines before 04.00 store them."""
    folder = tmp_path_factory.mktemp("truth")
    return change_map(catalogue(folder / "in", ("02.14", "02.14"), documents, ground), folder / "out", client)[0]


CASES = [
    ("05.00 taken out but stated", "05.00 taken out but stated"),
    ("04.00 not stated", "04.00 not stated"),
    ("02.14", "04.00 not stated"),
    ("02.14", "05.00 taken out but stated"),
    ("05.00 taken out but stated", "05.11 stated"),
    ("04.00 not stated", "02.14"),
    ("02.14", "05.00 stated, STAC 1.1"),
]


@pytest.mark.parametrize("kinds", CASES, ids=" and ".join)
def test_invariant_3_the_map_is_that_of_the_harmonised_pixels(
    kinds: tuple[str, str], documents: Any, ground: Any, truth: np.ndarray, client: Client, tmp_path: Path
) -> None:
    catalog = catalogue(tmp_path / "in", kinds, documents, ground)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, properties = change_map(catalog, tmp_path / "out", client)
    assert np.nanmax(truth) > 0.9
    np.testing.assert_allclose(found, truth, atol=CLOSE)
    stored = [-KINDS[kind][2] / 10_000 for kind in kinds]
    applied = properties["s2cd:applied_offsets"]
    assert [{b["offset"] for b in applied[d].values()} for d in ("before", "after")] == [{s} for s in stored]
    said = {w.category for w in caught}
    assert OffsetWarning not in said
    assert (BaselineWarning in said) == (kinds[0] != kinds[1])
    assert any("processing baselines differ" in note for note in properties["s2cd:notes"]) == (kinds[0] != kinds[1])


def test_a_flag_that_lies_is_told_by_the_pixels(documents: Any, ground: Any, client: Client, tmp_path: Path) -> None:
    """The document says the offset was taken out, and the pixels still have it."""
    honest = "05.00 taken out but stated"
    lying = documents | {"04.00 not stated": documents[honest]}
    catalog = catalogue(tmp_path / "in", (honest, "04.00 not stated"), lying, ground)
    with pytest.warns(OffsetWarning, match=r"the darkest valid pixels differ by \+0\.\d+ in every band"):
        _, properties = change_map(catalog, tmp_path / "out", client)
    assert any("an offset may be applied to one date only" in note for note in properties["s2cd:notes"])
    with pytest.raises(S2cdError, match="an offset of -0.1 was applied to one date only"):
        change_map(catalog, tmp_path / "strict", client, strict=True)
