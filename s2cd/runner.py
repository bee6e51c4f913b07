"""plan -> bounded submission -> report; a rerun goes on where the last one stopped.

The client searches once, decides what is compared with what, and keeps a few units of work (the pairs of some
consecutive dates of one field of view) on the cluster at a time, so that neither its memory nor the scheduler's grows
with the number of tiles.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import dask
import numpy as np
import xarray as xr
from distributed import Client, Future, wait

from s2cd import catalog, outputs
from s2cd.catalog.bands import SCL
from s2cd.catalog.scene import Grid, Scene
from s2cd.config import RunConfig
from s2cd.cube import common_grid, cube_grid
from s2cd.errors import ConfigError, NoScenesError, OutputError, S2cdError, S2cdWarning
from s2cd.inference import auto_chunk, change_codes
from s2cd.masks import INVALID_CLASSES, Mask
from s2cd.model import Model, ModelRef, load_model
from s2cd.outputs.codes import encode_codes
from s2cd.outputs.store import open_store
from s2cd.pairs import LeftOut, Pair, PairList, consecutive_pairs, fields_of_view, select_scenes
from s2cd.radiometry import check_offsets
from s2cd.reader import Tiling, require_asset
from s2cd.survey import Survey, scene_input, survey_scene
from s2cd.thumbnails import thumbnail

Progress = Callable[[str, int, int], None]
VIEWS = "views"
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class FieldOfView:
    """All scenes of one tile and relative orbit that metadata let pass, in order of time."""

    name: str
    scenes: tuple[Scene, ...]


@dataclass(frozen=True)
class Plan:
    """What a run will do, as far as metadata tell: pixels may still rule out scenes (see `min_valid`)."""

    config: RunConfig
    fields: tuple[FieldOfView, ...]
    left_out: tuple[LeftOut, ...]
    finished: frozenset[str]

    @property
    def scenes(self) -> list[Scene]:
        """Every scene that takes part."""
        return [scene for view in self.fields for scene in view.scenes]


@dataclass(frozen=True)
class MapRecord:
    """What became of one pair: "written", "kept" (finished by an earlier run) or "failed" (`error` says why)."""

    name: str
    status: str
    valid_fraction: float | None = None
    changed_fraction: float | None = None
    error: str | None = None


@dataclass
class Report:
    """What a run did."""

    out: str
    maps: list[MapRecord] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """True if every pair has its map."""
        return all(record.status != "failed" for record in self.maps)

    def count(self, status: str) -> int:
        """How many maps have this status."""
        return sum(record.status == status for record in self.maps)


@dataclass(frozen=True)
class _Context:
    """What every task of a run shares."""

    config: RunConfig
    ref: ModelRef
    model: Model
    mask: Mask


@dataclass(frozen=True)
class _Unit:
    """Pairs of a few consecutive dates of one field of view, computed together."""

    view: str
    pairs: tuple[Pair, ...]
    surveys: dict[str, Survey]


def make_plan(config: RunConfig, scenes: Iterable[Scene] | None = None) -> Plan:
    """Search the catalogue (or take `scenes`) and decide which dates are compared, by metadata alone.

    Raises CatalogError, NoScenesError if no two dates can be compared, and GridError if the scenes of one tile
    lie on different grids.
    """
    found = list(scenes) if scenes is not None else search_scenes(config)
    kept, left_out = select_scenes(found, max_cloud=config.max_cloud)
    fields = []
    for series in fields_of_view(kept, "any" if config.orbit == "any" else "same"):
        if len(series) > 1:
            fields.append(FieldOfView(view_name(series, config), tuple(series)))
        else:
            left_out.append(LeftOut(series[0].id, "the only date left of its tile and orbit"))
    if not fields:
        reasons = "; ".join(f"{item.what}: {item.reason}" for item in left_out[:3])
        raise NoScenesError(
            f"{config.catalog}: {len(found)} scenes found, but no two dates of one tile and orbit ({reasons})"
        )
    return Plan(config, tuple(fields), tuple(left_out), frozenset(outputs.finished(config.out)))


@dataclass(frozen=True)
class PlanTable:
    """A plan in words and figures, for a person."""

    pairs: int
    rows: list[dict[str, Any]]
    notes: list[str]
    left_out: list[LeftOut]


def describe_plan(plan: Plan) -> PlanTable:
    """Say what a plan compares, reads and writes, from metadata alone.

    Raises ConfigError for a band of the model that a scene does not offer, ModelError for an unknown model.
    """
    model = load_model(plan.config.model, device="cpu")
    _require_model_bands(plan, model)
    rows, tasks, total, decoded = [], 0, 0, 0
    left_out = list(plan.left_out)
    for view in plan.fields:
        pairs = _pairs_of(view, plan.config)
        left_out += pairs.left_out
        grid = common_grid(view.scenes[:1], model.bands)
        chunk = _chunk(plan.config, grid, model)
        tiling = Tiling(grid.shape, chunk, model.halo)
        units = -(-len(pairs) // (plan.config.dates_per_task - 1))
        tasks += units * tiling.blocks[0] * tiling.blocks[1] + len(pairs) + len(view.scenes)
        total += len(pairs)
        decoded += sum(_decoded_bytes(scene, model.bands) for scene in view.scenes)
        rows.append(
            {
                "field of view": view.name,
                "dates": len(view.scenes),
                "first": f"{view.scenes[0].time:%Y-%m-%d}",
                "last": f"{view.scenes[-1].time:%Y-%m-%d}",
                "pairs": len(pairs),
                "finished": sum(pair.name in plan.finished for pair in pairs),
                "pixels": f"{grid.shape[0]} x {grid.shape[1]}",
                "chunks": f"{tiling.blocks[0]} x {tiling.blocks[1]} of {chunk}",
            }
        )
    notes = [
        f"model {model.name} ({model.hash[:12]}): bands {', '.join(model.bands)}, halo {model.halo} px",
        f"{tasks / max(total, 1):.1f} tasks a pair, {decoded / 1e9:.2f} GB to decode, each block once a unit",
        "pixels may still rule out dates with less than "
        f"{plan.config.min_valid:.0%} valid: their neighbours are then paired",
    ]
    return PlanTable(total, rows, notes, left_out)


def search_scenes(config: RunConfig) -> list[Scene]:
    """Search the catalogue that `config` names, once. Raises CatalogError and NoScenesError."""
    return catalog.search(
        config.catalog,
        bbox=config.bbox,
        datetime=config.datetime,
        tiles=config.tiles,
        collection=config.collection,
        orbit=config.orbit if isinstance(config.orbit, int) else None,
    )


def run(
    config: RunConfig,
    client: Client | None = None,
    *,
    scenes: Iterable[Scene] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Make every change map that `config` asks for and that is not there yet.

    client    a Dask client; without one, `config.cluster` is started for the run and closed after it
    scenes    what to work on instead of a search
    progress  called with (phase, done, total)

    Returns the report, also written to the output folder; a pair that failed is in it and does not stop the
    others. Raises S2cdError for what concerns the whole run: catalogue, model, output folder, cluster.
    """
    started = time.monotonic()
    model = load_model(config.model, device="cpu")
    outputs.check_writable(config.out)
    with _strictness(config.strict), ExitStack() as stack:
        plan = make_plan(config, scenes)
        context = _Context(config, ModelRef(config.model, model.hash, config.device), model, _mask(config))
        _require_model_bands(plan, model)
        outputs.save_run(config.out, config.dump(), plan.scenes)
        if client is None:
            from s2cd.clusters import cluster

            client = stack.enter_context(cluster(config.cluster))
            LOG.info("dashboard: %s", client.dashboard_link)
        report = Report(config.out, left_out=list(plan.left_out))
        _Submission(client, context, plan, report, progress or (lambda *_: None)).run()
    report.seconds = time.monotonic() - started
    outputs.write_catalog(config.out)
    outputs.save_report(config.out, asdict(report))
    return report


