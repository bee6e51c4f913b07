"""Searching static catalogues: what is found, what is refused, and what is said about it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rustac

from s2cd.catalog import freeze, scene_from_item, scene_rows, scene_to_item, search
from s2cd.catalog.filters import check_bbox, intersects, parse_interval
from s2cd.catalog.frozen import BATCH
from s2cd.catalog.scene import Scene
from s2cd.catalog.static import read_document
from s2cd.errors import CatalogError, ConfigError, NoScenesError, OutputError, S2cdWarning
from s2cd.reader import band_source, read_window


def test_oscd_catalogue(shared_data: Path) -> None:
    scenes = search(shared_data / "oscd")
    assert len(scenes) == 28
    assert {s.level for s in scenes} == {"L1C"}
    assert all(s.assets["red"].scale == 1e-4 and s.assets["red"].offset == 0 for s in scenes)
    assert [(s.tile, s.time) for s in scenes] == sorted((s.tile, s.time) for s in scenes)
    assert all(Path(a.href).is_file() for s in scenes for a in s.assets.values())


@pytest.mark.parametrize("place", ["flanders", "flanders/catalog.json", "flanders/../flanders/"])
def test_flanders_catalogue_by_folder_and_file(shared_data: Path, place: str) -> None:
    scenes = search(shared_data / place)
    assert len(scenes) == 190
    assert {(s.tile, s.orbit) for s in scenes if s.tile == "31UDS"} == {("31UDS", 51), ("31UDS", 94)}
    assert (scenes[0].assets["scl"].scale, scenes[0].assets["scl"].reason) == (1, "class codes")


def test_filters_hold_together(shared_data: Path) -> None:
    found = search(shared_data / "flanders", tiles="T31UDS", orbit=51, datetime="2018", max_cloud=20)
    every = search(shared_data / "flanders")
    expected = [
        s for s in every if s.tile == "31UDS" and s.orbit == 51 and s.time.year == 2018 and (s.cloud_cover or 0) <= 20
    ]
    assert found == expected
    assert len(found) == 21


def test_bands_are_dropped_by_either_name(shared_data: Path) -> None:
    scenes = search(shared_data / "flanders", bands=["B04", "nir"])
    assert set(scenes[0].assets) == {"red", "nir", "scl"}


def test_band_that_nobody_offers_is_named(shared_data: Path) -> None:
    with pytest.raises(CatalogError, match="band 'cirrus' is offered by none of 28 scenes"):
        search(shared_data / "oscd", bands=["B10"])
    with pytest.raises(ConfigError, match="unknown band 'B42'"):
        search(shared_data / "oscd", bands=["B42"])


def test_a_scene_that_offers_none_of_the_bands_is_left_out(
    make_series: Callable[..., list[Scene]], tmp_path: Path
) -> None:
    first, second = make_series(dates=2, scl=False)
    freeze([replace(first, assets={"red": first.assets["red"]}), second], tmp_path / "scenes.parquet")
    with pytest.warns(S2cdWarning, match="1 scenes left out, the first: scene-000 offers none of the bands B08"):
        found = search(tmp_path / "scenes.parquet", bands=["B08"])
    assert [(row["id"], row["offset"]) for row in scene_rows(found)] == [("scene-001", 0)]


def test_nothing_found_says_what_the_catalogue_holds(shared_data: Path) -> None:
    with pytest.raises(NoScenesError, match=r"190 by datetime.*190 scenes.*31UDS.*51, 94.*2017-08-04"):
        search(shared_data / "flanders", datetime="2031")


def test_another_collection_is_named(shared_data: Path) -> None:
    with pytest.raises(NoScenesError, match="no scenes found, 28 by collection left out; its collections are 'oscd'$"):
        search(shared_data / "oscd", collection="nope")
    assert len(search(shared_data / "oscd", collection="oscd")) == 28


def test_swapped_bbox_is_named(shared_data: Path) -> None:
    with pytest.raises(NoScenesError, match="latitude and longitude swapped"):
        search(shared_data / "flanders", bbox=(50.8, 3.0, 50.9, 3.1))
    with pytest.raises(NoScenesError, match="190 by bbox") as error:
        search(shared_data / "flanders", bbox=(10, 10, 11, 11))
    assert "swapped" not in str(error.value)


@pytest.mark.parametrize(
    ("bbox", "message"),
    [
        ((3, 116, 4, 117), "latitude and longitude look swapped"),
        ((3, 51, 4, 50), "south 51 is not below north 50"),
        ((200, 50, 201, 51), "longitude outside"),
        ((3, 50, 3, 51), "west equals east"),
        ((3, 50, 4), "found 3 numbers"),
        ("3,50,4,51", "bbox: found '3,50,4,51', expected west, south"),
        ((3.2, 50, 3, 51), "bbox 3.2,50,3,51: west 3.2 lies east of east 3: .*west and east look swapped"),
        ("3504", "found 1 numbers"),
        (3.0, "found 3.0"),
    ],
)
def test_bbox_that_is_none(bbox: Any, message: str) -> None:
    with pytest.raises(CatalogError, match=message):
        check_bbox(bbox)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"tiles": [31]}, r"tiles: found \[31\], expected MGRS tiles"),
        ({"tiles": 31}, "tiles: found 31"),
        ({"orbit": "51"}, "orbit: found '51', expected relative orbits from 1 to 143"),
        ({"orbit": 144}, "orbit: found 144"),
        ({"max_cloud": "30"}, "max_cloud: found '30', expected percent"),
        ({"bands": [3]}, "unknown band 3, expected one of"),
        ({"datetime": ("2023-01-01", "2023-02-01")}, r"datetime: found \('2023-01-01', '2023-02-01'\), expected"),
        ({"datetime": "9999-12-31T23:59:59-05:00"}, "datetime '9999.*outside the years"),
    ],
)
def test_conditions_of_another_kind_are_named(shared_data: Path, conditions: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(shared_data / "oscd", **conditions)


def test_tiles_are_told_in_any_case(shared_data: Path) -> None:
    for name in ("OSCD-abudhabi", "oscd-ABUDHABI"):
        assert {s.tile for s in search(shared_data / "oscd", tiles=name)} == {"OSCD-abudhabi"}
    assert {s.tile for s in search(shared_data / "flanders", tiles=["t31uds", "31UES"])} == {"31UDS", "31UES"}


def test_file_addresses_name_what_their_escapes_stand_for(
    make_series: Callable[..., list[Scene]], tmp_path: Path
) -> None:
    """A catalogue in a folder with a blank and a percent sign, and its pixels."""
    (scene,) = make_series(dates=1)
    folder = (tmp_path / "series").rename(tmp_path / "my 100% data")
    red = replace(scene.assets["red"], href=(folder / "000" / "red.tif").as_uri())
    scene = replace(scene, assets={"red": red})
    collection = {"type": "FeatureCollection", "features": [scene_to_item(scene)]}
    (folder / "items.json").write_text(json.dumps(collection))
    (found,) = search((folder / "items.json").as_uri())
    assert found.assets["red"].href == str(folder / "000" / "red.tif")
    window = slice(0, 40), slice(0, 40)
    near, far = (read_window(band_source(s, "red"), red.grid, window) for s in (found, scene))
    assert np.array_equal(near, far)


def test_catalogue_that_is_none(tmp_path: Path) -> None:
    text = tmp_path / "text.json"
    text.write_text("hello")
    number = tmp_path / "number.json"
    number.write_text("[1]")
    strange = tmp_path / "strange.json"
    strange.write_text('{"type": "Topology"}')
    cases = {
        tmp_path / "nowhere": "does not exist; expected a path, a URL or one of earth-search",
        tmp_path: r"is a folder without catalog.json or collection.json or products \(\*\.SAFE\)$",
        "": "^'': does not exist; expected a path, a URL or one of earth-search",
        "x" * 300: "x: does not exist; expected a path, a URL",
        "x" * 300 + ".parquet": "x.parquet: does not exist",
        "http://[bad": r"^http://\[bad: is no address: Invalid IPv6 URL",
        "file://[bad/catalog.json": "is no address: Invalid IPv6 URL",
        text: "is not JSON, so not STAC",
        number: "is JSON but not STAC",
        strange: "found type 'Topology', expected Catalog",
    }
    for name, content, message in (
        ("features", {"type": "FeatureCollection", "features": ["a"]}, r"features: found \['a'\], expected a list"),
        ("mapping", {"type": "FeatureCollection", "features": {"a": 1}}, "features: found {'a': 1}, expected a list"),
        ("links", {"type": "Catalog", "links": ["a"]}, r"links: found \['a'\], expected a list of objects"),
        ("number", {"type": "Catalog", "links": [{"rel": "item", "href": 5}]}, "link 'item': found href 5, expected"),
        ("null", {"type": "Catalog", "links": [{"rel": "child", "href": None}]}, "link 'child': found href None"),
        ("item", {"type": "Feature", "id": "a", "links": 5}, "links: found 5, expected a list"),
    ):
        (tmp_path / f"{name}_.json").write_text(json.dumps(content))
        cases[tmp_path / f"{name}_.json"] = f"{name}_.json: {message}"
    (tmp_path / "bad.json").write_text('{"type": "Catalog", "links": [{"rel": "item", "href": "http://[bad"}]}')
    cases[tmp_path / "bad.json"] = r"^http://\[bad: cannot be read: Invalid IPv6 URL"
    for source, message in cases.items():
        with pytest.raises(CatalogError, match=message):
            search(source)


@pytest.mark.parametrize(
    "fields",
    [
        {"links": ["a"]},
        {"properties": {"datetime": "9999-12-31T23:59:59-05:00", "platform": "sentinel-2a", "grid:code": "MGRS-31UDS"}},
        {"assets": {"red": {"href": 5}}},
        {
            "assets": {
                "red": {
                    "href": "r.tif",
                    "proj:epsg": 1,
                    "proj:transform": [1, 0, 1, 0, 1, 1],
                    "proj:shape": [1, math.inf],
                }
            }
        },
    ],
)
def test_an_item_that_makes_no_sense_is_left_out(shared_data: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    items = [scene_to_item(s) for s in search(shared_data / "oscd")[:2]]
    collection = {"type": "FeatureCollection", "features": [items[0] | fields, items[1]]}
    (tmp_path / "items.json").write_text(json.dumps(collection))
    with pytest.warns(S2cdWarning, match=f"1 items left out, the first: item {items[0]['id']}: cannot be understood"):
        assert [s.id for s in search(tmp_path / "items.json")] == [items[1]["id"]]


def test_a_rotated_item_is_left_out(shared_data: Path, tmp_path: Path) -> None:
    items = [scene_to_item(s) for s in search(shared_data / "oscd")[:2]]
    items[0]["assets"]["red"]["proj:transform"] = [10, 3, 0, -3, -10, 0]
    (tmp_path / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    with pytest.warns(
        S2cdWarning, match=r"band red: found proj:transform \[10, 3, 0, -3, -10, 0\], expected no rotation"
    ):
        assert [s.id for s in search(tmp_path / "items.json")] == [items[1]["id"]]


@pytest.mark.parametrize(
    "coordinates", [[], [[]], [[1, 2]], [[[1, 2]]], [[[math.nan, 2], [3, 4], [5, 6], [math.nan, 2]]], "abcd"]
)
def test_an_item_that_lies_nowhere_is_left_out(shared_data: Path, tmp_path: Path, coordinates: Any) -> None:
    _expect_left_out(shared_data, tmp_path, {"geometry": {"type": "Polygon", "coordinates": coordinates}})


@pytest.mark.parametrize("fields", [{"id": 5}, {"collection": ["x"]}, {"s2:datatake_id": 5}])
def test_an_item_whose_names_are_no_text_is_left_out(shared_data: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    _expect_left_out(shared_data, tmp_path, fields, ", expected text")


@pytest.mark.parametrize("baseline", ["5.1.1", "", "new", 511, True, [5]])
def test_a_baseline_that_is_none_is_not_taken_for_absent(shared_data: Path, tmp_path: Path, baseline: Any) -> None:
    _expect_left_out(shared_data, tmp_path, {"s2:processing_baseline": baseline}, f"baseline {baseline!r}, expected")


@pytest.mark.parametrize("cloud", ["cloudy", True, math.nan, "inf", [5]])
def test_a_cloud_cover_that_is_no_number(shared_data: Path, tmp_path: Path, cloud: Any) -> None:
    _expect_left_out(shared_data, tmp_path, {"eo:cloud_cover": cloud}, f"eo:cloud_cover {cloud!r}, expected percent")


def _expect_left_out(shared_data: Path, folder: Path, fields: dict[str, Any], why: str = "") -> None:
    """Search two items, of which one has other fields or properties."""
    first, second = (scene_to_item(s) for s in search(shared_data / "oscd")[:2])
    properties = first["properties"] | {k: v for k, v in fields.items() if ":" in k}
    first |= {k: v for k, v in fields.items() if ":" not in k} | {"properties": properties}
    (folder / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": [first, second]}))
    with pytest.warns(S2cdWarning, match=rf"^1 items left out, the first: .*{re.escape(why)}"):
        assert [s.id for s in search(folder / "items.json")] == [second["id"]]


@pytest.mark.parametrize(
    ("stated", "read"),
    [
        *((b, "05.11") for b in ("05.11", 5.11, "5.11", "N0511", "0511", "N05.11")),
        *((b, "04.00") for b in (4.0, 4, "4.0")),
        (5.1, "05.10"),
        (None, None),
    ],
)
def test_a_baseline_in_every_form(shared_data: Path, stated: Any, read: str | None) -> None:
    item = scene_to_item(search(shared_data / "oscd")[0])
    item["properties"] |= {"s2:processing_baseline": stated, "eo:cloud_cover": "99.5"}
    found = scene_from_item(item)
    assert (found.baseline, found.cloud_cover) == (read, 99.5)


@pytest.mark.parametrize(("version", "read"), [("05.11", "05.11"), ("4.0", None), (4.0, None), ("sen2cor 2.11", None)])
def test_the_version_of_a_program_is_no_baseline(shared_data: Path, version: Any, read: str | None) -> None:
    item = scene_to_item(search(shared_data / "oscd")[0])
    item["id"], item["properties"] = "S2A_31UDS_L2A", item["properties"] | {"processing:version": version}
    for name in ("s2:processing_baseline", "s2:datatake_id"):
        item["properties"].pop(name, None)
    assert scene_from_item(item).baseline == read


@pytest.mark.parametrize(
    ("name", "collection", "level"),
    [
        ("S2A_31UDS_20230501_0_L1C", None, "L1C"),
        ("S2A_OPER_MSI_L1C_TL_SGS__20181231T203637_A018414_T31UDS", None, "L1C"),
        ("S2A_31UDS_20230501", "sentinel2a-l1c", "L1C"),
        ("x", "sentinel-s2-l2a-cogs", "L2A"),
        ("S2A_31UDS_20230501", "sentinel-2a", "L1C"),  # nothing says so, and there is no SCL
    ],
)
def test_the_level_is_not_that_of_the_platform(
    shared_data: Path, name: str, collection: str | None, level: str
) -> None:
    item = scene_to_item(search(shared_data / "oscd")[0]) | {"id": name, "collection": collection}
    del item["properties"]["s2:product_type"]
    assert scene_from_item(item).level == level


def test_item_behind_a_broken_link_is_named(tmp_path: Path) -> None:
    links = [{"rel": "item", "href": "./items/a.json"}]
    (tmp_path / "catalog.json").write_text(json.dumps({"type": "Catalog", "id": "c", "links": links}))
    with pytest.raises(CatalogError, match=r"items/a\.json: does not exist"):
        search(tmp_path)


def test_nested_catalogues_and_loops(shared_data: Path, tmp_path: Path) -> None:
    item = shared_data / "oscd" / "items" / "oscd_bercy_20161130.json"
    child = {
        "type": "Collection",
        "links": [{"rel": "item", "href": f"file://{item}"}, {"rel": "child", "href": "../catalog.json"}],
    }
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "collection.json").write_text(json.dumps(child))
    root = {"type": "Catalog", "links": [{"rel": "child", "href": "sub/collection.json"}]}
    (tmp_path / "catalog.json").write_text(json.dumps(root))
    assert [s.id for s in search(tmp_path)] == ["oscd_bercy_20161130"]


def test_items_that_are_no_scene_are_left_out_with_a_warning(shared_data: Path) -> None:
    page = shared_data / "stac" / "earth-search" / "search_10items_a8dc97a1.json"
    with pytest.warns(S2cdWarning, match="3 items left out, the first: item S1A_IW.*expected sentinel-2"):
        assert len(search(page)) == 7


def test_a_geoparquet_file_of_another_program_is_read_as_its_items_are(shared_data: Path, tmp_path: Path) -> None:
    page = shared_data / "stac" / "earth-search" / "search_10items_a8dc97a1.json"
    rustac.write_sync(str(tmp_path / "page.parquet"), read_document(str(page))["features"])
    found = {}
    for source in (page, tmp_path / "page.parquet"):
        with pytest.warns(S2cdWarning, match="3 items left out, the first: item S1A_IW.*expected sentinel-2"):
            found[source.suffix] = search(source, extra=["cloud"])
    assert [(s.id, s.assets) for s in found[".parquet"]] == [(s.id, s.assets) for s in found[".json"]]
    assert any("cloud" in s.assets for s in found[".parquet"])


@pytest.mark.parametrize("name", ["oscd", "flanders", "stac/cdse/search_4items_4bbff1fb.json"])
def test_frozen_search_is_equal_to_the_bit(shared_data: Path, tmp_path: Path, name: str) -> None:
    scenes = search(shared_data / name)
    freeze(scenes, tmp_path / "scenes.parquet")
    assert search(tmp_path / "scenes.parquet") == scenes
    assert [p.name for p in tmp_path.iterdir()] == ["scenes.parquet"]


def test_frozen_batches_keep_what_only_one_scene_has(shared_data: Path, tmp_path: Path) -> None:
    first, *_ = search(shared_data / "flanders")
    late = first.time + timedelta(days=1)
    scenes = [replace(first, id=f"{n:04d}", cloud_cover=10, processed=None) for n in range(2 * BATCH + 1)]
    cloud = replace(first.assets["scl"], band="cloud")
    scenes[-1] = replace(scenes[-1], assets={**first.assets, "cloud": cloud}, cloud_cover=10.25, processed=late)
    freeze(scenes, tmp_path / "scenes.parquet")
    assert search(tmp_path / "scenes.parquet") == scenes


def test_item_round_trip(shared_data: Path) -> None:
    for scene in search(shared_data / "flanders"):
        assets = {band: replace(asset, nodata=65535) for band, asset in scene.assets.items()}
        for told in (scene, replace(scene, assets=assets)):
            assert scene_from_item(scene_to_item(told)) == told


def test_rows_have_one_form(shared_data: Path) -> None:
    rows = scene_rows(search(shared_data / "stac" / "cdse" / "search_4items_4bbff1fb.json"))
    assert rows[0]["tile"] == "32TMT"
    assert rows[0]["offset"] == -0.1
    assert {tuple(row) for row in rows} == {tuple(rows[0])}


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        (None, None, None),
        ("2023", datetime(2023, 1, 1, tzinfo=UTC), datetime(2023, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)),
        ("2024-02", datetime(2024, 2, 1, tzinfo=UTC), datetime(2024, 2, 29, 23, 59, 59, 999999, tzinfo=UTC)),
        ("20240228/20240229", datetime(2024, 2, 28, tzinfo=UTC), datetime(2024, 2, 29, 23, 59, 59, 999999, tzinfo=UTC)),
        ("20230501T105031", *(datetime(2023, 5, 1, 10, 50, 31, tzinfo=UTC),) * 2),
        ("2023-05-01T10:50", *(datetime(2023, 5, 1, 10, 50, tzinfo=UTC),) * 2),
        ("2023-05-01/..", datetime(2023, 5, 1, tzinfo=UTC), None),
        ("../2023-05-01", None, datetime(2023, 5, 1, 23, 59, 59, 999999, tzinfo=UTC)),
        ("2023-05-01T10:00:00Z/2023-05-01T12:00:00+02:00",) + (datetime(2023, 5, 1, 10, tzinfo=UTC),) * 2,
        (datetime(2023, 5, 1, 10), *(datetime(2023, 5, 1, 10, tzinfo=UTC),) * 2),
        (
            date(2023, 5, 1),
            datetime(2023, 5, 1, tzinfo=UTC),
            datetime(2023, 5, 1, 23, 59, 59, 999999, tzinfo=UTC),
        ),
    ],
)
def test_intervals(text: str | date | None, start: datetime | None, end: datetime | None) -> None:
    assert parse_interval(text) == (start, end)


NONE = ["yesterday", "2023-13", "2023/2022", "2022/2023/2024", "2023-02-30", "20230230", "202305"]


@pytest.mark.parametrize("text", [*NONE, "2023-W18", "2023-W18/2023-W20", "2023-W18-1", "2023-121", "2023-05-01T10"])
def test_intervals_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="datetime"):
        parse_interval(text)


def _box(west: float, south: float, east: float, north: float) -> dict[str, object]:
    return {
        "type": "Polygon",
        "coordinates": [[[west, south], [east, south], [east, north], [west, north], [west, south]]],
    }


@pytest.mark.parametrize(
    ("footprint", "bbox", "meets"),
    [
        (_box(0, 0, 10, 10), (2, 2, 3, 3), True),
        (_box(2, 2, 3, 3), (0, 0, 10, 10), True),
        (_box(4, -5, 5, 20), (0, 0, 10, 10), True),
        (_box(0, 0, 1, 1), (2, 0, 3, 1), False),
        ({"type": "Polygon", "coordinates": [[[0, 0], [10, 0], [0, 10], [0, 0]]]}, (8, 8, 9, 9), False),
        (_box(179, 0, 180, 1), (178, 0, -178, 1), True),
        (_box(-180, 0, -179, 1), (178, 0, -178, 1), True),
        (_box(-178.5, 0, 178.5, 1), (179, 0, 179.5, 1), True),
        (_box(-178.5, 0, 178.5, 1), (-179.5, 0, -179, 1), True),
        (_box(-178.5, 0, 178.5, 1), (0, 0, 1, 1), False),
        (_box(-180.7, 0, -179.5, 1), (179.4, 0, 179.9, 1), True),
        (_box(-180.7, 0, -179.5, 1), (178, 0, 179, 1), False),
        (_box(179.3, 0, 180.5, 1), (-179.9, 0, -179.6, 1), True),
        (_box(179.3, 0, 180.5, 1), (-179.4, 0, -179, 1), False),
    ],
)
def test_footprints_meet_boxes(footprint: dict, bbox: tuple, meets: bool) -> None:
    assert intersects(footprint, bbox) is meets


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "no.parquet").write_text("no")
    with pytest.raises(CatalogError, match=r"no\.parquet: cannot be read as stac-geoparquet: found b'no' at its begin"):
        search(tmp_path / "no.parquet")
    with pytest.raises(CatalogError, match=r"none\.parquet: does not exist"):
        search(tmp_path / "none.parquet")


@pytest.mark.parametrize("name", ["scenes.parquet", "sub/scenes.parquet", "é a/50 %.parquet", "#1?.parquet"])
def test_a_search_is_frozen_wherever_it_is_told(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    scenes = search(shared_data / "oscd")[:2]
    freeze(scenes, name)
    assert search(name) == scenes
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / name]


def test_a_frozen_search_that_was_damaged(shared_data: Path, tmp_path: Path) -> None:
    freeze(search(shared_data / "oscd"), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    middle = len(whole) // 3
    damaged = {"short": whole[:middle], "empty": b"", "zeros": whole[:200] + b"\0" * middle + whole[200 + middle :]}
    damaged |= {"index": whole[:-200] + b"\0" * 100 + whole[-100:], "nothing": whole[:4] * 2}
    for name, content in damaged.items():
        (tmp_path / f"{name}.parquet").write_bytes(content)
        with pytest.raises(CatalogError, match=rf"{name}\.parquet: cannot be read as stac-geoparquet"):
            search(tmp_path / f"{name}.parquet")


def test_freezing_nothing_and_nowhere(shared_data: Path, tmp_path: Path) -> None:
    with pytest.raises(NoScenesError, match="no scenes to freeze"):
        freeze([], tmp_path / "x.parquet")
    (tmp_path / "file").touch()
    (tmp_path / "folder.parquet").mkdir()
    scenes = search(shared_data / "oscd")[:1]
    for name, message in (
        ("file/x.parquet", r"file/x\.parquet: cannot be written: .*file is no folder"),
        ("nowhere/x.parquet", r"nowhere/x\.parquet: cannot be written: .*nowhere is no folder"),
        ("folder.parquet", r"folder\.parquet: cannot be written: .*Is a directory"),
        (f"{'x' * 300}.parquet", r"x\.parquet: cannot be written"),
        ("x.json", r"x\.json: found a name in '\.json', expected \.parquet or \.geoparquet"),
    ):
        with pytest.raises(OutputError, match=rf"^[^\n]*{message}[^\n]*$"):
            freeze(scenes, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.parquet"]
