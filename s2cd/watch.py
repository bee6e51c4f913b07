"""Follow a catalogue: a new acquisition becomes a pair and a map within one polling interval.

What was done is known from the maps in the output folder and from a small state file beside them, so a watch goes on
after a restart where it stopped. A cluster is started only when something is new and ends with that work.
"""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Literal

from distributed import Client

from s2cd import outputs
from s2cd.addresses import public_href
from s2cd.catalog.duplicates import SAME_PASS
from s2cd.catalog.filters import parse_interval
from s2cd.catalog.packed import grouped
from s2cd.catalog.scene import Scene
from s2cd.config import RunConfig
from s2cd.errors import BusyError, CatalogError, ConfigError, NoScenesError, OutputError
from s2cd.model import Model, load_model
from s2cd.outputs.layout import tile_of, times_of
from s2cd.outputs.store import open_store, understood
from s2cd.pairs import fields_of_view, select_scenes
from s2cd.plan import require_same_recipe, search_scenes, usable_scenes, view_name, warn_of_unusable
from s2cd.runner import Progress, Report, run
from s2cd.views import View, read_view, write_view

STATE = "watch.json"
SEARCH = ("catalog", "bbox", "datetime", "tiles", "collection", "orbit", "max_cloud", "min_valid", "max_gap_days")
STAMP = "%Y-%m-%dT%H:%M:%SZ"
LONGEST = 366 * 86400.0  # seconds between two looks
LATE = timedelta(days=30)  # an acquisition that is published later than this after newer ones is not seen
LOG = logging.getLogger(__name__)

Seen = dict[str, dict[str, str]]
"""By field of view: ids of the pieces and sensing time (RFC 3339) of every scene that was dealt with."""
Paired = dict[str, list[str]]
"""By field of view: sensing times of dates that were compared, and so are valid by the options of these looks."""


def watch(
    config: RunConfig,
    interval: float = 900.0,
    once: bool = False,
    client: Client | None = None,
    progress: Progress | None = None,
) -> Iterator[Report]:
    """Look for new acquisitions every `interval` seconds, map what they change, and yield a report a look.

    once    look once and stop
    client  a Dask client to work on; without one, `config.cluster` is started for each look that finds something

    A look that finds nothing new yields an empty report. A catalogue that does not answer, or answers nonsense, ends
    the watch at the first look, and is tried again at later ones. A look at a folder that another watch works in waits
    for its next turn; with `once` it raises BusyError. Raises ConfigError for an interval of more than a year or none
    at all, S2cdError otherwise as `s2cd.run` does.
    """
    if not 0 < interval <= LONGEST:  # nor NaN
        raise ConfigError(f"interval: found {interval:g} s, expected more than 0 and at most a year ({LONGEST:.0f} s)")
    first = True
    while True:
        started = time.monotonic()
        try:
            yield _look(config, client, progress)
            first = False
        except BusyError as error:
            if once:
                raise
            LOG.warning("%s; trying again in %.0f s", error, interval)
        except CatalogError as error:
            if first or once:
                raise
            LOG.warning("%s; trying again in %.0f s", error, interval)
        if once:
            return
        time.sleep(max(0.0, started + interval - time.monotonic()))


def _look(config: RunConfig, client: Client | None, progress: Progress | None) -> Report:
    outputs.check_writable(config.out)
    with outputs.only_one(config.out):
        return _map_what_is_new(config, client, progress)


def _map_what_is_new(config: RunConfig, client: Client | None, progress: Progress | None) -> Report:
    """Search, run what is new, and remember it."""
    looks, paired = _load(config.out)
    options = _options(config)
    seen, compared = looks.setdefault(options, {}), paired.setdefault(options, {})
    finished = outputs.finished(config.out)
    model = load_model(config.model, device="cpu")
    require_same_recipe(config, model, finished)
    maps = _by_view(finished, config)
    mapped = {name: {t for pair in pairs for t in times_of(pair)} for name, pairs in maps.items()}
    mapped = {name: times & set(compared.get(name, times)) for name, times in mapped.items()}
    try:
        found = _usable(search_scenes(_since(config, seen, mapped)), model, config)
    except NoScenesError:
        return Report(config.out)
    kept, _ = select_scenes(found, max_cloud=config.max_cloud)
    orbit: Literal["same", "any"] = "any" if config.orbit == "any" else "same"
    views = {view_name(series, config): series for series in fields_of_view(kept, orbit)}
    todo = {
        name: window
        for name, series in views.items()
        if (window := _window(series, seen.get(name, {}), mapped.get(name, set())))
    }
    report = Report(config.out)
    if any(len(window) > 1 for window in todo.values()):
        scenes = [scene for window in todo.values() for scene in window]
        with _record_kept(config.out, {name: maps.get(name, []) for name in todo}):
            report = run(config, client, scenes=scenes, progress=progress)
    failed = {(tile_of(r.name), t) for r in report.maps if r.status == "failed" for t in times_of(r.name)}
    for name, series in views.items():
        done = {_key(s): _stamp(s) for s in series if (s.tile, _stamp(s)) not in failed}
        seen[name] = seen.get(name, {}) | done
    for name, pairs in _by_view((r.name for r in report.maps if r.status != "failed"), config).items():
        compared[name] = sorted({*compared.get(name, ()), *(t for pair in pairs for t in times_of(pair))})
    if todo:
        open_store(config.out).put(STATE, json.dumps({"looks": looks, "paired": paired}, indent=1).encode())
    return report