def run_status(out: str) -> list[dict[str, Any]]:
    """Return a row for each field of view of the run that writes to `out`: its pairs, and how many are finished.

    Raises OutputError if there is no run.
    """
    store = open_store(out)
    views = [name for name, _ in store.list(VIEWS)]
    if not views:
        raise OutputError(f"{out} holds no run: found no {VIEWS}/*.json")
    finished = outputs.finished(out)
    rows = []
    for name in sorted(views):
        view = json.loads(store.get(name))
        done = sum(pair in finished for pair in view["pairs"])
        rows.append({"field_of_view": view["name"], "pairs": len(view["pairs"]), "finished": done})
    return rows


class _Submission:
    """Keeps a bounded number of units on the cluster and collects what becomes of their pairs."""

    def __init__(self, client: Client, context: _Context, plan: Plan, report: Report, progress: Progress):
        self.client = client
        self.context = context
        self.plan = plan
        self.report = report
        self.progress = progress
        self.pending: dict[Future, tuple[_Unit, Pair]] = {}
        self.total = 0
        self.strict = context.config.strict

    def run(self) -> None:
        """Work through the plan; on an interrupt cancel what is under way and leave finished maps alone."""
        try:
            for unit in self._units():
                while self._units_under_way() >= self._limit():
                    self._collect()
                self._submit(unit)
            while self.pending:
                self._collect()
        except BaseException:
            self.client.cancel(list(self.pending), force=True)
            raise

    def _units(self) -> Iterator[_Unit]:
        """Yield work field by field; the next field is surveyed while this one is computed."""
        ahead: deque[tuple[FieldOfView, list[Future]]] = deque()
        for done, view in enumerate(self.plan.fields):
            ahead.append((view, self._survey(view)))
            self.progress("survey", done, len(self.plan.fields))
            if len(ahead) > 1:
                yield from self._units_of(*ahead.popleft())
        while ahead:
            yield from self._units_of(*ahead.popleft())
        self.progress("survey", len(self.plan.fields), len(self.plan.fields))

    def _survey(self, view: FieldOfView) -> list[Future]:
        context = self.context
        bands = context.model.bands
        inputs = [scene_input(s, bands, common_grid([s], bands)) for s in view.scenes]
        return self.client.map(survey_scene, inputs, mask=context.mask, model=context.ref, priority=10, pure=False)

    def _units_of(self, view: FieldOfView, futures: list[Future]) -> Iterator[_Unit]:
        surveys, unread = {}, []
        wait(futures)
        for scene, future in zip(view.scenes, futures, strict=True):
            if future.status == "finished":
                surveys[scene.id] = future.result()
            else:
                unread.append((scene, future.exception()))
        pairs = self._pairs(view, surveys, unread)
        size = self.context.config.dates_per_task - 1
        todo = [pair for pair in pairs if pair.name not in self.plan.finished]
        self.report.maps += [MapRecord(p.name, "kept") for p in pairs if p.name in self.plan.finished]
        self.total += len(todo)
        for start in range(0, len(todo), size):
            part = tuple(todo[start : start + size])
            yield _Unit(view.name, part, surveys)

    def _pairs(self, view: FieldOfView, surveys: dict[str, Survey], unread: Sequence[tuple[Scene, Any]]) -> list[Pair]:
        """Pair the dates of a field of view; a date that cannot be read fails its pairs, not the others."""
        config = self.context.config
        pairs = _pairs_of(view, config, {i: s.valid_fraction for i, s in surveys.items()})
        self.report.left_out += pairs.left_out
        document = {"name": view.name, "pairs": [pair.name for pair in pairs]}
        store = open_store(config.out)
        store.put(view_path(view.name), json.dumps(document).encode())
        errors = {scene.id: _message(error) for scene, error in unread}
        for pair in pairs:
            error = errors.get(pair.before.id) or errors.get(pair.after.id)
            if error:
                self._failed(pair, error)
        return [
            _checked(pair, surveys, config.strict)
            for pair in pairs
            if not {pair.before.id, pair.after.id} & errors.keys()
        ]

    def _submit(self, unit: _Unit) -> None:
        futures = self.client.compute(_unit_graph(unit, self.context), sync=False)
        self.pending.update(zip(futures, ((unit, pair) for pair in unit.pairs), strict=True))

    def _collect(self) -> None:
        """Wait for the next maps; a date that cannot be read takes only its own pairs with it."""
        done = set(wait(list(self.pending), return_when="FIRST_COMPLETED").done)
        broken = {id(self.pending[future][0]) for future in done if future.status != "finished"}
        siblings = [future for future, (unit, _) in self.pending.items() if id(unit) in broken]
        done |= set(wait(siblings).done) if siblings else set()
        again: dict[int, tuple[_Unit, list[Pair]]] = {}
        for future in done:
            unit, pair = self.pending.pop(future)
            if future.status == "finished":
                self.report.maps.append(MapRecord(pair.name, "written", **future.result()))
                continue
            error = future.exception()
            href = getattr(error, "href", None)
            if href is None or _reads(pair, href) or not any(_reads(p, href) for p in unit.pairs):
                self._failed(pair, _message(error))
            else:
                again.setdefault(id(unit), (unit, []))[1].append(pair)
        for unit, pairs in again.values():
            self._submit(_Unit(unit.view, tuple(sorted(pairs, key=lambda p: p.after.time)), unit.surveys))
        self.progress("maps", self.total - len(self.pending), self.total)

    def _failed(self, pair: Pair, error: str) -> None:
        self.report.maps.append(MapRecord(pair.name, "failed", error=error))

    def _units_under_way(self) -> int:
        return len({id(unit) for unit, _ in self.pending.values()})

    def _limit(self) -> int:
        """One unit a worker and one to follow: workers stay busy, memory stays bounded."""
        return len(self.client.nthreads()) + 1


