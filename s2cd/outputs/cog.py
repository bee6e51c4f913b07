"""Probability codes -> cloud-optimised GeoTIFF, in memory.

Overviews are made here, not by GDAL: averages rounded to codes compress as well as the map itself and cost a tenth of
the time. A VRT ties all levels together. Of profiles with DEFLATE GDAL's COG driver writes the header, and
`s2cd.outputs.deflated` the blocks; of others it writes all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import rasterio
from rasterio.io import MemoryFile
from rasterio.shutil import copy
from rasterio.transform import Affine

from s2cd.catalog.scene import Grid
from s2cd.codes import CODE_NODATA, QUANTUM
from s2cd.errors import ConfigError, GridError
from s2cd.outputs.deflated import filled

BLOCK = 512


@dataclass(frozen=True, slots=True)
class Profile:
    """How a map is stored: probability = scale * stored value, and `nodata` means no observation."""

    dtype: str
    scale: float
    nodata: float
    options: Mapping[str, str]

    @property
    def deflated(self) -> bool:
        """Whether blocks are plain DEFLATE streams."""
        return self.options == _DEFLATE

    def stored(self, codes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """Return what is stored for codes (y, x), in a block of `shape` that has no observation beyond them."""
        values = np.multiply(codes, np.float32(QUANTUM / self.scale), dtype=np.float32, order="C")
        if self.dtype != "float32":
            np.rint(values, out=values)
        np.copyto(values, np.float32(self.nodata), where=codes == CODE_NODATA)
        if codes.shape == shape:
            return values.astype(self.dtype, copy=False)
        block = np.full(shape, self.nodata, self.dtype)
        block[: codes.shape[0], : codes.shape[1]] = values
        return block


def _float32(**options: str) -> Profile:
    return Profile("float32", 1.0, np.nan, options)


_DEFLATE = {"COMPRESS": "DEFLATE", "PREDICTOR": "NO"}
# Chosen by measurement on full tiles, see docs/decisions.md.
PROFILES: Mapping[str, Profile] = {
    "default": _float32(**_DEFLATE),
    "zstd": _float32(COMPRESS="ZSTD", LEVEL="1", PREDICTOR="FLOATING_POINT"),
    "lerc": _float32(COMPRESS="LERC_DEFLATE", MAX_Z_ERROR=str(QUANTUM / 2)),
    "uint8": Profile("uint8", 1 / 254, 255, _DEFLATE),
}
_GDAL_TYPES = {"uint8": "Byte", "float32": "Float32"}


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
    tags      metadata of the file

    Raises GridError if the map's shape is not the grid's, ConfigError for an unknown profile.
    """
    if profile not in PROFILES:
        raise ConfigError(f"unknown COG profile {profile!r}, expected one of {', '.join(PROFILES)}")
    if pyramid[0].shape != tuple(grid.shape):
        raise GridError(f"a map of {pyramid[0].shape} pixels, expected the grid's {tuple(grid.shape)}")
    chosen = PROFILES[profile]
    about = {"QUANTUM": str(QUANTUM), **(tags or {})}
    if chosen.deflated:
        with _by_gdal(_vrt(pyramid, grid, chosen, about, empty=True), chosen, SPARSE_OK="YES") as header:
            yield memoryview(filled(bytes(header), pyramid, chosen.stored, threads))
        return
    pyramid = [np.ascontiguousarray(level, np.uint16) for level in pyramid]  # GDAL is told an address, not an order
    with _by_gdal(_vrt(pyramid, grid, chosen, about), chosen, NUM_THREADS=str(threads)) as data:
        yield data


@contextmanager
def _by_gdal(vrt: str, profile: Profile, **options: str) -> Iterator[memoryview]:
    """Yield what GDAL's COG driver makes of a VRT."""
    with (
        rasterio.Env(GDAL_MEM_ENABLE_OPEN="YES", VRT_ALLOW_MEM_DRIVER="YES"),
        MemoryFile(vrt.encode(), ext=".vrt") as source,
        MemoryFile(ext=".tif") as target,
    ):
        options = {"BLOCKSIZE": str(BLOCK), "BIGTIFF": "IF_SAFER", **profile.options, **options}
        copy(source.name, target.name, driver="COG", **options)
        yield target.getbuffer()


