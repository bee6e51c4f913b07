"""STAC documents without a server: a file, a folder or a URL that holds items or leads to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import urllib3

from s2cd.addresses import login_headers
from s2cd.catalog.http import Http, retry_policy
from s2cd.catalog.items import resolve_href
from s2cd.errors import CatalogError

ENTRY_FILES = ("catalog.json", "collection.json")
PARALLEL_REQUESTS = 16
Document = tuple[Mapping[str, Any], str]
Follow = Callable[[Mapping[str, Any]], Mapping[str, Any]]


TIMEOUT = urllib3.Timeout(connect=10, read=60)


@cache
def _http() -> Http:
    return Http(PARALLEL_REQUESTS, retry_policy(), TIMEOUT)


def is_url(source: str) -> bool:
    """Tell a URL from a path."""
    return source.startswith(("http://", "https://"))


def read_document(source: str) -> Mapping[str, Any]:
    """Read one JSON object from a path or URL. Raises CatalogError if there is none."""
    try:
        text = fetch(source) if is_url(source) else Path(source).read_bytes()
    except FileNotFoundError:
        raise CatalogError(f"{source}: does not exist") from None
    except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:  # a ValueError of an address that is none
        raise CatalogError(f"{source}: cannot be read: {_reason(error)}") from error
    return parse_document(text, source)


def parse_document(text: str | bytes, source: str) -> Mapping[str, Any]:
    """Return the JSON object that was found at `source`. Raises CatalogError if it is none."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise CatalogError(f"{source}: is not JSON, so not STAC: {error}") from error
    if not isinstance(document, dict) or "type" not in document:
        raise CatalogError(f"{source}: is JSON but not STAC: expected an object with a type")
    return document


def fetch(url: str) -> bytes:
    """Fetch what stands at `url`. Raises CatalogError for any answer but 200, HTTPError where there is none."""
    response = _http().request("GET", url, headers=login_headers(url))
    if response.status != 200:
        raise CatalogError(f"{url}: server answered {response.status} {response.reason}")
    return response.data


def _reason(error: Exception) -> str:
    text = str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)
    return " ".join(text.split())


def entry_document(folder: Path, *others: str) -> Path:
    """Return the document a folder's catalogue starts at.

    Raises CatalogError if it has none; `others` are what the caller would have taken instead.
    """
    for name in ENTRY_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CatalogError(f"{folder}: is a folder without {' or '.join((*ENTRY_FILES, *others))}")


def iter_items(document: Mapping[str, Any], base: str) -> Iterator[Document]:
    """Iterate over the items a document is, holds or links to, each with its own address.

    Raises CatalogError for a document that is not STAC and for links that cannot be read.
    """
    kind = document.get("type")
    if kind == "Feature":
        links = [*_all_links(document, base), {"rel": "self", "href": base}]  # the first one counts
        yield {**document, "links": links}, base
    elif kind == "FeatureCollection" and is_url(base):
        yield from iter_pages(document, base, _next_page)
    elif kind == "FeatureCollection":  # all of it: a page that was saved says nothing of where the others are now
        yield from ((item, base) for item in _objects(document, "features", base))
    elif kind in {"Catalog", "Collection"}:
        yield from _iter_linked(document, base, {base})
    else:
        expected = "expected Catalog, Collection, Feature or FeatureCollection"
        raise CatalogError(f"{base}: found type {kind!r}, {expected}")


def iter_pages(page: Mapping[str, Any], address: str, follow: Follow) -> Iterator[Document]:
    """Iterate over the items of an ItemCollection and of the pages that it leads on to, each with its page's address.

    `follow` reads what a link, its href absolute, leads to. A page without items is the last one: some servers lead on
    from there as well.

    Raises CatalogError for a page that is none, and for one that was there before.
    """
    known: set[int] = set()
    while True:
        items = _objects(page, "features", address)
        names = hash(repr([(item.get("collection"), item.get("id")) for item in items]))
        if names in known:
            raise CatalogError(f"{address}: found a page of {len(items)} items for the second time, expected the next")
        known.add(names)
        yield from ((item, address) for item in items)
        link = next(iter(links_of(page, address, "next")), None)
        if not items or link is None:
            return
        page, address = follow(link), link["href"]


def _next_page(link: Mapping[str, Any]) -> Mapping[str, Any]:
    method = str(link.get("method") or "GET").upper()
    if method != "GET":
        raise CatalogError(f"{link['href']}: is the next page by {method}, expected GET: search the API itself")
    return read_document(link["href"])


def _iter_linked(document: Mapping[str, Any], base: str, seen: set[str]) -> Iterator[Document]:
    items = iter(_new_links(document, base, "item", seen))
    with ThreadPoolExecutor(PARALLEL_REQUESTS if is_url(base) else 1) as pool:
        while batch := list(islice(items, 256)):
            for address, found in zip(batch, pool.map(read_document, batch), strict=True):
                yield from iter_items(found, address)
    for address in _new_links(document, base, "child", seen):
        child = read_document(address)
        if child.get("type") in {"Catalog", "Collection"}:
            yield from _iter_linked(child, address, seen)
        else:
            yield from iter_items(child, address)


def _new_links(document: Mapping[str, Any], base: str, relation: str, seen: set[str]) -> list[str]:
    """Addresses of links of one relation, each document once."""
    found = []
    for link in links_of(document, base, relation):
        if link["href"] not in seen:
            seen.add(link["href"])
            found.append(link["href"])
    return found


def links_of(document: Mapping[str, Any], base: str, *relations: str) -> list[dict[str, Any]]:
    """Return the links that have one of `relations`, each with an absolute href.

    Raises CatalogError for what are no links, and for one of these that leads nowhere.
    """
    found = [link for link in _all_links(document, base) if link.get("rel") in relations]
    for link in found:
        href = link.get("href")
        if not isinstance(href, str) or not href:
            raise CatalogError(f"{base}: link {link['rel']!r}: found href {href!r}, expected an address")
    return [{**link, "href": _resolve_link(link["href"], base)} for link in found]


def _resolve_link(href: str, base: str) -> str:
    """Resolve a link as `resolve_href` does, but "/a" behind a URL is on its server."""
    try:
        return resolve_href(urljoin(base, href) if is_url(base) else href, base)
    except ValueError as error:
        raise CatalogError(f"{base}: found a link to {href}, expected an address: {error}") from None


def _all_links(document: Mapping[str, Any], base: str) -> list[dict[str, Any]]:
    return _objects({"links": document.get("links") or []}, "links", base)


def _objects(document: Mapping[str, Any], name: str, base: str) -> list[dict[str, Any]]:
    """Return what a document lists under `name`. Raises CatalogError unless these are JSON objects."""
    found = document.get(name)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise CatalogError(f"{base}: {name}: found {found!r:.80}, expected a list of objects")
    return found
