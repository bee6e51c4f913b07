"""plan -> bounded submission -> report; a rerun goes on where the last one stopped.

The client searches once, decides what is compared with what, and keeps a few units of work (the pairs of some
consecutive dates of one field of view) on the cluster at a time, so that neither its memory nor the scheduler's grows
with the number of tiles.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any
from uuid import uuid4

import dask
from dask.highlevelgraph import HighLevelGraph
from dask.typing import Key
from distributed import Client, Future, wait
from distributed.comm import CommClosedError

from s2cd import outputs
from s2cd.addresses import public_href
from s2cd.catalog.scene import Scene
from s2cd.clusters import cluster, load_profile, try_submission
from s2cd.clusters.environment import return_free_memory
from s2cd.clusters.start import prepare_scheduler
from s2cd.config import RunConfig
from s2cd.cube import common_grid
from s2cd.errors import ClusterError, OutputError, S2cdError, S2cdWarning, ShiftError, ShiftWarning
from s2cd.inference import Levels, change_blocks
from s2cd.interrupts import noted_interrupts
from s2cd.maps import LARGEST_SHIFT, write_pair
from s2cd.masks import Mask
from s2cd.model import Model, ModelRef, load_model
from s2cd.model.ref import absolute_name
from s2cd.outputs.store import DAMAGED, require_there
from s2cd.pairs import LeftOut, Pair, PairList
from s2cd.plan import (
    FieldOfView,
    Plan,
    make_plan,
    mask_of,
    pairs_of,
    require_same_grids,
    require_same_levels,
    require_same_recipe,
    require_usable_here,
)
from s2cd.radiometry import check_offsets
from s2cd.sizes import Sizes, Workers, task_sizes
from s2cd.survey import SceneInput, Survey, scene_input, survey_scene
from s2cd.views import View, fingerprint, read_view, read_views, write_view

LOG = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
HEED = 0.5  # seconds between looks for an interrupt
ALONE = 60.0  # seconds without any worker after which that is said
NOTICE = 10.0  # seconds in which a client notices that its scheduler is gone


@dataclass(frozen=True, slots=True)
class MapRecord:
    """What became of one pair: "written", "kept" (finished by an earlier run) or "failed" (`error` says why).

    `shift` is how far the second image is displaced against the first, (y, x) in pixels, where that could be measured.
    """

    name: str
    status: str
    valid_fraction: float | None = None
    changed_fraction: float | None = None
    shift: tuple[float, float] | None = None
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
    workers: Workers


@dataclass(frozen=True)
class _Unit:
    """Pairs of a few consecutive dates of one field of view, computed together; `levels` by the name of a pair."""

    view: str
    pairs: tuple[Pair, ...]
    levels: Mapping[str, Levels]
    sizes: Sizes
    place: str | None = None  # the worker that it was sent to


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
    others. Raises S2cdError for what concerns the whole run: catalogue, model, output folder, cluster; OutputError if
    the folder holds maps of another model, mask, validity layer, COG profile, level or grid; ClusterError where the
    scheduler is gone.
    """
    started = time.monotonic()
    config = _located(config)
    model = load_model(config.model, device="cpu")
    expected = Workers() if client else _workers_to_come(config)
    outputs.check_writable(config.out)
    with _strictness(config.strict):
        plan = make_plan(config, scenes)
        require_same_recipe(config, model, plan.finished)
        require_same_grids(plan, model)
        require_same_levels(plan)
        if client is None:
            require_usable_here(plan)
        ref = ModelRef(config.model, model.hash, config.device)
        context = _Context(config, ref, model, mask_of(config), expected)
        report, earlier = Report(config.out), _figures_of_before(config.out)
        todo = _without_finished(plan, context, report)
        submission = _Submission(context, todo, report, progress or (lambda *_: None))
        with outputs.cataloguing(config.out) as listed, ExitStack() as stack:
            if todo.fields and client is None:
                client = stack.enter_context(cluster(config.cluster))
            outputs.save_run(config.out, config.dump(), plan.scenes)  # not before it has a cluster
            return_free_memory()  # to plan and freeze a continent takes 80 MB that nothing needs again
            if todo.fields and client is not None:
                with client.as_current(), _scheduler_needed(client):
                    prepare_scheduler(client)
                    submission.run(client)
    submission.look_for_maps(listed)
    report.maps = [earlier.get(r.name, r) if r.status == "kept" else r for r in report.maps]
    report.left_out[:0] = plan.left_out
    report.seconds = time.monotonic() - started
    outputs.save_report(config.out, asdict(report) | {"out": public_href(config.out)})
    return report


