"""A small STAC API that gives one item a page, by POST at /search and by GET at /items, and misbehaves on request."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

CONFORMS = [f"https://api.stacspec.org/v1.0.0/{name}" for name in ("core", "item-search", "item-search#query")]


class ApiServer(ThreadingHTTPServer):
    """Serves `items`; `answers` are bodies given instead of a page, by its number, or of a document, by its path.

    `following` says which page a page leads on to, where that is not the next. Searches are by collection, box and
    query.
    """

    daemon_threads = True

    def __init__(self, items: list[Mapping[str, Any]]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.items = items
        self.answers: dict[int | str, bytes] = {}
        self.following: dict[int, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def landing(self) -> dict[str, Any]:
        links = [
            {"rel": "self", "href": self.url},
            {"rel": "root", "href": self.url},
            {"rel": "search", "href": f"{self.url}/search", "type": "application/geo+json", "method": "POST"},
        ]
        about = {"type": "Catalog", "stac_version": "1.0.0", "id": "pages", "description": "pages"}
        return about | {"conformsTo": CONFORMS, "links": links}

    def page(self, number: int, link: dict[str, Any], items: list[Mapping[str, Any]]) -> dict[str, Any]:
        last = number >= len(items) - 1
        return {
            "type": "FeatureCollection",
            "features": items[number : number + 1],
            "links": [] if last and number not in self.following else [{"rel": "next", **link}],
        }

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()


def _matches(item: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """As pgstac has it: a box from east to west is taken for the rest of the Earth, and null is never less."""
    west, _, east, _ = asked.get("bbox") or (-180, -90, 180, 90)
    found = item["bbox"][0] <= max(west, east) and item["bbox"][2] >= min(west, east)
    pairs = [(item["properties"].get(name), *test.items()) for name, test in (asked.get("query") or {}).items()]
    found = found and item["collection"] in (asked.get("collections") or [item["collection"]])
    return found and all(v == limit if op == "eq" else v is not None and v <= limit for v, (op, limit) in pairs)


class _Handler(BaseHTTPRequestHandler):
    server: ApiServer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if not self.path.startswith("/items"):
            self._send(self.path, self.server.landing())
            return
        number = int(self.path.partition("page=")[2] or 0)
        following = self.server.following.get(number, number + 1)
        self._send(number, self.server.page(number, {"href": f"/items?page={following}"}, self.server.items))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = asked.get("page", 0)
        following = self.server.following.get(number, number + 1)
        link = {"href": f"{self.server.url}/search", "method": "POST", "body": {**asked, "page": following}}
        found = [item for item in self.server.items if _matches(item, asked)]
        self._send(number, self.server.page(number, link, found))

    def _send(self, what: int | str, document: dict[str, Any]) -> None:
        body = self.server.answers.get(what) or json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
