"""Blocks that we decode ourselves: the pixels that GDAL reads, from any layout, or an error."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.transform import Affine
from rasterio.windows import Window

from s2cd import reader
from s2cd.blocks import packing
from s2cd.catalog import access
from s2cd.catalog.scene import Grid
from s2cd.errors import ReadError
from s2cd.reader import BlockCache, Layout, Source, Tiling, read_window

TRANSFORM = Affine(10, 0, 600000, 0, -10, 5700000)


def write(path: Path, pixels: np.ndarray, **options) -> Path:
    profile = {"driver": "GTiff", "count": 1, "dtype": pixels.dtype, "crs": "EPSG:32631", "transform": TRANSFORM}
    profile |= {"height": pixels.shape[0], "width": pixels.shape[1], "compress": "DEFLATE", **options}
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.write(pixels, 1)
    return path


def tiles(size: int) -> dict[str, object]:
    return {"tiled": True, "blockxsize": size, "blockysize": size}


def noise(shape: tuple[int, int], dtype=np.uint16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def read(path: Path, window=None) -> np.ndarray:
    with rasterio.open(path) as dataset:
        grid = Grid(32631, tuple(TRANSFORM)[:6], dataset.shape)
    window = window or tuple(slice(0, n) for n in grid.shape)
    return read_window(Source("red", (str(path),), "static"), grid, window, Tiling(grid.shape, 1 << 14, 0))


@pytest.fixture(autouse=True)
def _no_blocks_of_others(monkeypatch):
    monkeypatch.setattr(reader, "BLOCKS", BlockCache())


@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    block=st.sampled_from([tiles(16), tiles(32), tiles(64), {"blockysize": 7}, {"blockysize": 64}]),
    predictor=st.sampled_from([1, 2]),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    data=st.data(),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_windows_are_what_gdal_reads(tmp_path, height, width, block, predictor, dtype, data):
    path = write(tmp_path / "a.tif", noise((height, width), dtype), predictor=predictor, **block)
    spans = [
        sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in (height, width)
    ]
    rows, cols = (slice(*span) for span in spans)
    with rasterio.open(path) as dataset:
        assert packing(dataset) is not None
        expected = dataset.read(1, window=Window.from_slices(rows, cols))
    np.testing.assert_array_equal(read(path, (rows, cols)), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"compress": "LZW"},
        {"compress": "ZSTD"},
        {"compress": None},
        {"endianness": "BIG"},
        {"sparse_ok": True},
        {"nbits": 12},
    ],
    ids=str,
)
def test_other_files_are_left_to_gdal(tmp_path, options):
    pixels = noise((70, 90)) & 0xFFF
    pixels[:32, :32] = 0  # left out of a sparse file
    path = write(tmp_path / "a.tif", pixels, **tiles(32), predictor=1, **options)
    with access.open_dataset("static", str(path)) as dataset:
        assert packing(dataset) is None or access.packed_blocks(dataset, [(0, 0), (0, 1)]) is None
    np.testing.assert_array_equal(read(path), pixels)


@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_of_a_file_of_several_bands_gdal_reads_the_first(tmp_path, interleave):
    pixels, path = noise((70, 90)), tmp_path / "a.tif"
    write(path, pixels, **tiles(32), predictor=2, count=3, interleave=interleave)
    np.testing.assert_array_equal(read(path), pixels)


def test_all_blocks_but_those_left_out_are_ours(tmp_path):
    path = write(tmp_path / "a.tif", noise((70, 90)), **tiles(32), predictor=2)
    with access.open_dataset("static", str(path)) as dataset:
        layout = Layout(dataset.shape, dataset.block_shapes[0])
        blocks = list(layout.covering(slice(0, 70), slice(0, 90)))
        packed = access.packed_blocks(dataset, blocks)
        assert packed is not None
        assert len(list(packed)) == len(blocks) == 9


@pytest.mark.parametrize("where", [0.3, 0.6, 0.9])
def test_a_damaged_block_is_an_error_that_names_the_file(tmp_path, where):
    path = write(tmp_path / "damaged.tif", noise((70, 90)), **tiles(32), predictor=2)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ReadError, match=r"damaged\.tif.*block"):
        read(path)


def test_a_file_that_ends_early_is_an_error_that_names_it(tmp_path):
    path = write(tmp_path / "short.tif", noise((70, 90)), **tiles(32), predictor=2)
    os.truncate(path, path.stat().st_size - 500)
    with pytest.raises(ReadError, match=r"short\.tif.*block"):
        read(path)


def test_blocks_of_another_size_than_the_header_says_are_an_error(tmp_path):
    path = write(tmp_path / "a.tif", noise((64, 64)), **tiles(32), predictor=1)
    with rasterio.open(path) as dataset:
        kind = packing(dataset)
    with rasterio.open(write(tmp_path / "b.tif", noise((64, 64)), **tiles(16), predictor=1)) as other:
        packed = (tmp_path / "b.tif").read_bytes()
        start, size = (int(other.get_tag_item(f"BLOCK_{w}_0_0", "TIFF", bidx=1)) for w in ("OFFSET", "SIZE"))
    assert kind is not None
    with pytest.raises(OSError, match="holds 512 bytes, expected 2048"):
        kind.unpack(packed[start : start + size], np.empty((32, 32), kind.dtype))


def test_a_file_written_anew_while_it_is_read_is_an_error(tmp_path):
    path = write(tmp_path / "a.tif", noise((70, 90)), **tiles(32), predictor=2)
    with access.OPEN_FILES.dataset(str(path)) as dataset:
        path.unlink()
        write(path, noise((70, 90), seed=1), **tiles(32), predictor=2)
        with pytest.raises(OSError, match="changed while it was read"):
            access.packed_blocks(dataset, [(0, 0)])
