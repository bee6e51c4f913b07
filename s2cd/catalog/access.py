"""How an asset is opened at read time, on the worker: addresses GDAL knows, options, signatures, retries."""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeVar
from urllib.parse import urlsplit

import rasterio
import urllib3

from s2cd.addresses import local_path
from s2cd.buckets import SOURCE_KEYS, s3_endpoint, source_endpoint, source_keys
from s2cd.catalog.http import Http, retry_policy
from s2cd.catalog.items import parse_time
from s2cd.catalog.providers import PROVIDERS, Provider
from s2cd.catalog.ranges import HEADS, HttpSource, RangeFile, RangePath, S3Source, s3_source
from s2cd.catalog.static import is_url
from s2cd.errors import GridError, ReadError, S2cdError

T = TypeVar("T")

with rasterio.Env():  # adds the file system of `RangePath` before threads read
    pass

# No listing of folders and no search for side files: an asset is one file. One thread, since s2cd reads in many.
GDAL_OPTIONS = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_NUM_THREADS": "1"}
# Known buckets of Amazon's, and the region they stand in; all but those whose readers pay are open.
REGIONS = {
    "deafrica-sentinel-2": "af-south-1",
    "e84-earth-search-sentinel-data": "us-west-2",
    "sentinel-cogs": "us-west-2",
    "sentinel-s2-l1c": "eu-central-1",
    "sentinel-s2-l2a": "eu-central-1",
}
REQUESTER_PAYS = {"sentinel-s2-l1c", "sentinel-s2-l2a"}
# Variables any of which says that this process has keys for S3.
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
ATTEMPTS = 5
FIRST_DELAY = 0.5
LONGEST_DELAY = 20.0
SAS_URL = "https://planetarycomputer.microsoft.com/api/sas/v1/token"
SIGNED_DOMAIN = ".blob.core.windows.net"  # whose tokens SAS_URL gives out: copies of an archive may lie elsewhere
RESIGN_BEFORE = 300.0
FRESH_TOKEN = 5.0


@contextmanager
def open_dataset(provider: str, href: str) -> Iterator[rasterio.DatasetReader]:
    """Open an asset for reading, wherever it lies.

    Remote files are read by `RangeFile`, which counts every byte; what it could not get is raised, even where GDAL
    went on without. Call it inside `with_retries`: signatures expire. Keys and endpoints come from the environment of
    the process that reads: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL or AWS_S3_ENDPOINT, or, where
    maps go elsewhere, S2CD_SOURCE_ACCESS_KEY_ID, S2CD_SOURCE_SECRET_ACCESS_KEY and S2CD_SOURCE_ENDPOINT_URL;
    S2CD_SAS_URL (Planetary Computer's token service) and PC_SDK_SUBSCRIPTION_KEY.

    Args:
        provider: the scene's provider key.
        href: path, file://, http(s):// or s3:// address.

    Raises ReadError if the asset needs keys and there are none; else what rasterio and the transport raise.
    """
    if is_local(href):
        with OPEN_FILES.dataset(local_path(href)) as dataset:
            yield dataset
        return
    source = _source(provider, href)
    file = RangeFile(source, HEADS.get(href, source))
    suffix = PurePosixPath(urlsplit(href).path).suffix
    try:
        with rasterio.Env(**GDAL_OPTIONS), RangePath(file, suffix) as path, path.open() as dataset:
            if file.failure is not None:
                raise file.failure
            HEADS.put(href, file.head)
            _files[id(dataset)] = file
            try:
                yield dataset
            finally:
                del _files[id(dataset)]
    except Exception as error:
        HEADS.forget(href)
        if file.failure is None or file.failure is error:  # an error that is its own cause cannot be pickled
            raise
        raise file.failure from error
    if file.failure is not None:
        raise file.failure


def is_local(href: str) -> bool:
    """Tell a path from an address."""
    return "://" not in href or href.startswith("file://")


@dataclass(frozen=True, slots=True)
class _Idle:
    """An open dataset that nobody reads: of which edition of a file, since when."""

    edition: tuple[object, ...]
    dataset: rasterio.DatasetReader
    since: float


