"""What a run leaves behind: change maps as COGs with STAC items and quicklooks, in one static catalogue."""

from s2cd.outputs.catalog import (
    cataloguing,
    count_inputs,
    finished,
    is_done,
    item_of,
    load_report,
    lost_maps,
    remove_map,
    save_report,
    save_run,
    write_catalog,
)
from s2cd.outputs.checks import validate
from s2cd.outputs.item import MapInfo
from s2cd.outputs.layout import path_of
from s2cd.outputs.lock import only_one
from s2cd.outputs.parts import MapPart, map_part
from s2cd.outputs.recipe import recipe, require_grids, require_levels, require_recipe
from s2cd.outputs.store import absolute, check_writable, place_of
from s2cd.outputs.writer import write_map

__all__ = [
    "MapInfo",
    "MapPart",
    "absolute",
    "cataloguing",
    "check_writable",
    "count_inputs",
    "finished",
    "is_done",
    "item_of",
    "load_report",
    "lost_maps",
    "map_part",
    "only_one",
    "path_of",
    "place_of",
    "recipe",
    "remove_map",
    "require_grids",
    "require_levels",
    "require_recipe",
    "save_report",
    "save_run",
    "validate",
    "write_catalog",
    "write_map",
]
