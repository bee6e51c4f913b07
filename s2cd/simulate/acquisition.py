"""One overpass: when it happens, how the sun stands, what the instrument sees, and what Sen2Cor calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from s2cd.simulate import atmosphere, spectra
from s2cd.simulate.changes import Event
from s2cd.simulate.ground import Ground, slopes
from s2cd.simulate.spectra import WAVELENGTHS
from s2cd.simulate.texture import Array, IntArray, fractal, resample

# A real overpass of orbit 51; the 143 orbits of a cycle follow each other evenly through 10 days, and the two
# satellites fly half a cycle apart.
_ORBIT_51 = datetime(2017, 12, 12, 10, 54, 15, tzinfo=UTC)
_ORBIT_SECONDS = 10 * 86400 / 143
_CLOUD_COVER = (0.02, 0.07, 0.04, 0.96, 0.0, 0.10, 0.06, 0.02)
_CLOUD_HEIGHT = 1400.0  # m above ground
_CLASS = {"nodata": 0, "dark": 2, "shadow": 3, "vegetation": 4, "bare": 5, "water": 6, "unclassified": 7}


@dataclass(frozen=True)
class Overpass:
    """Time (UTC), relative orbit, platform, sun elevation and azimuth [deg], cloud share, aerosol depth."""

    time: datetime
    orbit: int
    platform: str
    sun_elevation: float
    sun_azimuth: float
    cloud_share: float
    aerosol: float
    partial: bool


def overpasses(
    dates: int,
    orbits: Sequence[int],
    start: datetime,
    step_days: float,
    lonlat: tuple[float, float],
    clouds: bool,
) -> list[Overpass]:
    """Plan `dates` overpasses, `step_days` apart, the orbits taking turns; every date lies on a real 5-day cycle.

    The fourth date of a series of five or more is nearly overcast. The second orbit sees the tile only in part.
    """
    plan: list[Overpass] = []
    for k in range(dates):
        orbit = orbits[k % len(orbits)]
        reference = _ORBIT_51 + timedelta(seconds=(orbit - 51) * _ORBIT_SECONDS)
        wanted = start + timedelta(days=k * step_days)
        cycle = int(np.ceil((wanted - reference) / timedelta(days=5)))
        time = reference + timedelta(days=5 * cycle, seconds=37 * k % 11 * 7)
        share = _CLOUD_COVER[k % len(_CLOUD_COVER)] if clouds else 0.0
        if dates < 5 and share > 0.5:
            share = 0.05
        elevation, azimuth = sun_position(time, *lonlat)
        platform = "sentinel-2a" if cycle % 2 else "sentinel-2b"
        aerosol = 0.03 + 0.05 * ((k * 5) % 8) / 8
        plan.append(Overpass(time, orbit, platform, elevation, azimuth, share, aerosol, orbit in orbits[1:2]))
    return plan


def sun_position(time: datetime, longitude: float, latitude: float) -> tuple[float, float]:
    """Elevation and azimuth (clockwise from north) of the sun [deg], good to half a degree.

    Declination and equation of time after Spencer (1971), Search 2 (5), 172.
    """
    day = time.timetuple().tm_yday - 1 + time.hour / 24
    g = 2 * np.pi * day / 365
    declination = (
        0.006918 - 0.399912 * np.cos(g) + 0.070257 * np.sin(g) - 0.006758 * np.cos(2 * g) + 0.000907 * np.sin(2 * g)
    )
    minutes = 229.18 * (
        0.000075 + 0.001868 * np.cos(g) - 0.032077 * np.sin(g) - 0.014615 * np.cos(2 * g) - 0.040849 * np.sin(2 * g)
    )
    clock = time.hour * 60 + time.minute + time.second / 60 + minutes + 4 * longitude
    hour = np.radians(clock / 4 - 180)
    phi = np.radians(latitude)
    up = np.sin(phi) * np.sin(declination) + np.cos(phi) * np.cos(declination) * np.cos(hour)
    east = -np.cos(declination) * np.sin(hour)
    north = np.cos(phi) * np.sin(declination) - np.sin(phi) * np.cos(declination) * np.cos(hour)
    return float(np.degrees(np.arcsin(up))), float(np.degrees(np.arctan2(east, north)) % 360)


def observe(
    rng: np.random.Generator, ground: Ground, events: Sequence[Event], overpass: Overpass
) -> tuple[Array, IntArray]:
    """Return surface reflectance as Sen2Cor would deliver it, (band, y, x) float32 on the 10 m grid, and the SCL.

    Both carry no swath edge yet. The SCL (y, x) uint8 is on the 20 m grid, ceil(size / 2).
    """
    image = surface(ground, events, overpass.time)
    dy, dx = slopes(ground.elevation)
    image = atmosphere.sun_angle(image, dy, dx, overpass.sun_elevation, overpass.sun_azimuth)
    opacity, brightness, shade, veil = _sky(rng, ground.shape, overpass)
    if overpass.cloud_share:
        image = atmosphere.shadow(image, WAVELENGTHS, shade)
    down, right = rng.uniform(-0.3, 0.3, 2)
    fine = np.array(spectra.GSD) == 10
    image[fine] = atmosphere.shift(image[fine], down, right, sigma=0.55)
    image[~fine] = atmosphere.shift(image[~fine], down, right, sigma=0.9)
    image = atmosphere.haze(image, WAVELENGTHS, overpass.aerosol)
    image = atmosphere.gain(image, 1 + rng.normal(0, 0.012, len(image)))
    clear = image if not overpass.cloud_share else image.copy()
    if overpass.cloud_share:
        image = atmosphere.cirrus(image, WAVELENGTHS, veil)
        image = atmosphere.clouds(image, WAVELENGTHS, opacity, brightness)
    scl = classify(rng, clear, opacity, shade, veil)
    return atmosphere.noise(image, rng), scl


def surface(ground: Ground, events: Sequence[Event], when: datetime) -> Array:
    """Reflectance of the ground at a moment, evenly lit: (band, y, x) float32."""
    day = when.timetuple().tm_yday + when.hour / 24
    bare, green, cover = spectra.object_spectra(ground.cover, ground.chance, ground.harvest, day)
    growth = cover[ground.objects]
    patchy = spectra.patchiness(ground.cover)[ground.objects]
    growth = np.clip(growth + 3 * patchy * growth * (1.15 - growth) * ground.vigour, 0, 1.05)
    texture = spectra.texture_strength(ground.cover)[ground.objects]
    texture = 1 + texture * ground.brightness + 0.35 * texture * ground.vigour
    np.maximum(texture, 0.35, out=texture)
    image = np.empty((len(spectra.BANDS), *ground.shape), np.float32)
    for band in range(len(image)):
        low, rise = bare[:, band], green[:, band] - bare[:, band]
        image[band] = (low[ground.objects] + rise[ground.objects] * growth) * texture
    flat = image.reshape(len(image), -1)
    index, share, reflectance = ground.built
    flat[:, index] += share * (reflectance - flat[:, index])
    for event in events:
        if event.in_effect(when):
            flat[:, event.index] += event.share * (event.reflectance - flat[:, event.index])
    return image


def _sky(rng: np.random.Generator, shape: tuple[int, int], overpass: Overpass) -> tuple[Array, Array, Array, Array]:
    """Cloud opacity, cloud brightness, shadow depth and cirrus opacity, each (y, x) float32.

    Clouds are drawn on a wider 20 m grid, so that shadows fall into the image from clouds outside it.
    """
    if not overpass.cloud_share:
        none = np.zeros(shape, np.float32)
        return none, none + 1, none, none
    reach = _CLOUD_HEIGHT / np.tan(np.radians(overpass.sun_elevation)) / 10
    turn = np.radians(overpass.sun_azimuth)
    # Towards the sun: the cloud that shades a pixel stands there. Rows grow southwards.
    dy, dx = -reach * np.cos(turn), reach * np.sin(turn)
    margin = int(np.ceil(reach / 2)) + 4
    coarse = tuple((n + 1) // 2 + 2 * margin + 4 for n in shape)
    overcast = overpass.cloud_share > 0.5
    field = fractal(rng, (coarse[0], coarse[1]), 150 if overcast else 55, octaves=7, persistence=0.55)
    inner = field[margin:-margin, margin:-margin]
    excess = np.maximum(field - np.quantile(inner, 1 - overpass.cloud_share), 0)
    cloud = 1 - np.exp(-(2.5 if overcast else 5.0) * excess**1.3)
    light = 0.62 + 0.28 * np.minimum(excess, 1.6) + 0.06 * fractal(rng, (coarse[0], coarse[1]), 14, octaves=3)

    def view(grid: Array, dy: float = 0.0, dx: float = 0.0) -> Array:
        row, col = margin + dy / 2, margin + dx / 2
        part = grid[int(np.floor(row)) - 1 :, int(np.floor(col)) - 1 :]
        return resample(part, shape, 2.0, 1.0)

    wisps = fractal(rng, (coarse[0], coarse[1]), 120, octaves=5, persistence=0.55, stretch=2.5)
    thin = wisps - np.quantile(wisps, 1 - min(0.9 * overpass.cloud_share, 0.2))
    veil = 0.12 * np.clip(thin, 0, 1.2) + 0.05 * np.minimum(excess * 3, 1)
    return view(cloud), view(light), view(cloud, dy, dx), view(veil)


def classify(rng: np.random.Generator, clear: Array, opacity: Array, shade: Array, veil: Array) -> IntArray:
    """Scene classification on the 20 m grid with the habits of Sen2Cor: rims missed, roofs taken for cloud."""
    clear20 = np.stack([halve(band) for band in clear])
    blue, green, red, nir, _, swir, _ = clear20
    scl = np.full(blue.shape, _CLASS["unclassified"], np.uint8)
    ndvi = (nir - red) / np.maximum(nir + red, 1e-3)
    scl[ndvi < 0.32] = _CLASS["bare"]
    scl[ndvi > 0.40] = _CLASS["vegetation"]
    scl[(nir < 0.10) & (swir < 0.14)] = _CLASS["dark"]
    scl[(nir < 0.06) & (green > nir)] = _CLASS["water"]
    ragged = 0.10 * fractal(rng, (blue.shape[0], blue.shape[1]), 6, octaves=3)
    cloud, dark, thin = (halve(layer) for layer in (opacity, shade, veil))
    scl[(dark + ragged > 0.38) & (scl != _CLASS["water"])] = _CLASS["shadow"]
    scl[(thin + 0.1 * ragged > 0.035)] = 10
    scl[((cloud + ragged > 0.28) & (cloud > 0.08)) | ((blue > 0.30) & (red > 0.31))] = 8
    scl[(cloud + ragged > 0.62) & (cloud > 0.3)] = 9
    return scl


def halve(layer: Array) -> Array:
    """Average 2 x 2 pixels; an odd last row or column is averaged over what there is. (y, x) -> ceil half."""
    padded = np.pad(layer, [(0, n % 2) for n in layer.shape], mode="edge")
    return 0.25 * (padded[::2, ::2] + padded[1::2, ::2] + padded[::2, 1::2] + padded[1::2, 1::2])


def swath(shape: tuple[int, int], overpass: Overpass, full_width: float) -> tuple[float, float]:
    """Where the swath ends: column at the top row and at the bottom row, in 10 m pixels; infinite if beyond.

    A descending orbit runs from north-north-east to south-south-west, so the eastern edge leans to the left.
    """
    if not overpass.partial:
        return (np.inf, np.inf)
    jitter = 3.0 * (overpass.time.toordinal() % 5)
    return (full_width * 1.01 + jitter, full_width * 1.01 + jitter - 0.21 * shape[0])
