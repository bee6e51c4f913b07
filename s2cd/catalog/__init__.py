"""STAC in: search, static catalogues, and the scenes they hold."""

from s2cd.catalog.frozen import freeze
from s2cd.catalog.items import scene_from_item, scene_to_item
from s2cd.catalog.search import scene_rows, search

__all__ = ["freeze", "scene_from_item", "scene_rows", "scene_to_item", "search"]
