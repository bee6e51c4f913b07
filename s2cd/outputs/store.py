"""A folder or bucket that results go to: whole objects under their final names, or nothing."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore

from s2cd.addresses import local_path, public_href
from s2cd.buckets import environment_digest, open_bucket, reason_of
from s2cd.errors import OutputError
from s2cd.outputs.deflated import Buffer
from s2cd.outputs.layout import can_be_ours, is_ours, media_type

if TYPE_CHECKING:
    from obstore import Attributes

STALE_SECONDS = 600
UPLOADS = 4  # pieces of 5 MB on their way at a time: on a thin link each gets its share before it times out
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What Python raises where a JSON document is none, or lacks what is taken from it."""
_STAGED = re.compile(r"(.*)#\d+")  # obstore writes "name#1" and renames it to "name"


class Store:
    """Objects by name ("31UDS/x.tif") under a local folder or a URL such as s3://bucket/prefix.

    Credentials come from the environment only, as obstore reads it (AWS_ACCESS_KEY_ID, ...), and so do servers of S3
    (AWS_ENDPOINT_URL or AWS_S3_ENDPOINT).
    Raises OutputError for a file, a URL of an unknown kind or a folder that cannot be made.
    """

    def __init__(self, out: str):
        self.out = str(out)
        self.folder = local_folder(self.out)
        is_there(self.out)
        with _output_errors(self.out, "cannot be used"):
            self._store: Any = LocalStore(self.folder, mkdir=True) if self.folder else open_bucket(self.out)

    def put(self, name: str, data: bytes | Iterator[Buffer]) -> None:
        """Write an object, which may come in pieces.

        After this call it is there whole, or OutputError was raised and nothing is.
        """
        with _output_errors(f"{self.out}: {name}", "cannot be written"):
            obstore.put(
                self._store,
                name,
                data,  # type: ignore[arg-type]  # NumPy
                attributes=self._attributes(name),
                max_concurrency=UPLOADS,
            )

    def get(self, name: str) -> bytes:
        """Return an object's bytes. Raises OutputError if it is missing or cannot be read."""
        with _output_errors(f"{self.out}: {name}", "cannot be read"):
            return obstore.get(self._store, name).bytes().to_bytes()

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless it is there; return whether it was written, to one of several that try at once."""
        with _output_errors(f"{self.out}: {name}", "cannot be written"):
            try:
                obstore.put(self._store, name, data, mode="create", attributes=self._attributes(name))
            except AlreadyExistsError:
                return False
        return True

    def get_aged(self, name: str) -> tuple[bytes, float] | None:
        """Return an object's bytes and how many seconds ago they were written, None if it is not there."""
        with _output_errors(f"{self.out}: {name}", "cannot be read"):
            try:
                found = obstore.get(self._store, name)
                return found.bytes().to_bytes(), time.time() - found.meta["last_modified"].timestamp()
            except FileNotFoundError:
                return None

    def size(self, name: str) -> int | None:
        """Return how many bytes an object has, None if it is not there."""
        with _output_errors(f"{self.out}: {name}", "cannot be looked up"):
            try:
                return int(obstore.head(self._store, name)["size"])
            except FileNotFoundError:
                return None

    def list(self, prefix: str | None = None) -> Iterator[tuple[str, int]]:
        """Yield (name, size in bytes) of every object below a folder, in no particular order.

        Of a local folder only where ours may lie: what else is below it, such as lost+found, may be unreadable.
        """
        with _output_errors(self.out, "cannot be listed"):
            if self.folder is not None:
                yield from _files(self.folder, prefix or "")
                return
            for batch in obstore.list(self._store, prefix=prefix):
                yield from ((str(meta["path"]), int(meta["size"])) for meta in batch)

    def delete(self, name: str) -> None:
        """Remove an object; one that is not there is no error."""
        with _output_errors(f"{self.out}: {name}", "cannot be deleted"):
            try:
                obstore.delete(self._store, name)
            except FileNotFoundError:
                return

    def _attributes(self, name: str) -> Attributes | None:
        """What a browser must know to show an object of a bucket; folders keep none."""
        kind = media_type(name)
        return {"Content-Type": kind} if kind and self.folder is None else None

    def sweep(self) -> None:
        """Remove what a writer that was killed left of unfinished objects in a local folder.

        Anything younger than ten minutes may still be in the making and stays, and so does what is not ours.
        """
        if self.folder is None:
            return
        with suppress(OSError):  # files and folders may go meanwhile, and what stays does no harm
            for path in (*self.folder.glob("*#*"), *self.folder.glob("*/*#*")):
                staged = _STAGED.fullmatch(path.relative_to(self.folder).as_posix())
                if staged and is_ours(staged[1]):
                    _remove_stale(path)