class OpenFiles:
    """Local TIFFs that stay open between two reads, `most` of them: to open one takes as long as a tenth of a block.

    Each holds the bytes of its last block, about a megabyte. A file that was written anew is opened anew.
    """

    def __init__(self, most: int = 128):
        self.most = most
        self._idle: OrderedDict[int, _Idle] = OrderedDict()  # by a number, in order of time
        self._numbers: dict[tuple[object, ...], set[int]] = {}
        self._count = itertools.count()
        self._lock = threading.Lock()

    @contextmanager
    def dataset(self, path: str) -> Iterator[rasterio.DatasetReader]:
        """Lend a dataset to one thread; it is closed after an error."""
        edition = file_edition(path)
        dataset = self._take(edition) or _open(path)
        _editions[id(dataset)] = edition
        try:
            yield dataset
        except BaseException:
            dataset.close()
            raise
        finally:
            del _editions[id(dataset)]
        self._give(edition, dataset)

    def close(self, idle: float = 0.0) -> None:
        """Close what nobody has read for so many seconds: the space of a deleted file is free when it is closed."""
        with self._lock:
            since = time.monotonic() - idle
            old = [self._pop(n) for n in [n for n, entry in self._idle.items() if entry.since <= since]]
        for dataset in old:
            dataset.close()

    def _take(self, edition: tuple[object, ...]) -> rasterio.DatasetReader | None:
        with self._lock:
            numbers = self._numbers.get(edition)
            return self._pop(max(numbers)) if numbers else None

    def _give(self, edition: tuple[object, ...], dataset: rasterio.DatasetReader) -> None:
        if len(edition) == 1 or dataset.driver != "GTiff":  # others hold more than a file handle
            dataset.close()
            return
        with self._lock:
            number = next(self._count)
            self._idle[number] = _Idle(edition, dataset, time.monotonic())
            self._numbers.setdefault(edition, set()).add(number)
            oldest = self._pop(next(iter(self._idle))) if len(self._idle) > self.most else None
        if oldest is not None:
            oldest.close()

    def _pop(self, number: int) -> rasterio.DatasetReader:
        entry = self._idle.pop(number)
        numbers = self._numbers[entry.edition]
        numbers.remove(number)
        if not numbers:
            del self._numbers[entry.edition]
        return entry.dataset


def _open(path: str) -> rasterio.DatasetReader:
    with rasterio.Env(**GDAL_OPTIONS):
        return rasterio.open(path)


def file_edition(path: str) -> tuple[object, ...]:
    """Tell a file from one of the same name; the path alone where GDAL knows it and the system does not."""
    try:
        return _edition(path, os.stat(path))
    except OSError:
        return (path,)


def _edition(path: str, status: os.stat_result) -> tuple[object, ...]:
    return path, status.st_ino, status.st_size, status.st_mtime_ns


OPEN_FILES = OpenFiles()
_editions: dict[int, tuple[object, ...]] = {}  # of open local datasets, by their identity
_files: dict[int, RangeFile] = {}  # of open remote ones


