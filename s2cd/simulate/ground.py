"""The land: relief, water, woods, fields, settlements and roads, drawn once and lit anew for each date."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.ndimage import distance_transform_edt

from s2cd.simulate import spectra
from s2cd.simulate.spectra import Cover
from s2cd.simulate.texture import Array, IntArray, cells, fractal, hash01

ROAD_SUBPIXELS = 3


@dataclass
class Ground:
    """A landscape on the 10 m grid.

    objects         (y, x) int32, number of the field, stand, lake... a pixel belongs to
    cover           (object,) Cover code
    chance          (object, 4) float32 in [0, 1): what makes each object different
    harvest         (object,) uint16, day of the year of the harvest, 0 = none
    brightness      (y, x) float32, zero mean, unit variance: from pixel to pixel
    vigour          (y, x) float32, zero mean, unit variance: how well plants grow here
    elevation       (y, x) float32, metres
    river_distance  (y, x) float32, pixels
    built           flat pixel numbers, share (n,) and reflectance (band, n) of roads, tracks and buildings
    urbanity        (y, x) float32, 0 in the open, 1 in the middle of a town
    """

    objects: IntArray
    cover: IntArray
    chance: Array
    harvest: IntArray
    brightness: Array
    vigour: Array
    elevation: Array
    river_distance: Array
    urbanity: Array
    built: tuple[IntArray, Array, Array] = field(repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns at 10 m."""
        return self.objects.shape[0], self.objects.shape[1]

    @cached_property
    def area(self) -> IntArray:
        """Pixels per object."""
        return np.bincount(self.objects.ravel(), minlength=len(self.cover))

    @cached_property
    def object_urbanity(self) -> Array:
        """Mean urbanity per object."""
        total = np.bincount(self.objects.ravel(), self.urbanity.ravel(), len(self.cover))
        return total / np.maximum(self.area, 1)

    @property
    def pixel_cover(self) -> IntArray:
        """Cover code (y, x)."""
        return self.cover[self.objects]


@dataclass(frozen=True)
class Settlement:
    """Centre (y, x) [px], radius [px], and direction of its streets [rad]."""

    y: float
    x: float
    radius: float
    angle: float


def draw_ground(rng: np.random.Generator, shape: tuple[int, int]) -> Ground:
    """Draw a landscape of `shape` (rows, columns) at 10 m; reproducible for a given state of `rng`."""
    y, x = np.indices(shape, dtype=np.float32)
    river_distance, relief = _river_and_relief(rng, y, x)
    towns = _settlements(rng, shape, river_distance)
    roads = _roads(rng, shape, towns)
    town_of, urbanity = _urbanity(rng, y, x, towns, distance_to(roads > 0.2))
    seed = int(rng.integers(1 << 31))
    key, border = _field_pattern(rng, y, x, seed)
    objects = np.unique(key, return_inverse=True)[1].reshape(shape).astype(np.int32)
    cover = _land_use(rng, objects, relief, river_distance, seed)
    for code, mask in _special_places(rng, cover[objects], river_distance, urbanity, border, seed):
        objects[mask] = len(cover)
        cover = np.append(cover, code)
    ground = Ground(
        objects=objects,
        cover=cover,
        chance=rng.random((len(cover), 4), np.float32),
        harvest=spectra.harvest_days(cover, rng.random(len(cover), np.float32)),
        brightness=fractal(rng, shape, 4, octaves=3, persistence=0.9),
        vigour=fractal(rng, shape, 24, octaves=4, persistence=0.6),
        elevation=relief,
        river_distance=river_distance,
        urbanity=urbanity,
        built=(np.empty(0, np.intp), np.empty(0, np.float32), np.empty((7, 0), np.float32)),
    )
    ground.built = _built_surface(ground, town_of, towns, roads, border, seed)
    return ground


def _special_places(
    rng: np.random.Generator, cover: IntArray, river: Array, urbanity: Array, border: Array, seed: int
) -> list[tuple[Cover, IntArray]]:
    """What does not follow the pattern of fields, in the order in which it is laid over them."""
    shape = (cover.shape[0], cover.shape[1])
    y, x = np.ogrid[: shape[0], : shape[1]]
    is_wood = np.isin(cover, spectra.WOODS)
    bush = fractal(rng, shape, 18, octaves=4, persistence=0.7)
    hedges = (border < 0.9) & (bush > 0.55) & (fractal(rng, shape, 160, octaves=2) > 0.1)
    copses = bush > 2.7
    width = 3.4 + 0.9 * np.sin(x / 47 + y / 61)
    banks = (river < width / 2 + 1.3 + 0.6 * bush) & (bush > -0.2)
    urban = (urbanity > 0.5) & ~(is_wood & (urbanity < 0.62))
    lakes = _lakes(rng, shape, river) & (urbanity < 0.2)
    return [
        (Cover.BROADLEAF, (hedges | copses | banks) & ~is_wood),
        (Cover.GARDEN, urban),
        (Cover.BROADLEAF, urban & (bush > 1.5 + urbanity)),
        (Cover.LAKE, lakes),
        (Cover.RIVER, river < width / 2),
    ]