def _files(folder: Path, below: str = "") -> Iterator[tuple[str, int]]:
    """Yield path and size of each file in a folder and in its folders, or only in its folder `below`."""
    for name, status in _entries(folder / below):
        path = f"{below}/{name}".lstrip("/")
        if stat.S_ISREG(status.st_mode):
            yield path, status.st_size
        elif stat.S_ISDIR(status.st_mode) and not below:
            yield from _files(folder, name)


def _entries(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield what lies in a folder under names such as ours; nothing if it is gone."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if can_be_ours(entry.name) and (status := _status(entry)):
                    yield entry.name, status
    except FileNotFoundError:
        return


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Return what a name stands for, None for what is gone and for a link that leads nowhere or to itself."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ELOOP}:
            return None
        raise


def open_store(out: str) -> Store:
    """Return the store of an output folder; one per process and keys, since tasks ask for it again and again."""
    return _open_store(out, environment_digest())


@lru_cache(maxsize=8)
def _open_store(out: str, _environment: str) -> Store:
    return Store(out)


def require_there(out: str) -> None:
    """Raise OutputError for a folder that is not there: to look at results must not make one."""
    if not is_there(out):
        raise OutputError(f"{out}: is no folder, expected one that a run has written to")


def is_there(out: str) -> bool:
    """Whether `out` is a folder or names a bucket. Raises OutputError for a file, and for what may not be looked at."""
    folder = local_folder(out)
    try:
        mode = folder.stat().st_mode if folder else stat.S_IFDIR
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise OutputError(f"{out} cannot be used: {reason_of(error)}") from None
    if not stat.S_ISDIR(mode):
        raise OutputError(f"{out}: is a file, expected a folder or a URL")
    return True


def check_writable(out: str) -> None:
    """Write and remove a small object, and clear what a killed run left unfinished.

    Raises OutputError that names the folder and the reason: a missing permission, a file in the way, a full disk,
    a bucket that does not answer.
    """
    store = Store(out)
    probe = f".s2cd-{uuid4().hex}"
    with _output_errors(store.out, "cannot be written to"):
        obstore.put(store._store, probe, bytes(4096))
        obstore.delete(store._store, probe)
    store.sweep()


def _remove_stale(path: Path) -> None:
    with suppress(OSError):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_mtime < time.time() - STALE_SECONDS:
            path.unlink()


def local_folder(out: str) -> Path | None:
    """Return the folder that `out` names, None for a URL of a remote store. Raises OutputError for file://name."""
    path = local_path(out)
    if not path:
        raise OutputError(f"{out}: found no path, expected one such as file:///maps")
    return None if "://" in path else Path(path).absolute()


def absolute(out: str) -> str:
    """Return `out` so that it means the same in every process: a local folder by its whole path."""
    folder = local_folder(out)
    return out if folder is None else str(folder)


def place_of(out: str) -> str:
    """Name an output folder as this machine sees it, for a person."""
    return public_href(out) if local_folder(out) is None else f"{out} on {socket.gethostname()}"


@contextmanager
def understood(out: str, name: str, expected: str) -> Iterator[None]:
    """Raise OutputError that names the folder and the object if what the block takes from its JSON is not there."""
    try:
        yield
    except DAMAGED as error:
        raise OutputError(f"{out}: {name}: {type(error).__name__} {error}, expected {expected}") from None


@contextmanager
def _output_errors(what: str, failure: str) -> Iterator[None]:
    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        raise OutputError(f"{what} {failure}: {reason_of(error)}") from error
