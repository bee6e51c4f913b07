"""`validate` finds what is wrong with an output folder, and nothing in a good one."""

from __future__ import annotations

import json
import re
from datetime import timedelta

import numpy as np
import pytest
import rasterio
from outputs_support import AFTER, INFO, make_grid, make_pair, random_codes

from s2cd.codes import CODE_NODATA
from s2cd.outputs import validate, write_catalog, write_map
from s2cd.outputs.profiles import PROFILES

GRID = make_grid((530, 201))
PAIR = make_pair(GRID)


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    write_map(random_codes(GRID.shape), PAIR, GRID, INFO, str(folder), quicklook_rgb=(None, None))
    write_catalog(str(folder))
    return folder


@pytest.fixture
def tif(out):
    return out / "31UDS" / f"{PAIR.name}.tif"


@pytest.fixture
def item(out):
    return out / "31UDS" / f"{PAIR.name}.json"


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("shape", [(1, 1), (17, 19), (1023, 1025)], ids=str)
def test_what_is_written_is_valid(tmp_path, profile, shape):
    grid = make_grid(shape)
    write_map(random_codes(shape), make_pair(grid), grid, INFO, str(tmp_path), profile=profile)
    write_catalog(str(tmp_path))
    assert validate(str(tmp_path)) == []


def test_a_folder_without_maps_is_named(tmp_path):
    assert f"{tmp_path}: no maps" in validate(str(tmp_path))


def test_a_truncated_map_is_named(out, tif):
    tif.write_bytes(tif.read_bytes()[:-1000])
    (problem,) = validate(str(out))
    assert f"{PAIR.name}.tif: " in problem
    assert "bytes, expected" in problem


def test_a_damaged_map_is_named(out, tif):
    data = bytearray(tif.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 5000] = bytes(5000)
    tif.write_bytes(data)
    assert any(f"{PAIR.name}.tif: " in problem for problem in validate(str(out)))


