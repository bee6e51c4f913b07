"""Folders that training writes to."""

from __future__ import annotations

from pathlib import Path

from s2cd.errors import OutputError


def made(folder: Path) -> Path:
    """Make a folder and those above it where they are not there, and return it. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror}, expected a folder to write to") from None
    return folder
