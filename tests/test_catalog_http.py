"""Catalogues by URL, from servers that misbehave and from nginx."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from api_server import ApiServer
from fault_server import FaultServer
from services_support import service

from s2cd.catalog import freeze, http, scene_to_item, search, static
from s2cd.catalog.api import search_api
from s2cd.catalog.filters import make_filter
from s2cd.catalog.items import resolve_href
from s2cd.catalog.providers import PROVIDERS
from s2cd.catalog.ranges import HttpSource
from s2cd.errors import CatalogError, ConfigError
from s2cd.reader import band_source, read_window


@pytest.fixture
def server(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setattr(http, "BACKOFF", 0.01)
    monkeypatch.setattr(static, "_http", cache(static._http.__wrapped__))
    with FaultServer(shared_data, seed=3, stall=0.2) as running:
        yield running


def test_a_catalogue_by_url_is_that_of_the_folder(server: FaultServer, shared_data: Path) -> None:
    local = search(shared_data / "oscd")
    found = search(f"{server.url}/oscd/catalog.json")
    assert [s.id for s in found] == [s.id for s in local]
    assert found[0].assets["red"].href == f"{server.url}/oscd/" + local[0].assets["red"].href.split("/oscd/")[1]
    grid = found[0].assets["red"].grid
    window = (slice(100, 300), slice(7, 300))
    near, far = (read_window(band_source(s[0], "red"), grid, window) for s in (local, found))
    assert np.array_equal(near, far)


def test_user_and_password_of_an_address_open_its_server_and_are_told_to_no_other(
    server: FaultServer, shared_data: Path
) -> None:
    server.login = "me:p/w"
    place = server.url.replace("//", "//me:p%2Fw@")
    found = search(f"{place}/oscd/catalog.json")
    local = search(shared_data / "oscd")
    assert [s.id for s in found] == [s.id for s in local]
    window = (slice(100, 110), slice(7, 30))
    near, far = (read_window(band_source(s[0], "red"), found[0].assets["red"].grid, window) for s in (local, found))
    assert np.array_equal(near, far)
    assert resolve_href(f"{server.url}/a.tif", f"{place}/catalog.json") == f"{place}/a.tif"
    for elsewhere in ("http://other.org/a.tif", "http://[::1/a.tif", server.url.replace("http:", "https:")):
        assert resolve_href(elsewhere, f"{place}/catalog.json") == elsewhere
    with pytest.raises(CatalogError, match=f"^{server.url}/oscd/catalog.json: server answered 401"):
        search(f"{server.url.replace('//', '//me:wrong@')}/oscd/catalog.json")
    with FaultServer(shared_data) as other:
        server.moved = other.url
        path = found[0].assets["red"].href.removeprefix(place)
        assert search(f"{place}/oscd/catalog.json")
        assert len(HttpSource(place + path).fetch(0, 100)) == 100
        assert other.logins == {""}


def test_a_catalogue_by_url_survives_faults(server: FaultServer, shared_data: Path) -> None:
    server.rate, server.faults = 0.2, ("503", "429", "reset", "reset-midway", "truncated", "slow")
    found = search(f"{server.url}/flanders/catalog.json", tiles="31UES")
    assert [s.id for s in found] == [s.id for s in search(shared_data / "flanders", tiles="31UES")]
    assert sum(server.counts.values()) > 20


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone/catalog.json", "server answered 404"),
        ("oscd/labels/bercy.tif", "is not JSON, so not STAC"),
        ("stac/eodag/cop_dataspace_search.json", "is JSON but not STAC"),
    ],
)
def test_a_url_that_is_no_catalogue(server: FaultServer, path: str, message: str) -> None:
    with pytest.raises(CatalogError, match=message):
        search(f"{server.url}/{path}")


def test_proxies_of_the_environment_are_used(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on clusters whose nodes reach nothing by themselves: catalogue and pixels alike."""
    monkeypatch.setenv("HTTP_PROXY", server.url)
    scene = search("http://archive.test/oscd/catalog.json")[0]
    asset = scene.assets["red"]
    assert asset.href.startswith("http://archive.test/oscd/")
    pixels = read_window(band_source(scene, "red"), asset.grid, (slice(0, 8), slice(0, 8)))
    assert pixels.shape == (8, 8)
    assert pixels.any()
    monkeypatch.setenv("NO_PROXY", "archive.test")
    with pytest.raises(CatalogError, match=r"http://archive.test/oscd/catalog.json: cannot be read"):
        search("http://archive.test/oscd/catalog.json")


