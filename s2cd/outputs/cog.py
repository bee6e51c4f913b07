"""A map as cloud-optimised GeoTIFF, in memory.

Overviews are ours, not GDAL's: averages rounded to codes compress as well as the map itself and cost a tenth of
the time. A VRT ties all levels together. Of profiles with DEFLATE GDAL's COG driver writes the header, and
`s2cd.outputs.deflated` the blocks; of others it writes all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import rasterio
from rasterio.io import MemoryFile
from rasterio.shutil import copy
from rasterio.transform import Affine

from s2cd.catalog.scene import Grid
from s2cd.codes import CODE_NODATA, QUANTUM
from s2cd.outputs.deflated import Buffer, filled
from s2cd.outputs.overviews import coarser
from s2cd.outputs.parts import Blocks, blocks_of
from s2cd.outputs.profiles import BLOCK, PROFILES, Profile

_GDAL_TYPES = {"uint8": "Byte", "float32": "Float32"}


@contextmanager
def map_cog(
    blocks: Sequence[Blocks],
    pyramid: Sequence[np.ndarray],
    grid: Grid,
    *,
    profile: str = "default",
    threads: int = 1,
    tags: Mapping[str, str] | None = None,
) -> Iterator[list[Buffer]]:
    """Encode a map as COG, in pieces; these live as long as the context.

    blocks    of the finest levels, as the file holds them
    pyramid   uint16 codes (y, x) of the other levels, to the coarsest; both as `s2cd.outputs.parts.joined` gives them
    profile   key of PROFILES
    threads   how many threads of GDAL's compress what is not DEFLATE
    tags      metadata of the file
    """
    chosen = PROFILES[profile]
    shapes = [coarser(grid.shape, level) for level in range(len(blocks) + len(pyramid))]
    about = {"QUANTUM": str(chosen.quantum), **(tags or {})}
    if chosen.deflated:
        with _by_gdal(_vrt(shapes, [], grid, chosen, about), chosen, SPARSE_OK="YES") as header:
            yield filled(bytes(header), [*blocks, *(blocks_of(level, chosen) for level in pyramid)])
        return
    pyramid = [np.ascontiguousarray(level, np.uint16) for level in pyramid]  # GDAL is told an address, not an order
    with _by_gdal(_vrt(shapes, pyramid, grid, chosen, about), chosen, NUM_THREADS=str(threads)) as data:
        yield [data]


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


def _vrt(
    shapes: Sequence[tuple[int, int]],
    levels: Sequence[np.ndarray],
    grid: Grid,
    profile: Profile,
    tags: Mapping[str, str],
) -> str:
    """Describe a map and its overviews as one raster: arrays of codes in this process, or empty without `levels`."""
    a, b, c, d, e, f = grid.transform
    gdal_order = ", ".join(repr(float(v)) for v in (c, a, b, f, d, e))
    items = "".join(f"<MDI key={quoteattr(k)}>{escape(v)}</MDI>" for k, v in tags.items())
    header = (
        f"<SRS>EPSG:{grid.epsg}</SRS><GeoTransform>{gdal_order}</GeoTransform>"
        f'<Metadata><MDI key="AREA_OR_POINT">Area</MDI>{items}</Metadata>'
    )
    scale = f"<Scale>{profile.scale!r}</Scale><Offset>0</Offset>" if profile.scale != 1 else ""
    sources = [_codes(level, profile) for level in levels] or [""] * len(shapes)
    overviews = "".join(
        f'<Overview><SourceFilename relativeToVRT="0">{escape(_raster(shape, profile, source))}</SourceFilename>'
        "<SourceBand>1</SourceBand></Overview>"
        for shape, source in zip(shapes[1:], sources[1:], strict=True)
    )
    about = f"<Description>probability of change</Description>{scale}{overviews}"
    return _raster(shapes[0], profile, about + sources[0], header)


def _raster(shape: tuple[int, int], profile: Profile, band: str, header: str = "") -> str:
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
