"""Probability codes -> cloud-optimised GeoTIFF, in memory.

The codes stay uint16 until GDAL needs a block: a VRT over them turns each block into the stored type, so that a full
tile never exists as float32. Overviews are made here, not by GDAL: averages rounded to codes compress as well as the
map itself and cost a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

import numpy as np
import rasterio
from rasterio.io import MemoryFile
from rasterio.shutil import copy

from s2cd.catalog.scene import Grid
from s2cd.errors import ConfigError, GridError
from s2cd.outputs.codes import CODE_NODATA, CODE_SCALE, QUANTUM

BLOCK = 512
_BAND_ROWS = 512


@dataclass(frozen=True, slots=True)
class Profile:
    """How a map is stored: probability = scale * stored value, and `nodata` means no observation."""

    dtype: str
    scale: float
    nodata: float
    options: Mapping[str, str] = field(default_factory=dict)


# Chosen by measurement on a full tile of realistic texture: see docs/decisions.md.
PROFILES: Mapping[str, Profile] = {
    "default": Profile("float32", 1.0, np.nan, {"COMPRESS": "DEFLATE", "LEVEL": "1", "PREDICTOR": "NO"}),
    "zstd": Profile("float32", 1.0, np.nan, {"COMPRESS": "ZSTD", "LEVEL": "1", "PREDICTOR": "FLOATING_POINT"}),
    "lerc": Profile("float32", 1.0, np.nan, {"COMPRESS": "LERC_DEFLATE", "MAX_Z_ERROR": str(QUANTUM / 2)}),
    "uint8": Profile("uint8", 1 / 254, 255, {"COMPRESS": "DEFLATE", "LEVEL": "1", "PREDICTOR": "NO"}),
}
_GDAL_TYPES = {"uint8": "Byte", "uint16": "UInt16", "float32": "Float32"}
_DESCRIPTION = "probability of change"


@contextmanager
def map_cog(
    pyramid: list[np.ndarray],
    grid: Grid,
    *,
    profile: str = "default",
    threads: int = 1,
    tags: Mapping[str, str] | None = None,
) -> Iterator[memoryview]:
    """Encode a map as COG; the bytes live as long as the context.

    pyramid   uint16 codes (y, x) from the map itself to the coarsest overview, as `code_pyramid` gives them
    profile   key of PROFILES
    threads   how many threads compress

    Raises GridError if the map's shape is not the grid's, ConfigError for an unknown profile.
    """
    if profile not in PROFILES:
        raise ConfigError(f"unknown COG profile {profile!r}, expected one of {', '.join(PROFILES)}")
    stored = PROFILES[profile]
    all_tags = {"QUANTUM": str(QUANTUM), **(tags or {})}
    scale_to_stored = 1 / (stored.scale * CODE_SCALE)
    with _encoded(pyramid, grid, stored, scale_to_stored, CODE_NODATA, threads, all_tags) as data:
        yield data


def code_pyramid(codes: np.ndarray) -> list[np.ndarray]:
    """Return the codes and their overviews: each half the size of the one before, down to one block.

    A pixel of an overview is the mean of the observed pixels below it, rounded to a code; it is without observation
    where all of them are.
    """
    levels = [codes]
    while max(levels[-1].shape) > BLOCK:
        levels.append(_halve(levels[-1]))
    return levels


def _halve(codes: np.ndarray) -> np.ndarray:
    rows, columns = codes.shape
    out = np.empty((-(-rows // 2), -(-columns // 2)), np.uint16)
    for top in range(0, rows, _BAND_ROWS):
        band = codes[top : top + _BAND_ROWS]
        sums = _sum_of_pairs(_sum_of_pairs(band, 0), 1)
        out[top // 2 : top // 2 + len(sums)] = _MEAN_OF_FOUR[sums]
    return out


def _sum_of_pairs(values: np.ndarray, axis: int) -> np.ndarray:
    """Add neighbours along an axis in uint32; a last one without a partner gets "no observation" as its own."""
    values = np.moveaxis(values, axis, 0)
    size = len(values)
    sums = np.empty((-(-size // 2), *values.shape[1:]), np.uint32)
    np.add(values[0 : size - 1 : 2], values[1::2], out=sums[: size // 2], dtype=np.uint32)
    if size % 2:
        sums[-1] = values[-1] + np.uint32(CODE_NODATA * (2 if axis else 1))
    return np.moveaxis(sums, 0, axis)


def _mean_table() -> np.ndarray:
    """Mean of four codes by their sum: a sum tells how many of them are 65535, for the others reach only 4096."""
    sums = np.arange(4 * CODE_NODATA + 1, dtype=np.int64)
    missing = np.minimum((sums + 4) // (CODE_NODATA + 1), 4)
    observed = 4 - missing
    mean = (sums - missing * CODE_NODATA + observed // 2) // np.maximum(observed, 1)
    return np.where(observed == 0, CODE_NODATA, mean).astype(np.uint16)


_MEAN_OF_FOUR = _mean_table()


@contextmanager
def _encoded(
    pyramid: list[np.ndarray],
    grid: Grid,
    stored: Profile,
    ratio: float,
    source_nodata: int,
    threads: int,
    tags: Mapping[str, str],
) -> Iterator[memoryview]:
    if pyramid[0].shape != tuple(grid.shape):
        raise GridError(f"a map of {pyramid[0].shape} pixels, expected the grid's {tuple(grid.shape)}")
    with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_ONE_BIG_READ="YES"), ExitStack() as stack:
        levels = [_as_raster(stack, level) for level in pyramid]
        overviews = [
            _memory(stack, _vrt(level.shape, _band(stored, _scaled(name, ratio, source_nodata))), ".vrt").name
            for name, level in zip(levels[1:], pyramid[1:], strict=True)
        ]
        band = _band(stored, _scaled(levels[0], ratio, source_nodata), overviews, _DESCRIPTION)
        source = _memory(stack, _vrt(pyramid[0].shape, band, grid, tags), ".vrt")
        target = stack.enter_context(MemoryFile(ext=".tif"))
        copy(
            source.name,
            target.name,
            driver="COG",
            BLOCKSIZE=str(BLOCK),
            NUM_THREADS=str(threads),
            BIGTIFF="IF_SAFER",
            **stored.options,
        )
        yield target.getbuffer()


def _as_raster(stack: ExitStack, values: np.ndarray) -> str:
    """Offer an array to GDAL as a raster in memory; return its name."""
    rows, columns = values.shape
    size = values.dtype.itemsize
    raw = _memory(stack, np.ascontiguousarray(values).tobytes(), ".raw")
    band = (
        f'<VRTRasterBand dataType="{_GDAL_TYPES[values.dtype.name]}" band="1" subClass="VRTRawRasterBand">'
        f'<SourceFilename relativeToVRT="0">{raw.name}</SourceFilename><ImageOffset>0</ImageOffset>'
        f"<PixelOffset>{size}</PixelOffset><LineOffset>{size * columns}</LineOffset><ByteOrder>LSB</ByteOrder>"
        "</VRTRasterBand>"
    )
    return _memory(stack, _vrt((rows, columns), band), ".vrt").name


def _memory(stack: ExitStack, content: bytes | str, extension: str) -> MemoryFile:
    data = content.encode() if isinstance(content, str) else content
    return stack.enter_context(MemoryFile(data, ext=extension))


def _scaled(name: str, ratio: float, nodata: int) -> str:
    return (
        f'<ComplexSource><SourceFilename relativeToVRT="0">{name}</SourceFilename><SourceBand>1</SourceBand>'
        f"<NODATA>{nodata}</NODATA><ScaleOffset>0</ScaleOffset><ScaleRatio>{ratio!r}</ScaleRatio></ComplexSource>"
    )


def _band(stored: Profile, source: str, overviews: list[str] | None = None, description: str = "") -> str:
    scale = f"<Scale>{stored.scale!r}</Scale><Offset>0</Offset>" if stored.scale != 1 else ""
    levels = "".join(
        f'<Overview><SourceFilename relativeToVRT="0">{name}</SourceFilename><SourceBand>1</SourceBand></Overview>'
        for name in overviews or ()
    )
    return (
        f'<VRTRasterBand dataType="{_GDAL_TYPES[stored.dtype]}" band="1"><Description>{description}</Description>'
        f"<NoDataValue>{stored.nodata:g}</NoDataValue>{scale}{source}{levels}</VRTRasterBand>"
    )


def _vrt(shape: tuple[int, ...], band: str, grid: Grid | None = None, tags: Mapping[str, str] | None = None) -> str:
    georeference = ""
    if grid is not None:
        a, b, c, d, e, f = grid.transform
        gdal_order = ", ".join(repr(float(v)) for v in (c, a, b, f, d, e))
        georeference = f"<SRS>EPSG:{grid.epsg}</SRS><GeoTransform>{gdal_order}</GeoTransform>"
    items = "".join(f'<MDI key="{escape(k)}">{escape(v)}</MDI>' for k, v in (tags or {}).items())
    metadata = f'<Metadata><MDI key="AREA_OR_POINT">Area</MDI>{items}</Metadata>'
    size = f'rasterXSize="{shape[1]}" rasterYSize="{shape[0]}"'
    return f"<VRTDataset {size}>{georeference}{metadata}{band}</VRTDataset>"