def _without_finished(plan: Plan, context: _Context, report: Report) -> Plan:
    """Leave out of a plan the fields of view of which every pair has its map, and report these as kept.

    Which pairs there are tells what earlier runs saw of the dates: a rerun looks at no pixels, and needs no cluster,
    where it has nothing to do.
    """
    left = []
    for view in plan.fields:
        kept = _kept(plan.config.out, view.name) if plan.finished else View(view.name, [])
        pairs = _pairs_as_seen(kept, plan, view, context)
        maps = [] if pairs is None else [plan.map_of(pair) for pair in pairs]
        finished = [name for pair, name in zip(pairs or (), maps, strict=True) if name and plan.is_alone(pair, name)]
        if pairs is None or len(finished) < len(maps):
            left.append(view)
            continue
        report.maps += [MapRecord(name, "kept") for name in finished]
        report.left_out += pairs.left_out
        if kept.pairs != finished:
            write_view(plan.config.out, replace(kept, pairs=finished))
    return replace(plan, fields=tuple(left))


def _kept(out: str, name: str) -> View:
    """Return what is kept of a field of view; nothing of it where it is damaged, since it is written anew."""
    with suppress(OutputError):
        return read_view(out, name) or View(name, [])
    return View(name, [])


def _pairs_as_seen(kept: View, plan: Plan, view: FieldOfView, context: _Context) -> PairList | None:
    """Pair the dates of a field of view by what earlier runs saw of them; None where they have not seen them all."""
    if not kept.valid:
        return None
    seen = {scene.id: kept.valid.get(_fingerprint(scene, context)) for scene in view.scenes}
    known = {name: fraction for name, fraction in seen.items() if fraction is not None}
    return pairs_of(view, plan.config, known) if len(known) == len(seen) else None


def _fingerprint(scene: Scene, context: _Context) -> str:
    return fingerprint(_input(scene, context), context.mask)


def _input(scene: Scene, context: _Context) -> SceneInput:
    bands = context.model.bands
    return scene_input(scene, bands, common_grid([scene], bands), context.mask)


def _figures_of_before(out: str) -> dict[str, MapRecord]:
    """Return what the report of an earlier run tells of its maps, as of ones that are kept now."""
    maps = outputs.load_report(out).get("maps", ())
    with suppress(*DAMAGED):
        records = [MapRecord(**record) for record in maps]
        return {r.name: replace(r, status="kept", error=None) for r in records if r.status != "failed"}
    return {}


def _located(config: RunConfig) -> RunConfig:
    """Say in full where output and model lie: workers have working directories of their own."""
    return config.model_copy(update={"out": outputs.absolute(config.out), "model": absolute_name(config.model)})


def _workers_to_come(config: RunConfig) -> Workers:
    """Tell what the run's cluster will offer. Raises ClusterError for a profile that is none or will be refused."""
    profile = load_profile(config.cluster)
    try_submission(profile)
    return Workers.of_profile(profile, config.device)


def run_status(out: str) -> list[dict[str, Any]]:
    """Return a row for each field of view of the run that writes to `out`: its pairs, and how many are finished.

    Raises OutputError if there is no run, or its record is damaged.
    """
    require_there(out)
    found = read_views(out)
    if not found:
        raise OutputError(f"{out} holds no run: found no views/*.json")
    finished = outputs.finished(out)
    done = {view.name: sum(pair in finished for pair in view.pairs) for view in found}
    return [{"field_of_view": v.name, "pairs": len(v.pairs), "finished": done[v.name]} for v in found]


