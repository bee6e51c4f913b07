"""Maps in parts: what each chunk gives of one, compressed where whole blocks of the file lie in the chunk.

So a map waits for its last chunk in less memory than its codes take, and little is left to be done then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from isal import isal_zlib

from s2cd.apart import apart
from s2cd.codes import CODE_NODATA, CODE_SCALE, split_reasons
from s2cd.errors import GridError
from s2cd.outputs.overviews import coarser, code_pyramid, halved
from s2cd.outputs.profiles import BLOCK, PROFILES, Profile

THRESHOLD = 0.5
"""Probability above which a pixel counts as changed in `s2cd:changed_fraction`."""
CUT_LEVELS = 2  # at most: coarser ones are small, and overviews are made of them
STEP = 1 << CUT_LEVELS
"""Pixels: chunks begin at multiples of it, so that no pixel of the first overviews lies in two of them."""
_SHOWN = 1024  # pixels along a side: a level of that size, or a coarser one, is wanted as codes, for the quicklook
_LEVEL = 1  # of ISA-L's 0 to 3: higher ones take twice as long and save nothing on maps

Place = tuple[int, int]
"""Row and column: of a block among blocks, or of a pixel."""
Blocks = dict[Place, bytes | np.ndarray]
"""Blocks of a level of a map as the file holds them, bytes or uint8."""


class Cut(NamedTuple):
    """What a chunk gives of a level: `whole` blocks, and `pieces` of others, codes and where in it they begin."""

    whole: Blocks
    pieces: dict[Place, tuple[Place, np.ndarray]]


class MapPart(NamedTuple):
    """What a chunk gives of a map.

    cuts      of the finest levels: none, where the profile compresses otherwise, up to CUT_LEVELS
    origin    place of the first pixel in the first level that is not cut
    codes     uint16 (y, x) of that level
    pixels    how many it has of the map itself, and how many of these are `observed`, and `changed`
    validity  uint8 (y, x) of the map itself, as `s2cd.codes.split_reasons` gives it
    """

    cuts: tuple[Cut, ...]
    origin: Place
    codes: np.ndarray
    pixels: int
    observed: int
    changed: int
    validity: np.ndarray | None


def map_part(
    codes: np.ndarray, origin: Place, *, shape: tuple[int, int], profile: str = "default", reasons: bool = False
) -> MapPart:
    """Return what a chunk gives of a map of `shape`, in memory of its own (`s2cd.apart`).

    codes    uint16 (y, x); with `reasons` they tell which date does not show a pixel (`s2cd.codes`)
    origin   place of their first pixel in the map, multiples of STEP
    profile  key of PROFILES

    Raises ValueError for another origin.
    """
    if any(n % STEP for n in origin):
        raise ValueError(f"a part of a map begins at {origin}, expected multiples of {STEP}")
    codes, validity = split_reasons(codes) if reasons else (codes, None)
    pixels, missing = codes.size, int(np.count_nonzero(codes == CODE_NODATA))
    above = int(np.count_nonzero(codes > int(THRESHOLD * CODE_SCALE)))
    cuts, chosen = [], PROFILES[profile]
    for size in _cut_levels(shape, chosen):
        cuts.append(_cut(codes, origin, size, chosen))
        codes, origin = halved(codes), (origin[0] // 2, origin[1] // 2)
    return _apart(MapPart(tuple(cuts), origin, codes, pixels, pixels - missing, above - missing, validity))


def _apart(part: MapPart) -> MapPart:
    buffers: list[bytes | np.ndarray] = [part.codes]
    buffers += [] if part.validity is None else [part.validity]
    for cut in part.cuts:
        buffers += [*cut.whole.values(), *(piece for _, piece in cut.pieces.values())]
    copies = iter(apart(buffers))
    part = part._replace(codes=next(copies), validity=None if part.validity is None else next(copies))
    cuts = (
        Cut(
            {place: next(copies) for place in cut.whole},
            {place: (begin, next(copies)) for place, (begin, _) in cut.pieces.items()},
        )
        for cut in part.cuts
    )
    return part._replace(cuts=tuple(cuts))


def joined(parts: Sequence[MapPart], shape: tuple[int, int], profile: str) -> tuple[list[Blocks], list[np.ndarray]]:
    """Return a map's finest levels, as the file holds them, and the codes of all others, finest first.

    Raises GridError if the parts are not all of the map.
    """
    found = sum(part.pixels for part in parts)
    if found != shape[0] * shape[1]:
        raise GridError(f"parts of a map have {found} pixels, expected {shape[0] * shape[1]}")
    chosen = PROFILES[profile]
    levels = [
        _completed([part.cuts[level] for part in parts], size, chosen)
        for level, size in enumerate(_cut_levels(shape, chosen))
    ]
    codes = _pasted([(part.origin, part.codes) for part in parts], coarser(shape, len(levels)))
    return levels, code_pyramid(codes)


def joined_validity(parts: Sequence[MapPart], shape: tuple[int, int]) -> np.ndarray | None:
    """Return the validity of a map, None where its parts have none."""
    found = []
    for part in parts:
        if part.validity is not None:
            row, column = part.origin
            found.append(((row << len(part.cuts), column << len(part.cuts)), part.validity))
    return _pasted(found, shape) if found else None


def blocks_of(codes: np.ndarray, profile: Profile) -> Blocks:
    """Return a whole level (y, x) as the file holds it."""
    return _cut(codes, (0, 0), codes.shape, profile).whole


def _cut_levels(shape: tuple[int, int], profile: Profile) -> Iterator[tuple[int, int]]:
    """Yield the shapes of the levels that are cut."""
    for level in range(CUT_LEVELS if profile.deflated else 0):
        size = coarser(shape, level)
        if max(size) > _SHOWN:
            yield size


def _cut(codes: np.ndarray, origin: Place, shape: tuple[int, ...], profile: Profile) -> Cut:
    cut = Cut({}, {})
    starts, stops = origin, [o + n for o, n in zip(origin, codes.shape, strict=True)]
    for row in range(starts[0] // BLOCK, -(-stops[0] // BLOCK)):
        for column in range(starts[1] // BLOCK, -(-stops[1] // BLOCK)):
            place = row, column
            full = [(p * BLOCK, min((p + 1) * BLOCK, n)) for p, n in zip(place, shape, strict=True)]
            found = [(max(a, o), min(b, e)) for (a, b), o, e in zip(full, starts, stops, strict=True)]
            part = codes[tuple(slice(a - o, b - o) for (a, b), o in zip(found, origin, strict=True))]
            if found == full:
                cut.whole[place] = _packed(part, profile)
            else:
                cut.pieces[place] = (found[0][0], found[1][0]), part
    return cut


def _completed(cuts: Sequence[Cut], shape: tuple[int, int], profile: Profile) -> Blocks:
    """Return all blocks of a level, those that lie in several chunks put together."""
    blocks: Blocks = {}
    pieces: defaultdict[Place, list[tuple[Place, np.ndarray]]] = defaultdict(list)
    for cut in cuts:
        blocks |= cut.whole
        for place, piece in cut.pieces.items():
            pieces[place].append(piece)
    for place, some in pieces.items():
        top, left = place[0] * BLOCK, place[1] * BLOCK
        inside = [((row - top, column - left), codes) for (row, column), codes in some]
        whole = _pasted(inside, (min(BLOCK, shape[0] - top), min(BLOCK, shape[1] - left)))
        blocks[place] = _packed(whole, profile)
    return blocks


def _pasted(pieces: Sequence[tuple[Place, np.ndarray]], shape: tuple[int, int]) -> np.ndarray:
    """Return pieces, which cover all of `shape` between them, as one array."""
    if len(pieces) == 1:
        return pieces[0][1]
    out = np.empty(shape, pieces[0][1].dtype)
    for (row, column), piece in pieces:
        out[row : row + piece.shape[0], column : column + piece.shape[1]] = piece
    return out


def _packed(codes: np.ndarray, profile: Profile) -> bytes:
    return isal_zlib.compress(profile.stored(codes, (BLOCK, BLOCK)), _LEVEL)
