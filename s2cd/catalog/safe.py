"""Folders of .SAFE products, read from their own metadata."""

from __future__ import annotations

from pathlib import Path

from s2cd.catalog.scene import Scene
from s2cd.errors import CatalogError


def find_products(folder: Path) -> list[Path]:
    """Return the .SAFE products in `folder`, or `folder` itself if it is one."""
    return [folder] if folder.suffix == ".SAFE" else sorted(p for p in folder.glob("*.SAFE") if p.is_dir())


def scene_from_safe(product: Path) -> Scene:
    """Read a scene from a .SAFE product. Raises CatalogError."""
    raise CatalogError(f"{product}: .SAFE products cannot be read yet")
