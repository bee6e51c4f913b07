"""Offsets: decided from what documents say, and checked against what pixels say."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st

from s2cd.catalog import scene_from_item, search
from s2cd.catalog.items import radiometry_of
from s2cd.catalog.scene import Scene
from s2cd.errors import CatalogError, OffsetError, OffsetWarning
from s2cd.radiometry import RADIO_ADD_OFFSET, check_offsets, offset_difference, reflectance, resolve

BANDS = ("blue", "green", "red", "nir", "nir08", "swir16", "swir22")


@pytest.mark.parametrize(
    ("level", "baseline", "stated", "applied", "offset", "reason"),
    [
        # Earth Search v1 sentinel-2-l2a: the provider took the offset out, raster:bands still states it.
        ("L2A", "05.00", -0.1, True, 0.0, "provider has applied"),
        ("L2A", "05.00", -0.1, False, -0.1, "stated by the document"),
        ("L2A", "04.00", 0.0, False, -0.1, "the document states none"),
        ("L2A", "02.14", 0.0, False, 0.0, "before 04.00"),
        # sentinel-2-c1-l2a and CDSE: as stated.
        ("L2A", "05.11", -0.1, None, -0.1, "stated by the document"),
        # Planetary Computer: nothing stated.
        ("L2A", "04.00", None, None, -0.1, "the document states none"),
        ("L2A", "05.11", None, None, -0.1, "the document states none"),
        ("L2A", "03.01", None, None, 0.0, "before 04.00"),
        # L1C: its offset is its own; the flag speaks of L2A.
        ("L1C", "05.11", -0.1, None, -0.1, "stated by the document"),
        ("L1C", "05.11", -0.1, True, -0.1, "stated by the document"),
        ("L1C", "04.00", None, None, -0.1, "the document states none"),
        ("L1C", "02.09", None, None, 0.0, "before 04.00"),
        # A harmonised copy says so; a stated offset that the baseline cannot have is not believed.
        ("L2A", "05.00", 0.0, None, 0.0, "stated by the document"),
        ("L2A", "02.14", -0.1, None, 0.0, "the stated -0.1 is not possible there"),
        # No baseline.
        ("L2A", None, -0.1, None, -0.1, "no baseline"),
        ("L2A", None, None, None, 0.0, "none assumed"),
        ("L2A", None, -0.1, True, 0.0, "provider has applied"),
    ],
)
def test_resolver(
    level: str, baseline: str | None, stated: float | None, applied: bool | None, offset: float, reason: str
) -> None:
    found = resolve(level=level, baseline=baseline, stated_offset=stated, offset_applied=applied)
    assert found[:2] == (1e-4, offset)
    assert reason in found[2]


def test_a_stated_scale_is_taken() -> None:
    assert resolve(level="L2A", baseline="02.14", stated_scale=2e-4)[0] == 2e-4


def test_reflectance_has_no_offset_unless_it_is_stated() -> None:
    assert resolve(level="L2A", baseline="05.09", stated_scale=1.0)[:2] == (1.0, 0.0)
    assert resolve(level="L2A", baseline="05.09", stated_scale=1.0, stated_offset=-0.1)[:2] == (1.0, -0.1)


def item_of(raster: dict[str, object], baseline: str | None = "05.09", **properties: object) -> dict[str, object]:
    """An item of one band that says `raster` of it."""
    return {
        "type": "Feature",
        "id": "S2A_31UDS_x_L2A",
        "geometry": {"type": "Polygon", "coordinates": [[[3, 50], [4, 50], [4, 51], [3, 50]]]},
        "properties": {
            "datetime": "2020-01-01T00:00:00Z",
            "grid:code": "MGRS-31UDS",
            "proj:epsg": 32631,
            "s2:processing_baseline": baseline,
            **properties,
        },
        "assets": {"red": {"href": "x.tif", "proj:shape": [8, 8], "proj:transform": [10, 0, 0, 0, -10, 0], **raster}},
    }


@pytest.mark.parametrize(
    ("raster", "baseline", "scale", "offset"),
    [
        # rio-stac writes 1 and 0 where a file tells nothing: not what the file's numbers mean.
        ({"raster:bands": [{"data_type": "uint16", "scale": 1.0, "offset": 0.0}]}, "05.09", 1e-4, -0.1),
        ({"raster:bands": [{"data_type": "uint16", "scale": 1.0, "offset": 0.0}]}, "02.14", 1e-4, 0.0),
        ({"raster:bands": [{"data_type": "int16", "scale": 1, "offset": -1000}]}, "05.09", 1e-4, -0.1),
        ({"data_type": "uint16", "raster:scale": 1, "raster:offset": 0}, "05.09", 1e-4, -0.1),
        ({"bands": [{"data_type": "uint16", "raster:scale": 1, "raster:offset": 0}]}, None, 1e-4, 0.0),
        ({"bands": [{"data_type": "uint16", "raster:scale": 2e-4, "raster:offset": -0.1}]}, None, 2e-4, -0.1),
        ({"raster:bands": [{"data_type": "uint16", "scale": 1e-4, "offset": 0.0}]}, "05.09", 1e-4, 0.0),
        ({"raster:bands": [{"data_type": "uint16", "scale": 1e-3, "offset": -0.2}]}, "05.09", 1e-3, -0.2),
        # Reflectance itself, or a document that does not tell: training takes these.
        ({"raster:bands": [{"data_type": "float32", "scale": 1.0, "offset": 0.0}]}, "05.09", 1.0, 0.0),
        ({"raster:bands": [{"scale": 1.0, "offset": 0.0}]}, "05.09", 1.0, 0.0),
    ],
)
def test_a_scale_that_digital_numbers_cannot_have_is_none(
    raster: dict[str, object], baseline: str | None, scale: float, offset: float
) -> None:
    item = item_of(raster, baseline)
    asset = scene_from_item(item).assets["red"]
    assert (asset.scale, asset.offset) == (scale, offset)
    assert radiometry_of(item, "red") == (scale, offset, 0)


@pytest.mark.parametrize("raster", [{"scale": 1e-4, "offset": -1000}, {"data_type": "float32", "offset": -0.7}])
def test_an_offset_that_reflectance_cannot_have_is_refused(raster: dict[str, object]) -> None:
    with pytest.raises(CatalogError, match=rf"^item S2A_\w+, band red: found offset {raster['offset']}, expected one"):
        scene_from_item(item_of({"raster:bands": [raster]}))
    applied = item_of({"raster:bands": [raster]}, **{"earthsearch:boa_offset_applied": True})
    assert scene_from_item(applied).assets["red"].offset == 0


@given(st.integers(1, 65535), st.sampled_from([0.0, -0.1]))
def test_reflectance(dn: int, offset: float) -> None:
    pixels = np.array([[dn, 0]], dtype=np.uint16)
    found = reflectance(pixels, 1e-4, offset)
    assert found.dtype == np.float32
    assert found[0, 0] == pytest.approx(dn * 1e-4 + offset, abs=1e-6)
    assert np.isnan(found[0, 1])


ITEMS = {
    "no offset yet": ({"s2:processing_baseline": "02.14"}, None, 0),
    "applied, still stated": (
        {"s2:processing_baseline": "05.00", "earthsearch:boa_offset_applied": True},
        -0.1,
        0,
    ),
    "not stated": ({"s2:processing_baseline": "04.00"}, None, 1000),
    "stated": ({"s2:processing_baseline": "05.11"}, -0.1, 1000),
    "flag says not applied": (
        {"s2:processing_baseline": "05.00", "earthsearch:boa_offset_applied": False},
        -0.1,
        1000,
    ),
}


@pytest.mark.parametrize("case", ITEMS)
def test_every_way_of_storing_an_image_gives_the_same_reflectance(case: str, shared_data: Path) -> None:
    """One real image as each provider would store and describe it, so as pixels of any two of them can be paired."""
    source = search(shared_data / "flanders", tiles="31UDS", max_cloud=1)[0].assets["red"]
    with rasterio.open(source.href) as dataset:
        truth = dataset.read(1)
    properties, stated, added = ITEMS[case]
    stored = np.where(truth == 0, 0, truth + added).astype(np.uint16)
    bands = [{"nodata": 0} if stated is None else {"nodata": 0, "scale": 1e-4, "offset": stated}]
    asset = scene_from_item(item_of({"raster:bands": bands}, **properties)).assets["red"]
    expected = reflectance(truth, 1e-4, 0)
    np.testing.assert_allclose(reflectance(stored, asset.scale, asset.offset), expected, atol=1e-6)


def dark(scene: Scene, shift: float = 0.0) -> np.ndarray:
    """0.5 percentile of each band's reflectance, as if `shift` had been added to it."""
    found = []
    for band in BANDS:
        asset = scene.assets[band]
        with rasterio.open(asset.href) as dataset:
            found.append(np.nanpercentile(reflectance(dataset.read(1), asset.scale, asset.offset), 0.5))
    return np.array(found) + shift


