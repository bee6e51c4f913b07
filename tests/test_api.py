"""Searching a real STAC API (stac-fastapi-pgstac on PostGIS), through a proxy that fails on purpose."""

from __future__ import annotations

import json
import resource
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest
from services_support import load_items, service

from s2cd.catalog import api, freeze, http, search
from s2cd.catalog.scene import Scene
from s2cd.errors import CatalogError, NoScenesError

pytestmark = pytest.mark.services
MANY = 10_000


@pytest.fixture(scope="module")
def recorded(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of the API, holding the recorded Sentinel-2 items of all providers."""
    url = service("S2CD_TEST_STAC_API")
    items = {}
    for path in sorted((shared_data / "stac").glob("*/*.json")):
        document = json.loads(path.read_text())
        for item in document.get("features") or [document]:
            if item.get("type") == "Feature" and item.get("collection") and item.get("geometry"):
                items[item["collection"], item["id"]] = item | {"links": [], "stac_version": "1.0.0"}
    load_items(list(items.values()), tmp_path_factory.mktemp("recorded"))
    return url


def many_items() -> Iterator[dict[str, Any]]:
    """Items of one collection that share one tile, four a day."""
    asset = {
        "type": "image/tiff; application=geotiff",
        "proj:shape": [10980, 10980],
        "proj:transform": [10, 0, 499980, 0, -10, 5700000],
        "raster:bands": [{"nodata": 0, "data_type": "uint16", "scale": 0.0001, "offset": -0.1}],
    }
    ring = [[3.0, 50.5], [4.5, 50.5], [4.5, 51.4], [3.0, 51.4], [3.0, 50.5]]
    for number in range(MANY):
        time = datetime(2017, 1, 1, tzinfo=UTC) + timedelta(hours=6 * number)
        yield {
            "type": "Feature", "stac_version": "1.0.0", "id": f"many-{number:05d}", "collection": "many",
            "geometry": {"type": "Polygon", "coordinates": [ring]}, "bbox": [3.0, 50.5, 4.5, 51.4], "links": [],
            "properties": {
                "datetime": time.isoformat(), "platform": "sentinel-2a", "grid:code": "MGRS-31UDS", "proj:epsg": 32631,
                "eo:cloud_cover": number % 100, "sat:relative_orbit": 51, "s2:processing_baseline": "05.00",
            },
            "assets": {band: asset | {"href": f"https://example.org/{number}/{band}.tif"} for band in ("red", "nir")},
        }  # fmt: skip


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = service("S2CD_TEST_STAC_API")
    load_items(list(many_items()), tmp_path_factory.mktemp("many"))
    return url


class Proxy(ThreadingHTTPServer):
    """Passes requests on to an API; the n-th request of all fails as `plan` says: a status, "drop" or "cut"."""

    daemon_threads = True

    def __init__(self, target: str, plan: dict[int, int | str]):
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        self.target = target
        self.plan = plan
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()


class _ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
        self.server.requests.append(self.command)
        fault = self.server.plan.get(len(self.server.requests))
        if fault == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "cut":  # half of an answer
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"type": "FeatureCollection", "features": []}')
            self.close_connection = True
        elif fault is not None:
            self._answer(int(fault), b"fault", {"Retry-After": "0"} if fault in {429, 503} else {})
        else:
            headers = {"Host": self.headers["Host"], "Content-Type": "application/json"}
            request = urllib.request.Request(self.server.target + self.path, body, headers=headers, method=self.command)
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    self._answer(answer.status, answer.read(), {"Content-Type": answer.headers["Content-Type"]})
            except urllib.error.HTTPError as error:
                self._answer(error.code, error.read(), {})

    do_POST = do_GET

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def test_recorded_items_come_back_from_the_api_as_from_their_documents(recorded: str, shared_data: Path) -> None:
    scenes = search(recorded, collection="sentinel-2-l2a", bbox=(9, 47, 10, 48), datetime="2020-03")
    pages = [
        shared_data / "stac" / "earth-search" / f"search_{n}.json" for n in ("10items_548f14c6", "6items_2e87fb9b")
    ]
    expected = {s.id: s for page in pages for s in search(page)}
    assert {s.id for s in scenes} == set(expected)
    for scene in scenes:
        assert scene.assets == expected[scene.id].assets
        assert (scene.orbit, scene.baseline, scene.time) == (
            expected[scene.id].orbit,
            expected[scene.id].baseline,
            expected[scene.id].time,
        )


@pytest.mark.parametrize(
    ("conditions", "tiles"),
    [
        ({"tiles": ["32TMT"]}, {"32TMT"}),
        ({"tiles": ["T32TMT", "32UNU"]}, {"32TMT", "32UNU"}),
        ({"bbox": (-39, 81, -32, 82)}, {"24XWR"}),
        ({"datetime": "2024"}, {"32VKR"}),
        ({"max_cloud": 12, "datetime": "2020-07"}, {"32TMT"}),
        ({"orbit": 27}, {"24XWR"}),
    ],
)
def test_filters(recorded: str, conditions: dict[str, Any], tiles: set[str]) -> None:
    found = search(recorded, collection="sentinel-2-l2a", **conditions)
    assert {s.tile for s in found} == tiles


def test_tiles_of_an_api_without_grid_codes(recorded: str) -> None:
    """Planetary Computer's items name their tile otherwise, which an API we do not know may do as well."""
    found = search(recorded, collection="sentinel-2-l2a", tiles="24XWR")
    assert [s.provider for s in found] == ["planetary-computer"]


def test_a_collection_of_an_api_by_its_own_address(recorded: str) -> None:
    found = search(f"{recorded}/collections/sentinel-2-l1c")
    assert {s.level for s in found} == {"L1C"}


def test_nothing_found_and_no_such_collection(recorded: str) -> None:
    with pytest.raises(NoScenesError, match="no Sentinel-2 scenes found for datetime 1999-01-01T.*1999-12-31T"):
        search(recorded, collection="sentinel-2-l2a", datetime="1999")
    told = r"found for datetime 1999.*, tiles 31IDS, 60XWP \(31IDS: no MGRS tile, expected one such as 31UDS\)"
    with pytest.raises(NoScenesError, match=told):
        search(recorded, collection="sentinel-2-l2a", tiles=["31IDS", "60XWP"], datetime="1999")
    with pytest.raises(CatalogError):
        search(recorded, collection="nonsense")


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "PAGE_SIZE", 5)


