"""One acquisition, one scene: reprocessings reduce to the newest, split datatakes are put together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from s2cd.catalog.items import rings
from s2cd.catalog.scene import Scene

# The two halves of a split datatake carry datastrips that start at least this far apart; reprocessing moves
# the start of a datastrip by a second or so.
SAME_STRIP = timedelta(seconds=4)
# A satellite is back over a tile after a whole orbit of 100 minutes at the earliest; sensing times of one
# acquisition differ by less than the 15 minutes of a datatake.
SAME_PASS = timedelta(minutes=20)
# Least share of their union that footprints of two products of one datastrip have in common. Two halves overlap as
# well, the smaller one by nine tenths in a real case (16SGD, 10 October 2025), but never are the same.
SAME_FOOTPRINT = 0.5

LeftOut = tuple[Scene, str]


def reduce_duplicates(scenes: Iterable[Scene]) -> tuple[list[Scene], list[LeftOut]]:
    """Reduce products of one acquisition of one tile to one scene.

    Reprocessings of one datastrip reduce to the highest processing baseline of ESA's, then to the latest processing
    time; an L2A product goes before the L1C it was made from. Two datastrips of one datatake that meet in a
    tile become one scene with the smaller piece in `parts`, to be read where the larger one has no
    observation. Older baselines of the same stay at hand as its `editions`: dates that have no newer one are better
    compared with these.

    Returns the scenes that are kept, ordered by tile and time, and those left out, each with the reason.
    """
    kept: list[Scene] = []
    left_out: list[LeftOut] = []
    for group in _acquisitions(scenes):
        strips = _strips(group)
        chosen = _choose(strips)
        main, *parts = sorted(chosen, key=lambda s: (-_covered(s), s.id))
        kept.append(_with(main, parts, _editions(strips, main)))
        for strip in strips:
            best = next((s for s in strip if any(s is c for c in chosen)), None)
            left_out += [(s, _why(s, best, main)) for s in strip if s is not best]
    return sorted(kept, key=lambda s: (s.tile, s.time, s.id)), left_out


def _acquisitions(scenes: Iterable[Scene]) -> list[list[Scene]]:
    """Group products of one tile and platform that were sensed in one pass."""
    ordered = sorted(scenes, key=lambda s: (s.tile, s.platform or "", s.time, s.id))
    groups: list[list[Scene]] = []
    for scene in ordered:
        if groups and _same_pass(groups[-1][0], scene):
            groups[-1].append(scene)
        else:
            groups.append([scene])
    return groups


def _same_pass(a: Scene, b: Scene) -> bool:
    if (a.tile, a.platform) != (b.tile, b.platform) or (a.orbit and b.orbit and a.orbit != b.orbit):
        return False
    taken = _datatake_start(a), _datatake_start(b)
    return taken[0] == taken[1] if all(taken) else abs(a.time - b.time) < SAME_PASS


def _datatake_start(scene: Scene) -> str | None:
    """Sensing start of the datatake, which every baseline keeps, from its id or the product name."""
    for text in (scene.datatake or "", scene.id):
        found = re.search(r"(?:^GS2[A-D]|^S2[A-D]_MSIL(?:1C|2A))_(\d{8}T\d{6})_", text)
        if found:
            return found[1]
    return None


def _strips(group: Sequence[Scene]) -> list[list[Scene]]:
    """Split one acquisition into its datastrips, each with all its reprocessings."""
    strips: list[list[Scene]] = []
    for scene in group:
        home = next((strip for strip in strips if _same_strip(strip[0], scene)), None)
        if home is None:
            strips.append([scene])
        else:
            home.append(scene)
    return strips


def _same_strip(a: Scene, b: Scene) -> bool:
    if a.strip_start and b.strip_start:
        return abs(a.strip_start - b.strip_start) <= SAME_STRIP
    return _overlap(a, b) >= SAME_FOOTPRINT


def _overlap(a: Scene, b: Scene) -> float:
    """Area that two footprints share, over the area that either covers."""
    polygons = [[_flat(ring) for ring in rings(s.footprint)] for s in (a, b)]
    areas = [sum(abs(_area(p)) for p in piece) for piece in polygons]
    if min(areas) == 0:
        return 1.0
    shared = sum(abs(_area(_clip(p, q))) for p in polygons[0] for q in polygons[1])
    return shared / (sum(areas) - shared)


Ring = list[tuple[float, float]]


def _flat(ring: list[list[float]]) -> Ring:
    points = [(p[0], p[1]) for p in ring]
    points = points[:-1] if points[0] == points[-1] else points
    return points if _area(points) >= 0 else points[::-1]


def _area(ring: Ring) -> float:
    return 0.5 * sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1], strict=True))


def _clip(subject: Ring, window: Ring) -> Ring:
    """Sutherland-Hodgman: `subject` inside the (nearly convex) `window`, both anticlockwise."""
    result = subject
    for a, b in zip(window, window[1:] + window[:1], strict=True):
        if not result:
            break
        result = _clip_edge(result, a, b)
    return result


def _clip_edge(ring: Ring, a: tuple[float, float], b: tuple[float, float]) -> Ring:
    def side(p: tuple[float, float]) -> float:
        return (b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0])

    kept: Ring = []
    for p, q in zip(ring, ring[1:] + ring[:1], strict=True):
        s, t = side(p), side(q)
        if s >= 0:
            kept.append(p)
        if (s > 0 > t) or (s < 0 < t):
            f = s / (s - t)
            kept.append((p[0] + f * (q[0] - p[0]), p[1] + f * (q[1] - p[1])))
    return kept


_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


def _newness(scene: Scene) -> tuple[bool, str, datetime, str]:
    return (scene.level == "L2A", _rank(scene.baseline), scene.processed or _LONG_AGO, scene.id)


def _rank(baseline: str | None) -> str:
    """Return what orders baselines: that of products made with Sen2Cor's toolbox, 99.99, comes before all of ESA's."""
    return "" if baseline in {None, "99.99"} else str(baseline)


def _choose(strips: Sequence[Sequence[Scene]]) -> list[Scene]:
    """Choose one product per datastrip: as many datastrips as can be read as one image, then the newest.

    The pieces of a split datatake become one array of digital numbers, so all need the same level, radiometry and
    grid.
    """
    alike: dict[str, list[Scene]] = {}
    for strip in strips:
        for kind in {_kind(s) for s in strip}:
            newest = max((s for s in strip if _kind(s) == kind), key=_newness)
            alike.setdefault(kind, []).append(newest)
    return max(alike.values(), key=lambda pieces: (len(pieces), max(map(_newness, pieces))))


def _with(main: Scene, parts: Sequence[Scene], editions: tuple[Scene, ...] = ()) -> Scene:
    """Put one acquisition together; what `main` already brings stays where nothing else was found."""
    return replace(main, parts=tuple(parts) or main.parts, editions=editions or main.editions)


def _editions(strips: Sequence[Sequence[Scene]], main: Scene) -> tuple[Scene, ...]:
    """The whole acquisition in each other baseline that can be read as `main` can, newest first.

    Scenes are told apart by their ids, which some catalogues give to several baselines: the newest one counts then.
    """
    result = []
    taken = {main.id}
    fitting = [[s for s in strip if _fits(s, main)] for strip in strips]
    baselines = {s.baseline for strip in fitting for s in strip if s.baseline} - {main.baseline}
    for baseline in sorted(baselines, key=_rank, reverse=True):
        alike = [[s for s in strip if s.baseline == baseline and s.id not in taken] for strip in fitting]
        if not all(alike):
            continue
        pieces = [max(strip, key=_newness) for strip in alike]
        if len({_kind(piece) for piece in pieces}) == 1:
            first, *parts = sorted(pieces, key=lambda s: (-_covered(s), s.id))
            result.append(replace(_with(first, parts), time=main.time, editions=()))
            taken.add(first.id)
    return tuple(result)


def _fits(scene: Scene, main: Scene) -> bool:
    grids = [{band: asset.grid for band, asset in s.assets.items()} for s in (scene, main)]
    return scene.level == main.level and grids[0] == grids[1]


def _kind(scene: Scene) -> str:
    """What two products must share to be read as one image."""
    assets = sorted(scene.assets.items())
    return repr((scene.level, [(b, a.grid, a.scale, a.offset, a.nodata) for b, a in assets]))


def _covered(scene: Scene) -> float:
    return sum(abs(_area(_flat(ring))) for ring in rings(scene.footprint))


def cloud_cover(scene: Scene) -> float | None:
    """Return the cloud cover of all pieces of a scene, in percent of what they show; None where none states it."""
    stated = [(_covered(s), s.cloud_cover) for s in (scene, *scene.parts) if s.cloud_cover is not None]
    area = sum(covered for covered, _ in stated)
    return sum(covered * cover for covered, cover in stated) / area if area else scene.cloud_cover


def _why(scene: Scene, best: Scene | None, main: Scene) -> str:
    if best is None:
        return f"half of a split datatake whose radiometry or grid differs from that of {main.id}"
    if scene.level != best.level:
        return f"duplicate of {best.id}: {scene.level}, that one is {best.level}"
    if scene.baseline != best.baseline:
        return f"duplicate of {best.id}: baseline {scene.baseline}, that one has {best.baseline}"
    return f"duplicate of {best.id}: the same acquisition again"
