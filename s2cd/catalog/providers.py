"""What differs between the places people get Sentinel-2 from: one record each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

STATIC = "static"
TILE_QUERY = ("grid:code", "MGRS-{}")


@dataclass(frozen=True, slots=True)
class Provider:
    """One place that offers Sentinel-2.

    key          name on the command line
    url          root of its STAC API
    collections  collections it offers, the one searched by default first
    hosts        hosts and buckets by which its documents and assets are known
    tile_query   property that holds the tile, and how the tile is written there
    signing      how assets are made readable: "" (open), "planetary-computer", "s3"
    s3_options   options of the S3 client for its assets
    """

    key: str
    url: str
    collections: tuple[str, ...]
    hosts: tuple[str, ...]
    tile_query: tuple[str, str] = TILE_QUERY
    signing: str = ""
    s3_options: Mapping[str, str] = field(default_factory=dict)


PROVIDERS = {
    provider.key: provider
    for provider in (
        Provider(
            key="earth-search",
            url="https://earth-search.aws.element84.com/v1",
            collections=("sentinel-2-l2a", "sentinel-2-c1-l2a", "sentinel-2-l1c"),
            hosts=(
                "earth-search.aws.element84.com",
                "sentinel-cogs",
                "e84-earth-search-sentinel-data",
                "sentinel-s2-l1c",
                "sentinel-s2-l2a",
            ),
        ),
        Provider(
            key="planetary-computer",
            url="https://planetarycomputer.microsoft.com/api/stac/v1",
            collections=("sentinel-2-l2a",),
            hosts=("planetarycomputer.microsoft.com", "sentinel2l2a01.blob.core.windows.net"),
            tile_query=("s2:mgrs_tile", "{}"),
            signing="planetary-computer",
        ),
        Provider(
            key="cdse",
            url="https://stac.dataspace.copernicus.eu/v1",
            collections=("sentinel-2-l2a", "sentinel-2-l1c"),
            hosts=("stac.dataspace.copernicus.eu", "eodata", "zipper.dataspace.copernicus.eu"),
            signing="s3",
            s3_options={
                "endpoint": "https://eodata.dataspace.copernicus.eu",
                "region": "default",
                "virtual_hosted_style_request": "false",
            },
        ),
    )
}


def infer_provider(item: Mapping[str, Any]) -> str:
    """Return the key of the provider that an item's links or assets name, "static" if there is none."""
    links = (link.get("href") for link in item.get("links") or () if link.get("rel") in {"self", "root", "collection"})
    assets = (asset.get("href") for asset in (item.get("assets") or {}).values())
    for href in (*links, *assets):
        key = provider_of(href or "")
        if key != STATIC:
            return key
    return STATIC


def provider_of(href: str) -> str:
    """Return the key of the provider that serves `href`, "static" if none of the known ones does."""
    host = urlsplit(href).hostname or ""
    for provider in PROVIDERS.values():
        if any(host == h or host.startswith(f"{h}.s3.") for h in provider.hosts):
            return provider.key
    return STATIC
