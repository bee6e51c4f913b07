"""Remote files read in ranges, every byte accounted for.

GDAL's own HTTP reader takes a body that was cut off for the end of the file: a cut in a TIFF's header then reads as
blocks that were never written, so as nodata. Here an answer counts only if it is exactly the range that was asked for.
"""

from __future__ import annotations

import io
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Protocol, Self, cast

import obstore
import urllib3
from obstore.store import S3Store
from rasterio.io import FilePath

from s2cd.addresses import login_headers
from s2cd.buckets import client_options, environment_digest, source_keys
from s2cd.catalog.http import RETRIED_STATUS, Http, Retry
from s2cd.errors import ReadError

if TYPE_CHECKING:
    from obstore.store import S3Config

HEAD_BYTES = 1 << 16
FRESH = 10.0  # seconds for which a file is taken for the one that it was
GAP_BYTES = 1 << 18
PARALLEL = 8
CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 60.0
QUICK_RETRIES = 2
BACKOFF = 0.1
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Source(Protocol):
    """Something that gives ranges of bytes; `size` and `tag`, its edition, are known once the first was given.

    Where they are known from before, bytes of another edition are an error.
    """

    size: int | None
    tag: str | None

    def fetch(self, start: int, stop: int) -> bytes:
        """Return bytes [start, stop), fewer only at the end of the file. Raises OSError or HTTPError."""


class HttpSource:
    """A file on an HTTP server that serves ranges."""

    def __init__(self, url: str):
        self.url = url
        self.size: int | None = None
        self.tag: str | None = None

    def fetch(self, start: int, stop: int) -> bytes:
        """Return bytes [start, stop), fewer only at the end of the file. Raises ReadError for the whole of it."""
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity", **login_headers(self.url)}
        # Of the first answer the body waits: a server without ranges sends the whole file.
        answer = _http().request("GET", self.url, headers=headers, preload_content=self.size is not None)
        if answer.status != 206:
            answer.close()
            why = f"server answered {answer.status} {answer.reason}, expected 206 Partial Content"
            if answer.status == 200:  # it would again, with the whole file
                raise ReadError(self.url, why)
            raise (FileNotFoundError if answer.status in {404, 410} else OSError)(why)
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if not found or int(found[1]) != start:
            raise OSError(f"server sent {answer.headers.get('Content-Range')!r}, expected bytes from {start}")
        size = int(found[3])
        self._require_same_file(size, answer.headers.get("ETag") or answer.headers.get("Last-Modified"))
        expected = min(stop, size) - start
        if len(answer.data) != expected:
            raise OSError(f"server sent {len(answer.data)} bytes from {start}, expected {expected}")
        return answer.data

    def _require_same_file(self, size: int, tag: str | None) -> None:
        if self.size is not None and (self.size, self.tag) != (size, tag):
            raise OSError(f"file changed while it was read: {self.size} bytes {self.tag}, then {size} bytes {tag}")
        self.size, self.tag = size, tag


class S3Source:
    """An object in S3 or a store that speaks its protocol."""

    def __init__(self, store: S3Store, key: str):
        self.store = store
        self.key = key
        self.size: int | None = None
        self.tag: str | None = None

    def fetch(self, start: int, stop: int) -> bytes:
        """Return bytes [start, stop), fewer only at the end of the object."""
        options: obstore.GetOptions = {"range": (start, stop)}
        if self.tag is not None:
            options["if_match"] = self.tag
        answer = obstore.get(self.store, self.key, options=options)
        self.size, self.tag = answer.meta["size"], answer.meta["e_tag"]
        data = answer.bytes().to_bytes()
        expected = min(stop, self.size) - start
        if len(data) != expected:
            raise OSError(f"store sent {len(data)} bytes from {start}, expected {expected}")
        return data


@cache
def _http() -> Http:
    retries = Retry(total=QUICK_RETRIES, backoff_factor=BACKOFF, status_forcelist=RETRIED_STATUS, raise_on_status=False)
    return Http(64, retries, urllib3.Timeout(connect=CONNECT_TIMEOUT, read=READ_TIMEOUT))


@dataclass(slots=True)
class Head:
    """The first HEAD_BYTES of a file, its size and edition, and when the file last was of that edition."""

    data: bytes
    size: int | None
    tag: str | None
    seen: float


class Heads:
    """The first bytes of the `most` files read last, since every chunk of a tile opens the same files."""

    def __init__(self, most: int = 512):
        self.most = most
        self._heads: OrderedDict[str, Head] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, href: str, source: Source) -> Head | None:
        """Return what is known of a file. One not asked for anything lately is asked whether it still is the same.

        Raises what the transport raises.
        """
        with self._lock:
            if href in self._heads:
                self._heads.move_to_end(href)
            head = self._heads.get(href)
        if head is None or time.monotonic() - head.seen < FRESH:
            return head
        source.fetch(0, 1)
        if (source.size, source.tag) != (head.size, head.tag):
            return None
        head.seen = time.monotonic()
        return head

    def put(self, href: str, head: Head) -> None:
        """Keep the head of a file that can be told from a later edition."""
        with self._lock:
            if head.tag is not None:
                self._heads[href] = head
            while len(self._heads) > self.most:
                self._heads.popitem(last=False)

    def forget(self, href: str) -> None:
        """Drop what is known of a file that could not be read: it may be another by now."""
        with self._lock:
            self._heads.pop(href, None)


