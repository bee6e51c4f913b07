"""Reading onto a device against reading by GDAL. In place of a GPU, zlib inflates and NumPy holds the pixels."""

from __future__ import annotations

import math
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given
from hypothesis import strategies as st
from inference_support import run_codes

from s2cd import device_reader, lost, reader
from s2cd.device_reader import DeviceReader, block_file, read_dates
from s2cd.inflate import DamageError, InflateError, Packed, adler32, offsets, send
from s2cd.masks import Mask
from s2cd.model import BANDS, load_model
from s2cd.reader import BlockCache, Tiling, read_bands
from s2cd.survey import observed, scene_input

MASK, CPU = Mask(), torch.device("cpu")


def inflate(streams, use):
    """What `Inflater` is for a GPU, which does not look at checksums."""
    pixels, checksums = [], []
    for stream in streams:
        data = bytearray(stream.length)
        stream.read(memoryview(data))
        try:
            pixels.append(zlib.decompress(data[2:-4], -15))
        except zlib.error as error:
            raise DamageError(str(error)) from None
        if len(pixels[-1]) != stream.size:
            raise DamageError(f"{len(pixels[-1])} bytes, expected {stream.size}")
        checksums.append(int.from_bytes(data[-4:], "big"))
    return use(torch.frombuffer(bytearray(b"".join(pixels)), dtype=torch.uint8), checksums)


class Places:
    """Lends `inflate` to two threads at a time, as a GPU does to a few."""

    def __init__(self):
        self.free = threading.Semaphore(2)

    @contextmanager
    def __call__(self):
        assert self.free.acquire(timeout=20)
        try:
            yield inflate
        finally:
            self.free.release()


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(lost, "_given_up", [])
    monkeypatch.setattr(reader, "BLOCKS", BlockCache())
    return DeviceReader(CPU, Places(), BlockCache(), 1e12)


def inputs(scenes):
    grid = scenes[0].assets["red"].grid
    return [scene_input(scene, BANDS, grid, MASK) for scene in scenes], grid


def windows_of(tiling):
    return [tiling.read(i, j) for i in range(tiling.blocks[0]) for j in range(tiling.blocks[1])]


def rewritten(date, band, **options):
    """Store a band of a date anew."""
    number = [s.band for s in date.sources].index(band)
    with rasterio.open(date.sources[number].hrefs[0], "r+") as dataset:
        pixels, profile = dataset.read(1), dataset.profile
    with rasterio.open(date.sources[number].hrefs[0], "w", **{**profile, **options}) as dataset:
        dataset.write(pixels, 1)


@pytest.mark.parametrize("predictor", [1, 2])
@pytest.mark.parametrize(("shape", "chunk", "halo"), [((300, 333), 96, 32), ((257, 130), 64, 16), ((64, 64), 512, 64)])
def test_what_lies_on_a_device_is_what_gdal_reads_and_each_block_is_decoded_once(
    make_series, monkeypatch, device, shape, chunk, halo, predictor
):
    monkeypatch.setattr(device_reader, "COUNTS", reader.Counts())
    dates, grid = inputs(make_series(shape=shape, dates=2, block=64, predictor=predictor))
    tiling = Tiling(grid.shape, chunk, halo)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(partial(device.read, dates, tiling=tiling, fine=4), windows_of(tiling)))
    whole = Tiling(grid.shape, max(grid.shape), 0)
    for window, chunks in zip(windows_of(tiling), found, strict=True):
        for date, planes in zip(dates, chunks, strict=True):
            expected = read_bands((*date.sources, date.classes), grid, window, whole, fine=4)
            for ours, theirs in zip(planes, expected, strict=True):
                np.testing.assert_array_equal(ours.numpy().view(theirs.dtype), theirs)
    files = [block_file(source.hrefs[0]) for date in dates for source in (*date.sources, date.classes)]
    assert device_reader.COUNTS.decoded == sum(math.prod(file.shape) * file.dtype.itemsize for file in files)
    assert not device.blocks._entries
    assert device.blocks._bytes == 0