class _Submission:
    """Keeps a bounded number of units on the cluster and collects what becomes of their pairs."""

    client: Client

    def __init__(self, context: _Context, plan: Plan, report: Report, progress: Progress):
        self.context = context
        self.plan = plan
        self.report = report
        self.progress = progress
        self.pending: dict[Future, tuple[_Unit, Pair]] = {}
        self.interrupted = threading.Event()
        self.ended = threading.Event()  # a map ended since the last look
        self.asked, self.threads = -math.inf, dict[str, int]()
        self.manned = time.monotonic()  # when a worker was there last
        self.left = plan.steps  # pairs without a map, as far as is known
        self.total = 0
        self.submitted = 0
        self.places: defaultdict[str, list[str]] = defaultdict(list)  # names of maps, by where they were written

    def run(self, client: Client) -> None:
        """Work through the plan; on an interrupt cancel what is under way and leave finished maps alone."""
        self.client = client
        try:
            with noted_interrupts(self.interrupted):
                for unit in self._units():
                    while len(self._units_under_way()) >= self._units_at_a_time():
                        self._collect()
                    self._submit(unit)
                while self.pending:
                    self._collect()
        except BaseException:
            if self.client.status == "running":
                self.client.cancel(list(self.pending), force=True)
            raise

    def look_for_maps(self, listed: Collection[str]) -> None:
        """Report as failed what was written but is not in the folder, as `listed` shows it."""
        lost = outputs.lost_maps(self.context.config.out, listed, self.places)
        maps = self.report.maps
        maps[:] = [MapRecord(r.name, "failed", error=lost[r.name]) if r.name in lost else r for r in maps]

    def _units(self) -> Iterator[_Unit]:
        """Yield work field by field; the next one, on many workers the next few, are surveyed while it is computed."""
        ahead: deque[tuple[FieldOfView, list[Future]]] = deque()
        for done, view in enumerate(self.plan.fields):
            ahead.append((view, self._survey(view.scenes)))
            self.progress("survey", done, len(self.plan.fields))
            if len(ahead) > 1 + len(self._threads()) // 8:
                yield from self._units_of(*ahead.popleft())
        while ahead:
            yield from self._units_of(*ahead.popleft())
        self.progress("survey", len(self.plan.fields), len(self.plan.fields))

    def _survey(self, scenes: Iterable[Scene]) -> list[Future]:
        context = self.context
        inputs = [_input(scene, context) for scene in scenes]
        return self.client.map(survey_scene, inputs, mask=context.mask, model=context.ref, priority=10, pure=False)

    def _units_of(self, view: FieldOfView, futures: list[Future]) -> Iterator[_Unit]:
        scenes = view.scenes
        surveys, errors = self._results(scenes, futures)
        pairs = self._pairs(view, surveys, errors)
        maps = [self.plan.map_of(pair) for pair in pairs]
        todo = [pair for pair, name in zip(pairs, maps, strict=True) if name is None]
        self.report.maps += [MapRecord(name, "kept") for name in maps if name is not None]
        for pair, name in zip(pairs, maps, strict=True):
            self._remove_outdated(pair, name)
        self.total += len(todo)
        self.left -= len(view.dates) - 1 - len(todo)
        context = self.context
        grid = common_grid(scenes[:1], context.model.bands)
        sizes = task_sizes(context.config, grid.shape, self.left, context.model, self._workers)
        for start in range(0, len(todo), sizes.dates - 1):
            some = tuple(todo[start : start + sizes.dates - 1])
            levels = {p.name: Levels.of(surveys[p.before.id], surveys[p.after.id], context.model) for p in some}
            yield _Unit(view.name, some, levels, sizes)

    def _pairs(self, view: FieldOfView, surveys: dict[str, Survey], errors: dict[str, str]) -> list[Pair]:
        """Pair the dates of a field of view; a date that cannot be read fails its pairs, not the others."""
        config = self.context.config
        pairs = pairs_of(view, config, {i: s.valid_fraction for i, s in surveys.items()})
        self.report.left_out += pairs.left_out
        names = [self.plan.map_of(pair) or pair.name for pair in pairs]
        seen = [scene for scene in view.scenes if scene.id in surveys]
        valid = {_fingerprint(scene, self.context): surveys[scene.id].valid_fraction for scene in seen}
        write_view(config.out, View(view.name, names, valid))
        editions = {s.id: s for p in pairs for s in (p.before, p.after) if s.id not in surveys and s.id not in errors}
        found, failed = self._results(editions.values(), self._survey(editions.values()))
        surveys |= found
        errors |= failed
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
        unit = replace(unit, place=self._least_loaded(unit))
        workers = [unit.place] if unit.place else sorted(self._threads())
        graph, turns, maps = _unit_graph(unit, self.context, max(1, len(workers)))
        # As a layer: of a plain dictionary Dask would hash every argument of every task.
        layer = HighLevelGraph({str(maps[0]): graph}, {str(maps[0]): set()})
        self.submitted += 1
        # Dask takes what comes within a moment as equally urgent: two units side by side would hold memory for both.
        # Within one, chunks go row by row: few decoded blocks are kept, and the last, which are small, end together.
        urgency = {key: -(self.submitted + i / len(graph)) for i, key in enumerate(graph)}
        homes = places(graph, turns, maps, workers)
        with dask.annotate(workers=homes.get, priority=urgency.get, allow_other_workers=True):
            futures = self.client.get(layer, maps, sync=False)
        self.pending.update(zip(futures, ((unit, pair) for pair in unit.pairs), strict=True))
        for future in futures:
            future.add_done_callback(lambda _: self.ended.set())

    def _collect(self) -> None:
        """Wait for the next maps; a date that cannot be read takes only its own pairs with it."""
        done = self._first()
        broken = {id(self.pending[future][0]) for future in done if future.status != "finished"}
        siblings = [future for future, (unit, _) in self.pending.items() if id(unit) in broken]
        done |= self._wait(siblings) if siblings else set()
        again: dict[int, tuple[_Unit, list[Pair]]] = {}
        for future in done:
            unit, pair = self.pending.pop(future)
            if future.status == "finished":
                self._written(pair, future.result())
                continue
            error = future.exception()
            if isinstance(error, ShiftError):
                raise error
            href = getattr(error, "href", None)
            if href is None or _reads(pair, href) or not any(_reads(p, href) for p in unit.pairs):
                self._failed(pair, _message(error))
            else:
                again.setdefault(id(unit), (unit, []))[1].append(pair)
        for unit, pairs in again.values():
            self._submit(replace(unit, pairs=tuple(sorted(pairs, key=lambda p: p.after.time))))
        self.progress("maps", self.total - len(self.pending), self.total)

    def _results(self, scenes: Iterable[Scene], futures: list[Future]) -> tuple[dict[str, Survey], dict[str, str]]:
        """Surveys by scene id, and what kept others from being read."""
        self._wait(futures)
        ended = dict(zip((scene.id for scene in scenes), futures, strict=True))
        surveys = {name: future.result() for name, future in ended.items() if future.status == "finished"}
        return surveys, {name: _message(future.exception()) for name, future in ended.items() if name not in surveys}

    def _first(self) -> set[Future]:
        """Return the maps that ended, once there are some: Dask's own wait looks at each one that is under way anew."""
        while True:
            self.ended.clear()
            if done := [future for future in self.pending if future.status != "pending"]:
                return self._wait(done)
            self.ended.wait(HEED)
            if self.interrupted.is_set():
                raise KeyboardInterrupt
            self._tell_of_absence()

    def _wait(self, futures: list[Future]) -> set[Future]:
        """Return all of them when they have ended. Raises KeyboardInterrupt, within a moment, after an interrupt."""
        while True:
            if self.interrupted.is_set():
                raise KeyboardInterrupt
            with suppress(TimeoutError):
                return set(wait(futures, timeout=HEED).done)
            self._tell_of_absence()

    def _tell_of_absence(self) -> None:
        """Say so, once, where no worker has been there for long: a wait without a word looks like work."""
        if self._threads():
            self.manned = time.monotonic()
        elif time.monotonic() > self.manned + ALONE:
            LOG.warning("no worker for %.0f s, the run waits for one; on a batch system its jobs may be queued", ALONE)
            self.manned = math.inf

    def _threads(self) -> dict[str, int]:
        """Threads by worker, asked for now and then: each question is a message to the scheduler and back."""
        if time.monotonic() > self.asked + HEED:
            self.asked, self.threads = time.monotonic(), self.client.nthreads()
        return self.threads

    def _written(self, pair: Pair, figures: dict[str, Any]) -> None:
        name = pair.name
        self.places[figures.pop("place")].append(name)
        record = MapRecord(name, "written", **figures)
        self.report.maps.append(record)
        self._remove_outdated(pair, name)
        if record.shift and math.hypot(*record.shift) > LARGEST_SHIFT:
            message = f"{name}: the images are displaced by {math.hypot(*record.shift):.2f} pixels, expected 0"
            warnings.warn(message, ShiftWarning, stacklevel=2)

    def _remove_outdated(self, pair: Pair, name: str | None) -> None:
        """Once a pair has its map, remove what was made of it under other names when one of its dates lacked a piece.

        A date bears the time of its largest piece, which may have been published last.
        """
        if name is None or not (pair.before.parts or pair.after.parts):
            return
        out = self.context.config.out
        others = self.plan.maps_of_pieces(pair) - {name}
        if others and outputs.is_done(out, name):
            for other in others:
                outputs.remove_map(out, other)

    def _failed(self, pair: Pair, error: str) -> None:
        self.report.maps.append(MapRecord(pair.name, "failed", error=error))

    def _units_at_a_time(self) -> int:
        return units_at_a_time(self._threads().values(), self._workers.threads_a_unit)

    @cached_property
    def _workers(self) -> Workers:
        """What the cluster offers, asked once it has surveyed a scene: batch jobs, and their GPUs, come with work."""
        expected, found = self.context.workers, Workers.of_client(self.client, self.context.config.device)
        if found is None:
            return expected
        return replace(found, count=max(found.count, expected.count), threads=max(found.threads, expected.threads))

    def _units_under_way(self) -> list[_Unit]:
        return list({id(unit): unit for unit, _ in self.pending.values()}.values())

    def _least_loaded(self, unit: _Unit) -> str | None:
        """Return the worker with the fewest units: chunks of one unit share decoded blocks, and maps gather chunks.

        Idle workers still take tasks from it. None, for all workers, where there are fewer units than workers.
        """
        workers = self._threads()
        if self.left / (unit.sizes.dates - 1) < len(workers):
            return None
        units = Counter(other.place for other in self._units_under_way())
        return min(workers, key=lambda worker: units[worker], default=None)


