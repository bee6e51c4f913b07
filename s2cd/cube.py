"""Scenes -> lazy xarray datacube (time, band, y, x), on the native grid, by stackstac."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import rioxarray  # noqa: F401  (registers the .rio accessor that carries the CRS)
import stackstac
import xarray as xr
from rasterio.transform import Affine
from rasterio.windows import Window

from s2cd.catalog.bands import SCL, canonical_band
from s2cd.catalog.scene import Grid, Scene
from s2cd.errors import ConfigError, GridError, NoScenesError, ReadError
from s2cd.reader import SPECTRAL, Source, band_source, read_window, require_asset

DEFAULT_BANDS = ("blue", "green", "red", "nir", "nir08", "swir16", "swir22")


def open_cube(scenes: Sequence[Scene], bands: Sequence[str] | None = None, chunk: int = 2048) -> xr.DataArray:
    """Open scenes of one tile as a lazy datacube.

    bands   names such as "B04" or "red", "scl", or the key of another asset of the scenes; by default the seven bands
            of the shipped models, and the scene classification where every scene has it
    chunk   edge of a spatial chunk in pixels; a chunk holds one date and all bands

    Returns a DataArray (time, band, y, x) of uint16 digital numbers, its attribute `nodata` (0 as a rule) where there
    is no observation, on the finest grid among the bands, never resampled but for the exact replication of coarser
    bands. Coordinates: pixel centres x and y, `id` (time), `parts` (time, what a split datatake is filled from), and
    `scale` and `offset` (time, band) with reflectance = scale * digital number + offset. The CRS stands where rioxarray
    looks for it.

    Raises NoScenesError without scenes, ConfigError for a band a scene does not offer, for a chunk below 1 and for
    bands that differ in nodata, and GridError for scenes of different grids; when computed, ReadError and GridError as
    in `s2cd.reader.read_window`.
    """
    ordered = sorted(scenes, key=lambda s: (s.time, s.id))
    if not ordered:
        raise NoScenesError("no scenes to open, expected at least one")
    if not isinstance(chunk, Integral) or chunk < 1:
        raise ConfigError(f"chunk: found {chunk!r}, expected a whole number of pixels, at least 1")
    names = cube_bands(ordered, bands)
    grid, nodata = common_grid(ordered, names), _common_nodata(ordered, names)
    stacked = stackstac.stack(
        [_plain_item(scene, names, grid) for scene in ordered],
        assets=list(names),
        epsg=grid.epsg,
        resolution=(abs(grid.transform[0]), abs(grid.transform[4])),
        bounds=_bounds(grid),
        snap_bounds=False,
        chunksize=(1, -1, int(chunk), int(chunk)),
        dtype=np.dtype("uint16"),
        fill_value=np.uint16(nodata),
        rescale=False,
        sortby_date=False,
        xy_coords="center",
        properties=False,
        band_coords=False,
        errors_as_nodata=(),
        reader=partial(AssetReader, grid=grid),
    )
    if stacked.shape[2:] != grid.shape:
        raise GridError(f"tile {ordered[0].tile}: cube has shape {stacked.shape[2:]}, its scenes {grid.shape}")
    return _with_coordinates(stacked, ordered, names, grid, nodata)


def cube_bands(scenes: Sequence[Scene], bands: Sequence[str] | None) -> tuple[str, ...]:
    """Return canonical band names, each checked to be offered by every scene.

    Raises ConfigError for a name no band has, a band named twice, and a band a scene does not offer.
    """
    if bands is None:
        names = DEFAULT_BANDS + ((SCL,) if all(SCL in s.assets for s in scenes) else ())
    else:
        names = tuple(b if all(b in s.assets for s in scenes) else canonical_band(b) for b in bands)
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice or not names:
        raise ConfigError(f"bands {list(bands or ())}: expected different names, found {twice or 'none'} twice")
    for scene in scenes:
        for name in names:
            require_asset(scene, name)
    return names


def common_grid(scenes: Sequence[Scene], bands: Sequence[str]) -> Grid:
    """Return the finest grid among `bands`, asserted to be the same for every scene.

    Raises GridError naming the scene that differs, with both grids.
    """
    grid = finest_grid(scenes[0], bands)
    for scene in scenes:
        for piece in (scene, *scene.parts):
            found = finest_grid(piece, bands)
            if found != grid:
                raise GridError(f"{piece.id} lies on {found}, but {scenes[0].id} on {grid}")
    return grid


def finest_grid(scene: Scene, bands: Sequence[str]) -> Grid:
    """Return the grid of the band with the smallest pixels."""
    return min((require_asset(scene, b).grid for b in bands), key=lambda g: abs(g.transform[0]))


def _common_nodata(scenes: Sequence[Scene], bands: Sequence[str]) -> int:
    """Return the digital number that means no observation: that of the spectral bands, if there are any.

    Raises ConfigError where bands differ in it, and where uint16 does not hold it.
    """
    shown = [band for band in bands if band in SPECTRAL] or bands
    pieces = [piece for scene in scenes for piece in (scene, *scene.parts)]
    found = {require_asset(piece, band).nodata: f"{piece.id}, {band}" for piece in pieces for band in shown}
    nodata = next(iter(found))
    if len(found) > 1 or not 0 <= nodata <= 65535:
        told = " and ".join(f"{value} ({where})" for value, where in found.items())
        raise ConfigError(f"nodata: found {told}, expected one number from 0 to 65535 in the whole cube")
    return nodata


def window_of(part: Grid, whole: Grid) -> tuple[slice, slice]:
    """Return the rows and columns of `whole` that a grid within it covers, at whatever spacing."""
    (left, right), (top, bottom) = _edges(part, 1), _edges(part, 0)
    a, _, x, _, e, y = whole.transform
    spans = sorted(((top - y) / e, (bottom - y) / e)), sorted(((left - x) / a, (right - x) / a))
    rows, cols = (
        slice(max(0, round(start)), min(round(stop), size))
        for (start, stop), size in zip(spans, whole.shape, strict=True)
    )
    return rows, cols


def _edges(grid: Grid, axis: int) -> tuple[float, float]:
    """Return where a grid begins and ends along y (0) or x (1)."""
    a, _, left, _, e, top = grid.transform
    start, spacing = ((top, e), (left, a))[axis]
    return start, start + spacing * grid.shape[axis]


class AssetReader:
    """stackstac's reader protocol on top of `s2cd.reader`: typed errors, retries and signing, no resampling.

    stackstac knows an asset by one URL string, so the source travels in it (see `_plain_item`).
    """

    def __init__(self, *, url: str, grid: Grid, **_: Any):
        provider, band, nodata, *hrefs = url.split("\n")
        self.source = Source(band, tuple(hrefs), provider, int(nodata))
        self.grid = grid

    def read(self, window: Window, **_: Any) -> np.ndarray:
        """Read a window of the cube's grid as uint16 (y, x). Raises ReadError for pixels that are none."""
        rows, cols = (slice(*(int(v) for v in span)) for span in window.toranges())
        found = read_window(self.source, self.grid, (rows, cols))
        with np.errstate(invalid="ignore"):
            pixels = found.astype(np.uint16, copy=False)
        if not np.can_cast(found.dtype, np.uint16) and not np.array_equal(pixels, found):
            values = f"{found.dtype} from {found.min():g} to {found.max():g}"
            raise ReadError(self.source.hrefs[0], f"holds {values}, expected whole numbers from 0 to 65535")
        return pixels

    def close(self) -> None:
        """Nothing stays open between reads."""


