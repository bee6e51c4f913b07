"""The simulated series: what it writes, and that its truth is true."""

from __future__ import annotations

import filecmp
import json
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pystac
import pytest
import rasterio
from rio_cogeo.cogeo import cog_validate

from s2cd.catalog import search
from s2cd.catalog.duplicates import reduce_duplicates
from s2cd.errors import CatalogError, ConfigError, OutputError, ReadError
from s2cd.simulate import CHANGE_KINDS, HARVEST, simulate, truth_between

BANDS = ("blue", "green", "red", "nir", "nir08", "swir16", "swir22")


def items_of(catalog: Path) -> list[dict]:
    links = json.loads(catalog.read_text())["links"]
    paths = [catalog.parent / link["href"] for link in links if link["rel"] == "item"]
    return [json.loads(path.read_text()) | {"folder": path.parent} for path in paths]


def read(item: dict, key: str) -> np.ndarray:
    with rasterio.open(item["folder"] / item["assets"][key]["href"]) as source:
        return source.read(1)


def reflectance(item: dict, key: str) -> np.ndarray:
    """As a careful reader would: NaN where nodata, and no second subtraction where the archive did it."""
    band = item["assets"][key]["raster:bands"][0]
    offset = 0 if item["properties"]["earthsearch:boa_offset_applied"] else band["offset"]
    numbers = read(item, key).astype(np.float32)
    return np.where(numbers == 0, np.nan, numbers * band["scale"] + offset)


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> Path:
    return simulate(tmp_path_factory.mktemp("series"), size=512, dates=8, seed=3)


@pytest.fixture(scope="module")
def clear(tmp_path_factory) -> Path:
    return simulate(tmp_path_factory.mktemp("clear"), size=420, dates=6, orbits=(51,), seed=5, clouds=False)


def test_same_arguments_same_files(tmp_path):
    a, b = (simulate(tmp_path / name, size=96, dates=3, seed=11) for name in "ab")
    files = sorted(p.relative_to(a.parent) for p in a.parent.rglob("*") if p.is_file())
    assert len(files) == 1 + 3 * 9 + 3
    _, different, missing = filecmp.cmpfiles(a.parent, b.parent, files, shallow=False)
    assert (different, missing) == ([], [])
    other = simulate(tmp_path / "c", size=96, dates=3, seed=12)
    assert not np.array_equal(read(items_of(a)[0], "red"), read(items_of(other)[0], "red"))


