"""STAC documents without a server: a file, a folder or a URL that holds items or leads to them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import urllib3

from s2cd.catalog.items import resolve_href
from s2cd.errors import CatalogError

ENTRY_FILES = ("catalog.json", "collection.json")
RETRIED_STATUS = (429, 500, 502, 503, 504)
PARALLEL_REQUESTS = 16
LONGEST_WAIT = 60.0
BACKOFF = 0.3
Document = tuple[Mapping[str, Any], str]


class Retry(urllib3.Retry):
    """Retries that wait as long as a server asks for, but never longer than a minute."""

    def get_retry_after(self, response: urllib3.BaseHTTPResponse) -> float | None:
        """Return seconds to wait, as the answer states them."""
        asked = super().get_retry_after(response)
        return None if asked is None else min(asked, LONGEST_WAIT)


def retry_policy() -> Retry:
    """Retries for catalogue requests: every method, so POST too, honouring Retry-After, with back-off."""
    return Retry(
        total=6,
        connect=3,
        backoff_factor=BACKOFF,
        backoff_max=20,
        backoff_jitter=0.2,
        status_forcelist=RETRIED_STATUS,
        allowed_methods=None,
        respect_retry_after_header=True,
        raise_on_status=False,
    )


TIMEOUT = urllib3.Timeout(connect=10, read=60)
_pools: dict[str, urllib3.PoolManager] = {}


def _http() -> urllib3.PoolManager:
    if "pool" not in _pools:
        _pools["pool"] = urllib3.PoolManager(maxsize=PARALLEL_REQUESTS, retries=retry_policy(), timeout=TIMEOUT)
    return _pools["pool"]


def is_url(source: str) -> bool:
    """Tell a URL from a path."""
    return source.startswith(("http://", "https://"))


def read_document(source: str) -> Mapping[str, Any]:
    """Read one JSON object from a path or URL. Raises CatalogError if there is none."""
    try:
        text = fetch(source) if is_url(source) else Path(source).read_bytes()
        document = json.loads(text)
    except FileNotFoundError:
        raise CatalogError(f"{source}: does not exist") from None
    except (OSError, urllib3.exceptions.HTTPError) as error:
        raise CatalogError(f"{source}: cannot be read: {_reason(error)}") from error
    except ValueError as error:
        raise CatalogError(f"{source}: is not JSON, so not STAC: {error}") from error
    if not isinstance(document, dict) or "type" not in document:
        raise CatalogError(f"{source}: is JSON but not STAC: expected an object with a type")
    return document


def fetch(url: str) -> bytes:
    """Fetch what stands at `url`. Raises CatalogError for any answer but 200, HTTPError where there is none."""
    response = _http().request("GET", url)
    if response.status != 200:
        raise CatalogError(f"{url}: server answered {response.status} {response.reason}")
    return response.data


def _reason(error: Exception) -> str:
    text = str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)
    return " ".join(text.split())


def entry_document(folder: Path) -> Path:
    """Return the document a folder's catalogue starts at. Raises CatalogError if it has none."""
    for name in ENTRY_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CatalogError(f"{folder}: is a folder without {' or '.join(ENTRY_FILES)}")


def iter_items(document: Mapping[str, Any], base: str) -> Iterator[Document]:
    """Iterate over the items a document is, holds or links to, each with its own address.

    Raises CatalogError for a document that is not STAC and for links that cannot be read.
    """
    kind = document.get("type")
    if kind == "Feature":
        links = [*(document.get("links") or ()), {"rel": "self", "href": base}]  # the first one counts
        yield {**document, "links": links}, base
    elif kind == "FeatureCollection":
        yield from ((item, base) for item in document.get("features") or ())
    elif kind in {"Catalog", "Collection"}:
        yield from _iter_linked(document, base, {base})
    else:
        expected = "expected Catalog, Collection, Feature or FeatureCollection"
        raise CatalogError(f"{base}: found type {kind!r}, {expected}")


def _iter_linked(document: Mapping[str, Any], base: str, seen: set[str]) -> Iterator[Document]:
    items = iter(_links(document, base, {"item"}, seen))
    with ThreadPoolExecutor(PARALLEL_REQUESTS if is_url(base) else 1) as pool:
        while batch := list(islice(items, 256)):
            for address, found in zip(batch, pool.map(read_document, batch), strict=True):
                yield from iter_items(found, address)
    for address in _links(document, base, {"child"}, seen):
        child = read_document(address)
        if child.get("type") in {"Catalog", "Collection"}:
            yield from _iter_linked(child, address, seen)
        else:
            yield from iter_items(child, address)


def _links(document: Mapping[str, Any], base: str, relations: set[str], seen: set[str]) -> list[str]:
    """Addresses of links with one of `relations`, each document once."""
    found = []
    for link in document.get("links") or ():
        address = resolve_href(link.get("href") or "", base)
        if link.get("rel") in relations and address and address not in seen:
            seen.add(address)
            found.append(address)
    return found
