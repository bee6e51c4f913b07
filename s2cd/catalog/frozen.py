"""A search frozen to disk as stac-geoparquet, so that a run can be repeated exactly."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from io import SEEK_END, BytesIO
from itertools import islice
from os import PathLike, fspath
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from uuid import uuid4

import obstore
import rustac
from arro3.core import RecordBatchReader, Table
from arro3.io import read_parquet
from rustac.exceptions import BaseError as StoreError
from rustac.store import LocalStore

from s2cd.buckets import open_bucket, reason_of
from s2cd.catalog.items import scene_from_item, scene_to_item, understood
from s2cd.catalog.packed import grouped
from s2cd.catalog.scene import Scene
from s2cd.catalog.static import fetch, is_url
from s2cd.errors import CatalogError, NoScenesError, OutputError, S2cdError

PART_OF, EDITION_OF = "s2cd:part_of", "s2cd:edition_of"
MAGIC = b"PAR1"
SUFFIXES = (".parquet", ".geoparquet")
BATCH = 250  # items written at a time: those of a continent are gigabytes


def freeze(scenes: Iterable[Scene], path: str | PathLike[str]) -> None:
    """Write scenes to a stac-geoparquet file (.parquet, .geoparquet); `search(path)` gives back equal scenes.

    Raises NoScenesError without scenes and OutputError if the file cannot be written.
    """
    scenes = scenes if isinstance(scenes, Collection) else tuple(scenes)
    if not scenes:
        raise NoScenesError(f"{fspath(path)}: no scenes to freeze, expected at least one")
    target = writable(path)
    partial = target.with_name(f".s2cd-{uuid4().hex}.parquet")  # a plain name: the writer takes it for part of a URL
    try:
        with ThreadPoolExecutor(1) as thread:  # a notebook has an event loop of its own
            thread.submit(asyncio.run, _write(scenes, partial)).result()
        partial.replace(target)
    except (OSError, rustac.RustacError, StoreError) as error:
        with suppress(OSError):
            partial.unlink()
        raise OutputError(f"{target}: cannot be written: {reason_of(error)}") from error


def writable(path: str | PathLike[str]) -> Path:
    """Return the absolute path of a file to freeze scenes to. Raises OutputError for one that cannot be."""
    target = Path(path).absolute()
    if target.suffix not in SUFFIXES:
        raise OutputError(f"{target}: found a name in {target.suffix!r}, expected {' or '.join(SUFFIXES)}")
    if not os.path.isdir(target.parent) or not os.access(target.parent, os.W_OK):
        raise OutputError(f"{target}: cannot be written: {target.parent} is no folder that can be written to")
    return target


async def _write(scenes: Collection[Scene], path: Path) -> None:
    """Write the items of `scenes`; columns and their types follow from the first batch, so that must show them all."""
    examples = _examples(_all_items(scenes))
    rest = (item for number, item in enumerate(_all_items(scenes)) if number not in examples)
    store = LocalStore(path.parent)
    async with rustac.geoparquet_writer(list(examples.values()), path.name, store=store) as writer:
        while batch := list(islice(rest, BATCH)):
            await writer.write(batch)


def _examples(items: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return, by their number, items that between them have every field of all `items` in every type."""
    known: set[tuple[Any, ...]] = set()
    examples = {}
    for number, item in enumerate(items):
        fields = set(_fields({name: part for name, part in item.items() if name != "geometry"}))
        if not fields <= known:
            known |= fields
            examples[number] = item
    return examples


