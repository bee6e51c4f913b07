"""STAC APIs: one search, page after page, with retries that cover what servers do in the middle of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

import pystac_client
import requests
from pystac.link import Link
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from urllib3.exceptions import ReadTimeoutError

from s2cd.catalog.filters import Filter, boxes_of
from s2cd.catalog.http import BACKOFF, retry_policy
from s2cd.catalog.items import format_time
from s2cd.catalog.providers import PROVIDERS, TILE_QUERY, Provider
from s2cd.catalog.static import Document, iter_pages, links_of, parse_document
from s2cd.errors import CatalogError, ConfigError

PAGE_SIZE = 250
READ_TIMEOUT = 60.0
WHOLE_TRIES = 4
Find = Callable[[dict[str, Any] | None], Iterator[Document]]


def provider_at(url: str) -> Provider | None:
    """Return the known provider whose API stands at `url`, None for any other."""
    return next((p for p in PROVIDERS.values() if url.rstrip("/") == p.url), None)


def search_api(url: str, wanted: Filter, collection: str | None, provider: Provider | None) -> Iterator[Document]:
    """Search a STAC API and yield its items as they arrive, one page in memory at a time, each item once.

    The server checks area, time and tiles. Cloud cover is for the caller to check, as is all else: servers leave out
    items that state none.

    Raises CatalogError if the API cannot be reached, is none, fails for good, or gives what is no page of items, and
    ConfigError for a search of a known `provider` without an area.
    """
    if provider and wanted.bbox is None and wanted.tiles is None:
        raise ConfigError(f"{provider.key}: found neither bbox nor tiles, expected one: it holds the whole globe")
    try:
        io = StacApiIO(max_retries=retry_policy(), timeout=READ_TIMEOUT)
        client = _open(url, io)

        def find(query: dict[str, Any] | None) -> Iterator[Document]:
            for box in boxes_of(wanted.bbox) if wanted.bbox else [None]:
                found = client.search(
                    method="POST",
                    collections=[collection] if collection else None,
                    bbox=box,
                    datetime=_interval(wanted),
                    query=query,
                    limit=PAGE_SIZE,
                )
                yield from _iter_found(found, io)

        seen: set[tuple[str, str]] = set()
        for item, page in find(None) if wanted.tiles is None else _find_tiles(find, wanted.tiles, provider):
            key = (str(item.get("collection") or ""), str(item.get("id") or ""))
            if key not in seen:
                seen.add(key)
                yield item, _address(item, page)
    except (APIError, requests.RequestException, NotImplementedError) as error:
        raise CatalogError(f"{url}: search failed: {' '.join(str(error).split())[:300]}") from error


def _open(url: str, io: StacApiIO) -> pystac_client.Client:
    try:
        return pystac_client.Client.open(url, stac_io=io)
    except (APIError, requests.RequestException):
        raise
    except Exception as error:  # of a document that is no landing page pystac raises what it stumbles over
        raise CatalogError(f"{url}: is no STAC API: {type(error).__name__}: {error}") from error


def _iter_found(found: pystac_client.ItemSearch, io: StacApiIO) -> Iterator[Document]:
    """Iterate over what was found, page after page: pystac_client takes what is no page for the end of the search."""
    parameters = found.get_parameters()

    def page(source: str | Link, address: str, **how: Any) -> Mapping[str, Any]:
        return parse_document(_whole(lambda: io.read_text(source, parameters=parameters, **how)), address)

    first = page(found.url, found.url, method=found.method)
    return iter_pages(first, found.url, lambda link: page(Link.from_dict(dict(link)), link["href"]))


def _whole(read: Callable[[], str]) -> str:
    """Call `read` until the answer is whole: requests retries one that does not come, not one that breaks off."""
    for attempt in range(WHOLE_TRIES - 1):
        try:
            return read()
        except APIError as error:
            reason = error.__context__
            stalled = isinstance(reason, requests.ConnectionError) and isinstance(reason.args[0], ReadTimeoutError)
            if not stalled and not isinstance(reason, requests.exceptions.ChunkedEncodingError):
                raise
        time.sleep(BACKOFF * 2**attempt)
    return read()


def _interval(wanted: Filter) -> str | None:
    start, end = wanted.interval
    if not start and not end:
        return None
    return "/".join(format_time(t) if t else ".." for t in (start, end))


def _find_tiles(find: Find, tiles: Collection[str], provider: Provider | None) -> Iterator[Document]:
    """Find items of `tiles`, asked for one by one, since servers differ in how they take a list of values.

    Zones 1 to 9 are asked for in both forms: Earth Search has older items of MGRS-9VWK and newer ones of MGRS-09VWK. An
    API we do not know may not hold tiles as `grid:code`: if none is found, a query without tiles follows.
    """
    name, form = provider.tile_query if provider else TILE_QUERY
    found = False
    for written in dict.fromkeys(code for tile in sorted(tiles) for code in (tile, tile.removeprefix("0"))):
        for document in find({name: {"eq": form.format(written)}}):
            found = True
            yield document
    if not found and provider is None:
        yield from find(None)


def _address(item: Mapping[str, Any], page: str) -> str:
    """Where an item says that it stands; what is wrong with its links is told when a scene is made of it."""
    with suppress(CatalogError):
        return next((link["href"] for link in links_of(item, page, "self")), page)
    return page
