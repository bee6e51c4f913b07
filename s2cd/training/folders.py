"""Folders and files that training writes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s2cd.errors import OutputError


def made(folder: Path) -> Path:
    """Make a folder and those above it where they are not there, and return it.

    Raises OutputError if that fails or no file can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}, expected a folder to write to") from None
    return folder


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Write a file in the block. Raises OutputError that names it where that fails."""
    try:
        yield path
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        reason = (str(getattr(error, "strerror", None) or error).splitlines() or [type(error).__name__])[0]
        raise OutputError(f"{path}: cannot be written: {reason}") from None