def _usable(found: Iterable[Scene], model: Model, config: RunConfig) -> list[Scene]:
    """Return the scenes that a run can read; of the others, which the next look asks for again, one is told."""
    split = [usable_scenes(group, model, config) for _, group in grouped(found, lambda scene: scene.tile)]
    warn_of_unusable([item for _, left_out in split for item in left_out])
    return [scene for usable, _ in split for scene in usable]


def _window(series: list[Scene], seen: dict[str, str], mapped: set[str]) -> list[Scene]:
    """What of a field of view takes part in pairs with its new scenes; nothing if there are none.

    Pairs join consecutive valid dates. A date that has a map, made or kept with these options, is known to be valid, so
    no pair of a new scene reaches beyond the nearest such dates before and after it.
    """
    new = [scene for scene in series if _key(scene) not in seen]
    if not new:
        return []
    before = [s.time for s in series if s.time < new[0].time and _stamp(s) in mapped]
    after = [s.time for s in series if s.time > new[-1].time and _stamp(s) in mapped]
    first = before[-1] if before else series[0].time
    last = after[0] if after else series[-1].time
    return [scene for scene in series if first <= scene.time <= last]


def _since(config: RunConfig, seen: Seen, mapped: Mapping[str, set[str]]) -> RunConfig:
    """Search as far back as a late scene can lie, and on to the mapped date before it in each field of view.

    The pairs of a new scene end at mapped dates (see `_window`), so nothing earlier takes part.
    """
    if not any(seen.values()):
        return config
    newest = max(stamp for scenes in seen.values() for stamp in scenes.values())
    late = f"{datetime.fromisoformat(newest) - LATE:{STAMP}}"
    partners = [
        max((stamp for stamp in mapped.get(view, ()) if stamp <= late), default=min(scenes.values()))
        for view, scenes in seen.items()
        if scenes
    ]
    since = datetime.fromisoformat(min(late, *partners)) - SAME_PASS  # halves of a datatake may be sensed before it
    start, end = parse_interval(config.datetime)
    since = max(since, start) if start else since
    return config.model_copy(update={"datetime": f"{since.isoformat()}/{end.isoformat() if end else '..'}"})


def _by_view(finished: Iterable[str], config: RunConfig) -> dict[str, list[str]]:
    """Return the names of the finished maps by field of view."""
    maps: dict[str, list[str]] = defaultdict(list)
    for name in finished:
        orbit = "any orbit" if config.orbit == "any" else name.rsplit("_", 3)[1]
        maps[f"{tile_of(name)} {orbit}"].append(name)
    return maps


def _options(config: RunConfig) -> str:
    """What decides which dates are compared: what was seen with other options says nothing of these."""
    options = config.model_dump(mode="json") | {"catalog": public_href(config.catalog)}
    return ", ".join(f"{name} {options[name]}" for name in SEARCH)


def _load(out: str) -> tuple[dict[str, Seen], dict[str, Paired]]:
    """Return what earlier looks have seen and paired, by options; nothing where a person or a full disk damaged it."""
    store = open_store(out)
    if store.size(STATE) is None:
        return {}, {}
    text = store.get(STATE)
    try:
        with understood(out, STATE, "what a watch has seen"):
            state = json.loads(text)
            looks, paired = state.get("looks", {}), state.get("paired", {})  # which earlier versions did not state
            stamps = [s for seen in looks.values() for scenes in seen.values() for s in scenes.values()]
            for stamp in stamps + [s for views in paired.values() for times in views.values() for s in times]:
                datetime.strptime(stamp, STAMP)
            return looks, paired
    except OutputError as error:
        LOG.warning("%s; starting from the maps", error)
        return {}, {}


def _key(scene: Scene) -> str:
    """The ids of a scene's pieces: the second half of a split datatake that is published later makes it new."""
    return " ".join(sorted(piece.id for piece in (scene, *scene.parts)))


def _stamp(scene: Scene) -> str:
    """Sensing time as the names of maps give it: RFC 3339, to the second."""
    return f"{scene.time:{STAMP}}"


@contextmanager
def _record_kept(out: str, maps: Mapping[str, Collection[str]]) -> Iterator[None]:
    """Put the pairs of earlier looks back, however the block ends: a run of some dates keeps only the pairs of these.

    maps  the finished maps of each field of view, which are on record again even if a look was killed
    """
    earlier = {view: {*names, *_on_record(out, view).pairs} for view, names in maps.items()}
    try:
        yield
    finally:
        replaced = {name for names in maps.values() for name in names} - outputs.finished(out)
        for view, pairs in earlier.items():
            record = _on_record(out, view)
            names = sorted({*(pairs - replaced), *record.pairs}, key=times_of)
            write_view(out, replace(record, pairs=names))


def _on_record(out: str, view: str) -> View:
    return read_view(out, view) or View(view, [])