def _river_and_relief(rng: np.random.Generator, y: Array, x: Array) -> tuple[Array, Array]:
    """A meandering river from one side to the other, and hills that leave it its valley [m]."""
    shape = y.shape
    along, across, length = (x, y, shape[0]) if rng.random() < 0.5 else (y, x, shape[1])
    phase = rng.uniform(0, 2 * np.pi, 4)
    course = length * rng.uniform(0.3, 0.7) + 0.0 * along
    slope = np.zeros_like(along)
    for wavelength, amplitude, p in zip((1100, 420, 170, 73), (110, 42, 15, 4.5), phase, strict=True):
        k = np.float32(2 * np.pi / wavelength)
        course += amplitude * np.sin(k * along + p)
        slope += amplitude * k * np.cos(k * along + p)
    distance = (np.abs(across - course) / np.sqrt(1 + slope**2)).astype(np.float32)
    hills = fractal(rng, (shape[0], shape[1]), 240, octaves=7, persistence=0.53)
    valley = 1 - np.exp(-((distance / 110) ** 2))
    height = 60 + 15 * valley + 70 * valley * np.maximum(hills + 0.6, 0.15 * hills)
    height += 90 * valley * np.maximum(hills - 0.4, 0) ** 1.5
    return distance, height.astype(np.float32)


def _settlements(rng: np.random.Generator, shape: tuple[int, int], river: Array) -> list[Settlement]:
    """One town, and a village for every 5 square kilometres or so."""
    count = max(1, round(shape[0] * shape[1] / 60_000))
    towns: list[Settlement] = []
    for _ in range(count * 6):
        radius = 62.0 if not towns else float(np.clip(rng.lognormal(2.85, 0.4), 9, 40))
        radius = min(radius, 0.2 * min(shape))
        y, x = rng.uniform(0.08, 0.92, 2) * shape
        clear = all(np.hypot(t.y - y, t.x - x) > 1.6 * (t.radius + radius) + 25 for t in towns)
        if clear and river[int(y), int(x)] > 0.3 * radius:
            towns.append(Settlement(float(y), float(x), radius, float(rng.uniform(0, np.pi / 2))))
        if len(towns) == count:
            break
    return towns or [Settlement(shape[0] / 2, shape[1] / 2, 0.2 * min(shape), 0.3)]


def _urbanity(
    rng: np.random.Generator, y: Array, x: Array, towns: list[Settlement], road: Array
) -> tuple[IntArray, Array]:
    """The nearest settlement, and how built-up the place is: settlements grow along their roads."""
    town_of = np.zeros(y.shape, np.int16)
    urbanity = np.zeros(y.shape, np.float32)
    ragged = 0.30 * fractal(rng, (y.shape[0], y.shape[1]), 32, octaves=5, persistence=0.7)
    ribbon = 0.42 * np.exp(-road / 4)
    for number, town in enumerate(towns):
        reach = int(2.2 * town.radius) + 3
        window = (
            slice(max(int(town.y) - reach, 0), int(town.y) + reach),
            slice(max(int(town.x) - reach, 0), int(town.x) + reach),
        )
        r2 = ((y[window] - town.y) ** 2 + (x[window] - town.x) ** 2) / town.radius**2
        here = np.exp(-0.9 * r2) + (ragged + ribbon)[window] * np.minimum(1, 1.7 * np.exp(-0.45 * r2))
        closer = here > urbanity[window]
        town_of[window][closer] = number
        urbanity[window] = np.maximum(urbanity[window], here)
    return town_of, np.clip(urbanity, 0, 1)


def _field_pattern(rng: np.random.Generator, y: Array, x: Array, seed: int) -> tuple[IntArray, Array]:
    """Blocks between lanes, each cut into parallel fields of its own width and direction.

    Returns a number per field and the distance to the nearest lane [px].
    """
    shape = (y.shape[0], y.shape[1])
    bend_y, bend_x = (7 * fractal(rng, shape, 90, octaves=3) for _ in range(2))
    block, border = cells(rng, y + bend_y, x + bend_x, 56)
    bend_y *= 0.25
    angle = hash01(seed, np.arange(block.max() + 1)) * np.float32(np.pi)
    width = 5.5 + 15 * hash01(seed + 1, np.arange(block.max() + 1)) ** 1.5
    length = 22 + 45 * hash01(seed + 2, np.arange(block.max() + 1))
    cos, sin = np.cos(angle)[block], np.sin(angle)[block]
    u = (x + bend_y) * cos + (y + bend_x * 0.25) * sin
    v = (y + bend_x * 0.25) * cos - (x + bend_y) * sin
    w = width[block]
    strip = np.floor(u / w + 0.28 * np.sin(u * (2.1 / w))).astype(np.int64)
    stagger = hash01(seed + 3, block, strip)
    piece = np.floor(v / length[block] + stagger).astype(np.int64)
    return ((block.astype(np.int64) << 24) + ((strip & 0xFFF) << 12) + (piece & 0xFFF)), border