def validity_cog(validity: np.ndarray, grid: Grid) -> bytes:
    """Return a COG of classes, uint8 (y, x) on `grid`, without nodata; its overviews are the nearest pixels."""
    profile = {
        "driver": "COG", "height": grid.shape[0], "width": grid.shape[1], "count": 1, "dtype": "uint8",
        "crs": f"EPSG:{grid.epsg}", "transform": Affine(*grid.transform), "compress": "DEFLATE", "level": 1,
        "blocksize": BLOCK, "overview_resampling": "NEAREST",
    }  # fmt: skip
    with MemoryFile() as file:
        with file.open(**profile) as dataset:
            dataset.write(validity, 1)
        return file.read()


def code_pyramid(codes: np.ndarray) -> list[np.ndarray]:
    """Return the codes and their overviews: each half the size of the one before, down to one block."""
    from s2cd.outputs.overviews import halved  # Numba takes a third of a second to load: not for `s2cd status`

    levels = [codes]
    while max(levels[-1].shape) > BLOCK:
        levels.append(halved(levels[-1]))
    return levels


def _vrt(
    levels: list[np.ndarray], grid: Grid, profile: Profile, tags: Mapping[str, str], *, empty: bool = False
) -> str:
    """Describe a map and its overviews, arrays of codes in this process, as one raster; if `empty`, without them."""
    a, b, c, d, e, f = grid.transform
    gdal_order = ", ".join(repr(float(v)) for v in (c, a, b, f, d, e))
    items = "".join(f"<MDI key={quoteattr(k)}>{escape(v)}</MDI>" for k, v in tags.items())
    header = (
        f"<SRS>EPSG:{grid.epsg}</SRS><GeoTransform>{gdal_order}</GeoTransform>"
        f'<Metadata><MDI key="AREA_OR_POINT">Area</MDI>{items}</Metadata>'
    )
    scale = f"<Scale>{profile.scale!r}</Scale><Offset>0</Offset>" if profile.scale != 1 else ""
    sources = ["" if empty else _codes(level, profile) for level in levels]
    overviews = "".join(
        f'<Overview><SourceFilename relativeToVRT="0">{escape(_raster(level.shape, profile, source))}</SourceFilename>'
        "<SourceBand>1</SourceBand></Overview>"
        for level, source in zip(levels[1:], sources[1:], strict=True)
    )
    about = f"<Description>probability of change</Description>{scale}{overviews}"
    return _raster(levels[0].shape, profile, about + sources[0], header)


def _raster(shape: tuple[int, ...], profile: Profile, band: str, header: str = "") -> str:
    """Describe a raster of stored values; without a source in `band` it is without observation everywhere."""
    rows, columns = shape
    return (
        f'<VRTDataset rasterXSize="{columns}" rasterYSize="{rows}">{header}'
        f'<VRTRasterBand dataType="{_GDAL_TYPES[profile.dtype]}" band="1">'
        f"<NoDataValue>{profile.nodata:g}</NoDataValue>{band}</VRTRasterBand></VRTDataset>"
    )


def _codes(codes: np.ndarray, profile: Profile) -> str:
    """Describe an array of codes as the source of stored values: GDAL converts them as it reads, block by block.

    The array is named to GDAL's MEM driver by its address: https://gdal.org/drivers/raster/mem.html.
    """
    rows, columns = codes.shape
    memory = f"MEM:::DATAPOINTER={codes.ctypes.data:#x},PIXELS={columns},LINES={rows},DATATYPE=UInt16"
    return (
        f'<ComplexSource><SourceFilename relativeToVRT="0">{memory}</SourceFilename><SourceBand>1</SourceBand>'
        f"<NODATA>{CODE_NODATA}</NODATA>"
        f"<ScaleOffset>0</ScaleOffset><ScaleRatio>{QUANTUM / profile.scale!r}</ScaleRatio></ComplexSource>"
    )
