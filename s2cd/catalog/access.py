"""How an asset is opened at read time, on the worker: addresses GDAL knows, options, signatures, retries."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from s2cd.catalog.providers import PROVIDERS
from s2cd.errors import ReadError, S2cdError

T = TypeVar("T")

# GDAL's HTTP settings, in one place. Few and large ranges, no directory listings, no answer taken from a
# cache that a failed request may have left, retries on what servers do under load.
GDAL_OPTIONS = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_HTTP_MULTIRANGE": "YES",
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "GDAL_HTTP_CONNECTTIMEOUT": "10",
    "GDAL_HTTP_TIMEOUT": "60",
    "GDAL_HTTP_LOW_SPEED_TIME": "20",
    "GDAL_HTTP_LOW_SPEED_LIMIT": "1000",
    "GDAL_HTTP_MAX_RETRY": "3",
    "GDAL_HTTP_RETRY_DELAY": "0.5",
    "GDAL_INGESTED_BYTES_AT_OPEN": "32768",
    "VSI_CACHE": "TRUE",
    "VSI_CACHE_SIZE": "5000000",
}
ATTEMPTS = 5
FIRST_DELAY = 0.5
LONGEST_DELAY = 20.0


def open_options(provider: str, href: str) -> tuple[str, dict[str, str]]:
    """Return the address GDAL opens for `href` and the GDAL options for it.

    `provider` is the scene's provider key. Call it for every open: signatures expire.
    """
    record = PROVIDERS.get(provider)
    options = dict(GDAL_OPTIONS)
    if record is not None:
        options |= record.options
    return gdal_path(href), options


def gdal_path(href: str) -> str:
    """Translate a path or URL into GDAL's virtual file system."""
    for scheme, prefix in (("s3://", "/vsis3/"), ("gs://", "/vsigs/")):
        if href.startswith(scheme):
            return prefix + href.removeprefix(scheme)
    if href.startswith(("http://", "https://")):
        return f"/vsicurl/{href}"
    return href.removeprefix("file://")


def with_retries(read: Callable[[], T], href: str, attempts: int = ATTEMPTS) -> T:
    """Call `read` until it succeeds, with exponential back-off and jitter between attempts.

    Local files get one attempt: they do not recover. Errors of ours pass through.

    Raises ReadError that names `href` and the last failure.
    """
    tries = attempts if "://" in href and not href.startswith("file://") else 1
    for delay in _delays(tries):
        try:
            return read()
        except S2cdError:
            raise
        except Exception as error:
            if delay is None:
                raise ReadError(href, " ".join(str(error).split())) from error
            time.sleep(delay)
    raise ReadError(href, f"{attempts} attempts allowed, expected at least one")


def _delays(tries: int) -> Iterator[float | None]:
    """Seconds to wait after each failed attempt, None after the last."""
    for attempt in range(tries - 1):
        yield min(FIRST_DELAY * 2**attempt, LONGEST_DELAY) * random.uniform(0.5, 1.0)
    if tries > 0:
        yield None
