"""Reading onto a device against reading by GDAL. In place of a GPU, zlib inflates and NumPy holds the pixels."""

from __future__ import annotations

import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import rasterio
import torch

from s2cd import device_reader, reader
from s2cd.device_reader import block_file, read_arrays
from s2cd.inflate import InflateError, adler32, offsets
from s2cd.masks import Mask
from s2cd.model import BANDS, load_model
from s2cd.reader import BlockCache, Tiling, read_bands
from s2cd.survey import observed, scene_input

MASK = Mask()


class Zlib:
    """What `Inflater` is for a GPU."""

    def staging(self, size):
        return torch.empty(size, dtype=torch.uint8)

    def __call__(self, staged, starts, lengths, sizes):
        out = torch.empty(sum(sizes), dtype=torch.uint8)
        data = staged.numpy()
        for start, length, first, size in zip(starts, lengths, offsets(sizes), sizes, strict=False):
            assert start % 16 == 0
            try:
                found = zlib.decompress(data[start : start + length].tobytes(), -15)
            except zlib.error as error:
                raise InflateError(str(error)) from None
            out.numpy()[first : first + size] = np.frombuffer(found, np.uint8)
        return out


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(device_reader, "BLOCKS", BlockCache())
    monkeypatch.setattr(reader, "BLOCKS", BlockCache())


def inputs(scenes):
    grid = scenes[0].assets["red"].grid
    return [scene_input(scene, BANDS, grid, MASK) for scene in scenes], grid


def rewritten(date, band, **options):
    """Store a band of a date anew."""
    number = [s.band for s in date.sources].index(band)
    with rasterio.open(date.sources[number].hrefs[0], "r+") as dataset:
        pixels, profile = dataset.read(1), dataset.profile
    with rasterio.open(date.sources[number].hrefs[0], "w", **{**profile, **options}) as dataset:
        dataset.write(pixels, 1)


@pytest.mark.parametrize("predictor", [1, 2])
@pytest.mark.parametrize(("shape", "chunk", "halo"), [((300, 333), 96, 32), ((257, 130), 64, 16), ((64, 64), 512, 64)])
def test_arrays_on_a_device_are_what_gdal_reads_and_each_block_is_decoded_once(
    make_series, monkeypatch, shape, chunk, halo, predictor
):
    monkeypatch.setattr(device_reader, "COUNTS", reader.Counts())
    dates, grid = inputs(make_series(shape=shape, dates=2, block=64, predictor=predictor))
    tiling = Tiling(grid.shape, chunk, halo)
    windows = [tiling.read(i, j) for i in range(tiling.blocks[0]) for j in range(tiling.blocks[1])]
    read = partial(read_arrays, dates, tiling=tiling, fine=4, inflate=Zlib(), arrays=np)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read, windows))
    whole = Tiling(grid.shape, max(grid.shape), 0)
    for window, chunks in zip(windows, found, strict=True):
        for date, (planes, classes) in zip(dates, chunks, strict=True):
            expected = read_bands((*date.sources, date.classes), grid, window, whole, fine=4)
            for ours, theirs in zip((*planes, classes), expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)
                assert ours.dtype == theirs.dtype
    files = [block_file(source.hrefs[0]) for date in dates for source in (*date.sources, date.classes)]
    assert device_reader.COUNTS.decoded == sum(math.prod(file.shape) * file.dtype.itemsize for file in files)
    assert not device_reader.BLOCKS._entries
    assert device_reader.BLOCKS._bytes == 0


@pytest.mark.parametrize(
    "options", [{"compress": "LZW"}, {"compress": "DEFLATE", "predictor": 2, "dtype": "float32"}, {"compress": None}]
)
def test_other_kinds_of_files_are_left_to_the_host(make_series, options):
    dates, grid = inputs(make_series(shape=(130, 140), dates=1, block=64))
    tiling = Tiling(grid.shape, 64, 16)
    read = partial(read_arrays, dates, tiling.read(0, 0), tiling, 4, Zlib(), np)
    assert read() is not None
    device_reader.BLOCKS = BlockCache()
    rewritten(dates[0], "green", **options)
    assert read() is None
    assert not device_reader.BLOCKS._entries