def _plain_item(scene: Scene, bands: Sequence[str], grid: Grid) -> dict[str, Any]:
    """What stackstac needs of an item: plain, with the old `proj:epsg`, and no bbox to fall back on.

    All bands have the grid of the cube, on which they are read: a coarse one may end before an odd fine one, and
    stackstac would not read what lies beyond.
    """
    assets = {}
    for band in bands:
        source = band_source(scene, band)
        assets[band] = {
            "href": "\n".join((source.provider, band, str(source.nodata), *source.hrefs)),
            "type": "image/tiff",
            "proj:epsg": grid.epsg,
            "proj:transform": list(grid.transform),
            "proj:shape": list(grid.shape),
        }
    properties = {"datetime": scene.time.replace(tzinfo=None).isoformat()}
    return {"id": scene.id, "type": "Feature", "properties": properties, "assets": assets}


def _bounds(grid: Grid) -> tuple[float, float, float, float]:
    (top, bottom), (left, right) = _edges(grid, 0), _edges(grid, 1)
    return (left, bottom, right, top)


def _with_coordinates(
    stacked: xr.DataArray, scenes: Sequence[Scene], bands: Sequence[str], grid: Grid, nodata: int
) -> xr.DataArray:
    a, _, left, _, e, top = grid.transform
    rows, cols = grid.shape
    radiometry = [[[getattr(s.assets[b], what) for b in bands] for s in scenes] for what in ("scale", "offset")]
    cube = xr.DataArray(
        stacked.data,
        dims=("time", "band", "y", "x"),
        coords={
            "time": np.array([s.time.replace(tzinfo=None) for s in scenes], dtype="datetime64[ns]"),
            "band": list(bands),
            "y": top + e * (np.arange(rows) + 0.5),
            "x": left + a * (np.arange(cols) + 0.5),
            "id": ("time", [s.id for s in scenes]),
            "parts": ("time", [parts_of(s) for s in scenes]),
            "scale": (("time", "band"), np.array(radiometry[0], dtype=np.float64)),
            "offset": (("time", "band"), np.array(radiometry[1], dtype=np.float64)),
        },
        name="digital_number",
        attrs={"long_name": "Sentinel-2 digital number", "nodata": nodata, "tile": scenes[0].tile},
    )
    return cube.rio.write_crs(grid.epsg).rio.write_transform(Affine(*grid.transform))


def parts_of(scene: Scene) -> str:
    """Return the ids of the other pieces of a split datatake, as the cube's coordinate `parts` has them."""
    return " ".join(part.id for part in scene.parts)


def cube_grid(cube: xr.DataArray) -> Grid:
    """Return the pixel grid of a cube (or of any part of one).

    Raises GridError if it has no CRS with an EPSG code, or no pixels.
    """
    epsg = cube.rio.crs.to_epsg() if cube.rio.crs else None
    if epsg is None:
        raise GridError(f"cube has CRS {cube.rio.crs}, expected one with an EPSG code (cube.rio.write_crs)")
    if not cube.size:
        raise GridError(f"cube has shape {cube.shape}, expected pixels")
    whole = cube.rio.transform(recalc=False)  # of the cube that this may be a part of
    (left, a), (top, e) = _axis(cube.x.values, whole.a), _axis(cube.y.values, whole.e)
    return Grid(epsg, (a, 0.0, left, 0.0, e, top), (cube.sizes["y"], cube.sizes["x"]))


def _axis(centres: np.ndarray, spacing: float) -> tuple[float, float]:
    """Return where pixels of these centres begin, and their spacing, which a single one does not tell."""
    if len(centres) > 1:
        spacing = (centres[-1] - centres[0]) / (len(centres) - 1)
    return float(centres[0] - spacing / 2), float(spacing)
