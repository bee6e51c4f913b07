"""What a run leaves behind: change maps as COGs with STAC items and quicklooks, in one static catalogue."""

from s2cd.outputs.catalog import finished, is_done, save_report, save_run, write_catalog
from s2cd.outputs.checks import validate
from s2cd.outputs.item import MapInfo
from s2cd.outputs.layout import path_of
from s2cd.outputs.recipe import recipe, require_recipe
from s2cd.outputs.store import check_writable
from s2cd.outputs.writer import write_map

__all__ = [
    "MapInfo",
    "check_writable",
    "finished",
    "is_done",
    "path_of",
    "recipe",
    "require_recipe",
    "save_report",
    "save_run",
    "validate",
    "write_catalog",
    "write_map",
]
