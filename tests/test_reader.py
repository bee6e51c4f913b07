"""Reading: exact windows, typed errors, each block decoded once."""

from __future__ import annotations

import itertools
import math
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rasterio
from conftest import write_series, write_tiff
from hypothesis import given
from hypothesis import strategies as st
from rasterio.transform import Affine

from s2cd import reader
from s2cd.errors import ConfigError, GridError, ReadError
from s2cd.reader import BlockCache, Tiling, band_source, read_bands, read_overview, read_window, rectangles


def whole(scene, band):
    with rasterio.open(scene.assets[band].href) as dataset:
        return dataset.read(1)


@pytest.mark.parametrize("shape", [(17, 19), (200, 232), (129, 63)])
@pytest.mark.parametrize("band", ["red", "swir16", "scl"])
def test_window_equals_the_file_replicated_to_10_m(make_series, shape, band):
    scene = make_series(shape=shape, dates=1)[0]
    factor = 1 if band == "red" else 2
    expected = whole(scene, band).repeat(factor, 0).repeat(factor, 1)[: shape[0], : shape[1]]
    grid = scene.assets["red"].grid
    everything = read_window(band_source(scene, band), grid, (slice(0, shape[0]), slice(0, shape[1])))
    np.testing.assert_array_equal(everything, expected)
    window = (slice(3, shape[0] - 2), slice(5, shape[1]))
    np.testing.assert_array_equal(read_window(band_source(scene, band), grid, window), expected[window])