def _land_use(rng: np.random.Generator, objects: IntArray, relief: Array, river: Array, seed: int) -> IntArray:
    """What grows on each object: woods on the heights, meadows by the river, crops in between."""
    count = np.bincount(objects.ravel())
    shape = (objects.shape[0], objects.shape[1])

    def mean(values: Array) -> Array:
        return np.bincount(objects.ravel(), values.ravel()) / count

    number = np.arange(len(count))
    woods = mean(fractal(rng, shape, 150, octaves=5, persistence=0.6)) + 0.007 * (mean(relief) - 120)
    woods += 0.3 * hash01(seed + 5, number)
    grass = mean(fractal(rng, shape, 200, octaves=3)) + 1.6 * np.exp(-mean(river) / 45)
    crop = np.searchsorted([0.38, 0.52, 0.64, 0.85], hash01(seed + 6, number))
    cover = np.where((grass > 1.0) | (hash01(seed + 7, number) < 0.10), Cover.MEADOW, crop)
    conifer = mean(fractal(rng, shape, 120, octaves=3)) + 0.8 * (hash01(seed + 8, number) - 0.5) > 0.4
    return np.where(woods > 0.85, np.where(conifer, Cover.CONIFER, Cover.BROADLEAF), cover).astype(np.uint8)


def _lakes(rng: np.random.Generator, shape: tuple[int, int], river: Array) -> IntArray:
    """Gravel pits and ponds beside the river."""
    shapes = fractal(rng, shape, 60, octaves=4, persistence=0.4) - 0.00035 * (river - 40) ** 2
    return (shapes > 1.9) & (river > 8)


def _roads(rng: np.random.Generator, shape: tuple[int, int], towns: list[Settlement]) -> Array:
    """Share of each pixel under asphalt: a motorway, and roads between neighbouring settlements."""
    n = ROAD_SUBPIXELS
    canvas = np.zeros((shape[0] * n, shape[1] * n), bool)
    start, end = rng.uniform(0.1, 0.9, 2) * shape[0]
    _pave(canvas, _curve(rng, (start, -5.0), (end, shape[1] + 5.0), 0.05), 2.4)
    paved: set[tuple[Settlement, Settlement]] = set()
    for i, town in enumerate(towns):
        others = sorted(towns[:i] + towns[i + 1 :], key=lambda t: (t.y - town.y) ** 2 + (t.x - town.x) ** 2)
        for other in others[:3]:
            if (other, town) not in paved:
                _pave(canvas, _curve(rng, (town.y, town.x), (other.y, other.x), 0.06), 0.95)
            paved.add((town, other))
        edge = (float(rng.choice([-5, shape[0] + 5])), float(rng.uniform(0, shape[1])))
        if i % 3 == 0:
            _pave(canvas, _curve(rng, (town.y, town.x), edge, 0.06), 0.8)
    return canvas.reshape(shape[0], n, shape[1], n).mean(axis=(1, 3), dtype=np.float32)


def _curve(rng: np.random.Generator, a: tuple[float, float], b: tuple[float, float], bend: float) -> Array:
    """Points (2, n) every quarter of a pixel along a smooth, slightly winding way from a to b."""
    span = np.hypot(b[0] - a[0], b[1] - a[1])
    t = np.linspace(0, 1, int(4.4 * span) + 2, dtype=np.float32)
    offset = np.zeros_like(t)
    for wave in (1, 2, 3):
        offset += rng.normal(0, bend * span / wave**1.6) * np.sin(np.pi * wave * t)
    along = np.array([b[0] - a[0], b[1] - a[1]]) / max(span, 1e-6)
    points = np.array(a)[:, None] + along[:, None] * span * t + np.array([along[1], -along[0]])[:, None] * offset
    return points.astype(np.float32)


def _pave(canvas: IntArray, points: Array, width: float) -> None:
    """Set the subpixels within `width` pixels across the line."""
    direction = np.gradient(points, axis=1)
    normal = np.stack([direction[1], -direction[0]]) / np.maximum(np.hypot(*direction), 1e-6)
    for offset in np.arange(-width / 2, width / 2 + 0.01, 0.2):
        row, col = np.floor((points + offset * normal) * ROAD_SUBPIXELS).astype(np.intp)
        inside = (row >= 0) & (row < canvas.shape[0]) & (col >= 0) & (col < canvas.shape[1])
        canvas[row[inside], col[inside]] = True