def _unit_graph(unit: _Unit, context: _Context) -> list[Any]:
    """One delayed map a pair; the chunks that several pairs share are computed once."""
    config = context.config
    bands = context.model.bands
    grid = common_grid([unit.pairs[0].before], bands)
    chunk = _chunk(config, grid, context.model)
    codes = change_codes(unit.pairs, unit.surveys, context.ref, context.mask, chunk)
    blocks = codes.to_delayed()[0].tolist()
    write = dask.delayed(write_pair, pure=False)
    return [write(blocks, position, pair, grid, context.ref, config) for position, pair in enumerate(unit.pairs)]


def _pairs_of(view: FieldOfView, config: RunConfig, valid_fractions: dict[str, float] | None = None) -> PairList:
    return consecutive_pairs(
        view.scenes,
        min_valid=config.min_valid,
        max_gap_days=config.max_gap_days,
        valid_fractions=valid_fractions,
        orbit="any" if config.orbit == "any" else "same",
    )


def _checked(pair: Pair, surveys: dict[str, Survey], strict: bool) -> Pair:
    """Let the darkest pixels confirm the stated offsets; a contradiction is warned of and noted on the pair."""
    found = check_offsets(surveys[pair.before.id].dark, surveys[pair.after.id].dark, pair.name, strict=strict)
    if found is None:
        return pair
    note = f"darkest pixels differ by {found:+.3f} in every band: an offset may be applied to one date only"
    return replace(pair, notes=(*pair.notes, note))


