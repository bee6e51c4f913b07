"""What decides the content of a map beyond its pair: the maps of one folder share it, and their items tell it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from s2cd.catalog.scene import Grid
from s2cd.errors import OutputError
from s2cd.outputs.layout import path_of, tile_of
from s2cd.outputs.profiles import PROFILES
from s2cd.outputs.store import open_store, understood

Recipe = dict[str, Any]


def recipe(model: str, model_hash: str, mask: Mapping[str, Any], *, validity: bool, cog_profile: str) -> Recipe:
    """Return how maps are made, by option.

    model, model_hash  name, or path, and SHA-256 of the weights
    mask               as `Mask.description` gives it
    validity           whether a layer beside each map tells why a pixel has no value
    cog_profile        key of `s2cd.outputs.profiles.PROFILES`
    """
    return {
        **_by_option(model, model_hash, mask),
        "validity": validity,
        "cog_profile": cog_profile,
        "data_type": PROFILES[cog_profile].dtype,
    }


def recipe_of(item: Mapping[str, Any]) -> Recipe:
    """Return what the item of a map says of how it was made; None where it says nothing."""
    properties, assets = item["properties"], item["assets"]
    profile = properties.get("s2cd:cog_profile")
    return {
        **_by_option(properties.get("s2cd:model"), properties.get("s2cd:model_hash"), properties.get("s2cd:mask", {})),
        "validity": "validity" in assets,
        "cog_profile": profile,
        "data_type": None if profile else assets["change"]["raster:bands"][0]["data_type"],
    }


def difference(found: Recipe, expected: Recipe) -> str:
    """Say in what two recipes differ, "" if in nothing: what one of them does not state contradicts nothing."""
    return "; ".join(
        f"{option} {value}, expected {expected[option]}"
        for option, value in found.items()
        if value is not None and expected[option] is not None and value != expected[option]
    )


def require_recipe(out: str, names: Collection[str], expected: Recipe) -> None:
    """Raise OutputError if these finished maps of a folder were made in another way than `expected`.

    One item is read and stands for all, since nothing is added to a folder without asking. What an item of an
    earlier version does not state contradicts nothing.
    """
    if not names:
        return
    path = path_of(min(names), ".json")
    with understood(out, path, "the item of a map"):
        found = recipe_of(json.loads(open_store(out).get(path)))
    if differ := difference(found, expected):
        raise OutputError(f"{out} holds maps of {differ}: choose another folder for these options, or ask for the same")


def require_grids(out: str, names: Iterable[str], expected: Mapping[str, Grid]) -> None:
    """Raise OutputError if the finished maps of a tile lie on another grid than `expected` says, as maps of a part do.

    One item of each tile is read and stands for all.
    """
    for tile, name in {tile_of(name): name for name in sorted(names, reverse=True)}.items():
        if tile not in expected:
            continue
        path = path_of(name, ".json")
        with understood(out, path, "the item of a map"):
            properties = json.loads(open_store(out).get(path))["properties"]
            shape, transform = (tuple(properties[f"proj:{what}"]) for what in ("shape", "transform"))
            grid = Grid(properties["proj:epsg"], transform, shape)
            same = _same(grid, expected[tile])
        if not same:
            found, wanted = _place(grid), _place(expected[tile])
            raise OutputError(
                f"{out} holds maps of {tile} of {found}, expected {wanted}: choose another folder for maps of a part"
            )


def require_levels(out: str, name: str, expected: tuple[str, str]) -> None:
    """Raise OutputError if a finished map shows dates of other processing levels than (earlier, later) `expected`."""
    path = path_of(name, ".json")
    with understood(out, path, "the item of a map"):
        found = tuple(json.loads(open_store(out).get(path))["properties"].get("s2cd:levels", expected))
    if found != expected:
        told, wanted = (" and ".join(dict.fromkeys(levels)) for levels in (found, expected))
        raise OutputError(f"{out} holds {name} of {told}, expected {wanted}: choose another folder for these")


def _same(found: Grid, expected: Grid) -> bool:
    """Tell whether two grids are one, to a hundredth of a pixel at either corner."""
    alike = found.epsg == expected.epsg and found.shape == tuple(expected.shape)
    gaps = (abs(a - b) for a, b in zip(_corners(found), _corners(expected), strict=True))
    return alike and max(gaps) < 0.01 * abs(expected.transform[0])


def _corners(grid: Grid) -> tuple[float, float, float, float]:
    (width, _, left, _, height, top), (rows, cols) = grid.transform, grid.shape
    return left, top, left + cols * width, top + rows * height


def _place(grid: Grid) -> str:
    left, top = grid.transform[2], grid.transform[5]
    return f"{grid.shape[0]} x {grid.shape[1]} pixels from ({left:.10g}, {top:.10g}) in EPSG:{grid.epsg}"


def _by_option(model: str | None, model_hash: str | None, mask: Mapping[str, Any]) -> Recipe:
    return {
        "model": f"{Path(model).name} ({model_hash[:12]})" if model and model_hash else None,
        "mask": mask.get("function", mask.get("band")),
        "mask_classes": sorted(mask["invalid"]) if "invalid" in mask else None,
        "mask_dilation": mask.get("dilation"),
    }