@pytest.mark.parametrize("shape", [(101, 79), (200, 232), (129, 64)])
def test_bands_of_20_m_stay_so_where_they_may(make_series, shape):
    scene = make_series(shape=shape, dates=1)[0]
    grid, names = scene.assets["red"].grid, ("blue", "red", "swir16", "scl")
    sources, tiling = [band_source(scene, name) for name in names], Tiling(shape, 64, 16)
    rows, cols = tiling.read(1, 0)
    fine, coarse = (rows, cols), tuple(slice(s.start // 2, -(-s.stop // 2)) for s in (rows, cols))
    planes = read_bands(sources, grid, (rows, cols), tiling, fine=2)
    for name, plane in zip(names, planes, strict=True):
        np.testing.assert_array_equal(plane, whole(scene, name)[fine if name in names[:2] else coarse])
    odd = slice(rows.start + 1, rows.stop), cols
    planes = read_bands(sources, grid, odd, tiling, fine=2)  # does not start at a whole pixel of 20 m
    assert {plane.shape for plane in planes} == {planes[0].shape}


@pytest.mark.parametrize(("chunk", "halo"), [(64, 16), (80, 24), (96, 40), (512, 64)])
def test_invariant_5_each_source_block_is_decoded_once(make_series, monkeypatch, chunk, halo):
    scene = make_series(shape=(300, 333), dates=1, block=64)[0]
    monkeypatch.setattr(reader, "BLOCKS", BlockCache())
    monkeypatch.setattr(reader, "COUNTS", reader.Counts())
    grid = scene.assets["red"].grid
    tiling = Tiling(grid.shape, chunk, halo)
    chunks = [(i, j) for i in range(tiling.blocks[0]) for j in range(tiling.blocks[1])]
    for band in ("red", "swir22"):
        source, expected = band_source(scene, band), whole(scene, band)
        factor = 1 if band == "red" else 2
        expected = expected.repeat(factor, 0).repeat(factor, 1)
        with ThreadPoolExecutor(4) as pool:
            windows = [tiling.read(*c) for c in chunks]
            for window, data in zip(
                windows, pool.map(partial(read_window, source, grid, tiling=tiling), windows), strict=True
            ):
                np.testing.assert_array_equal(data, expected[: grid.shape[0], : grid.shape[1]][window])
    assert sum(whole(scene, b).nbytes for b in ("red", "swir22")) == reader.COUNTS.decoded
    assert not reader.BLOCKS._entries
    assert reader.BLOCKS._bytes == 0


def test_a_full_cache_reads_again_and_never_wrong(make_series, monkeypatch):
    scene = make_series(shape=(300, 333), dates=1, block=64)[0]
    monkeypatch.setattr(reader, "BLOCKS", BlockCache(max_bytes=10_000))
    grid, source, expected = scene.assets["red"].grid, band_source(scene, "red"), whole(scene, "red")
    tiling = Tiling(grid.shape, 64, 16)
    for i in range(tiling.blocks[0]):
        for j in range(tiling.blocks[1]):
            window = tiling.read(i, j)
            np.testing.assert_array_equal(read_window(source, grid, window, tiling), expected[window])
    assert reader.BLOCKS._bytes <= 10_000


def test_a_block_that_was_forgotten_while_others_had_it_is_given_back_without_harm():
    """The cache was full, or the block lay idle: who has it still gives it back, or fails, and meets no other's."""
    cache, file, block = BlockCache(), ("work", "red.tif"), (0, 0)
    mine, _ = cache.claim(file, [block], {block: 2})
    cache.publish(mine[block], np.zeros((4, 4), np.uint16))
    _, held = cache.claim(file, [block], {block: 2})
    cache.drop(idle=0)
    again, _ = cache.claim(file, [block], {block: 2})
    cache.publish(again[block], np.ones((4, 4), np.uint16))
    for had in (mine, held):
        cache.release(file, had)
    cache.abandon(file, mine, OSError("another block of this chunk is damaged"))
    assert cache._entries == {(file, *block): again[block]}
    cache.drop(idle=0)
    cache.release(file, again)
    cache.abandon(file, again, OSError("another block of this chunk is damaged"))
    assert cache._bytes == 0


def test_blocks_left_behind_serve_no_later_unit_of_work(monkeypatch, tmp_path):
    monkeypatch.setattr(reader, "BLOCKS", BlockCache())
    scene, written_anew = (write_series(tmp_path / f"{n}", shape=(300, 333), dates=1, seed=n)[0] for n in (0, 1))
    grid, source, tiling = scene.assets["red"].grid, band_source(scene, "red"), Tiling((300, 333), 128, 16)
    window = tiling.read(0, 0)
    read_window(source, grid, window, tiling)  # and its neighbours are never read, as after an interrupt
    expected = whole(written_anew, "red")
    shutil.copy(written_anew.assets["red"].href, scene.assets["red"].href)
    np.testing.assert_array_equal(read_window(source, grid, window, replace(tiling, work="next")), expected[window])
    assert len(reader.BLOCKS._entries) == 2 * len({key[1:] for key in reader.BLOCKS._entries})
    reader.BLOCKS.drop(idle=60)
    assert reader.BLOCKS._entries
    reader.BLOCKS.drop(idle=0)
    assert not reader.BLOCKS._entries
    assert reader.BLOCKS._bytes == 0


@given(st.integers(1, 12000), st.sampled_from([16, 96, 512, 1024, 1536, 2048, 3072]), st.sampled_from([0, 16, 80]))
def test_chunks_are_all_of_a_grid_and_know_who_reads_what(size, chunk, halo):
    tiling = Tiling((size, 7), chunk, halo)
    assert tiling.blocks[0] == -(-size // chunk)
    cores = [tiling.core(row, 0)[0] for row in range(tiling.blocks[0])]
    assert [core.start for core in cores] == [0, *(core.stop for core in cores[:-1])]
    assert cores[-1].stop == size
    assert all(0 < core.stop - core.start <= chunk and core.start % 16 == 0 for core in cores)
    assert cores[tiling.middle[0]].start <= size // 2 < cores[tiling.middle[0]].stop
    for start in range(0, size, max(1, size // 9)):
        stop = min(start + 700, size)
        reads = [tiling.read(row, 0)[0] for row in range(tiling.blocks[0])]
        assert tiling.readers(slice(start, stop), slice(0, 7)) == sum(r.start < stop and start < r.stop for r in reads)


def test_borders_of_chunks_lie_within_blocks_of_the_sources_where_the_network_may_start_there():
    tiling = Tiling((10980, 10980), 2048, 80, stride=16)
    assert [tiling.core(row, 0)[0].start for row in range(6)] == [0, 1536, 3584, 5632, 7680, 9728]
    tiling = Tiling((10980, 10980), 3072, 12, stride=6)
    assert [tiling.core(row, 0)[0].start for row in range(4)] == [0, 3072, 6144, 9216]


def test_a_failed_read_leaves_no_block_behind(make_series, monkeypatch, tmp_path):
    monkeypatch.setattr(reader, "BLOCKS", BlockCache())
    scene = make_series(shape=(300, 333), dates=1, block=64)[0]
    href = scene.assets["red"].href
    content = open(href, "rb").read()
    truncated = tmp_path / "truncated.tif"
    truncated.write_bytes(content[: len(content) // 2])
    source = replace(band_source(scene, "red"), hrefs=(str(truncated),))
    grid = scene.assets["red"].grid
    tiling = Tiling(grid.shape, 128, 16)
    with pytest.raises(ReadError, match=r"truncated\.tif"):
        read_window(source, grid, tiling.read(1, 1), tiling)
    assert not reader.BLOCKS._entries


def test_a_block_that_a_neighbour_could_not_decode_is_decoded_here(make_series, monkeypatch):
    monkeypatch.setattr(reader, "BLOCKS", BlockCache())
    scene = make_series(shape=(300, 333), dates=1, block=64)[0]
    grid, source, expected = scene.assets["red"].grid, band_source(scene, "red"), whole(scene, "red")
    tiling = Tiling(grid.shape, 128, 16)
    window, href = tiling.read(1, 1), source.hrefs[0]
    theirs, _ = reader.BLOCKS.claim((tiling.work, href), [(1, 1)], {(1, 1): 4})  # a neighbour's, and not decoded yet
    finish = reader._start(source, grid, window, tiling)
    reader.BLOCKS.abandon((tiling.work, href), theirs, OSError("the neighbour's connection broke"))
    np.testing.assert_array_equal(finish(), expected[window])


def test_a_mistake_in_waiting_is_not_taken_for_a_neighbours_failure(make_series, monkeypatch):
    monkeypatch.setattr(reader, "BLOCKS", BlockCache())
    scene = make_series(shape=(300, 333), dates=1, block=64)[0]
    grid, tiling = scene.assets["red"].grid, Tiling((300, 333), 128, 16)
    monkeypatch.setattr(reader, "_replicate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read_window(band_source(scene, "red"), grid, tiling.read(1, 1), tiling)


def test_missing_asset_is_a_read_error_naming_it(make_series):
    scene = make_series(dates=1)[0]
    source = replace(band_source(scene, "red"), hrefs=("nowhere/B04.tif",))
    with pytest.raises(ReadError, match=r"nowhere/B04\.tif"):
        read_window(source, scene.assets["red"].grid, (slice(0, 8), slice(0, 8)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"transform": (10.0, 0, 499990.0, 0, -10.0, 5700000.0)},
        {"transform": (10.0, 0, 499980.0, 0, -10.0, 5700005.0)},
        {"transform": (15.0, 0, 499980.0, 0, -15.0, 5700000.0)},
        {"transform": (10.0, 0, 499980.0, 0, -20.0, 5700000.0)},
        {"transform": (10.0, 0, 499980.0, 0, 10.0, 5700000.0)},
        {"transform": (10.0, 3.0, 499980.0, -3.0, -10.0, 5700000.0)},
        {"epsg": 32632},
        {"shape": (200, 233)},
    ],
)
def test_a_file_on_another_grid_than_its_item_is_refused(make_series, wrong):
    scene = make_series(dates=1)[0]
    grid = replace(scene.assets["red"].grid, **wrong)
    with pytest.raises(GridError, match="expected EPSG") as caught:
        read_window(band_source(scene, "red"), grid, (slice(0, 8), slice(0, 8)))
    assert caught.value.href == scene.assets["red"].href


@pytest.mark.parametrize("rounded", ["up", "down"])
def test_a_coarse_grid_may_end_with_an_odd_number_of_fine_pixels(make_series, rounded):
    scene = make_series(shape=(101, 79), dates=1)[0]
    asset = scene.assets["swir16"]
    data = whole(scene, "swir16")[: None if rounded == "up" else 50, : None if rounded == "up" else 39]
    ends_with = Affine(10.0 * 79 / data.shape[1], 0, 499980.0, 0, -10.0 * 101 / data.shape[0], 5700000.0)
    write_tiff(Path(asset.href), data, ends_with, 64)
    grid = scene.assets["red"].grid
    read = read_window(band_source(scene, "swir16"), grid, (slice(0, 101), slice(0, 79)))
    expected = data.repeat(2, 0).repeat(2, 1)[:101, :79]
    edge = [(0, n - m) for n, m in zip((101, 79), expected.shape, strict=True)]
    np.testing.assert_array_equal(read, np.pad(expected, edge, mode="edge"))
    everything = Tiling((101, 79), 112, 16)
    source = band_source(scene, "swir16")
    (native,) = read_bands([source], grid, everything.read(0, 0), everything, fine=0)
    np.testing.assert_array_equal(native, np.pad(data, [(0, 51 - len(data)), (0, 40 - data.shape[1])], mode="edge"))


def test_unknown_band_names_what_the_scene_offers(make_series):
    with pytest.raises(ConfigError, match=r"scene-000 offers no band 'rededge1', only blue, green"):
        band_source(make_series(dates=1)[0], "rededge1")


def test_later_parts_fill_what_earlier_ones_do_not_cover(make_series, monkeypatch):
    monkeypatch.setattr(reader, "BLOCKS", BlockCache())
    first, second = make_series(dates=2)
    data = whole(first, "red")
    with rasterio.open(first.assets["red"].href, "r+") as dataset:
        dataset.write(np.where(np.arange(data.shape[1]) < 100, data, 0).astype(np.uint16), 1)
    scene = replace(first, parts=(second,))
    grid = first.assets["red"].grid
    read = read_window(band_source(scene, "red"), grid, (slice(0, 200), slice(0, 232)))
    np.testing.assert_array_equal(read[:, :100], data[:, :100])
    np.testing.assert_array_equal(read[:, 100:], whole(second, "red")[:, 100:])
    assert (read_overview(band_source(scene, "red"), grid, 2) > 0).all()
    tiling = Tiling((200, 232), 64, 16)
    for index in np.ndindex(tiling.blocks):
        window = tiling.read(*index)
        np.testing.assert_array_equal(read_window(band_source(scene, "red"), grid, window, tiling), read[window])
    assert not reader.BLOCKS._entries  # though some chunks need nothing of the second part


def test_every_part_fills_an_overview_where_those_before_have_no_observation(make_series):
    """Of a datatake in three pieces, and of pixels that are none by another number than 0."""
    scenes = make_series(shape=(64, 96), dates=3, change=False)
    expected = whole(scenes[0], "red")
    for index, scene in enumerate(scenes):
        with rasterio.open(scene.assets["red"].href, "r+") as dataset:
            dataset.nodata = 65535
            dataset.write(np.where(np.arange(96) // 32 == index, expected, 65535).astype(np.uint16), 1)
    source = replace(band_source(scenes[0], "red"), hrefs=tuple(s.assets["red"].href for s in scenes), nodata=65535)
    grid = scenes[0].assets["red"].grid
    np.testing.assert_array_equal(read_overview(source, grid, 1), expected)
    np.testing.assert_array_equal(read_window(source, grid, (slice(0, 64), slice(0, 96))), expected)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_overview_has_the_decimated_shape(make_series, factor):
    scene = make_series(shape=(101, 79), dates=1)[0]
    grid = scene.assets["red"].grid
    shapes = {read_overview(band_source(scene, b), grid, factor).shape for b in ("red", "swir16", "scl")}
    assert shapes == {(-(-101 // factor), -(-79 // factor))}


@given(size=st.integers(1, 400), chunk=st.integers(1, 130), halo=st.integers(0, 90), block=st.integers(1, 100))
def test_readers_counts_the_chunks_that_overlap_a_block(size, chunk, halo, block):
    tiling = Tiling((size, 1), chunk, halo)
    spans = [tiling.read(i, 0)[0] for i in range(tiling.blocks[0])]
    for start in range(0, size, block):
        stop = min(start + block, size)
        expected = sum(span.start < stop and span.stop > start for span in spans)
        assert tiling.readers(slice(start, stop), slice(0, 1)) == expected


@given(
    shape=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    chunk=st.integers(16, 130),
    halo=st.integers(0, 40),
    block=st.integers(16, 100),
    workers=st.integers(1, 9),
    data=st.data(),
)
def test_readers_are_those_whose_worker_has_the_chunk(shape, chunk, halo, block, workers, data):
    tiling = Tiling(shape, chunk, halo, workers=workers)
    chunks = list(np.ndindex(tiling.blocks))
    turns = {c: tiling.turn(*c) for c in chunks}
    assert sorted(turns.values()) == list(turns.values())
    areas = Counter({c: math.prod(s.stop - s.start for s in tiling.core(*c)) for c in chunks})
    for worker in range(workers):
        found = sum(areas[c] for c in chunks if turns[c] == worker)
        assert abs(found - math.prod(shape) / workers) <= max(areas.values())
    here = data.draw(st.sampled_from(chunks))
    mine = [tiling.read(*c) for c in chunks if turns[c] == turns[here]]
    for corner in itertools.product(*(range(0, size, block) for size in shape)):
        spans = [slice(start, min(start + block, size)) for start, size in zip(corner, shape, strict=True)]
        expected = sum(all(w.start < s.stop and s.start < w.stop for w, s in zip(c, spans, strict=True)) for c in mine)
        assert replace(tiling, worker=turns[here]).readers(*spans) == expected


def test_two_workers_share_a_tile_evenly():
    tiling = Tiling((10980, 10980), 2048, 64, stride=16, workers=2)
    first = [c for c in np.ndindex(tiling.blocks) if tiling.turn(*c) == 0]
    assert len(first) == 17
    area = sum(math.prod(s.stop - s.start for s in tiling.core(*c)) for c in first)
    assert area / 10980**2 == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("workers", [2, 3, 4, 99])
def test_workers_that_share_a_unit_keep_no_block_for_each_other(make_series, monkeypatch, workers):
    scene = make_series(shape=(300, 333), dates=1, block=64)[0]
    grid, source, expected = scene.assets["red"].grid, band_source(scene, "red"), whole(scene, "red")
    tiling = Tiling(grid.shape, 64, 16, workers=workers)
    chunks = list(np.ndindex(tiling.blocks))
    decoded, needed = 0, 0
    for worker in range(workers):
        monkeypatch.setattr(reader, "BLOCKS", BlockCache())
        monkeypatch.setattr(reader, "COUNTS", reader.Counts())
        mine = [c for c in chunks if tiling.turn(*c) == worker]
        for c in mine:
            window = tiling.read(*c)
            np.testing.assert_array_equal(
                read_window(source, grid, window, replace(tiling, worker=worker)), expected[window]
            )
        assert not reader.BLOCKS._entries
        blocks = {b for c in mine for b in reader.Layout(grid.shape, (64, 64)).covering(*tiling.read(*c))}
        needed += sum(expected[reader.Layout(grid.shape, (64, 64)).spans(b)].nbytes for b in blocks)
        decoded += reader.COUNTS.decoded
    assert decoded == needed > expected.nbytes


@given(st.sets(st.tuples(st.integers(0, 6), st.integers(0, 6))))
def test_rectangles_cover_each_block_once(blocks):
    covered = [
        (i, j) for (i0, j0), (i1, j1) in rectangles(blocks) for i in range(i0, i1 + 1) for j in range(j0, j1 + 1)
    ]
    assert sorted(covered) == sorted(blocks)


def test_waiting_for_a_neighbour_that_fails_ends_in_its_error(make_series, monkeypatch):
    """Two threads want the same block; the file is gone: both get the typed error, none hangs."""
    monkeypatch.setattr(reader, "BLOCKS", BlockCache())
    scene = make_series(shape=(300, 333), dates=1, block=64)[0]
    source = replace(band_source(scene, "red"), hrefs=("gone.tif",))
    grid = scene.assets["red"].grid
    tiling = Tiling(grid.shape, 128, 16)
    errors = []

    def attempt(index):
        try:
            read_window(source, grid, tiling.read(0, index), tiling)
        except ReadError as error:
            errors.append(error)

    threads = [threading.Thread(target=attempt, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(errors) == 2
