"""STAC APIs: one search, page after page, with retries that cover what servers do in the middle of one."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import pystac_client
import requests
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO

from s2cd.catalog.filters import Filter
from s2cd.catalog.items import format_time
from s2cd.catalog.providers import PROVIDERS, TILE_QUERY, Provider
from s2cd.catalog.static import Document, retry_policy
from s2cd.errors import CatalogError

PAGE_SIZE = 250
READ_TIMEOUT = 60.0


def provider_at(url: str) -> Provider | None:
    """Return the known provider whose API stands at `url`, None for any other."""
    return next((p for p in PROVIDERS.values() if url.rstrip("/") == p.url), None)


def search_api(url: str, wanted: Filter, collection: str | None, provider: Provider | None) -> Iterator[Document]:
    """Search a STAC API and yield its items as they arrive, one page in memory at a time, each item once.

    Raises CatalogError if the API cannot be reached, is none, or fails for good.
    """
    try:
        io = StacApiIO(max_retries=retry_policy(), timeout=READ_TIMEOUT)
        client = pystac_client.Client.open(url, stac_io=io)
        seen: set[tuple[str, str]] = set()
        for query in _queries(wanted, provider, seen):
            found = client.search(
                method="POST",
                collections=[collection] if collection else None,
                bbox=wanted.bbox,
                datetime=_interval(wanted),
                query=query or None,
                limit=PAGE_SIZE,
            )
            for item in found.items_as_dicts():
                key = (item.get("collection") or "", item.get("id") or "")
                if key not in seen:
                    seen.add(key)
                    yield item, _address(item, url)
    except (APIError, requests.RequestException, NotImplementedError) as error:
        raise CatalogError(f"{url}: search failed: {' '.join(str(error).split())[:300]}") from error


def _interval(wanted: Filter) -> str | None:
    start, end = wanted.interval
    if not start and not end:
        return None
    return "/".join(format_time(t) if t else ".." for t in (start, end))


def _queries(wanted: Filter, provider: Provider | None, seen: Collection[object]) -> Iterator[dict[str, Any]]:
    """Queries of conditions a server can check by itself; all of them are checked again here.

    Tiles are asked for one by one, since servers differ in how they take a list of values. An API we do not know may
    not hold tiles as `grid:code`: if nothing was `seen` after that, a query without tiles follows.
    """
    cloud: dict[str, Any] = {}
    if wanted.max_cloud is not None and wanted.max_cloud < 100:
        cloud = {"eo:cloud_cover": {"lte": wanted.max_cloud}}
    if wanted.tiles is not None:
        name, form = provider.tile_query if provider else TILE_QUERY
        for tile in sorted(wanted.tiles):
            yield cloud | {name: {"eq": form.format(tile)}}
    if wanted.tiles is None or (provider is None and not seen):
        yield cloud


def _address(item: dict[str, Any], url: str) -> str:
    links = (link for link in item.get("links") or () if link.get("rel") == "self")
    return next((link["href"] for link in links), url)