@pytest.mark.parametrize(
    "options",
    [
        {"compress": "LZW"},
        {"compress": "DEFLATE", "predictor": 2, "dtype": "float32"},
        {"compress": None},
        {"ENDIANNESS": "BIG"},
        {"NBITS": 12},
        {"tiled": False, "blockysize": 3, "blockxsize": 140},
    ],
)
def test_other_kinds_of_files_are_left_to_the_host(make_series, device, options):
    dates, grid = inputs(make_series(shape=(130, 140), dates=1, block=64))
    tiling = Tiling(grid.shape, 64, 16)
    assert device.read(dates, tiling.read(0, 0), tiling, 4) is not None
    device.blocks.drop(0)
    rewritten(dates[0], "green", **options)
    assert device.read(dates, tiling.read(0, 0), tiling, 4) is None
    assert not device.blocks._entries


def test_dates_of_other_shapes_are_left_to_the_host(make_series, device):
    (date,), grid = inputs(make_series(shape=(130, 140), dates=1, block=64))
    tiling = Tiling(grid.shape, 64, 16)
    twice = replace(date.sources[0], hrefs=date.sources[0].hrefs * 2)
    elsewhere = replace(date.sources[0], hrefs=("https://host/B02.tif",))
    for other in (
        replace(date, classes=None),
        replace(date, sources=(twice, *date.sources[1:])),
        replace(date, sources=(elsewhere, *date.sources[1:])),
    ):
        assert device.read([other], tiling.read(0, 0), tiling, 4) is None
    assert device.read([date], (slice(1, 65), slice(0, 64)), tiling, 4) is None
    assert device.read([date], tiling.read(0, 0), tiling, 7) is None


def test_as_many_dates_are_read_at_once_as_there_is_memory_for(make_series):
    dates, grid = inputs(make_series(shape=(130, 140), dates=5, block=64))
    window = Tiling(grid.shape, 512, 0).read(0, 0)
    for room, sizes in ((0, [1] * 5), (2 * 10.5 * 130 * 140, [2, 2, 1]), (1e12, [5])):
        groups = list(DeviceReader(CPU, Places(), BlockCache(), room).groups(dates, window, 4))
        assert [len(group) for group in groups] == sizes
        assert [date for group in groups for date in group] == dates


@pytest.mark.parametrize("damage", ["cut", "bit", "header"])
def test_a_damaged_file_is_left_to_the_host_and_keeps_nobody_waiting(make_series, device, damage, caplog):
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
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda window: device.read(dates, window, tiling, 4), windows_of(tiling)))
    assert None in found
    assert not lost.given_up()
    assert any("is read on the host" in message for message in caplog.messages)
    whole = Tiling(grid.shape, max(grid.shape), 0)
    for window, chunk in zip(windows_of(tiling), found, strict=True):
        for planes in (chunk or [])[:1]:
            expected = read_bands((*dates[0].sources, dates[0].classes), grid, window, whole, fine=4)
            assert all(
                np.array_equal(ours.numpy().view(theirs.dtype), theirs)
                for ours, theirs in zip(planes, expected, strict=True)
            )


@pytest.mark.parametrize("at_once", [0, 1e12])
def test_codes_are_the_same_wherever_pixels_lie_and_if_some_dates_are_left_to_the_host(
    make_series, monkeypatch, device, at_once
):
    """NumPy stands for CuPy here."""
    read = []

    def read_dates(dates, window, tiling, fine, _):
        for group in DeviceReader(CPU, Places(), device.blocks, at_once).groups(dates, window, fine):
            found = device.read(group, window, tiling, fine)
            read.append(found is not None)
            if found is None:
                yield None
                return
            yield from (device_reader._arrays(planes, np) for planes in found)

    scenes = make_series(shape=(300, 333), dates=4, predictor=2)
    rewritten(inputs(scenes)[0][3], "nir", compress="LZW")
    expected = run_codes(scenes, 128)
    monkeypatch.setattr("s2cd.inference.read_dates", read_dates)
    np.testing.assert_array_equal(run_codes(scenes, 128), expected)
    assert any(read) == (at_once == 0)
    rewritten(inputs(scenes)[0][3], "nir", compress="DEFLATE")
    np.testing.assert_array_equal(run_codes(scenes, 128), expected)
    assert read[-1]


