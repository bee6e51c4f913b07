"""Where things lie in an output folder: `{tile}/{name}.tif`, `.json` and `.png`, one catalogue per tile."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import product
from pathlib import PurePosixPath

from s2cd.errors import OutputError

ROOT = "collection.json"
TILE_CATALOG = "catalog.json"
COLLECTION_ID = "s2cd-change"
VALIDITY = "_validity.tif"
COG_TYPE = "image/tiff; application=geotiff; profile=cloud-optimized"
ITEM_TYPE = "application/geo+json"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".parquet": "application/vnd.apache.parquet",
    ".png": "image/png",
    ".tif": COG_TYPE,
    ".yaml": "application/yaml",
}
SAME_TIME = 2  # seconds: reprocessing moves a sensing time by a millisecond or so, and names cut it to seconds
_NAME = re.compile(r"S2CD_(?P<tile>[\w.\-]*\w)_R[\d\-]+_(?P<start>\d{8}T\d{6})_(?P<end>\d{8}T\d{6})")
_TIME = "%Y%m%dT%H%M%S"
_PART = re.compile(r"[\w.\-]*\w")
_FILE = re.compile(rf"(?P<name>{_NAME.pattern})(?P<extension>{re.escape(VALIDITY)}|\.tif|\.json|\.png)")
_DOCUMENT = re.compile(
    r"collection\.json|run\.yaml|scenes\.parquet|report\.json|watch\.json|watch\.lock|index\.html|\.s2cd-[0-9a-f]{32}"
    r"|[\w.\-]*\w/catalog\.json|views/[\w.\-]+_(R\d{3}|any_orbit)\.json"
)


def tile_of(name: str) -> str:
    """Return the tile in a map's name. Raises OutputError for a name that cannot be a file's."""
    return _match(name)["tile"]


def times_of(name: str) -> tuple[str, str]:
    """Return the two sensing times in a map's name, as RFC 3339."""
    match = _match(name)
    return _rfc3339(match["start"]), _rfc3339(match["end"])


def names_alike(name: str) -> Iterator[str]:
    """Yield the names that a map of the same pair may have, its own first: either time may differ by `SAME_TIME`."""
    yield name
    field, *times = name.rsplit("_", 2)
    shifts = [timedelta(seconds=s) for s in range(-SAME_TIME, SAME_TIME + 1)]
    starts, ends = ([f"{datetime.strptime(t, _TIME) + shift:{_TIME}}" for shift in shifts] for t in times)
    yield from (f"{field}_{start}_{end}" for start, end in product(starts, ends))


def path_of(name: str, extension: str) -> str:
    """Return where a file of a map lies: `path_of(name, ".tif")`."""
    return f"{tile_of(name)}/{name}{extension}"


def is_map_name(name: str) -> bool:
    """Whether a file of this name (without extension) belongs to a map."""
    return _NAME.fullmatch(name) is not None


def can_be_ours(name: str) -> bool:
    """Whether s2cd may write a file or folder of this name, wherever below an output folder."""
    return _PART.fullmatch(name) is not None


def is_ours(path: str) -> bool:
    """Whether a file at this path below an output folder is one that s2cd writes."""
    match = _FILE.fullmatch(path.rpartition("/")[2])
    if match is not None:
        return path == path_of(match["name"], match["extension"])
    return _DOCUMENT.fullmatch(path) is not None


def media_type(path: str) -> str | None:
    """Return the media type of a file at this path below an output folder, None for one that nobody is to look at."""
    file = PurePosixPath(path)
    return ITEM_TYPE if file.suffix == ".json" and is_map_name(file.stem) else _TYPES.get(file.suffix)


def _match(name: str) -> re.Match[str]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise OutputError(f"{name!r} cannot name a map, expected S2CD_{{tile}}_R{{orbit}}_{{time}}_{{time}}")
    return match


def _rfc3339(t: str) -> str:
    return f"{t[:4]}-{t[4:6]}-{t[6:8]}T{t[9:11]}:{t[11:13]}:{t[13:15]}Z"