def test_dates_of_other_shapes_are_left_to_the_host(make_series):
    (date,), grid = inputs(make_series(shape=(130, 140), dates=1, block=64))
    tiling = Tiling(grid.shape, 64, 16)
    twice = replace(date.sources[0], hrefs=date.sources[0].hrefs * 2)
    elsewhere = replace(date.sources[0], hrefs=("https://host/B02.tif",))
    for other in (
        replace(date, classes=None),
        replace(date, sources=(twice, *date.sources[1:])),
        replace(date, sources=(elsewhere, *date.sources[1:])),
    ):
        assert read_arrays([other], tiling.read(0, 0), tiling, 4, Zlib(), np) is None
    assert read_arrays([date], (slice(1, 65), slice(0, 64)), tiling, 4, Zlib(), np) is None
    assert read_arrays([date], tiling.read(0, 0), tiling, 7, Zlib(), np) is None


@pytest.mark.parametrize("damage", ["cut", "bit", "header"])
def test_a_damaged_file_is_left_to_the_host_and_keeps_nobody_waiting(make_series, damage, caplog):
    dates, grid = inputs(make_series(shape=(300, 333), dates=2, block=64))
    tiling = Tiling(grid.shape, 96, 32)
    file = block_file(dates[1].sources[2].hrefs[0])
    data = bytearray(open(file.path, "rb").read())
    at = int(file.starts[1, 1] + file.lengths[1, 1] // 2)
    if damage == "cut":
        data = data[:at]
    else:
        data[at if damage == "bit" else 0] ^= 0x10
    open(file.path, "wb").write(data)
    windows = [tiling.read(i, j) for i in range(tiling.blocks[0]) for j in range(tiling.blocks[1])]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda w: read_arrays(dates, w, tiling, 4, Zlib(), np), windows))
    assert None in found
    assert any("is read on the host" in message for message in caplog.messages)
    whole = Tiling(grid.shape, max(grid.shape), 0)
    for window, chunk in zip(windows, found, strict=True):
        for date, (planes, _) in zip(dates, chunk or [], strict=chunk is not None):
            if date is dates[0]:
                expected = read_bands(date.sources, grid, window, whole, fine=4)
                assert all(np.array_equal(a, b) for a, b in zip(planes, expected, strict=True))


def test_checksums_are_those_of_zlib():
    rng = np.random.default_rng(0)
    for size in (64, 6400, 1 << 21):
        pieces = torch.from_numpy(rng.integers(0, 256, (3, size), dtype=np.uint8))
        pieces[0] = 255
        assert adler32(pieces).tolist() == [zlib.adler32(piece.numpy().tobytes()) for piece in pieces]


@pytest.mark.gpu
def test_a_gpu_reads_what_the_host_reads(make_series, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    cupy = pytest.importorskip("cupy")
    pytest.importorskip("nvidia.libnvcomp")
    monkeypatch.setenv(device_reader.SWITCH, "1")
    model = load_model("generic", device="cuda")
    dates, grid = inputs(make_series(shape=(700, 733), dates=3, block=128, predictor=2))
    tiling = Tiling(grid.shape, 320, 64)
    whole = Tiling(grid.shape, max(grid.shape), 0)
    windows = [tiling.read(i, j) for i in range(tiling.blocks[0]) for j in range(tiling.blocks[1])]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda w: device_reader.read_dates(dates, w, tiling, 4, model.device), windows))
    for window, chunk in zip(windows, found, strict=True):
        for date, (planes, classes) in zip(dates, chunk, strict=True):
            *expected, expected_classes = read_bands((*date.sources, date.classes), grid, window, whole, fine=4)
            assert all(isinstance(plane, cupy.ndarray) for plane in planes)
            for ours, theirs in zip((*planes, classes), (*expected, expected_classes), strict=True):
                np.testing.assert_array_equal(cupy.asnumpy(ours), theirs)
            seen = observed(planes, classes, date, MASK)
            np.testing.assert_array_equal(cupy.asnumpy(seen), observed(expected, expected_classes, date, MASK))
            gains = model.affine(np.full((7, 2), 0.1, np.float32), 1e-4)
            ours = model.encode(planes, gains, seen)
            theirs = model.encode(expected, gains, cupy.asnumpy(seen))
            assert torch.equal(ours.features[0], theirs.features[0])