def test_who_waits_for_another_that_fails_hands_on_its_memory_first(make_series, device, monkeypatch):
    """What reads on two streams must say so before it is given up: `record_stream`."""
    dates, grid = inputs(make_series(shape=(130, 140), dates=1, block=64))
    tiling, told = Tiling(grid.shape, 64, 16), []
    monkeypatch.setattr(device_reader, "_used_here", lambda tensor: told.append(tensor.shape))
    file = block_file(dates[0].sources[0].hrefs[0])
    theirs, _ = device.blocks.claim((tiling.work, file.path), [(1, 1)], {(1, 1): 4})
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(device.read, dates, tiling.read(0, 0), tiling, 4)
        first = device.blocks.claim((tiling.work, file.path), [(0, 1)], {(0, 1): 1})[1]
        while not first or not first[0, 1].pixels.done():  # until the others are decoded
            first = device.blocks.claim((tiling.work, file.path), [(0, 1)], {(0, 1): 1})[1]
        device.blocks.abandon((tiling.work, file.path), theirs, OSError("gone"))
        assert waiting.result(timeout=20) is None
    assert told == [(80, 80)]


@given(st.lists(st.binary(max_size=80), min_size=1), st.integers(120, 400))
def test_streams_come_to_their_places_whatever_they_pass_through(datas, room):
    def packed_of(data):
        return Packed(len(data), lambda into: into.__setitem__(slice(None), data), 64)

    datas = [zlib.compress(data) for data in datas]
    *starts, total = offsets([len(data) for data in datas], 14)
    packed = torch.zeros(total, dtype=torch.uint8)
    staged = torch.zeros(room, dtype=torch.uint8)
    checksums = send([packed_of(data) for data in datas], starts, staged, packed, lambda: None)
    for start, data, checksum in zip(starts, datas, checksums, strict=True):
        assert start % 16 == 14
        assert packed[start : start + len(data)].numpy().tobytes() == data
        assert checksum == int.from_bytes(data[-4:], "big")


@pytest.mark.parametrize(
    "data", [bytes(40), bytes(2) + zlib.compress(b"pixels")[2:], zlib.compress(b"pixels")[:-4] + bytes(4)]
)
def test_what_can_be_no_stream_is_not_sent(data):
    stream = Packed(len(data), lambda into: into.__setitem__(slice(None), data), 64)
    with pytest.raises(InflateError, match="no stream of zlib"):
        send([stream], [14], torch.zeros(80, dtype=torch.uint8), torch.zeros(80, dtype=torch.uint8), lambda: None)


def test_checksums_are_those_of_zlib():
    rng = np.random.default_rng(0)
    for size in (64, 6400, 1 << 21):
        pieces = torch.from_numpy(rng.integers(0, 256, (3, size), dtype=np.uint8))
        pieces[0] = 255
        assert adler32(pieces).tolist() == [zlib.adler32(piece.numpy().tobytes()) for piece in pieces]


@pytest.mark.gpu
def test_a_gpu_reads_what_the_host_reads(make_series):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    cupy = pytest.importorskip("cupy")
    pytest.importorskip("nvidia.libnvcomp")
    model = load_model("generic", device="cuda")
    dates, grid = inputs(make_series(shape=(700, 733), dates=3, block=128, predictor=2))
    tiling = Tiling(grid.shape, 320, 64)
    whole = Tiling(grid.shape, max(grid.shape), 0)
    with ThreadPoolExecutor(9) as pool:
        found = list(pool.map(lambda w: list(read_dates(dates, w, tiling, 4, model.device)), windows_of(tiling)))
    for window, chunk in zip(windows_of(tiling), found, strict=True):
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


@pytest.mark.gpu
def test_a_gpu_notices_damage_and_works_on(make_series):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("cupy")
    pytest.importorskip("nvidia.libnvcomp")
    place = torch.device("cuda", 0)
    dates, grid = inputs(make_series(shape=(700, 733), dates=2, block=128, predictor=2))
    file = block_file(dates[1].sources[2].hrefs[0])
    sound = open(file.path, "rb").read()
    tiling = Tiling(grid.shape, 1024, 0)
    rng = np.random.default_rng(0)
    for _ in range(10):
        data = bytearray(sound)
        at = int(rng.integers(file.starts[2, 2] + 2, file.starts[2, 2] + file.lengths[2, 2]))
        data[at] ^= 1 << int(rng.integers(8))
        open(file.path, "wb").write(data)
        assert None in list(read_dates(dates, tiling.read(0, 0), tiling, 4, place))
    open(file.path, "wb").write(sound)
    assert None not in list(read_dates(dates, tiling.read(0, 0), tiling, 4, place))