def _built_surface(
    ground: Ground, town_of: IntArray, towns: list[Settlement], roads: Array, border: Array, seed: int
) -> tuple[IntArray, Array, Array]:
    """Collect what is built: pixel numbers, share of the pixel, reflectance of that share."""
    cover = ground.pixel_cover
    urban = cover == Cover.GARDEN
    lane = np.clip(0.75 - border, 0, 0.6) * ~urban
    lane *= np.where(np.isin(cover, spectra.WOODS), 0.12, hash01(seed + 11, ground.objects // 3) < 0.75)
    share = np.zeros((3, *ground.shape), np.float32)  # asphalt, track, building
    share[0], share[1] = roads, lane
    rows, cols = np.nonzero(urban)
    angle = np.array([t.angle for t in towns], np.float32)[town_of[rows, cols]]
    asphalt, roof, colour = fabric(rows, cols, angle, ground.urbanity[rows, cols], seed)
    share[0][rows, cols] = np.maximum(share[0][rows, cols], asphalt)
    share[2][rows, cols] = roof * (1 - roads[rows, cols])
    share[:, np.isin(cover, (Cover.RIVER, Cover.LAKE)) & (roads == 0)] = 0
    total = np.minimum(share.sum(axis=0), 1)
    index = np.flatnonzero(total)
    parts = share.reshape(3, -1)[:, index]
    parts /= np.maximum(parts.sum(axis=0), 1e-6)
    mixed = spectra.ASPHALT[:, None] * parts[0] + spectra.TRACK[:, None] * parts[1]
    urban_at = np.searchsorted(index, np.ravel_multi_index((rows, cols), ground.shape))
    urban_at, known = np.minimum(urban_at, len(index) - 1), roof > 0
    mixed[:, urban_at[known]] += colour[:, known] * parts[2, urban_at[known]]
    return index, total.ravel()[index], mixed.astype(np.float32)


def fabric(
    rows: IntArray, cols: IntArray, angle: Array, density: Array, seed: int, industrial: bool | None = None
) -> tuple[Array, Array, Array]:
    """Streets and buildings at the given pixels: share of street, share of roof, reflectance of roof (band, n).

    Houses measure 10 to 30 m, halls 60 to 80 m; quarters of the latter are drawn where `industrial` is None.
    """
    n = len(rows)
    street, roof = np.zeros(n, np.float32), np.zeros(n, np.float32)
    colour = np.zeros((7, n), np.float32)
    cos, sin = np.cos(angle), np.sin(angle)
    halls = (hash01(seed + 20, rows // 34, cols // 34) < 0.22) & (density < 0.85)
    if industrial is not None:
        halls = np.full(n, industrial)
    for dy, dx in ((0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)):
        u = (cols + dx) * cos + (rows + dy) * sin
        v = (rows + dy) * cos - (cols + dx) * sin
        on_street = ((u % 8.3) < 0.7) | ((v % 13.1) < 0.7)
        size_u, size_v = np.where(halls, 8.3, 1.9), np.where(halls, 6.5, 2.6)
        iu, iv = np.floor(u / size_u).astype(np.int64), np.floor(v / size_v).astype(np.int64)
        present = hash01(seed + 21, iu, iv, halls) < np.where(halls, 0.7, 0.15 + 0.55 * density)
        gap = np.where(halls, 0.16, 0.12)
        inside = (u / size_u - iu > gap) & (v / size_v - iv > gap)
        house = present & inside & ~on_street
        kind = np.searchsorted([0.5, 0.74, 0.95], hash01(seed + 22, iu, iv))
        hall_kind = np.searchsorted([0.05, 0.3, 0.62], hash01(seed + 23, iu, iv))
        tone = 0.6 + 0.5 * hash01(seed + 24, iu, iv)
        paint = spectra.ROOFS[np.where(halls, hall_kind, kind)].T * tone
        street += 0.25 * (on_street * 0.8 + (halls & ~house & ~on_street) * 0.75)
        roof += 0.25 * house
        colour += 0.25 * house * paint
    return street, roof, colour / np.maximum(roof, 1e-6)


def slopes(elevation: Array) -> tuple[Array, Array]:
    """dz/dy (southwards) and dz/dx (eastwards) of an elevation model on the 10 m grid, metres per metre."""
    if min(elevation.shape) < 2:
        return np.zeros_like(elevation), np.zeros_like(elevation)
    dy, dx = np.gradient(elevation, 10.0)
    return dy.astype(np.float32), dx.astype(np.float32)


def distance_to(mask: IntArray) -> Array:
    """Distance [px] of each pixel to the nearest one in `mask`; infinite where the mask is empty."""
    if not mask.any():
        return np.full(mask.shape, np.inf, np.float32)
    return distance_transform_edt(~mask).astype(np.float32)