def _fields(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path and the type of every value in a JSON document."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _fields(part, (*path, name))
    elif isinstance(value, list):
        for part in value:
            yield from _fields(part, (*path, "[]"))
    else:
        yield (*path, type(value))


class _Stored(NamedTuple):
    """A scene of a frozen file, and the ids of those that it is a part or another edition of."""

    scene: Scene
    part_of: str | None
    edition_of: str | None


def read_frozen(path: str | PathLike[str], extra: Collection[str] = ()) -> Iterator[Scene]:
    """Yield every scene of a stac-geoparquet file, of a server or bucket too, tile by tile.

    Items of other programs may be no scenes, of which it warns, and have `extra` assets to keep. Raises CatalogError if
    it is none.
    """
    source = fspath(path)
    if "://" not in source and not os.path.isfile(source):  # pathlib raises an error for a long name
        raise CatalogError(f"{source}: does not exist")
    base = source if "://" in source else str(Path(source).absolute())

    def stored(item: dict[str, Any]) -> _Stored:
        scene = scene_from_item(item, base=base, extra=extra)
        return _Stored(scene, *map(item["properties"].get, (PART_OF, EDITION_OF)))

    for _, scenes in grouped(understood(_read(source), stored), lambda s: s.scene.tile):
        yield from _together(scenes)


def _together(stored: Iterable[_Stored]) -> list[Scene]:
    """Put the scenes of a tile together with their parts and editions."""
    wholes: list[Scene] = []
    parts: dict[str, list[Scene]] = {}
    editions: dict[str, list[Scene]] = {}
    for scene, part_of, edition_of in stored:
        if part_of is not None:
            parts.setdefault(part_of, []).append(scene)
            continue
        wholes.append(scene)
        if edition_of is not None:
            editions.setdefault(edition_of, []).append(scene)
    wholes = [replace(scene, parts=tuple(parts.get(scene.id, ()))) for scene in wholes]
    by_id = {scene.id: scene for scene in wholes}
    others = {scene.id for found in editions.values() for scene in found}
    return [
        replace(scene, editions=tuple(by_id[e.id] for e in editions.get(scene.id, ())))
        for scene in wholes
        if scene.id not in others
    ]


def _read(source: str) -> Iterator[dict[str, Any]]:
    """Yield the file's items, a thousand in memory at a time: rustac alone would hold all, at 75 kB each."""
    try:
        with _opened(source) as file:
            for batch in _batches(file):
                yield from map(_without_nulls, rustac.from_arrow(Table.from_batches([batch]))["features"])
    except S2cdError:
        raise
    except Exception as error:  # arro3 raises no narrower one for a damaged file
        raise CatalogError(f"{source}: cannot be read as stac-geoparquet: {reason_of(error)}") from error


def _opened(source: str) -> BinaryIO:
    if is_url(source):
        return BytesIO(fetch(source))
    if "://" in source:
        bucket, _, name = source.rpartition("/")
        return BytesIO(obstore.get(open_bucket(bucket), name).bytes().to_bytes())
    return Path(source).open("rb")


def _batches(file: BinaryIO) -> RecordBatchReader:
    """Read a Parquet file piece by piece. Raises ValueError if it is none, or its index is damaged."""
    first = file.read(len(MAGIC))
    file.seek(max(0, file.seek(0, SEEK_END) - len(MAGIC)))
    found = (first, file.read())
    if found != (MAGIC, MAGIC):
        raise ValueError(f"found {found[0]!r} at its beginning and {found[1]!r} at its end, expected {MAGIC!r} at both")
    file.seek(0)
    try:
        return read_parquet(file)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust: a BaseException that cannot be imported
            raise
        raise ValueError(f"its index is damaged: {error}") from None


def _all_items(scenes: Iterable[Scene]) -> Iterator[dict[str, Any]]:
    return (item for scene in scenes for item in _items(scene))


def _items(scene: Scene) -> list[dict[str, Any]]:
    pieces = [scene_to_item(part) for part in scene.parts]
    for piece in pieces:
        piece["properties"][PART_OF] = scene.id
    editions = [_items(edition) for edition in scene.editions]
    for edition, *_ in editions:
        edition["properties"][EDITION_OF] = scene.id
    return [scene_to_item(scene), *pieces, *(item for items in editions for item in items)]


def _without_nulls(value: Any) -> Any:
    """Drop the nulls by which a table says that a row has no such field."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