def test_values_and_holes_in_overviews_are_found(out, tif, item):
    with rasterio.open(tif, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as dataset:
        values = dataset.read(1)
        values[:100, :100] = 1.5
        dataset.write(values, 1)
    edit(item, lambda d: d["assets"]["change"].pop("file:size"))
    problems = "\n".join(validate(str(out)))
    assert "10000 values are neither in [0, 1] nor nodata" in problems
    assert "overview 0: " in problems


@pytest.mark.parametrize("overviews", [[], [2]])
def test_a_plain_geotiff_is_no_cog(out, tif, item, overviews):
    with rasterio.open(tif) as dataset:
        values, profile = dataset.read(1), dataset.profile | {"blockxsize": 512, "blockysize": 512}
    with rasterio.open(tif, "w", **profile) as dataset:
        dataset.write(values, 1)
        dataset.build_overviews(overviews, rasterio.enums.Resampling.average)
    edit(item, lambda d: d["assets"]["change"].pop("file:size"))
    problems = "\n".join(validate(str(out)))
    assert ("not laid out as a cloud-optimised" if overviews else "without overviews") in problems


@pytest.mark.parametrize(
    ("key", "value"), [("proj:shape", [700, 600]), ("proj:transform", [10.0] * 6), ("proj:epsg", 32632)]
)
def test_a_grid_that_is_not_the_items_is_found(out, item, key, value):
    edit(item, lambda d: d["properties"].update({key: value}))
    (problem,) = validate(str(out))
    assert f"{PAIR.name}.tif: {key} " in problem
    assert str(value) in problem


def test_missing_pieces_are_found(out, tif, item):
    tif.with_suffix(".png").unlink()
    (out / "31UDS" / "catalog.json").unlink()
    problems = "\n".join(validate(str(out)))
    assert "asset thumbnail at" in problems
    assert "parent link to 31UDS/catalog.json, which does not exist" in problems
    assert f"{item.name}: not listed in the catalogue" in problems


def test_a_map_without_item_and_a_catalogue_out_of_date_are_found(out, item):
    pair = make_pair(GRID, after=AFTER + timedelta(days=5))
    write_map(np.zeros(GRID.shape, np.uint16), pair, GRID, INFO, str(out))
    item.unlink()
    problems = validate(str(out))
    assert f"31UDS/{PAIR.name}.tif: no item, the map is not finished" in problems
    assert f"31UDS/{PAIR.name}.json: listed in the catalogue, but does not exist" in problems
    assert f"31UDS/{pair.name}.json: not listed in the catalogue" in problems
    write_catalog(str(out))
    assert len(validate(str(out))) == 1


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[1]", "\0"], ids=["cut", "deep", "list", "binary"])
def test_an_item_that_is_no_json_is_named(out, item, text):
    item.write_text(text)
    (problem,) = validate(str(out))
    assert problem.startswith(f"31UDS/{item.name}: ")


def put(value, *keys):
    """Return a change of a document: another value at a place in it; without a value there is nothing."""

    def change(document):
        for key in keys[:-1]:
            document = document[key]
        del document[keys[-1]]
        if value is not ...:
            document[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put({}, "assets"), "no asset change, expected the map"),
        (put(..., "assets"), "no asset change, expected the map"),
        (put([], "assets"), "no asset change, expected the map"),
        (put(None, "assets"), "no asset change, expected the map"),
        (put(..., "assets", "change", "href"), "KeyError 'href', expected the item of a map"),
        (put(None, "assets", "change", "raster:bands"), "TypeError"),
        (put([], "assets", "change", "raster:bands"), "IndexError"),
        (put(None, "assets", "change", "raster:bands", 0, "scale"), "TypeError"),
        (put(10**400, "assets", "change", "raster:bands", 0, "scale"), "OverflowError"),
        (put(..., "links"), "KeyError 'links', expected the item of a map"),
        (put(None, "links"), "TypeError links of type NoneType"),
        (put("", "links"), "TypeError links of type str"),
        (put(..., "links", 0, "href"), "KeyError 'href'"),
        (put(..., "links", 0, "rel"), "KeyError 'rel'"),
        (put(..., "properties"), "properties None, expected an object"),
        (put(None, "properties"), "properties None, expected an object"),
        (put(None, "bbox"), "bbox None, expected west, south, east, north in degrees"),
        (put([3, 52, 4, 51], "bbox"), "bbox [3, 52, 4, 51], expected"),
        (put(None, "properties", "start_datetime"), "start_datetime None, expected a time such as"),
        (put("2023-02-30T10:00:00Z", "properties", "end_datetime"), "end_datetime '2023-02-30T10:00:00Z', expected"),
        (put("x", "properties", "s2cd:changed_fraction"), "s2cd:changed_fraction 'x', expected 0 to 1, or null where"),
        (put(None, "properties", "s2cd:changed_fraction"), "s2cd:changed_fraction None, expected"),
        (put(float("nan"), "properties", "s2cd:valid_fraction"), "s2cd:valid_fraction nan, expected 0 to 1"),
    ],
)
def test_a_damaged_item_is_one_problem_and_other_maps_are_checked(out, item, change, message):
    pair = make_pair(GRID, after=AFTER + timedelta(days=5))
    write_map(random_codes(GRID.shape), pair, GRID, INFO, str(out))
    write_catalog(str(out))
    other = out / "31UDS" / f"{pair.name}.tif"
    other.write_bytes(other.read_bytes()[:-1000])
    edit(item, change)
    damaged, cut = validate(str(out))
    assert damaged.startswith(f"31UDS/{item.name}: {message}")
    assert cut.startswith(f"31UDS/{other.name}: ")


def test_a_map_without_observations_is_valid(tmp_path):
    write_map(np.full(GRID.shape, CODE_NODATA, np.uint16), PAIR, GRID, INFO, str(tmp_path))
    write_catalog(str(tmp_path))
    assert validate(str(tmp_path)) == []


@pytest.mark.parametrize("path", ["collection.json", "31UDS/catalog.json"])
@pytest.mark.parametrize("links", [None, "abc", [{"rel": "child"}, {"rel": "item"}]], ids=str)
def test_a_damaged_catalogue_is_named(out, item, path, links):
    edit(out / path, put(links, "links"))
    problems = validate(str(out))
    assert re.match(rf"{path}: \w+Error .*, expected a document of the catalogue", problems[0])
    assert problems[1:] == [f"31UDS/{item.name}: not listed in the catalogue"]


def test_maps_that_were_made_with_other_options_are_found(out):
    """As those of two runs that began at the same time."""
    later = make_pair(GRID, after=AFTER + timedelta(days=5))
    write_map(random_codes(GRID.shape), later, GRID, INFO, str(out), quicklook_rgb=(None, None), profile="uint8")
    write_catalog(str(out))
    path = f"31UDS/{later.name}.json"
    assert validate(str(out)) == [f"{path}: cog_profile uint8, expected default as of the first map"]


def test_a_folder_of_other_maps_below_is_not_its_own(bucket):
    for place in ("s3://maps/all", "s3://maps/all/other"):
        write_map(random_codes(GRID.shape), PAIR, GRID, INFO, place)
    write_catalog("s3://maps/all")
    assert validate("s3://maps/all") == []