@pytest.mark.usefixtures("small_pages")
def test_a_search_survives_what_servers_do_in_the_middle_of_one(recorded: str) -> None:
    plain = search(recorded, collection="sentinel-2-l2a", datetime="../2021")
    plan: dict[int, int | str] = {1: 503, 3: 502, 5: 503, 6: 503, 8: 429, 10: 504, 11: "cut", 12: "cut", 14: "drop"}
    with Proxy(recorded, plan) as proxy:
        found = search(proxy.url, collection="sentinel-2-l2a", datetime="../2021")
    assert ids(found) == ids(plain)
    assert proxy.requests.count("POST") > 8
    assert len(proxy.requests) >= 12


@pytest.mark.usefixtures("small_pages")
def test_a_server_that_stays_broken_is_named(recorded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search fails with an error; it never ends with the pages it had."""
    monkeypatch.setattr(http.Retry, "DEFAULT_BACKOFF_MAX", 0)
    monkeypatch.setattr(api, "retry_policy", lambda: http.Retry(1, allowed_methods=None, status_forcelist=[503]))
    with Proxy(recorded, dict.fromkeys(range(4, 100), 503)) as proxy:
        with pytest.raises(CatalogError, match=rf"{proxy.url}: search failed"):
            search(proxy.url, collection="sentinel-2-l2a")
        assert "POST" in proxy.requests


def test_an_address_where_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        url = f"http://127.0.0.1:{closed.server_address[1]}"
    with pytest.raises(CatalogError, match=f"{url}: cannot be read"):
        search(url)


def test_ten_thousand_items_in_bounded_memory(many: str, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = search(many, collection="many")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert len(found) == MANY
    assert grown < 150, f"{grown:.0f} MiB more"
    freeze(found, tmp_path / "many.parquet")
    assert search(tmp_path / "many.parquet") == found


def ids(scenes: list[Scene]) -> list[str]:
    return [s.id for s in scenes]