HEADS = Heads()


class RangeFile:
    """The bytes of a remote file that were fetched so far, and those that are asked for next.

    What went wrong for GDAL is kept in `failure`, since it may carry on without the bytes it did not get. rasterio's
    `FilePath` opens it as it does files of fsspec: `file.fs.open(file.path, file.mode)`.
    """

    path, mode = "", "rb"

    def __init__(self, source: Source, head: Head | None = None):
        self.source = source
        self.failure: BaseException | None = None
        self._chunks: OrderedDict[int, bytes] = OrderedDict()
        self.head = head or self._read_head()  # what another `RangeFile` of the same file can start from
        source.size, source.tag = self.head.size, self.head.tag
        self._store(0, self.head.data)

    @property
    def size(self) -> int:
        """The bytes of the file."""
        return self.source.size or 0

    @property
    def fs(self) -> Self:
        """The file system that has this file only: itself."""
        return self

    def open(self, path: str, mode: str) -> RangeReader:
        """Return a reader at the start of the file."""
        return RangeReader(self)

    def read(self, start: int, stop: int) -> bytes:
        """Return bytes [start, stop), fewer only at the end of the file. Raises what the transport raises."""
        stop = min(stop, self.size)
        if stop <= start:
            return b""
        return self._cached(start, stop) or self._read_ahead(start, stop)

    def _read_ahead(self, start: int, stop: int) -> bytes:
        ahead = self._fetch(start, max(stop, min(start + HEAD_BYTES, self.size)))
        self._store(start, ahead)
        return ahead[: stop - start]

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch byte ranges [start, stop) that will be read, neighbours in one request, several at a time."""
        missing = [r for r in merge_ranges(ranges) if self._cached(*r) is None]
        if len(missing) == 1:
            self._store(missing[0][0], self._fetch(*missing[0]))
        elif missing:
            with ThreadPoolExecutor(min(PARALLEL, len(missing))) as pool:
                for (start, _), data in zip(missing, pool.map(lambda r: self._fetch(*r), missing), strict=True):
                    self._store(start, data)

    def _read_head(self) -> Head:
        data = self.source.fetch(0, HEAD_BYTES)
        return Head(data, self.source.size, self.source.tag, time.monotonic())

    def _fetch(self, start: int, stop: int) -> bytes:
        data = self.source.fetch(start, stop)
        self.head.seen = time.monotonic()  # every answer is of the same edition, or an error
        return data

    def _store(self, start: int, data: bytes) -> None:
        self._chunks[start] = data

    def _cached(self, start: int, stop: int) -> bytes | None:
        for first, data in self._chunks.items():
            if first <= start and stop <= first + len(data):
                return data if (first, len(data)) == (start, stop - start) else data[start - first : stop - first]
        return None


class RangeReader:
    """A position in a `RangeFile`. GDAL calls it through C, where nothing can be raised."""

    def __init__(self, file: RangeFile):
        self._file = file
        self._position = 0

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move as in any file."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def read(self, size: int) -> bytes:
        """Return `size` bytes, fewer at the end of the file, and none from the first failure on."""
        if self._file.failure is not None:
            return b""
        try:
            data = self._file.read(self._position, self._position + size)
        except BaseException as error:  # raised by `open_dataset` when GDAL has returned
            self._file.failure = error
            return b""
        self._position += len(data)
        return data


def merge_ranges(ranges: Iterable[tuple[int, int]], gap: int = GAP_BYTES) -> list[tuple[int, int]]:
    """Merge byte ranges [start, stop) that lie at most `gap` bytes apart; the result is ordered."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start - merged[-1][1] <= gap:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


class RangePath(FilePath):
    """A name by which GDAL opens a `RangeFile` as long as this is entered, as `rasterio.open(opener=...)` has one.

    An opener adds a file system to GDAL's list and removes it again, with every file, while other threads walk through
    that list without a lock: with GDAL 3.10, a process that reads in several threads crashes sooner or later. Names of
    this kind share one file system, which the first `rasterio.Env` adds.
    """

    def __init__(self, file: RangeFile, suffix: str):
        super(FilePath, self).__init__(file, filename=f"asset{suffix}")  # FilePath's own only warns to use an opener


def s3_source(bucket: str, key: str, config: Mapping[str, str]) -> S3Source:
    """Return an object of a bucket; `config` has the options of obstore's S3Store."""
    return S3Source(_s3_store(bucket, tuple(sorted(config.items())), environment_digest()), key)


@lru_cache(maxsize=32)
def _s3_store(bucket: str, config: tuple[tuple[str, str], ...], _environment: str) -> S3Store:
    keys, options = source_keys(), dict(config)
    if "endpoint" in options:
        options["aws_endpoint_url_s3"] = options["endpoint"]  # before which obstore takes the environment's
    return S3Store(
        bucket,
        config=cast("S3Config", options),
        # Not among the options: with them obstore would send the environment's AWS_SESSION_TOKEN.
        credential_provider=None if keys is None else lambda: keys,
        client_options=client_options("s3", timeout=f"{READ_TIMEOUT:g}s", connect_timeout=f"{CONNECT_TIMEOUT:g}s"),
        retry_config={"max_retries": QUICK_RETRIES},
    )