def _chunk(config: RunConfig, grid: Grid, model: Model) -> int:
    """Edge of a chunk; one that is asked for is rounded up to the stride of the network."""
    if config.chunk == "auto":
        return auto_chunk(grid.shape, model.stride)
    return -(-config.chunk // model.stride) * model.stride


def _decoded_bytes(scene: Scene, bands: Sequence[str]) -> int:
    shapes = [scene.assets[band].grid.shape for band in bands]
    classes = scene.assets[SCL].grid.shape if SCL in scene.assets else (0, 0)
    return sum(2 * rows * cols for rows, cols in shapes) + classes[0] * classes[1]


def _mask(config: RunConfig) -> Mask:
    invalid = INVALID_CLASSES if config.mask_classes is None else config.mask_classes
    return Mask(invalid=invalid, dilation=round(config.mask_dilation / 10))


def write_change_maps(
    change: xr.DataArray, out: str | Path, *, cog_profile: str = "default", quicklook: bool = True
) -> list[dict[str, Any]]:
    """Compute what `detect_changes` returned, or some of its pairs, and write COG, STAC item and quicklook of each.

    Runs on the Dask client that is active, else on threads. Returns the STAC items.

    Raises ConfigError for an array that does not know its pairs, OutputError, and what computing it raises.
    """
    if not {"pairs", "model"} <= change.attrs.keys():
        raise ConfigError(f"array {change.name!r} has no pairs and model, expected what detect_changes returns")
    outputs.check_writable(str(out))
    grid, ref = cube_grid(change), change.attrs["model"]
    config = RunConfig(catalog="", out=str(out), model=ref.name, cog_profile=cog_profile, quicklook=quicklook)
    write = dask.delayed(_write_array, pure=False)
    items = dask.compute(
        *(write(one.data, change.attrs["pairs"][str(one.pair.values)], grid, ref, config) for one in change)
    )
    outputs.write_catalog(str(out))
    return list(items)


def write_pair(
    blocks: list[list[Any]],
    position: int,
    pair: Pair,
    grid: Grid,
    ref: ModelRef,
    config: RunConfig,
) -> dict[str, float]:
    """Put the chunks of one pair together and write its map; return the figures for the report."""
    codes = np.block([[block[position] for block in row] for row in blocks])
    properties = _write_codes(codes, pair, grid, ref, config)["properties"]
    return {
        "valid_fraction": properties["s2cd:valid_fraction"],
        "changed_fraction": properties["s2cd:changed_fraction"],
    }


def _write_array(probability: np.ndarray, pair: Pair, grid: Grid, ref: ModelRef, config: RunConfig) -> dict[str, Any]:
    return _write_codes(encode_codes(probability), pair, grid, ref, config)


def _write_codes(codes: np.ndarray, pair: Pair, grid: Grid, ref: ModelRef, config: RunConfig) -> dict[str, Any]:
    info = outputs.MapInfo(model=ref.name, model_hash=ref.hash, bands=ref.load().bands)
    rgb = (thumbnail(pair.before), thumbnail(pair.after)) if config.quicklook else None
    return outputs.write_map(codes, pair, grid, info, config.out, quicklook_rgb=rgb, profile=config.cog_profile)


@contextmanager
def _strictness(strict: bool) -> Iterator[None]:
    """In strict mode the first warning about the input ends the run, as an error."""
    with warnings.catch_warnings():
        if strict:
            warnings.simplefilter("error", S2cdWarning)
        try:
            yield
        except S2cdWarning as warning:
            raise S2cdError(f"strict: {warning}") from None


def _require_model_bands(plan: Plan, model: Model) -> None:
    """Raise ConfigError before anything is computed if a scene lacks a band that the model needs."""
    for scene in plan.scenes:
        for band in model.bands:
            require_asset(scene, band)


def _reads(pair: Pair, href: str) -> bool:
    """Whether the asset belongs to one of the two scenes."""
    scenes = (piece for s in (pair.before, pair.after) for piece in (s, *s.parts))
    return any(asset.href == href for scene in scenes for asset in scene.assets.values())


def _message(error: BaseException | None) -> str:
    return str(error) if isinstance(error, S2cdError) else f"{type(error).__name__}: {error}"


def view_path(name: str) -> str:
    """Return where the output folder keeps the pairs of a field of view."""
    return f"{VIEWS}/{name.replace(' ', '_')}.json"


def view_name(series: Sequence[Scene], config: RunConfig) -> str:
    """Return the name of the field of view that these scenes share: "31UDS R051"."""
    return f"{series[0].tile} {'any orbit' if config.orbit == 'any' else f'R{series[0].orbit or 0:03d}'}"
