"""The item of a map and the catalogue around it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pystac
import pytest
from outputs_support import AFTER, INFO, LONLAT, UTM, make_grid, make_pair, make_scene, random_codes
from PIL import Image
from pystac.validation import validate_dict
from rasterio.warp import transform_bounds

from s2cd.addresses import public_href, without_secrets
from s2cd.catalog import freeze, search
from s2cd.codes import CODE_NODATA, encode_codes
from s2cd.errors import CatalogError, ConfigError, GridError, OutputError
from s2cd.outputs import MapInfo, finished, is_done, save_report, save_run, write_catalog, write_map
from s2cd.outputs.item import footprint
from s2cd.outputs.page import write_page
from s2cd.pairs import Pair
from s2cd.simulate import simulate

GRID = make_grid((17, 19))
NAME = "S2CD_31UDS_R051_20230102T103001_20230203T104002"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_item_says_what_the_map_is_and_where_it_comes_from(out):
    codes = np.zeros(GRID.shape, np.uint16)
    codes[:, :4] = CODE_NODATA
    codes[0, 4:10] = 1000
    pair = make_pair(GRID, notes=("baselines differ",))
    info = MapInfo("generic", "ab" * 32, ("red", "green"), extra={"s2cd:shift": [0.25, -0.5]})
    item = write_map(codes, pair, GRID, info, str(out))
    assert item == json.loads((out / "31UDS" / f"{NAME}.json").read_text())
    assert item["id"] == NAME
    properties = item["properties"]
    expected = {
        "datetime": None,
        "start_datetime": "2023-01-02T10:30:01Z",
        "end_datetime": "2023-02-03T10:40:02Z",
        "proj:code": "EPSG:32631",
        "proj:epsg": 32631,
        "proj:shape": [17, 19],
        "proj:transform": list(UTM[1]),
        "platform": "sentinel-2a",
        "sat:relative_orbit": 51,
        "grid:code": "MGRS-31UDS",
        "s2cd:model": "generic",
        "s2cd:model_hash": "ab" * 32,
        "s2cd:bands": ["red", "green"],
        "s2cd:threshold": 0.5,
        "s2cd:valid_fraction": round(15 / 19, 6),
        "s2cd:changed_fraction": round(6 / (15 * 17), 6),
        "s2cd:notes": ["baselines differ"],
        "s2cd:shift": [0.25, -0.5],
    }
    assert {key: properties[key] for key in expected} == expected
    assert set(properties["processing:software"]) == {"s2cd"}
    applied = properties["s2cd:applied_offsets"]
    assert applied["before"]["red"] == {"scale": 1e-4, "offset": -0.1, "reason": "raster:bands"}
    assert applied.keys() == {"before", "after"}
    assert [k["rel"] for k in item["links"]].count("derived_from") == 2
    asset = item["assets"]["change"]
    stored = {"data_type": "float32", "nodata": "nan", "unit": "1"}
    assert asset["raster:bands"] == [stored | {"scale": 1.0, "offset": 0.0}]
    assert asset.items() >= stored.items()


def test_item_is_valid_stac(out):
    for profile in ("default", "uint8"):
        pair = make_pair(GRID)
        item = write_map(random_codes(GRID.shape), pair, GRID, INFO, str(out), profile=profile)
        validate_dict(item, extensions=[])  # the core schema; those of extensions are not at hand offline


def test_no_secret_reaches_an_item(out):
    write_map(random_codes(GRID.shape), make_pair(GRID), GRID, INFO, str(out), quicklook_rgb=(None, None))
    write_catalog(str(out))
    for path in out.rglob("*"):
        assert not path.is_file() or b"secret" not in path.read_bytes().lower()


@pytest.mark.parametrize(
    ("href", "expected"),
    [
        ("https://a:b@h.org/x/y.tif?sig=1#f", "https://h.org/x/y.tif"),
        ("s3://bucket/x.jp2", "s3://bucket/x.jp2"),
        ("https://a:b?c@h.org/y.tif?sig=a b", "https://h.org/y.tif"),
        ("http://[::1/y.tif", "http://[::1/y.tif"),
        ("/data/what?is#this.tif", "/data/what?is#this.tif"),
    ],
)
def test_hrefs_lose_what_may_be_secret(href, expected):
    assert public_href(href) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot read https://a:b@h.org/y.tif?sig=1: refused", "cannot read https://h.org/y.tif: refused"),
        ("exceeded with url: /y.tif?sig=1 (Caused by 'x')", "exceeded with url: /y.tif (Caused by 'x')"),
        ("failed: 'http://a:b@h:80', s3://c/d#1.", "failed: 'http://h:80', s3://c/d."),
        ("/data/what?.tif: does not exist", "/data/what?.tif: does not exist"),
        ("http://me:it's@h.org/y.json: server answered 401", "http://h.org/y.json: server answered 401"),
        (
            "found 'http://h.org/y.tif?sig='X'&b=\"1\"', expected another",
            "found 'http://h.org/y.tif', expected another",
        ),
        ('{"href": "http://h.org/y.tif?sig=1"}, s3://b/c', '{"href": "http://h.org/y.tif"}, s3://b/c'),
    ],
)
def test_texts_lose_what_may_be_secret(text, expected):
    assert without_secrets(text) == expected


def test_inputs_of_an_api_are_linked_by_their_items(out):
    scenes = [make_scene(GRID, t, provider="earth-search") for t in (AFTER - timedelta(days=5), AFTER)]
    item = write_map(random_codes(GRID.shape), Pair(*scenes), GRID, INFO, str(out))
    links = [link["href"] for link in item["links"] if link["rel"] == "derived_from"]
    root = "https://earth-search.aws.element84.com/v1/collections/sentinel-2-l2a/items"
    assert links == [f"{root}/{scene.id}" for scene in scenes]


def test_inputs_of_a_static_catalogue_are_linked_by_their_items(out, tmp_path):
    scenes = search(simulate(tmp_path / "catalogue", size=64, dates=2, orbits=(51,)))
    assert [Path(s.address).name for s in scenes] == [f"{s.id}.json" for s in scenes]
    freeze(scenes, tmp_path / "scenes.parquet")
    assert search(tmp_path / "scenes.parquet") == scenes
    item = write_map(random_codes(GRID.shape), Pair(*scenes), GRID, INFO, str(out))
    links = [link["href"] for link in item["links"] if link["rel"] == "derived_from"]
    assert [json.loads(Path(link).read_text())["id"] for link in links] == [s.id for s in scenes]


def test_a_published_item_is_linked_where_it_was_published(shared_data):
    scene = search(shared_data / "stac" / "earth-search" / "search_10items_548f14c6.json")[0]
    root = "https://earth-search.aws.element84.com/v1/collections/sentinel-2-l2a/items"
    assert scene.address == f"{root}/{scene.id}"


def test_probabilities_are_accepted_as_well_as_codes(out):
    values = np.linspace(0, 1, 17 * 19, dtype=np.float32).reshape(17, 19)
    values[0, 0] = np.nan
    a = write_map(values, make_pair(GRID), GRID, INFO, str(out / "a"))
    b = write_map(encode_codes(values), make_pair(GRID), GRID, INFO, str(out / "b"))
    assert a["properties"] | {"created": ""} == b["properties"] | {"created": ""}
    first, second = ((out / n / "31UDS" / f"{NAME}.tif").read_bytes() for n in "ab")
    assert first == second


@pytest.mark.parametrize(("profile", "steps"), [("default", "1/1024"), ("lerc", "1/1024"), ("uint8", "1/254")])
def test_an_item_states_the_precision_of_its_profile(out, profile, steps):
    item = write_map(random_codes(GRID.shape), make_pair(GRID), GRID, INFO, str(out), profile=profile)
    assert item["assets"]["change"]["description"].startswith(f"0 to 1 in steps of {steps}; nodata")


def test_the_page_names_tiles_in_full(out):
    write_map(random_codes(GRID.shape), make_pair(GRID, "saclay_e"), GRID, INFO, str(out))
    write_page(str(out))
    assert "<b>saclay_e: 2023-01-02 to 2023-02-03</b>" in (out / "index.html").read_text()


@pytest.mark.parametrize("fill", [CODE_NODATA, 0])
def test_maps_of_nothing(out, fill):
    item = write_map(np.full(GRID.shape, fill, np.uint16), make_pair(GRID), GRID, INFO, str(out))
    valid, changed = (item["properties"][f"s2cd:{k}_fraction"] for k in ("valid", "changed"))
    assert (valid, changed) == ((0.0, None) if fill else (1.0, 0.0))


def test_a_map_off_its_grid_is_refused_before_anything_is_written(out):
    with pytest.raises(GridError, match=rf"{NAME}: a map of \(17, 20\) pixels, expected \(17, 19\)"):
        write_map(random_codes((17, 20)), make_pair(GRID), GRID, INFO, str(out))
    assert not out.exists()


def test_an_unknown_profile_is_named_before_anything_is_written(out):
    with pytest.raises(ConfigError, match="'jpeg'.*default"):
        write_map(random_codes(GRID.shape), make_pair(GRID), GRID, INFO, str(out), profile="jpeg")
    assert not out.exists()


@pytest.mark.parametrize("tile", ["../x", "a/b", "x y", ".."])
def test_a_tile_cannot_lead_out_of_the_folder(out, tile):
    with pytest.raises(OutputError, match="cannot name a map"):
        write_map(random_codes(GRID.shape), make_pair(GRID, tile), GRID, INFO, str(out))
    assert not out.exists() or not list(out.rglob("*.*"))


def test_footprint_of_a_tile_in_utm():
    geometry, bbox = footprint(make_grid((10980, 10980)))
    assert geometry["type"] == "Polygon"
    expected = transform_bounds("EPSG:32631", "EPSG:4326", 600000, 5590200, 709800, 5700000, densify_pts=101)
    assert bbox == pytest.approx(expected, abs=1e-4)


def test_footprint_of_a_grid_in_degrees_is_its_box():
    _, bbox = footprint(make_grid((100, 200), LONLAT))
    a, _, c, _, e, f = LONLAT[1]
    assert bbox == pytest.approx([c, f + 100 * e, c + 200 * a, f], abs=1e-6)


@pytest.mark.parametrize("epsg", [32601, 32660])
def test_footprint_across_the_antimeridian_is_cut_in_two(epsg):
    easting = 250000.0 if epsg == 32601 else 590000.0
    transform = (10.0, 0.0, easting, 0.0, -10.0, 7200000.0)
    geometry, (west, _, east, _) = footprint(make_grid((10980, 10980), (epsg, transform)))
    if west > east:
        assert geometry["type"] == "MultiPolygon"
        assert 170 < west <= 180
        assert -180 <= east < -170
        for ring in (part[0] for part in geometry["coordinates"]):
            assert np.ptp([x for x, _ in ring]) < 10
            assert sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise(ring)) > 0  # anticlockwise
    else:
        pytest.fail(f"bbox from {west} to {east} does not cross")


def test_catalogue_opens_and_every_item_resolves(out):
    tiles = ["31UDS", "saclay_e", "01KAB"]
    pairs = [make_pair(GRID, t, AFTER + timedelta(days=d)) for t in tiles for d in range(3)]
    for pair in pairs:
        write_map(random_codes(GRID.shape), pair, GRID, INFO, str(out), quicklook_rgb=(None, None))
    write_catalog(str(out))
    collection = pystac.Collection.from_file(str(out / "collection.json"))
    validate_dict(collection.to_dict(include_self_link=False, transform_hrefs=False), extensions=[])
    items = list(collection.get_items(recursive=True))
    assert {item.id for item in items} == {pair.name for pair in pairs} == finished(str(out))
    for item in items:
        assert item.get_collection().id == collection.id
        assert item.get_parent().title == item.properties["s2cd:tile"]
        with Image.open(item.assets["thumbnail"].get_absolute_href()) as image:
            assert image.format == "PNG"
    start, end = collection.extent.temporal.intervals[0]
    assert (start, end) == (pairs[0].before.time, max(p.after.time for p in pairs))


def test_an_empty_folder_is_a_valid_catalogue(out):
    write_catalog(str(out))
    collection = pystac.Collection.from_file(str(out / "collection.json"))
    assert list(collection.get_items(recursive=True)) == []


def test_a_map_without_item_or_cog_is_not_finished(out):
    pair = make_pair(GRID)
    assert finished(str(out)) == set()
    assert not out.exists()  # asking leaves no trace
    write_map(random_codes(GRID.shape), pair, GRID, INFO, str(out))
    assert is_done(str(out), pair.name)
    tif, item = (out / "31UDS" / f"{NAME}{e}" for e in (".tif", ".json"))
    content = tif.read_bytes()
    tif.unlink()
    assert not is_done(str(out), pair.name)
    tif.write_bytes(content)
    item.unlink()
    assert not is_done(str(out), pair.name)
    assert finished(str(out)) == set()


def test_a_run_is_kept_beside_its_maps(out):
    scenes = [make_scene(GRID, datetime(2023, 1, d, tzinfo=UTC)) for d in (1, 2)]
    save_run(str(out), "catalog: x\n", scenes)
    save_report(str(out), {"out": "x", "maps": []})
    assert (out / "run.yaml").read_text() == "catalog: x\n"
    kept = search(out / "scenes.parquet")
    assert [(s.id, s.time, s.assets) for s in kept] == [(s.id, s.time, s.assets) for s in scenes]
    assert json.loads((out / "report.json").read_text())["maps"] == []
    save_run(str(out), "catalog: y\n", scenes)
    assert not (out / "report.json").exists()  # until this run ends


def test_frozen_scenes_of_a_bucket_are_read_there(bucket):
    scenes = [make_scene(GRID, datetime(2023, 1, d, tzinfo=UTC)) for d in (1, 2)]
    save_run(bucket.url, "catalog: x\n", scenes)
    kept = search(f"{bucket.url}/scenes.parquet")
    assert [(s.id, s.time, s.assets) for s in kept] == [(s.id, s.time, s.assets) for s in scenes]
    for place in (f"{bucket.url}/none.parquet", "s3://none/scenes.parquet", "ftp://none/scenes.parquet"):
        with pytest.raises(CatalogError, match=rf"^{place}: cannot be read as stac-geoparquet: .*$"):
            search(place)