def _unit_graph(unit: _Unit, context: _Context, workers: int) -> tuple[dict[Key, Any], dict[Key, int], list[Key]]:
    """Return tasks, the most urgent first, which worker has each chunk, and the keys of maps, one a pair.

    A graph written by hand: Dask's collections take the client and the scheduler five times as long as these tasks.
    """
    config = context.config
    bands = context.model.bands
    grid = common_grid([unit.pairs[0].before], bands)
    levels = [unit.levels[pair.name] for pair in unit.pairs]
    finish = partial(outputs.map_part, shape=grid.shape, profile=config.cog_profile, reasons=config.validity)
    graph, blocks, turns = change_blocks(
        unit.pairs,
        levels,
        context.ref,
        context.mask,
        unit.sizes.chunk,
        finish,
        reasons=config.validity,
        workers=workers,
    )
    number = uuid4().hex
    maps: list[Key] = [("write_pair", number, position) for position in range(len(unit.pairs))]
    for position, (key, pair) in enumerate(zip(maps, unit.pairs, strict=True)):
        write = partial(write_pair, position=position, pair=pair, grid=grid, ref=context.ref, config=config)
        graph[key] = (write, blocks)
    return graph, turns, maps


def units_at_a_time(threads: Iterable[int], threads_a_unit: int) -> int:
    """Return how many units keep workers of so many threads busy, and no more, for each holds memory.

    While the last chunks and the maps of a unit leave threads idle the next one runs; on many threads more do.
    """
    return max(1, sum(1 + -(-count // threads_a_unit) for count in threads))


def places(
    graph: Iterable[Key], turns: Mapping[Key, int], maps: Sequence[Key], workers: Sequence[str]
) -> dict[Key, Sequence[str]]:
    """Return the worker of each task: that of `turns` for chunks, each in turn for maps.

    What all chunks wait for has no place; without any worker, as when batch jobs wait for work, no task has one.
    """
    homes: dict[Key, Sequence[str]] = dict.fromkeys(graph, ())
    if workers:
        homes |= {key: (workers[turn],) for key, turn in turns.items()}
        homes |= {key: (workers[i % len(workers)],) for i, key in enumerate(maps)}
    return homes


def _checked(pair: Pair, surveys: dict[str, Survey], strict: bool) -> Pair:
    """Let the darkest pixels confirm the stated offsets; a contradiction is warned of and noted on the pair."""
    found = check_offsets(surveys[pair.before.id].dark, surveys[pair.after.id].dark, pair.name, strict=strict)
    if found is None:
        return pair
    note = f"darkest pixels differ by {found:+.3f} in every band: an offset may be applied to one date only"
    return replace(pair, notes=(*pair.notes, note))


@contextmanager
def _scheduler_needed(client: Client) -> Iterator[None]:
    """Say so, in one line, where the scheduler is gone: Dask tells of cancelled futures and closed connections."""
    place = client.scheduler_info(n_workers=0)["address"]
    try:
        yield
    except (CancelledError, OSError) as error:
        patience = time.monotonic() + NOTICE * isinstance(error, CommClosedError)
        while client.status == "running" and time.monotonic() < patience:  # it may not have noticed yet
            time.sleep(HEED / 10)
        if client.status == "running":
            raise
        raise ClusterError(
            f"{place}: the scheduler is gone, expected it to stay; finished maps are whole, run again to go on"
        ) from None


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


def _reads(pair: Pair, href: str) -> bool:
    """Whether the asset belongs to one of the two scenes."""
    scenes = (piece for s in (pair.before, pair.after) for piece in (s, *s.parts))
    return any(asset.href == href for scene in scenes for asset in scene.assets.values())


def _message(error: BaseException | None) -> str:
    return str(error) if isinstance(error, S2cdError) else f"{type(error).__name__}: {error}"