def test_a_frozen_search_by_url(server: FaultServer, shared_data: Path, tmp_path: Path) -> None:
    scenes = search(shared_data / "oscd")
    freeze(scenes, tmp_path / "scenes.parquet")
    server.root = tmp_path
    assert search(f"{server.url}/scenes.parquet") == scenes


@pytest.fixture
def pages(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    monkeypatch.setattr(static, "_http", cache(static._http.__wrapped__))
    with ApiServer([scene_to_item(scene) for scene in search(shared_data / "oscd")[:4]]) as running:
        yield running


@pytest.mark.parametrize("place", ["", "/items"])
def test_every_page_is_read(pages: ApiServer, shared_data: Path, place: str) -> None:
    expected = [s.id for s in search(shared_data / "oscd")[:4]]
    assert [s.id for s in search(pages.url + place)] == expected
    pages.following[3] = 4  # some servers lead on from every page, to an empty one at last
    assert [s.id for s in search(pages.url + place)] == expected


@pytest.mark.parametrize("place", ["", "/items"])
@pytest.mark.parametrize(("number", "following"), [(1, 1), (2, 0), (3, 1)])
def test_pages_that_lead_back_are_an_error(pages: ApiServer, place: str, number: int, following: int) -> None:
    pages.following[number] = following
    with pytest.raises(CatalogError, match=f"{pages.url}/.*: found a page of 1 items for the second time"):
        search(pages.url + place)


def described(item: dict[str, Any], name: str, west: float = 3.0, **properties: object) -> dict[str, Any]:
    """An item of another name and area; `properties` replace those that say where it lies and how cloudy it is."""
    east, without = west + 0.5, ("grid:code", "eo:cloud_cover")
    ring = [[west, -17], [east, -17], [east, -16], [west, -16], [west, -17]]
    kept = {k: v for k, v in item["properties"].items() if k not in without}
    return item | {
        "id": name,
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "bbox": [west, -17, east, -16],
        "properties": kept | {key.replace("__", ":"): value for key, value in properties.items()},
    }


def test_tiles_of_an_api_in_every_form(pages: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    item = pages.items[0]
    codes = {"short": "MGRS-9VWK", "long": "MGRS-09VWK", "other": "MGRS-31UDS"}
    pages.items = [described(item, name, grid__code=code) for name, code in codes.items()]
    pages.items.append(described(item, "hidden", s2__mgrs_tile="31UES"))
    assert {s.id for s in search(pages.url, tiles=["09VWK", "31UDS"])} == set(codes)
    assert {s.id for s in search(pages.url, tiles="31UES")} == {"hidden"}
    monkeypatch.setitem(PROVIDERS, "earth-search", replace(PROVIDERS["earth-search"], url=pages.url))
    assert {s.id for s in search("earth-search", tiles="9VWK", collection=item["collection"])} == {"short", "long"}


def test_a_known_provider_by_its_url_is_searched_as_by_its_name(
    pages: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = replace(PROVIDERS["earth-search"], url=pages.url)
    monkeypatch.setitem(PROVIDERS, "earth-search", record)
    first, *_, last = record.collections
    pages.items = [
        described(pages.items[0], name, grid__code="MGRS-31UDS") | {"collection": name} for name in record.collections
    ]
    for source in ("earth-search", pages.url, f"{pages.url}/"):
        assert [s.collection for s in search(source, tiles="31UDS")] == [first]
        assert [s.collection for s in search(source, tiles="31UDS", collection=last)] == [last]
    links = [{"rel": "root", "href": pages.url}, {"rel": "items", "href": f"{pages.url}/items"}]
    pages.answers[f"/collections/{last}"] = json.dumps({"type": "Collection", "id": last, "links": links}).encode()
    assert [s.collection for s in search(f"{pages.url}/collections/{last}", tiles="31UDS")] == [last]


def test_a_box_across_the_antimeridian_is_asked_of_an_api_in_two(pages: ApiServer) -> None:
    places = {"west of it": 179.3, "on both sides": -180.2, "east of it": -179.8, "elsewhere": 20.0}
    pages.items = [described(pages.items[0], n, west, grid__code="MGRS-01KAB") for n, west in places.items()]
    found = [s.id for s in search(pages.url, bbox=(179, -18, -179, -15))]
    assert sorted(found) == ["east of it", "on both sides", "west of it"]


def test_an_api_does_not_leave_out_what_states_no_cloud(pages: ApiServer) -> None:
    item, tile = pages.items[0], {"grid__code": "MGRS-31UDS"}
    pages.items = [described(item, "unknown", **tile)]
    pages.items += [described(item, str(cloud), **tile, eo__cloud_cover=cloud) for cloud in (5, 95)]
    assert {s.id for s in search(pages.url, max_cloud=30)} == {"unknown", "5"}


NONSENSE = [
    (b"<html>maintenance</html>", "is not JSON, so not STAC"),
    (b"{}", "is JSON but not STAC"),
    (b'{"code": "InternalError", "description": "backend timeout"}', "is JSON but not STAC"),
    (b"[]", "is JSON but not STAC"),
    (b'{"type": "FeatureCollection", "features": null}', "features: found None, expected a list of objects"),
    (b'{"type": "FeatureCollection", "features": ["a"]}', r"features: found \['a'\], expected a list"),
    (b'{"type": "FeatureCollection", "features": [], "links": [5]}', r"links: found \[5\], expected a list"),
    (b'{"type": "FeatureCollection", "features": [], "links": [{"rel": "next", "href": 5}]}', "found href 5"),
    (b'{"type": "FeatureCollection", "features": [], "links": [{"rel": "next", "href": "//[b"}]}', r"link to //\[b, "),
]


@pytest.mark.parametrize(("place", "number"), [("", 0), ("", 1), ("/items", 1)])
@pytest.mark.parametrize(("body", "message"), NONSENSE)
def test_a_page_that_is_none_is_an_error(pages: ApiServer, place: str, number: int, body: bytes, message: str) -> None:
    pages.answers[number] = body
    with pytest.raises(CatalogError, match=f"^{pages.url}/[^ ]*: .*{message}"):
        search(pages.url + place)


def test_a_search_of_the_whole_globe_is_refused() -> None:
    with pytest.raises(ConfigError, match="cdse: found neither bbox nor tiles, expected one"):
        search("cdse", datetime="2023-06")


def test_a_provider_whose_api_is_away_behind_a_page(pages: ApiServer) -> None:
    """Providers are searched without a look at their landing page before."""
    for body in (b"<html>maintenance</html>", b"{}", b"[]", b'{"type": "Catalog", "links": 3}'):
        pages.answers["/"] = body
        with pytest.raises(CatalogError, match=f"{pages.url}: is no STAC API: "):
            list(search_api(pages.url, make_filter(tiles="31UDS"), None, PROVIDERS["cdse"]))


@pytest.mark.services
def test_pixels_from_nginx(shared_data: Path) -> None:
    url, folder = service("S2CD_TEST_ASSETS_URL"), Path(service("S2CD_TEST_ASSETS_DIR"))
    source = shared_data / "oscd" / "assets" / "paris" / "20161130"
    shutil.copytree(source, folder / "paris", dirs_exist_ok=True)
    scene = next(s for s in search(shared_data / "oscd") if s.id == "oscd_paris_20161130")
    for band, name in (("red", "B04"), ("swir16", "B11")):
        asset = scene.assets[band]
        with rasterio.open(asset.href) as dataset:
            truth = dataset.read(1)
        far = band_source(scene, band)
        moved = type(far)(band, (f"{url}/paris/{name}.tif",), "static")
        whole = (slice(0, asset.grid.shape[0]), slice(0, asset.grid.shape[1]))
        assert np.array_equal(read_window(moved, asset.grid, whole), truth)
