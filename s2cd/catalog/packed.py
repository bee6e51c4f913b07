"""Scenes in a fortieth of their memory: those of a tile differ in little, so that their pickle compresses well.

A scene takes 3.6 kB, so those of a continent and a year would otherwise weigh most in the client, all through a run.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
WAITING = 8  # records of a group that wait to be packed together


class Packed(Collection[T], Generic[T]):
    """Any number of records, compressed; each iteration makes new ones."""

    def __init__(self, records: Iterable[T] = ()):
        self._count = 0
        self._pieces: list[bytes] = []
        self.extend(records)

    def extend(self, records: Iterable[T]) -> None:
        """Append records."""
        piece = list(records)
        if piece:
            self._pieces.append(zlib.compress(pickle.dumps(piece, pickle.HIGHEST_PROTOCOL), 1))
            self._count += len(piece)

    @classmethod
    def joined(cls, parts: Iterable[Packed[T]]) -> Packed[T]:
        """Return the records of all `parts`, which share what is packed."""
        whole = cls()
        for part in parts:
            whole._pieces += part._pieces
            whole._count += len(part)
        return whole

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        for piece in self._pieces:
            yield from pickle.loads(zlib.decompress(piece))

    def __contains__(self, record: object) -> bool:
        return any(record == other for other in self)


def grouped(records: Iterable[T], key: Callable[[T], str]) -> Iterator[tuple[str, list[T]]]:
    """Yield records by their key, in order of keys, each group in the order in which it came; one is not packed."""
    waiting: dict[str, list[T]] = {}
    packed: dict[str, Packed[T]] = {}
    for record in records:
        name = key(record)
        group = waiting.setdefault(name, [])
        group.append(record)
        if len(group) == WAITING:
            packed.setdefault(name, Packed()).extend(waiting.pop(name))
    for name in sorted(packed.keys() | waiting.keys()):
        yield name, [*packed.pop(name, ()), *waiting.pop(name, ())]