@pytest.mark.parametrize("size", [(17, 19), (1, 1), [101, 64]])
def test_odd_sizes(tmp_path, size):
    item = items_of(simulate(tmp_path, size=size, dates=1))[0]
    assert read(item, "red").shape == tuple(size)
    half = tuple(-(-n // 2) for n in size)
    assert read(item, "swir16").shape == read(item, "scl").shape == half
    assert item["assets"]["swir16"]["proj:shape"] == list(half)


def test_items_state_the_grid_of_their_files(series):
    for item in items_of(series):
        for key in (*BANDS, "scl"):
            asset = item["assets"][key]
            with rasterio.open(item["folder"] / asset["href"]) as source:
                assert source.crs.to_epsg() == item["properties"]["proj:epsg"] == 32631
                assert list(source.transform)[:6] == asset["proj:transform"]
                assert list(source.shape) == asset["proj:shape"]
                assert source.dtypes[0] == asset["raster:bands"][0]["data_type"]
                assert source.nodata == 0
            west, north = asset["proj:transform"][2], asset["proj:transform"][5]
            assert (west - 399960) % 60 == 0
            assert (5700000 - north) % 60 == 0


def test_files_are_cogs(series):
    for path in list(series.parent.rglob("*.tif"))[::5]:
        valid, errors, _ = cog_validate(path, strict=True)
        assert valid, errors


def test_catalogue_is_stac(series):
    collection = pystac.Collection.from_file(str(series))
    items = list(collection.get_items())
    assert len(items) == 8
    assert len({item.id for item in items}) == 8
    for document in items_of(series):
        item = pystac.Item.from_dict(document)
        assert item.datetime is not None
        west, south, east, north = item.bbox
        assert west < 3 + 1 < east + 2
        assert south < north
        assert item.geometry["coordinates"][0][0] == item.geometry["coordinates"][0][-1]
        assert item.properties["grid:code"] == "MGRS-31UDS"
        name = item.properties["s2:product_uri"]
        assert f"_R{item.properties['sat:relative_orbit']:03d}_T31UDS_" in name
        assert item.properties["s2:datatake_id"].endswith(item.properties["s2:processing_baseline"])


def test_orbits_alternate_and_the_second_is_partial(series):
    items = items_of(series)
    assert [i["properties"]["sat:relative_orbit"] for i in items] == [51, 94] * 4
    for item in items:
        share = (read(item, "red") == 0).mean()
        assert share == pytest.approx(item["properties"]["s2:nodata_pixel_percentage"] / 100, abs=0.01)
        assert (share > 0.02) == (item["properties"]["sat:relative_orbit"] == 94)
        assert np.array_equal(read(item, "scl") == 0, read(item, "swir16") == 0)


def test_offsets_are_stated_as_the_archive_does(series):
    stated = [
        (
            i["properties"]["s2:processing_baseline"],
            i["properties"]["earthsearch:boa_offset_applied"],
            i["assets"]["red"]["raster:bands"][0]["offset"],
        )
        for i in items_of(series)
    ]
    assert stated == [("03.00", False, 0)] * 6 + [("05.00", False, -0.1), ("05.00", True, -0.1)]
    darkest = [np.nanpercentile(reflectance(i, "red"), 1) for i in items_of(series)]
    assert max(darkest[:3] + darkest[4:]) < 0.05


def test_reprocessed_duplicate_is_the_same_reflectance(tmp_path):
    first, second, *_ = items_of(simulate(tmp_path, size=64, dates=2, reprocessed=True))
    assert first["properties"]["datetime"] == second["properties"]["datetime"]
    assert second["properties"]["s2:processing_baseline"] == "05.00"
    for band in BANDS:
        np.testing.assert_allclose(reflectance(first, band), reflectance(second, band), atol=1e-4)
        assert read(second, band).min() >= 1000


def test_split_datatake_is_two_halves_of_one(tmp_path):
    whole = items_of(simulate(tmp_path / "whole", size=(90, 70), dates=2))[1]
    parts = items_of(simulate(tmp_path / "split", size=(90, 70), dates=2, split=True))[1:]
    assert len({p["properties"]["s2:datatake_id"] for p in parts}) == 1
    assert len({p["id"] for p in parts}) == 2
    for band in (*BANDS, "scl"):
        a, b = (read(p, band) for p in parts)
        assert not ((a > 0) & (b > 0)).any()
        assert np.array_equal(np.maximum(a, b), read(whole, band))


def test_catalogue_reduces_reprocessing_and_joins_halves(tmp_path):
    again = search(str(simulate(tmp_path / "again", size=40, dates=2, reprocessed=True)))
    kept, duplicates = reduce_duplicates(again)
    assert [s.baseline for s in kept] == ["05.00", "03.00"]
    assert [s.assets["red"].offset for s in kept] == pytest.approx([-0.1, 0])
    assert [s.baseline for s, _ in duplicates] == ["03.00"]
    halves = search(str(simulate(tmp_path / "halves", size=40, dates=2, split=True)))
    kept, duplicates = reduce_duplicates(halves)
    assert [len(s.parts) for s in kept] == [0, 1]
    assert duplicates == []


def test_catalogue_decides_the_offsets_that_the_pixels_carry(series):
    scenes = search(str(series))
    assert [s.assets["red"].offset for s in scenes] == pytest.approx([0] * 6 + [-0.1, 0])


def test_truth_is_where_the_pixels_changed(clear):
    items = items_of(clear)
    for before, after in pairwise(items):
        times = [i["properties"]["datetime"] for i in (before, after)]
        truth = truth_between(clear.parent, *times).astype(bool)
        season = truth_between(clear.parent, *times, kinds=(HARVEST,)).astype(bool)
        difference = sum(np.abs(reflectance(after, b) - reflectance(before, b)) for b in BANDS[:4])
        assert truth.any()
        quiet = np.median(difference[~truth & ~season])
        assert np.median(difference[truth]) > 1.5 * quiet


def test_truth_of_an_event_that_ends(clear):
    events = json.loads((clear.parent / "truth" / "events.json").read_text())["events"]
    assert {e["kind"] for e in events} <= set(CHANGE_KINDS)
    flood = next(e for e in events if e["kind"] == "flood" and e["end"])
    year = ("2021-01-01", "2022-01-01")
    assert truth_between(clear.parent, *year, kinds=("flood",)).sum() == 0
    assert truth_between(clear.parent, "2021-01-01", flood["date"], kinds=("flood",)).sum() == flood["pixels"]
    assert truth_between(clear.parent, *reversed(year)).sum() == truth_between(clear.parent, *year).sum()
    with_harvest = truth_between(clear.parent, *year, kinds=(*CHANGE_KINDS, HARVEST))
    assert with_harvest.sum() > truth_between(clear.parent, *year).sum()
    assert truth_between(clear.parent, datetime(2021, 6, 1), "2021-06-01").sum() == 0


def test_clouds_are_bright_and_called_clouds(series):
    item = next(i for i in items_of(series) if 2 < i["properties"]["eo:cloud_cover"] < 60)
    scl = read(item, "scl")
    blue = reflectance(item, "blue")[::2, ::2]
    assert np.median(blue[scl == 9]) > 0.3
    assert np.median(blue[np.isin(scl, (4, 5))]) < 0.12
    shadow = reflectance(item, "nir")[::2, ::2][scl == 3]
    assert np.median(shadow) < np.median(reflectance(item, "nir")[::2, ::2][scl == 4])
    counted = 100 * np.isin(scl, (8, 9, 10)).sum() / (scl > 0).sum()
    assert counted == pytest.approx(item["properties"]["eo:cloud_cover"], abs=1e-3)


def test_one_date_is_overcast(series):
    cover = [i["properties"]["eo:cloud_cover"] for i in items_of(series)]
    assert sum(c > 70 for c in cover) == 1


def test_mirrored_landscape_keeps_the_grids_together(tmp_path):
    item = items_of(simulate(tmp_path, size=(250, 180), dates=1, draw_size=100, clouds=False))[0]
    red, swir = read(item, "red"), read(item, "swir16")
    assert np.array_equal(red[:100], red[100:200][::-1])
    assert np.array_equal(swir[:50], swir[50:100][::-1])
    assert red.shape == truth_between(tmp_path, "2021-01-01", "2021-12-31").shape == (250, 180)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size 0: expected a whole number from 1 to 10980"),
        ({"size": (20, 10981)}, "size 10981: expected"),
        ({"size": 32.0}, "size 32.0: expected"),
        ({"size": "32"}, "size '32': expected"),
        ({"tile": "99XXX"}, "unknown tile '99XXX'"),
        ({"dates": 0}, "dates 0: expected a whole number of at least 1"),
        ({"seed": -1}, "seed -1: expected"),
        ({"orbits": 51}, "orbits 51: expected one or more"),
        ({"orbits": ()}, "expected one or more"),
        ({"orbits": (0,)}, "orbit 0: expected"),
        ({"start": "soon"}, "date 'soon': expected"),
        ({"start": "9999-12-31"}, "expected acquisitions from 2015-06-23 to 2100-01-01"),
        ({"step_days": 1e9}, "expected acquisitions from 2015-06-23 to 2100-01-01"),
        ({"step_days": float("nan")}, "step_days nan: expected a finite number above 0"),
        ({"step_days": 0}, "step_days 0: expected a finite number above 0"),
        ({"step_days": 4, "orbits": (51,)}, "orbits 51 and 51 would both be S2A_31UDS_20210430_0_L2A: expected"),
        ({"step_days": 1}, "orbits 94 and 94 would both be S2A_31UDS_20210413_0_L2A: expected"),
        (
            {"step_days": 2, "orbits": (51, 94, 137), "dates": 6, "start": "2021-04-12"},
            "would follow .*: expected orbits, step_days and start in order of time",
        ),
        ({"draw_size": 33}, "not an even number"),
        ({"blocksize": 0}, "blocksize 0: expected"),
        ({"blocksize": 100}, "blocksize 100: expected a multiple of 16"),
    ],
)
def test_impossible_arguments(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        simulate(tmp_path / "out", **{"size": 32, **options})
    assert not (tmp_path / "out").exists()


def test_no_two_acquisitions_share_an_id(tmp_path):
    neighbours = {"size": 32, "dates": 2, "orbits": (51, 53), "step_days": 5}
    with pytest.raises(ConfigError, match="orbits 51 and 53 would both be S2B_31UDS_20220719_0_L2A"):
        simulate(tmp_path / "out", start="2022-07-14T12:00:00", **neighbours)
    items = items_of(simulate(tmp_path / "out", start="2022-07-10", **neighbours))
    assert len({item["id"] for item in items}) == 2


@pytest.mark.parametrize("step_days", [2.5, 3])
def test_orbits_that_take_turns_are_seen_more_often_than_each(tmp_path, step_days):
    items = items_of(simulate(tmp_path, size=16, dates=6, step_days=step_days))
    days = [item["properties"]["datetime"] for item in items]
    assert len({item["id"] for item in items}) == len(days) == 6
    assert days == sorted(days)


def test_a_start_in_another_time_zone_is_the_same_moment(tmp_path):
    east, utc = "2021-04-10T23:00:00+12:00", "2021-04-10T11:00:00"
    a, b = (items_of(simulate(tmp_path / t[-5:], size=16, dates=1, start=t)) for t in (east, utc))
    assert a[0]["id"] == b[0]["id"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write the series in .*file/out"):
        simulate(tmp_path / "file" / "out", size=16, dates=1)


def test_a_series_goes_on_over_what_an_interrupted_one_left(tmp_path):
    (item,) = items_of(simulate(tmp_path, size=64, dates=1))
    (item["folder"] / "B04.tif").write_bytes(b"II*\0\x08\0\0\0" + bytes(64))
    whole = read(items_of(simulate(tmp_path, size=64, dates=1))[0], "red")
    assert (whole > 0).all()


@pytest.mark.parametrize("kinds", [("constuction",), "burn", ("burn", "fire")])
def test_truth_of_unknown_kinds(clear, kinds):
    with pytest.raises(ConfigError, match="expected a sequence of construction, clear-cut, burn, flood, harvest"):
        truth_between(clear.parent, "2021-01-01", "2022-01-01", kinds=kinds)


def test_truth_of_an_unknown_date(clear):
    with pytest.raises(ConfigError, match="date 'someday': expected"):
        truth_between(clear.parent, "someday", "2022-01-01")


@pytest.mark.parametrize("text", ["{", "[]", '{"events": [{"id": 1, "kind": "burn", "date": "soon", "end": null}]}'])
def test_truth_of_damaged_events(tmp_path, text):
    simulate(tmp_path, size=32, dates=2)
    (tmp_path / "truth" / "events.json").write_text(text)
    with pytest.raises(CatalogError, match=r"events.json: not the events of a simulated series"):
        truth_between(tmp_path, "2021-01-01", "2022-01-01")


def test_truth_without_its_raster(tmp_path):
    simulate(tmp_path, size=32, dates=2)
    (tmp_path / "truth" / "events.tif").unlink()
    with pytest.raises(ReadError, match=r"cannot read .*events.tif"):
        truth_between(tmp_path, "2021-01-01", "2022-01-01")


def test_truth_of_another_folder(tmp_path, clear):
    for place in (tmp_path, clear):
        with pytest.raises(CatalogError, match=r"no truth in .*not a folder written by"):
            truth_between(place, "2021-01-01", "2021-02-01")
