"""What a run will do, decided from metadata alone: which dates are compared, in which pieces, and why not others."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from operator import itemgetter
from typing import Any

from s2cd import outputs
from s2cd.catalog.access import require_keys
from s2cd.catalog.bands import SCL
from s2cd.catalog.filters import make_filter
from s2cd.catalog.packed import Packed, grouped
from s2cd.catalog.scene import Scene
from s2cd.catalog.search import found_scenes
from s2cd.clusters.profiles import CudaProfile, LocalProfile, load_profile
from s2cd.config import RunConfig
from s2cd.cube import common_grid, finest_grid
from s2cd.errors import ConfigError, NoScenesError, S2cdWarning
from s2cd.masks import Mask, extra_assets
from s2cd.model import Model, load_model
from s2cd.model.device import choose_device
from s2cd.outputs.layout import names_alike
from s2cd.pairs import LeftOut, Pair, PairList, consecutive_pairs, fields_of_view, select_scenes
from s2cd.reader import Tiling
from s2cd.sizes import Sizes, Workers, task_sizes


@dataclass(frozen=True)
class FieldOfView:
    """All scenes of one tile and relative orbit that metadata let pass, in order of time."""

    name: str
    dates: Packed[Scene]

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """The scenes, unpacked at each call: a run holds those of a few fields of view at a time."""
        return tuple(self.dates)


@dataclass(frozen=True)
class Plan:
    """What a run will do, as far as metadata tell: pixels may still rule out scenes (see `min_valid`)."""

    config: RunConfig
    fields: tuple[FieldOfView, ...]
    left_out: Collection[LeftOut]
    finished: frozenset[str]

    @property
    def scenes(self) -> Collection[Scene]:
        """Every scene that takes part; those of one field of view in memory at a time."""
        return Packed.joined(view.dates for view in self.fields)

    @property
    def steps(self) -> int:
        """How many pairs there are, before pixels rule out dates."""
        return sum(len(view.dates) - 1 for view in self.fields)

    def map_of(self, pair: Pair) -> str | None:
        """Return the name of the pair's finished map, None if there is none that shows every piece of its dates.

        Raises OutputError if the item of the map of a split date cannot be understood.
        """
        if not self.finished:  # as in every run that is new: a tenth of a millisecond a pair
            return None
        return next((n for n in names_alike(pair.name) if n in self.finished and self._is_whole(n, pair)), None)

    def maps_of_pieces(self, pair: Pair) -> set[str]:
        """Return all finished maps of the pair, also those named after another piece of a split date."""
        before, after = ((scene, *scene.parts) for scene in (pair.before, pair.after))
        names = (Pair(*pieces).name for pieces in product(before, after))
        return {alike for name in names for alike in names_alike(name) if alike in self.finished}

    def is_alone(self, pair: Pair, name: str) -> bool:
        """Whether no other map was made of the pair when one of its dates lacked a piece."""
        return not (pair.before.parts or pair.after.parts) or self.maps_of_pieces(pair) == {name}

    def _is_whole(self, name: str, pair: Pair) -> bool:
        """Whether a map was made of as many pieces as its pair has now: half a date may be published before the rest.

        Their number tells, since reprocessing changes ids and keeps maps.
        """
        pieces = 2 + len(pair.before.parts) + len(pair.after.parts)
        return pieces == 2 or outputs.count_inputs(self.config.out, name) >= pieces


def make_plan(config: RunConfig, scenes: Iterable[Scene] | None = None) -> Plan:
    """Search the catalogue (or take `scenes`) and decide which dates are compared, by metadata alone.

    Scenes that cannot be read (`usable_scenes`) are left out with a warning.

    Raises CatalogError, NoScenesError if no two dates can be compared, ConfigError for a mask that cannot be used and
    where no scene offers what model and mask need, ModelError for an unknown model, and GridError if the scenes of one
    tile lie on different grids, none of which most of them share.
    """
    mask_of(config)
    model = load_model(config.model, device="cpu")
    fields: list[FieldOfView] = []
    left_out, unusable = Packed[LeftOut](), Packed[LeftOut]()
    unclassified = Packed[str]()
    count = 0
    for _, found in grouped(search_scenes(config) if scenes is None else scenes, lambda scene: scene.tile):
        count += len(found)
        usable, others = usable_scenes(found, model, config)
        unusable.extend(others)
        if config.mask == SCL:
            unclassified.extend(s.id for s in usable if s.level == "L2A" and SCL not in s.assets)
        kept, unused = select_scenes(usable, max_cloud=config.max_cloud)
        for series in fields_of_view(kept, "any" if config.orbit == "any" else "same"):
            if len(series) == 1:
                unused.append(LeftOut(series[0].id, "the only date left of its tile and orbit"))
                continue
            fields.append(FieldOfView(view_name(series, config), Packed(series)))
        left_out.extend(unused)
    warn_of_unusable(unusable)
    if unclassified:
        told = f"{len(unclassified)} L2A scenes have no scene classification, the first: {next(iter(unclassified))}"
        warnings.warn(f"{told}: a simple test of their spectra tells clouds, and no shadows", S2cdWarning, stacklevel=2)
    left_out.extend(unusable)
    if len(unusable) == count > 0:
        first = next(iter(unusable))
        raise ConfigError(f"none of {count} scenes can be used, the first: {first.what} {first.reason}")
    if not fields:
        reasons = "; ".join(f"{item.what}: {item.reason}" for item in islice(left_out, 3))
        raise NoScenesError(
            f"{config.catalog}: {count} scenes found, but no two dates of one tile and orbit ({reasons})"
        )
    return Plan(config, tuple(fields), left_out, frozenset(outputs.finished(config.out)))


def usable_scenes(scenes: Iterable[Scene], model: Model, config: RunConfig) -> tuple[list[Scene], list[LeftOut]]:
    """Split the scenes of one tile into those that a run can read and those that it has to leave out.

    The latter lack a band of the model, the mask, or the scene classification where others of their level have one;
    or their pixels are not of the model's size, or they lie on another grid than most scenes.
    """
    scenes = list(scenes)
    classified = {scene.level for scene in scenes if SCL in scene.assets} if config.mask == SCL else set()
    usable: list[Scene] = []
    left_out: list[LeftOut] = []
    for scene in scenes:
        needed = [*model.bands, *extra_assets(config.mask), *([SCL] if scene.level in classified else [])]
        if reason := _lacks(scene, needed) or model.misfit(abs(finest_grid(scene, model.bands).transform[0])):
            left_out.append(LeftOut(scene.id, reason))
        else:
            usable.append(scene)
    grids = [finest_grid(scene, model.bands) for scene in usable]
    usual, most = max(Counter(grids).items(), key=itemgetter(1), default=(None, 0))
    if most <= len(usable) / 2:
        return usable, left_out
    strays = [(scene, grid) for scene, grid in zip(usable, grids, strict=True) if grid != usual]
    left_out += [LeftOut(s.id, f"lies on {g}, {most} of {len(usable)} of its tile on {usual}") for s, g in strays]
    return [scene for scene, grid in zip(usable, grids, strict=True) if grid == usual], left_out


def _lacks(scene: Scene, needed: Collection[str]) -> str | None:
    """Say which of the assets that are needed a scene, or a piece of it, does not offer."""
    offered = set.intersection(*(set(piece.assets) for piece in (scene, *scene.parts)))
    lacking = [name for name in needed if name not in offered]
    return f"offers no {', '.join(lacking)}, only {', '.join(sorted(offered))}" if lacking else None


def warn_of_unusable(left_out: Collection[LeftOut]) -> None:
    """Tell of scenes that `usable_scenes` leaves out."""
    if left_out:
        first = next(iter(left_out))
        told = f"{len(left_out)} scenes left out, the first: {first.what} {first.reason}"
        warnings.warn(told, S2cdWarning, stacklevel=3)


def mask_of(config: RunConfig) -> Mask:
    """Return the mask that `config` describes. Raises ConfigError for one that cannot be used."""
    return Mask.parse(config.mask, config.mask_classes, round(config.mask_dilation / 10))


@dataclass(frozen=True)
class PlanTable:
    """A plan in words and figures, for a person."""

    pairs: int
    rows: list[dict[str, Any]]
    notes: list[str]
    left_out: list[LeftOut]


def describe_plan(plan: Plan) -> PlanTable:
    """Say what a plan compares, reads and writes, from metadata alone.

    Raises ModelError for an unknown model or device, ReadError for scenes that ask for keys, ClusterError for a wrong
    cluster profile, OutputError if the finished maps were made with other options, of another level or on other grids.
    """
    model = load_model(plan.config.model, device="cpu")
    require_same_recipe(plan.config, model, plan.finished)
    require_same_grids(plan, model)
    require_same_levels(plan)
    require_usable_here(plan)
    mask = mask_of(plan.config)
    workers = Workers.of_profile(load_profile(plan.config.cluster), plan.config.device)
    rows, tasks, total, missing, decoded = [], 0, 0, 0, 0
    chunks: dict[str, None] = {}  # in order, each once
    left_out, left = list(plan.left_out), plan.steps
    for view in plan.fields:
        scenes, pairs = view.scenes, pairs_of(view, plan.config)
        left_out += pairs.left_out
        todo = [pair for pair in pairs if plan.map_of(pair) is None]
        left -= len(scenes) - 1 - len(todo)  # as a run counts: what is finished needs no unit
        grid = common_grid(scenes[:1], model.bands)
        sizes = task_sizes(plan.config, grid.shape, left, model, workers)
        tiling = Tiling(grid.shape, sizes.chunk, model.halo, model.stride)
        total += len(pairs)
        if todo:
            chunks[_explain(plan.config, tiling, sizes, workers)] = None
            units = -(-len(todo) // (sizes.dates - 1))
            tasks += units * tiling.blocks[0] * tiling.blocks[1] + len(todo) + len(scenes)
            shown = {s.id: s for pair in todo for s in (pair.before, pair.after)}
            decoded += sum(_decoded_bytes(scene, model.bands, mask.band) for scene in shown.values())
            missing += len(todo)
        rows.append(
            {
                "field of view": view.name,
                "dates": len(scenes),
                "first": f"{scenes[0].time:%Y-%m-%d}",
                "last": f"{scenes[-1].time:%Y-%m-%d}",
                "pairs": len(pairs),
                "finished": len(pairs) - len(todo),
                "pixels": f"{grid.shape[0]} x {grid.shape[1]}",
                "chunks": f"{tiling.blocks[0]} x {tiling.blocks[1]} of {sizes.chunk}",
            }
        )
    notes = [
        f"model {model.name} ({model.hash[:12]}): bands {', '.join(model.bands)}, halo {model.halo} px",
        *chunks,
        f"{tasks / missing:.1f} tasks a pair, {decoded / 1e9:.2f} GB to decode, each block once a unit"
        if missing
        else f"nothing is left to do: {total} maps are finished",
        "pixels may still rule out dates with less than "
        f"{plan.config.min_valid:.0%} valid: their neighbours are then paired",
    ]
    return PlanTable(total, rows, notes, left_out)


def search_scenes(config: RunConfig) -> Iterator[Scene]:
    """Search the catalogue that `config` names, once. Raises CatalogError and NoScenesError when it comes to them."""
    orbit = config.orbit if isinstance(config.orbit, int) else None
    wanted = make_filter(config.bbox, config.datetime, config.tiles, orbit)
    return found_scenes(config.catalog, wanted, config.collection, extra_assets(config.mask))


def pairs_of(view: FieldOfView, config: RunConfig, valid_fractions: dict[str, float] | None = None) -> PairList:
    """Pair the scenes of a field of view as `config` asks; `valid_fractions` by scene id, if pixels were looked at."""
    return consecutive_pairs(
        view.scenes,
        min_valid=None if valid_fractions is None else config.min_valid,
        max_gap_days=config.max_gap_days,
        valid_fractions=valid_fractions,
        orbit="any" if config.orbit == "any" else "same",
    )


def _explain(config: RunConfig, tiling: Tiling, sizes: Sizes, workers: Workers) -> str:
    """Say where the size of a task comes from, and what the halo of a chunk costs."""
    rows, cols = tiling.blocks
    spans = [tiling.read(row, 0)[0] for row in range(rows)], [tiling.read(0, col)[1] for col in range(cols)]
    read = [sum(span.stop - span.start for span in axis) for axis in spans]
    more = read[0] * read[1] / (tiling.shape[0] * tiling.shape[1]) - 1
    chunk, dates = ("auto" if option == "auto" else "as asked for" for option in (config.chunk, config.dates_per_task))
    offered = [
        f"about {need / 1e9:.2f} GB a thread, of "
        + (f"{size / 1e9:.1f} GB of {where}" if size and math.isfinite(size) else f"{where} of unknown size")
        for need, size, where in (
            (sizes.need, workers.memory, "memory"),
            (sizes.device_need, workers.device, "its GPU"),
        )
        if need
    ]
    return (
        f"chunks of {tiling.chunk} px ({chunk}), {sizes.dates} dates a task ({dates}): {' and '.join(offered)};"
        f" halos of {tiling.halo} px add {more:.0%} to the"
        " network's work"
    )


def _decoded_bytes(scene: Scene, bands: Sequence[str], mask: str) -> int:
    shapes = [scene.assets[band].grid.shape for band in bands]
    classes = scene.assets[mask].grid.shape if mask in scene.assets else (0, 0)
    return sum(2 * rows * cols for rows, cols in shapes) + classes[0] * classes[1]


def require_usable_here(plan: Plan) -> None:
    """Find out early what the workers of a cluster on this machine would find out one by one.

    Raises ModelError for a device that is not there, ReadError for scenes that ask for keys which are not there.
    """
    if not isinstance(load_profile(plan.config.cluster), LocalProfile | CudaProfile):
        return
    choose_device(plan.config.device)
    scene = next(iter(plan.fields[0].dates))
    require_keys(scene.provider, next(iter(scene.assets.values())).href)


def require_same_recipe(config: RunConfig, model: Model, finished: Collection[str]) -> None:
    """Raise OutputError if the finished maps of the output folder were made in another way than `config` asks for."""
    mask = mask_of(config).description
    recipe = outputs.recipe(config.model, model.hash, mask, validity=config.validity, cog_profile=config.cog_profile)
    outputs.require_recipe(config.out, finished, recipe)


def require_same_grids(plan: Plan, model: Model) -> None:
    """Raise OutputError if finished maps of a tile lie on another grid than its scenes: maps of a part are no maps."""
    if plan.finished:
        firsts = (next(iter(view.dates)) for view in plan.fields)
        grids = {scene.tile: finest_grid(scene, model.bands) for scene in firsts}
        outputs.require_grids(plan.config.out, plan.finished, grids)


def require_same_levels(plan: Plan) -> None:
    """Raise OutputError if a finished map shows a pair at another processing level than the plan would: L1C, not L2A.

    One map of each field of view stands for all.
    """
    for view in plan.fields if plan.finished else ():
        maps = ((pair, plan.map_of(pair)) for pair in pairs_of(view, plan.config))
        pair, name = next(((pair, name) for pair, name in maps if name), (None, None))
        if pair and name:
            outputs.require_levels(plan.config.out, name, (pair.before.level, pair.after.level))


def view_name(series: Sequence[Scene], config: RunConfig) -> str:
    """Return the name of the field of view that these scenes share: "31UDS R051"."""
    return f"{series[0].tile} {'any orbit' if config.orbit == 'any' else f'R{series[0].orbit or 0:03d}'}"
