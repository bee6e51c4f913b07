"""Which two dates are compared, and why the others are not."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Real
from typing import Literal, SupportsIndex, overload

from s2cd.catalog.duplicates import cloud_cover, reduce_duplicates
from s2cd.catalog.scene import Scene
from s2cd.errors import BaselineWarning, ConfigError, GridError, LevelWarning, OrbitWarning

REFERENCE_BAND_ORDER = ("red", "blue", "green", "nir")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two acquisitions of the same field of view, `before` the earlier; `notes` say what to keep in mind."""

    before: Scene
    after: Scene
    notes: tuple[str, ...] = ()

    @property
    def tile(self) -> str:
        """MGRS tile of both scenes."""
        return self.after.tile

    @property
    def orbit(self) -> str:
        """Relative orbit as it stands in names: "R051", "R000" where unknown, "R051-094" where mixed."""
        orbits = sorted({self.before.orbit or 0, self.after.orbit or 0})
        return "R" + "-".join(f"{orbit:03d}" for orbit in orbits)

    @property
    def gap_days(self) -> float:
        """Days between the two acquisitions."""
        return (self.after.time - self.before.time).total_seconds() / 86400

    @property
    def name(self) -> str:
        """Name of the pair's change map, without extension."""
        t0, t1 = (f"{scene.time:%Y%m%dT%H%M%S}" for scene in (self.before, self.after))
        return f"S2CD_{self.tile}_{self.orbit}_{t0}_{t1}"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A scene or a pair that is not used, and the reason."""

    what: str
    reason: str


class PairList(list[Pair]):
    """Pairs in chronological order per field of view, with the reasons for what was `left_out`."""

    def __init__(self, pairs: Iterable[Pair] = (), left_out: Iterable[LeftOut] = ()):
        super().__init__(pairs)
        self.left_out = list(left_out)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Pair: ...

    @overload
    def __getitem__(self, index: slice) -> PairList: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Pair | PairList:
        """Return one pair, or some in a list of the same kind."""
        if isinstance(index, slice):
            return PairList(super().__getitem__(index), self.left_out)
        return super().__getitem__(index)

    @property
    def scenes(self) -> list[Scene]:
        """The scenes of the pairs, each once, in order of time: what `s2cd.open_cube` takes."""
        scenes = {s.id: s for pair in self for s in (pair.before, pair.after)}
        return sorted(scenes.values(), key=lambda s: (s.time, s.id))


def consecutive_pairs(
    scenes: Iterable[Scene],
    *,
    max_cloud: float | None = None,
    max_gap_days: float | None = None,
    min_valid: float | None = None,
    valid_fractions: Mapping[str, float] | None = None,
    orbit: Literal["same", "any"] = "same",
) -> PairList:
    """Pair each scene with the next one of the same tile and relative orbit.

    Reprocessings of one acquisition count once, in the newest baseline but where the other date of a pair has only an
    older one that both have; the halves of a split datatake are one scene. Scenes are left
    out above `max_cloud` percent (by metadata) and below `min_valid` (a fraction in [0, 1], looked up by scene id
    in `valid_fractions`); pairs are left out above `max_gap_days`. With `orbit="any"` neighbouring orbits are
    compared as well: their viewing angles differ, so shadows, facades and displaced summits appear as change.

    Raises GridError if two scenes of one tile lie on different grids, ConfigError for another `orbit`, for limits that
    are no numbers, and for `min_valid` without `valid_fractions`.
    """
    if orbit not in ("same", "any"):
        raise ConfigError(f"orbit: found {orbit!r}, expected 'same' or 'any'; a search can be for one orbit")
    for name, limit in (("max_cloud", max_cloud), ("max_gap_days", max_gap_days), ("min_valid", min_valid)):
        if limit is not None and (not isinstance(limit, Real) or math.isnan(limit)):
            raise ConfigError(f"{name}: found {limit!r}, expected a number")
    if min_valid is not None and valid_fractions is None:
        raise ConfigError(f"min_valid: found {min_valid:g} without valid_fractions, expected a fraction of each scene")
    kept, left_out = select_scenes(scenes, max_cloud=max_cloud)
    if min_valid is not None and valid_fractions is not None:
        kept, cloudy = _split_by_validity(kept, min_valid, valid_fractions)
        left_out += cloudy
    pairs = PairList(left_out=left_out)
    for series in fields_of_view(kept, orbit):
        if len(series) == 1:
            pairs.left_out.append(LeftOut(series[0].id, "the only date left of its tile and orbit"))
        for before, after in pairwise(series):
            pair = _pair(before, after)
            if max_gap_days is not None and pair.gap_days > max_gap_days:
                reason = f"{pair.gap_days:.1f} days apart, more than {max_gap_days:g}"
                pairs.left_out.append(LeftOut(pair.name, reason))
            else:
                pairs.append(pair)
    return pairs


def select_scenes(scenes: Iterable[Scene], *, max_cloud: float | None = None) -> tuple[list[Scene], list[LeftOut]]:
    """Reduce duplicates and drop scenes above `max_cloud` percent; return what is kept and what is left out."""
    unique, duplicates = reduce_duplicates(scenes)
    left_out = [LeftOut(scene.id, reason) for scene, reason in duplicates]
    kept = []
    for scene in unique:
        cover = cloud_cover(scene)
        if max_cloud is not None and cover is not None and cover > max_cloud:
            left_out.append(LeftOut(scene.id, f"cloud cover {cover:.1f} % above {max_cloud:g} %"))
        else:
            kept.append(scene)
    return kept, left_out


def fields_of_view(scenes: Iterable[Scene], orbit: Literal["same", "any"] = "same") -> list[list[Scene]]:
    """Group scenes by tile and relative orbit (by tile alone for "any"), each group in order of time.

    Raises GridError if two scenes of one group lie on different grids.
    """
    groups: dict[tuple[str, int], list[Scene]] = defaultdict(list)
    for scene in scenes:
        groups[(scene.tile, (scene.orbit or 0) if orbit == "same" else 0)].append(scene)
    result = []
    for key in sorted(groups):
        series = sorted(groups[key], key=lambda s: (s.time, s.id))
        for first, other in pairwise(series):
            _require_same_grid(first, other)
        result.append(series)
    return result


def _split_by_validity(
    scenes: list[Scene], min_valid: float, fractions: Mapping[str, float]
) -> tuple[list[Scene], list[LeftOut]]:
    kept, left_out = [], []
    for scene in scenes:
        fraction = fractions.get(scene.id, 1.0)
        if fraction >= min_valid:
            kept.append(scene)
        else:
            why = "is no number" if math.isnan(fraction) else f"below {min_valid:g}"
            left_out.append(LeftOut(scene.id, f"valid fraction {fraction:.3f} {why}"))
    return kept, left_out


def _require_same_grid(a: Scene, b: Scene) -> None:
    for band in REFERENCE_BAND_ORDER:
        if band in a.assets and band in b.assets:
            grid_a, grid_b = a.assets[band].grid, b.assets[band].grid
            if grid_a != grid_b:
                raise GridError(
                    f"tile {a.tile}: {a.id} lies on EPSG:{grid_a.epsg} {grid_a.transform} {grid_a.shape}, "
                    f"but {b.id} on EPSG:{grid_b.epsg} {grid_b.transform} {grid_b.shape}"
                )
            return


def _pair(before: Scene, after: Scene) -> Pair:
    """Pair two dates: one steps back to an older edition if that is the baseline of the other."""
    first, second = before, after
    if before.baseline != after.baseline:
        first = next((e for e in before.editions if e.baseline == after.baseline), before)
        second = next((e for e in after.editions if e.baseline == before.baseline), after)
    notes = [
        f"{taken.id} of baseline {taken.baseline} stands for {newest.id}: the other date has no {newest.baseline}"
        for taken, newest in ((first, before), (second, after))
        if taken is not newest
    ]
    first, second = (replace(s, editions=()) for s in (first, second))
    return Pair(first, second, (*notes, *_notes(first, second)))


def _notes(before: Scene, after: Scene) -> tuple[str, ...]:
    notes = []
    if before.baseline and after.baseline and before.baseline != after.baseline:
        notes.append(f"processing baselines differ: {before.baseline} and {after.baseline}")
        warnings.warn(f"{before.id} and {after.id}: {notes[-1]}", BaselineWarning, stacklevel=4)
    if before.orbit != after.orbit or before.orbit is None:
        differ = f"differ: {before.orbit} and {after.orbit}" if before.orbit != after.orbit else "unknown"
        notes.append(f"relative orbits {differ}")
        risk = "where viewing angles differ, shadows, facades and displaced summits can appear as change"
        warnings.warn(f"{before.id} and {after.id}: {notes[-1]}: {risk}", OrbitWarning, stacklevel=4)
    if before.level != after.level:
        notes.append(f"processing levels differ: {before.level} and {after.level}")
        risk = "the atmosphere is in the pixels of one alone, so it can appear as change"
        warnings.warn(f"{before.id} and {after.id}: {notes[-1]}: {risk}", LevelWarning, stacklevel=4)
    return tuple(notes)