def prefetch(dataset: rasterio.DatasetReader, window: tuple[slice, slice]) -> None:
    """Fetch the blocks of a remote TIFF that `window` (rows, columns) of its first band needs, in few requests.

    Does nothing for local files and other formats. Raises what the transport raises.
    """
    file = _files.get(id(dataset))
    if file is None or dataset.driver not in {"GTiff", "COG"}:
        return
    rows, columns = (
        range(part.start // size, -(-part.stop // size))
        for part, size in zip(window, dataset.block_shapes[0], strict=True)
    )
    file.prefetch(filter(None, (block_range(dataset, block) for block in itertools.product(rows, columns))))


def packed_blocks(dataset: rasterio.DatasetReader, blocks: Sequence[tuple[int, int]]) -> Iterator[bytes] | None:
    """Return what an open TIFF holds of blocks (row, column) of its first band, one after the other.

    None where it leaves out some of them, where its numbers are not little-endian, and where GDAL alone knows the
    file. The iterator raises what the transport raises, and OSError for a file that changed or ends too early.
    """
    file, edition = _files.get(id(dataset)), _editions.get(id(dataset), ())
    found = [block_range(dataset, block) for block in blocks]
    ranges = [r for r in found if r is not None]
    if len(ranges) < len(found) or (file is None and len(edition) < 2):
        return None
    parts = _parts_of(edition, ((0, 2), *ranges)) if file is None else _fetched(file, ((0, 2), *ranges))
    return parts if next(parts) == b"II" else None


def block_range(dataset: rasterio.DatasetReader, block: tuple[int, int]) -> tuple[int, int] | None:
    """Return where a block (row, column) of the first band lies in its file, None for one that is left out."""
    names = (f"BLOCK_{what}_{block[1]}_{block[0]}" for what in ("OFFSET", "SIZE"))
    offset, size = (int(dataset.get_tag_item(name, "TIFF", bidx=1) or 0) for name in names)
    return (offset, offset + size) if offset and size else None


def _parts_of(edition: tuple[object, ...], ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    path = str(edition[0])
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _edition(path, os.fstat(file)) != edition:
            raise OSError("the file changed while it was read")
        for start, stop in ranges:
            yield os.pread(file, stop - start, start)
    finally:
        os.close(file)


def _fetched(file: RangeFile, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    file.prefetch(ranges)
    for start, stop in ranges:
        yield file.read(start, stop)


def _source(provider: str, href: str) -> HttpSource | S3Source:
    record = PROVIDERS.get(provider)
    if href.startswith("s3://"):
        bucket, _, key = href.removeprefix("s3://").partition("/")
        return s3_source(bucket, key, s3_options(provider, href))
    if not is_url(href):
        raise ReadError(href, "found an address of another kind, expected a path, http(s):// or s3://")
    signing = record is not None and record.signing == "planetary-computer"
    signed = signing and (urlsplit(href).hostname or "").endswith(SIGNED_DOMAIN)
    return HttpSource(SIGNER.sign(href) if signed else href)


def require_keys(provider: str, href: str) -> None:
    """Raise ReadError for an asset that asks for keys where this process has none."""
    if href.startswith("s3://"):
        s3_options(provider, href)


def s3_options(provider: str, href: str) -> dict[str, str]:
    """Return options of the S3 client for an object: endpoint, region, whether to sign, who pays.

    A provider's own hold for its own buckets: copies of an archive may lie elsewhere. Keys are not among them: those of
    scenes alone (S2CD_SOURCE_*) go before AWS_*, which sign nothing for buckets that are known to be open.

    Raises ReadError if the object asks for keys and this process has none, or one of two.
    """
    bucket = urlsplit(href).hostname or ""
    record = PROVIDERS.get(provider)
    record = record if record is not None and bucket in record.hosts else None
    pays = bucket in REQUESTER_PAYS
    options = _place(bucket, record) | ({"request_payer": "true"} if pays else {})
    is_open = bucket in REGIONS and not pays
    if _has_source_keys(href) or (not is_open and any(os.environ.get(name) for name in KEYS)):
        return options
    if pays or (record is not None and record.signing == "s3"):
        why = "its readers pay" if pays else f"{provider} asks for keys"
        names = f"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or {' and '.join(SOURCE_KEYS)}"
        raise ReadError(href, f"{why}: set {names}, on the workers")
    return options | {"skip_signature": "true"}


def _place(bucket: str, record: Provider | None) -> dict[str, str]:
    """Options that say where a bucket stands: as the environment has it, else as is known.

    With keys of scenes alone, AWS_ENDPOINT_URL is the server of maps: what is known goes before it.
    """
    own = dict(record.s3_options) if record is not None else {}
    region = REGIONS.get(bucket)
    known = bool(own or region)
    named = source_endpoint() or ({} if known and source_keys() is not None else s3_endpoint())
    if region is None or named:
        return own | named
    return {"region": region, "endpoint": f"https://s3.{region}.amazonaws.com"}  # lest AWS_ENDPOINT_URL is taken


def _has_source_keys(href: str) -> bool:
    found = [name for name in SOURCE_KEYS if os.environ.get(name)]
    if len(found) == 1:
        raise ReadError(href, f"found {found[0]} alone, expected {' and '.join(SOURCE_KEYS)}")
    return bool(found)


@dataclass(frozen=True, slots=True)
class _Token:
    """A shared access signature for a container of an account, and when it should be replaced."""

    query: str
    since: float
    replace_at: float


class SasSigner:
    """Signs Planetary Computer addresses; a token serves a whole container until shortly before it expires."""

    def __init__(self) -> None:
        self._tokens: dict[tuple[str, str], _Token] = {}
        self._lock = threading.Lock()
        self._http = Http(10, retry_policy(), urllib3.Timeout(10, 30))

    def sign(self, href: str) -> str:
        """Return `href` with a signature that is valid for some minutes. Raises ReadError."""
        bare, _, _ = href.partition("?")
        key = _container(bare)
        with self._lock:
            token = self._tokens.get(key)
            if token is None or time.time() >= token.replace_at:
                token = self._tokens[key] = self._fetch(key, bare)
        return f"{bare}?{token.query}"

    def forget(self, href: str) -> None:
        """Drop the token of an address that could not be read, unless it is too new to be the cause."""
        with self._lock:
            key = _container(href.partition("?")[0])
            if key in self._tokens and time.time() - self._tokens[key].since > FRESH_TOKEN:
                del self._tokens[key]

    def _fetch(self, key: tuple[str, str], href: str) -> _Token:
        url = f"{os.environ.get('S2CD_SAS_URL', SAS_URL).rstrip('/')}/{key[0]}/{key[1]}"
        subscription = os.environ.get("PC_SDK_SUBSCRIPTION_KEY")
        headers = {"Ocp-Apim-Subscription-Key": subscription} if subscription else {}
        try:
            answer = self._http.request("GET", url, headers=headers)
            if answer.status != 200:
                raise ReadError(href, f"cannot be signed: {url} answered {answer.status}")
            document = json.loads(answer.data)
            now = time.time()
            left = parse_time(document["msft:expiry"]).timestamp() - now
            return _Token(document["token"], now, now + left - min(RESIGN_BEFORE, left / 10))
        except (urllib3.exceptions.HTTPError, ValueError, KeyError) as error:
            raise ReadError(href, f"cannot be signed at {url}: {' '.join(str(error).split())}") from error


def _container(href: str) -> tuple[str, str]:
    """Storage account and container of an Azure blob address."""
    parts = urlsplit(href)
    return (parts.hostname or "").partition(".")[0], parts.path.lstrip("/").partition("/")[0]


SIGNER = SasSigner()


def with_retries(read: Callable[[], T], href: str) -> T:
    """Call `read` until it succeeds, with exponential back-off and jitter between attempts.

    Local files get one attempt: they do not recover. A file that is not there is asked for twice. Of our own errors
    only GridError is tried again, once, since a damaged header can look like another grid; the others pass through.

    Raises ReadError that names `href` and the last failure.
    """
    why = "no attempt was made"
    for attempt, delay in enumerate(_delays(1 if is_local(href) else ATTEMPTS)):
        try:
            return read()
        except GridError:
            if attempt or delay is None:
                raise
        except S2cdError:
            raise
        except Exception as error:
            why = _one_line(error)
            if delay is None or (attempt and isinstance(error, FileNotFoundError)):
                break
        SIGNER.forget(href)
        time.sleep(delay)
    raise ReadError(href, why)  # without GDAL's error as its cause: that cannot be unpickled, and Dask would lose both


def _one_line(error: Exception) -> str:
    """What went wrong: GDAL's words where rasterio only points at them, without the internals that obstore appends."""
    told = error.__cause__ if error.__cause__ and "previous exception" in str(error) else error
    return " ".join(str(told).partition("Debug source:")[0].split())


def _delays(tries: int) -> Iterator[float | None]:
    """Seconds to wait after each failed attempt, None after the last."""
    for attempt in range(tries - 1):
        yield min(FIRST_DELAY * 2**attempt, LONGEST_DELAY) * random.uniform(0.5, 1.0)
    yield None
