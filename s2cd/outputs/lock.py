"""One watch at a time in an output folder: an object there says who it is, and is renewed as long as it works."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from threading import Event, Thread

from s2cd.errors import BusyError, OutputError
from s2cd.outputs.store import STALE_SECONDS, Store, open_store

LOCK = "watch.lock"
RENEW_SECONDS = 60.0


@contextmanager
def only_one(out: str) -> Iterator[None]:
    """Keep other watches out of a folder while the block lasts; for buckets too, where no process sees another.

    Raises BusyError if one works there, unless it has not been heard of for ten minutes: then it was killed.
    """
    store = open_store(out)
    owner = f"{socket.gethostname()}, process {os.getpid()}, since {datetime.now(UTC).isoformat()}".encode()
    _take(store, owner)
    ended = Event()
    renewing = Thread(target=_renew, args=(store, owner, ended), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        with suppress(OutputError):  # it goes stale, and what ended the block says more
            if _is_owned(store, owner):
                store.delete(LOCK)


def _take(store: Store, owner: bytes) -> None:
    while not store.create(LOCK, owner):
        found = store.get_aged(LOCK)
        if found is None:  # given back meanwhile
            continue
        other, age = found
        if age < STALE_SECONDS:
            raise BusyError(
                f"{store.out}: a watch works here ({' '.join(other.decode(errors='replace').split())}), heard of "
                f"{age:.0f} s ago, expected none: wait for it; one that was killed is forgotten after {STALE_SECONDS} s"
            )
        store.delete(LOCK)  # two that find it stale in one moment may both go on: they repeat each other's work


def _renew(store: Store, owner: bytes, ended: Event) -> None:
    while not ended.wait(RENEW_SECONDS):
        with suppress(OutputError):  # a bucket that does not answer may do so in a minute
            if _is_owned(store, owner):
                store.put(LOCK, owner)


def _is_owned(store: Store, owner: bytes) -> bool:
    """Whether the lock is still ours: a machine that slept may have lost it."""
    found = store.get_aged(LOCK)
    return found is not None and found[0] == owner