def test_lost_and_doubled_offsets_of_real_pairs_are_found_and_honest_pairs_pass(shared_data: Path) -> None:
    scenes = search(shared_data / "oscd")
    pairs = [(a, b) for a, b in pairwise(scenes) if a.tile == b.tile]
    assert len(pairs) == 14
    levels = [(dark(a), dark(b)) for a, b in pairs]
    assert all(offset_difference(a, b) is None for a, b in levels)
    for shift in (RADIO_ADD_OFFSET, -RADIO_ADD_OFFSET):
        for swap in (False, True):
            found = [offset_difference(*((a + shift, b) if swap else (a, b + shift))) for a, b in levels]
            assert sum(f is not None for f in found) >= 13
            assert all(abs(abs(f) - 0.1) < 0.04 for f in found if f is not None)


def test_check_warns_and_is_strict_on_request() -> None:
    low, high = np.full(7, 0.01), np.full(7, 0.11)
    with pytest.warns(OffsetWarning, match=r"S2CD_x: the darkest valid pixels differ by \+0\.100"):
        assert check_offsets(low, high, "S2CD_x") == pytest.approx(0.1)
    with pytest.raises(OffsetError, match="applied to one date only"):
        check_offsets(low, high, "S2CD_x", strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_offsets(low, low + 0.02, "S2CD_x", strict=True) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (np.full(7, np.nan), np.full(7, 0.1)),
        (np.array([]), np.array([])),
        # Both too dark, by as much.
        (np.full(7, -0.08), np.full(7, -0.06)),
        # Haze: much in blue, nothing in short-wave infrared.
        (np.full(7, 0.02), np.array([0.16, 0.14, 0.12, 0.09, 0.08, 0.03, 0.02])),
    ],
)
def test_what_is_no_lost_offset(before: np.ndarray, after: np.ndarray) -> None:
    assert offset_difference(before, after) is None
