"""What an output folder keeps of each field of view: its pairs, and how much of each date an earlier run has seen.

A rerun pairs the dates with that, and looks at no pixel where every pair has its map.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from s2cd.masks import Mask
from s2cd.outputs.layout import is_map_name, is_ours
from s2cd.outputs.store import open_store, understood
from s2cd.survey import SceneInput

FOLDER = "views"


@dataclass(frozen=True)
class View:
    """A field of view's name, the names of its pairs, and the valid fraction of each date by its `fingerprint`."""

    name: str
    pairs: list[str]
    valid: dict[str, float] = field(default_factory=dict)


def fingerprint(scene: SceneInput, mask: Mask) -> str:
    """Return what tells a date that was looked at: its files, how their numbers are read, and what masks them."""
    return hashlib.blake2b(repr((scene, mask)).encode(), digest_size=8).hexdigest()


def write_view(out: str, view: View) -> None:
    """Keep a field of view. Raises OutputError."""
    open_store(out).put(_path(view.name), json.dumps(asdict(view)).encode())


def read_view(out: str, name: str) -> View | None:
    """Return what is kept of a field of view, None if nothing is. Raises OutputError for what is damaged."""
    return _read(out, _path(name)) if open_store(out).size(_path(name)) is not None else None


def read_views(out: str) -> list[View]:
    """Return all fields of view that a folder keeps, by their paths. Raises OutputError."""
    return [_read(out, path) for path in sorted(_paths(out))]


def _paths(out: str) -> Iterable[str]:
    return (path for path, _ in open_store(out).list(FOLDER) if is_ours(path) and f"{FOLDER}/." not in path)


def _read(out: str, path: str) -> View:
    with understood(out, path, "the pairs of a field of view"):
        found = json.loads(open_store(out).get(path))
        valid = {str(key): float(fraction) for key, fraction in found.get("valid", {}).items()}
        view = View(found["name"], list(found["pairs"]), valid)
        if strange := [pair for pair in view.pairs if not is_map_name(pair)]:
            raise ValueError(f"{strange[0]!r} names no map")
        return view


def _path(name: str) -> str:
    return f"{FOLDER}/{name.replace(' ', '_')}.json"
