"""Network and Dask together: chunked equals whole, no seams, offsets and identical dates give no change."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import dask
import dask.threaded
import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from inference_support import MASK, MODEL, REF, graph_of, run_codes, surveys_of

import s2cd
from s2cd import reader
from s2cd.codes import decode_codes
from s2cd.cube import open_cube
from s2cd.errors import ConfigError, GridError, ReadError
from s2cd.inference import _aligned_chunks, detect_changes
from s2cd.masks import Mask
from s2cd.model import normalise
from s2cd.pairs import consecutive_pairs
from s2cd.simulate import simulate, truth_between

QUANTUM = 1 / 1024


def test_a_client_needs_no_device_of_its_workers(make_series):
    """A login node has none."""
    graph, *_ = graph_of(make_series(dates=2), 512, replace(REF, device="cuda:63"))
    (shared,) = (key for key in graph if key[0] == "unit_of_work")
    assert graph[shared][0]().ref.device == "cuda:63"


def whole_image(scenes):
    """The reference: whole dates through the network in one piece, no Dask."""
    surveys, results = surveys_of(scenes), []
    for pair in consecutive_pairs(scenes):
        encoded = []
        for scene in (pair.before, pair.after):
            cube = open_cube([scene], bands=[*MODEL.bands, "scl"]).values[0]
            valid = (cube[:-1] > 0).all(axis=0) & MASK.from_classes(cube[-1][::2, ::2], 2).repeat(2, 0).repeat(2, 1)[
                : cube.shape[1], : cube.shape[2]
            ]
            scale = np.array([scene.assets[b].scale for b in MODEL.bands], np.float32)
            offset = np.array([scene.assets[b].offset for b in MODEL.bands], np.float32)
            affine = MODEL.affine(surveys[scene.id].statistics, scale, offset)
            encoded.append((MODEL.encode(cube[:-1], affine, valid), valid))
        (a, valid_a), (b, valid_b) = encoded
        background = MODEL.background(surveys[pair.before.id].sketch, surveys[pair.after.id].sketch)
        results.append(np.where(valid_a & valid_b, MODEL.decode(a, b, background), np.nan))
    return np.stack(results)


def unique_bytes(scenes):
    total = 0
    for scene in scenes:
        for asset in scene.assets.values():
            with rasterio.open(asset.href) as dataset:
                total += dataset.read(1).nbytes
    return total


def paint_clouds(scene, shape):
    with rasterio.open(scene.assets["scl"].href, "r+") as dataset:
        scl = dataset.read(1)
        scl[shape[0] // 8 : shape[0] // 4, :12] = 9
        dataset.write(scl, 1)


@pytest.mark.parametrize(("shape", "chunk"), [((17, 19), 64), ((261, 333), 128), ((400, 210), 96), ((257, 255), 2048)])
def test_invariant_1_chunked_equals_whole(make_series, shape, chunk):
    scenes = make_series(shape=shape, dates=3)
    paint_clouds(scenes[1], shape)
    expected = whole_image(scenes)
    assert np.isnan(expected).any()
    chunk = -(-chunk // MODEL.stride) * MODEL.stride
    pairs = consecutive_pairs(scenes)
    cube = open_cube(scenes, chunk=chunk)
    lazily = detect_changes(cube, pairs, device="cpu")
    assert dask.is_dask_collection(lazily.data)
    assert (lazily.dims, lazily.dtype) == (("pair", "y", "x"), np.float32)
    np.testing.assert_allclose(lazily.compute(scheduler="threads").values, expected, atol=1e-5)
    codes = decode_codes(run_codes(scenes, chunk))
    np.testing.assert_allclose(codes, expected, atol=QUANTUM / 2 + 1e-5)


def test_clouds_that_grow_beyond_the_halo_of_the_network_hide_the_same_in_chunks(make_series):
    scenes = make_series(shape=(261, 333), dates=2)
    paint_clouds(scenes[1], (261, 333))
    pairs, mask = consecutive_pairs(scenes), Mask(dilation=60)
    whole, chunked = (
        detect_changes(open_cube(scenes, chunk=chunk), pairs, mask=mask, device="cpu").values for chunk in (2048, 96)
    )
    assert 0.1 < np.isnan(whole).mean() < 0.8
    np.testing.assert_allclose(chunked, whole, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("scl", [True, False])
def test_chunks_that_lie_on_a_gpu_give_the_same(make_series, scl):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    cupy = pytest.importorskip("cupy")
    scenes = make_series(shape=(300, 333), scl=scl)
    pairs, cube = consecutive_pairs(scenes), open_cube(scenes, chunk=128)
    there = cube.copy(data=cube.data.map_blocks(cupy.asarray, meta=cupy.empty((0,) * 4, cube.dtype)))
    for device in ("cuda", "cpu"):
        expected = detect_changes(cube, pairs, device=device).compute(scheduler="threads").values
        found = detect_changes(there, pairs, device=device).compute(scheduler="threads").values
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_invariant_2_shape_grid_and_range(make_series):
    scenes = make_series(shape=(101, 333))
    change = detect_changes(open_cube(scenes), consecutive_pairs(scenes), device="cpu")
    assert change.shape == (2, 101, 333)
    assert tuple(change.rio.transform())[:6] == scenes[0].assets["red"].grid.transform
    assert change.rio.crs.to_epsg() == 32631
    values = change.values
    assert ((values >= 0) & (values <= 1) | np.isnan(values)).all()


def test_invariant_3_identical_dates_and_offsets_give_no_change(make_series):
    scenes = make_series(shape=(200, 232), dates=2, change=False)
    first = scenes[0]
    shifted = {}
    for name, asset in first.assets.items():
        if name != "scl":
            with rasterio.open(scenes[1].assets[name].href, "r+") as copy, rasterio.open(asset.href) as original:
                copy.write(original.read(1) + 1000, 1)
            shifted[name] = replace(asset, href=scenes[1].assets[name].href, offset=-0.1)
    shifted["scl"] = first.assets["scl"]
    again = replace(scenes[1], assets=shifted)
    same = replace(scenes[1], assets=first.assets)
    pairs_same, pairs_shifted = consecutive_pairs([first, same]), consecutive_pairs([first, again])
    identical = detect_changes(open_cube([first, same]), pairs_same, device="cpu").values
    offset = detect_changes(open_cube([first, again]), pairs_shifted, device="cpu").values
    assert identical.max() < 0.05
    np.testing.assert_allclose(offset, identical, atol=1e-3)


def test_pairs_are_compared_against_their_own_background(make_series, monkeypatch):
    """The level reaches the network in both forms of the computation, and is that of the pair."""
    scenes = make_series(shape=(200, 232), dates=3)
    monkeypatch.setattr(normalise, "LEAST_BACKGROUND", 0.01)  # these dates differ by less than dates usually do
    surveys, pairs = surveys_of(scenes), consecutive_pairs(scenes)
    levels = [MODEL.background(surveys[p.before.id].sketch, surveys[p.after.id].sketch) for p in pairs]
    assert levels[0] != levels[1]
    expected = whole_image(scenes)
    lazily = detect_changes(open_cube(scenes, chunk=96), pairs, device="cpu")
    np.testing.assert_allclose(lazily.values, expected, atol=1e-5)
    np.testing.assert_allclose(decode_codes(run_codes(scenes, 96)), expected, atol=QUANTUM / 2 + 1e-5)


def test_predict_gives_what_a_run_gives(make_series):
    """A single chunk without clouds, its statistics taken from the same pixels."""
    scenes = make_series(shape=(200, 232), dates=2)
    (pair,) = consecutive_pairs(scenes)
    cube = open_cube(scenes, bands=list(MODEL.bands))
    before, after = (
        cube.values[i] * np.float32(s.assets["red"].scale) + np.float32(s.assets["red"].offset)
        for i, s in enumerate((pair.before, pair.after))
    )
    change = detect_changes(open_cube(scenes), [pair], device="cpu").values[0]
    valid = ~np.isnan(change)
    # Not exactly: numbers and their reflectance are scaled in two ways, and may then round to two values of float16.
    np.testing.assert_allclose(MODEL.predict(before, after)[valid], change[valid], atol=5e-3)


def test_what_changed_in_a_simulated_series_stands_out(tmp_path):
    catalog = simulate(tmp_path, size=384, dates=3, orbits=(51,), seed=5, clouds=False)
    scenes = s2cd.search(str(catalog))
    pairs = consecutive_pairs(scenes)
    change = detect_changes(open_cube(scenes), pairs, device="cpu").values
    truth = np.stack([truth_between(tmp_path, p.before.time, p.after.time) for p in pairs]).astype(bool)
    assert truth.any()
    assert np.nanmean(change[truth]) > 10 * np.nanmean(change[~truth])


def test_invariant_4_a_failed_read_names_the_asset(make_series):
    scenes = make_series(dates=3)
    graph, keys, _ = graph_of(scenes, 128)
    content = open(scenes[1].assets["nir"].href, "rb").read()
    open(scenes[1].assets["nir"].href, "wb").write(content[: len(content) // 2])
    with pytest.raises(ReadError, match=r"001/nir\.tif"):
        dask.threaded.get(graph, keys)


def test_invariant_5_a_run_decodes_each_date_once(make_series, monkeypatch):
    scenes = make_series(shape=(400, 460), dates=4)
    monkeypatch.setattr(reader, "COUNTS", reader.Counts())
    monkeypatch.setattr(reader, "BLOCKS", reader.BlockCache())
    run_codes(scenes, 128)
    assert reader.COUNTS.decoded == unique_bytes(scenes)


def test_displacement_is_measured_on_pixels_that_are_read_anyway(make_series, monkeypatch):
    scenes = make_series(shape=(400, 460), dates=2, change=False)
    with rasterio.open(scenes[1].assets["red"].href, "r+") as file, rasterio.open(scenes[0].assets["red"].href) as red:
        file.write(np.roll(red.read(1), (2, -3), axis=(0, 1)), 1)
    work = graph_of(scenes, 256)[:2]
    monkeypatch.setattr(reader, "COUNTS", reader.Counts())
    monkeypatch.setattr(reader, "BLOCKS", reader.BlockCache())
    rows = dask.threaded.get(*work)
    assert reader.COUNTS.decoded == unique_bytes(scenes)
    (shift,) = rows[0][0].shifts
    assert (shift.dy, shift.dx) == pytest.approx((2, -3), abs=0.1)
    assert sum(block.shifts is not None for row in rows for block in row) == 1


def test_displacement_is_that_of_pixels_that_both_dates_show(make_series):
    scenes = make_series(shape=(400, 460), dates=2, change=False)
    with rasterio.open(scenes[1].assets["red"].href, "r+") as file:
        red = file.read(1)
        red[:, :300] = np.roll(red, (3, 5), axis=(0, 1))[:, :300]  # clouds, of their own shape and place
        file.write(red, 1)
    with rasterio.open(scenes[1].assets["scl"].href, "r+") as file:
        scl = file.read(1)
        scl[:, :150] = 9
        file.write(scl, 1)
    ((block,),) = dask.threaded.get(*graph_of(scenes, 512)[:2])
    (shift,) = block.shifts
    assert (shift.dy, shift.dx) == pytest.approx((0, 0), abs=0.1)


def test_invariant_7_the_graph_carries_urls_and_a_hash_only(make_series):
    scenes = make_series(shape=(261, 333), dates=3)
    change = detect_changes(open_cube(scenes), consecutive_pairs(scenes), device="cpu")
    blocks, *_ = graph_of(scenes, 128)
    for collection in (dict(change.data.__dask_graph__()), blocks):
        graph = pickle.dumps(collection)
        assert REF.hash.encode() in graph
        assert b"Polygon" not in graph
        assert len(graph) < 200_000


def test_the_halves_of_a_split_datatake_are_one_date_of_the_cube(make_series):
    first, top = make_series(shape=(200, 232), dates=2)
    takes = {"datatake": "GS2A_20230506T105031_041100_N05.09"}
    top, bottom = (
        replace(half_of(top, rows, name), strip_start=top.time + timedelta(seconds=late), **takes)
        for name, rows, late in (("top", slice(0, 100), 0), ("bottom", slice(100, 200), 60))
    )
    pairs = consecutive_pairs([first, top, bottom])
    assert [s.id for s in pairs.scenes] == [first.id, pairs[0].after.id]
    change = detect_changes(open_cube(pairs.scenes), pairs, device="cpu").values[0]
    np.testing.assert_allclose(change, decode_codes(run_codes([*pairs.scenes], 128))[0], atol=QUANTUM)
    assert np.isfinite(change).all()
    with pytest.raises(ConfigError, match=r"(top|bottom): found no other half in the cube, expected (top|bottom)"):
        detect_changes(open_cube([first, top, bottom]), pairs, device="cpu")


def half_of(scene, rows, name):
    """The scene as one half of a split datatake: observed in some rows (of 10 m) only, on a footprint of its own."""
    assets = {}
    for key, asset in scene.assets.items():
        href = Path(asset.href).with_name(f"{name}-{key}.tif")
        shutil.copy(asset.href, href)
        with rasterio.open(href, "r+") as dataset:
            data, factor = dataset.read(1), 200 // dataset.height
            seen = np.zeros(data.shape, bool)
            seen[rows.start // factor : rows.stop // factor] = True
            dataset.write(np.where(seen, data, 0), 1)
        assets[key] = replace(asset, href=str(href))
    return replace(scene, id=name, assets=assets)


def test_a_cube_is_taken_with_its_axes_in_any_order_and_else_as_it_was_opened(make_series):
    scenes = make_series(shape=(200, 232), dates=2)
    cube, pairs = open_cube(scenes), consecutive_pairs(scenes)
    change = detect_changes(cube, pairs, device="cpu").values
    turned = detect_changes(cube.transpose("x", "y", "time", "band"), pairs, device="cpu")
    np.testing.assert_array_equal(turned.values, change)
    for wrong, message in (
        (cube * cube.scale + cube.offset, r"cube: found float64, expected the digital numbers of open_cube"),
        (cube.where(cube > 0), r"cube: found float\d+, expected the digital numbers"),
        (cube[0], r"cube: found dimensions \('band', 'y', 'x'\) and coordinates"),
        (cube.drop_vars("id"), r"cube: found dimensions .*, expected .* and id as open_cube gives them"),
    ):
        with pytest.raises(ConfigError, match=message):
            detect_changes(wrong, pairs, device="cpu")
    with pytest.raises(ConfigError, match=r"mask: found 'scl', expected a Mask, such as Mask.parse\('scl'\)"):
        detect_changes(cube, pairs, mask="scl", device="cpu")


def no_cloud(reflectance, bands):
    return np.zeros(reflectance.shape[1:], bool)


def test_a_cube_without_the_mask_band_is_refused(make_series):
    scenes = make_series(shape=(200, 232), dates=2)
    pairs, cube = consecutive_pairs(scenes), open_cube(scenes, bands=list(MODEL.bands))
    with pytest.raises(ConfigError, match="model and mask need the bands blue, .*, scl, the cube lacks scl"):
        detect_changes(cube, pairs, device="cpu")
    change = detect_changes(cube, pairs, mask=Mask(function=f"{__name__}:no_cloud"), device="cpu")
    assert change.shape == (1, 200, 232)


def test_a_function_takes_the_place_of_a_mask_band_that_the_cube_holds(make_series):
    scenes = make_series(shape=(200, 232), dates=2)
    with rasterio.open(scenes[0].assets["scl"].href, "r+") as file:
        file.write(np.full(file.shape, 9, np.uint8), 1)
    pairs, mask = consecutive_pairs(scenes), Mask(function=f"{__name__}:no_cloud")
    assert np.isfinite(detect_changes(open_cube(scenes), pairs, mask=mask, device="cpu")).all()


@pytest.mark.parametrize(("top", "left"), [(0, 0), (16, 32), (1, 7), (22, 31), (8, 2)])
@pytest.mark.parametrize("scl", [True, False])
def test_a_part_of_a_cube_gives_what_its_tile_does(make_series, top, left, scl):
    """Wherever it begins; along its edge less is seen than in the tile."""
    scenes = make_series(shape=(300, 316), dates=2, scl=scl)
    cube, pairs = open_cube(scenes), consecutive_pairs(scenes)
    whole = detect_changes(cube, pairs, device="cpu")
    part = detect_changes(cube[:, :, top : top + 260, left : left + 272], pairs, device="cpu")
    assert part.shape == (1, 260, 272)
    inner = {"y": slice(80, 180), "x": slice(80, 192)}
    expected = whole.isel(y=slice(top, top + 260), x=slice(left, left + 272)).isel(inner)
    assert expected.y.equals(part.isel(inner).y)
    np.testing.assert_allclose(part.isel(inner), expected, atol=QUANTUM)


def test_a_cube_between_the_pixels_of_its_tile_is_refused(make_series):
    scenes = make_series(shape=(200, 232), dates=2)
    cube = open_cube(scenes)
    moved = cube.assign_coords(x=cube.x + 5).rio.write_transform(Affine(10, 0, 499985, 0, -10, 5700000))
    with pytest.raises(GridError, match=r"starts at column 0\.5 of its tile, expected a whole number"):
        detect_changes(moved, consecutive_pairs(scenes), device="cpu")


@pytest.mark.parametrize(
    ("part", "spacing"),
    [({"y": slice(None, None, 5), "x": slice(None, None, 5)}, "50, -50"), ({"y": slice(None, None, -1)}, "10, 10")],
)
def test_a_decimated_or_flipped_cube_is_none_of_its_tile(make_series, part, spacing):
    """Its corner may lie where that of a whole pixel would."""
    scenes = make_series(shape=(205, 235), dates=2)
    with pytest.raises(GridError, match=f"the cube has a pixel every {spacing}, expected 10, -10"):
        detect_changes(open_cube(scenes).isel(part), consecutive_pairs(scenes), device="cpu")


def test_cube_that_lacks_a_band_or_a_date_and_no_pairs(make_series):
    scenes = make_series(dates=3)
    pairs = consecutive_pairs(scenes)
    with pytest.raises(ConfigError, match="the cube lacks swir16, swir22"):
        detect_changes(open_cube(scenes, bands=["B02", "B03", "B04", "B08", "B8A"]), pairs, device="cpu")
    with pytest.raises(ConfigError, match="needs scene-001 and scene-002"):
        detect_changes(open_cube(scenes[:2]), pairs, device="cpu")
    with pytest.raises(ConfigError, match="pairs: found none"):
        detect_changes(open_cube(scenes), consecutive_pairs(scenes[:1]), device="cpu")


@pytest.mark.parametrize("size", [5, 64, 100, 130, 1025])
def test_aligned_chunks_are_no_smaller_than_the_halo(size):
    chunks = _aligned_chunks(size, 50, 8, 64)
    assert sum(chunks) == size
    assert all(c % 8 == 0 for c in chunks[:-1])
    assert len(chunks) == 1 or min(chunks) >= 64
