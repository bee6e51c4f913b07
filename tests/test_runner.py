"""A run from plan to report: resumable, bounded, honest about what failed."""

from __future__ import annotations

import json
import os
import socket
import threading
import warnings
from collections import defaultdict
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import dask
import numpy as np
import pystac
import pytest
import rasterio
from conftest import GSD
from dask.callbacks import Callback
from distributed import Client, LocalCluster, get_task_stream
from fault_server import FaultServer

import s2cd
from s2cd import runner
from s2cd.catalog import access, freeze
from s2cd.cube import common_grid
from s2cd.errors import ClusterError, ConfigError, NoScenesError, OutputError, S2cdError, S2cdWarning, ShiftWarning
from s2cd.inference import Block
from s2cd.maps import write_pair
from s2cd.model import ModelRef, load_model
from s2cd.outputs import finished, require_grids, validate, write_catalog
from s2cd.outputs.page import write_page
from s2cd.pairs import consecutive_pairs
from s2cd.plan import describe_plan, make_plan
from s2cd.registration import Shift
from s2cd.runner import places, run, run_status, units_at_a_time
from s2cd.simulate import simulate
from s2cd.sizes import Workers


@pytest.fixture(scope="module")
def client():
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        yield client


@pytest.fixture
def config(tmp_path):
    return s2cd.RunConfig(catalog="given", out=str(tmp_path / "out"), device="cpu", min_valid=0.0)


def read(path):
    with rasterio.open(path) as dataset:
        return dataset.read(1)


def test_invariant_6_a_rerun_does_nothing_and_goes_on_where_it_stopped(make_series, config, client, tmp_path):
    scenes = make_series(dates=5)
    first = run(config, client, scenes=scenes)
    assert first.ok
    assert first.count("written") == 4
    out = tmp_path / "out"
    tiffs = sorted(out.rglob("*.tif"))
    before = {p: p.stat().st_mtime_ns for p in out.rglob("S2CD_*.*")}
    again = run(config, client, scenes=scenes)
    assert (again.count("kept"), again.count("written")) == (4, 0)
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("S2CD_*.*")}
    content = tiffs[1].read_bytes()
    tiffs[1].with_suffix(".json").unlink()
    tiffs[1].unlink()
    repaired = run(config, client, scenes=scenes)
    assert (repaired.count("kept"), repaired.count("written")) == (3, 1)
    assert tiffs[1].read_bytes() == content


def age(out):
    """Take from the items what earlier versions did not state."""
    for path in out.rglob("S2CD_*.json"):
        item = json.loads(path.read_text())
        del item["properties"]["s2cd:cog_profile"], item["properties"]["s2cd:mask"]
        path.write_text(json.dumps(item))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "urban"}, r"model generic \(\w{12}\), expected urban \(\w{12}\)"),
        ({"mask_classes": "0"}, r"mask_classes \[0, 1, 3, 8, 9, 10\], expected \[0\]"),
        ({"mask_dilation": 0.0}, "mask_dilation 60, expected 0"),
        ({"validity": True}, "validity False, expected True"),
        ({"cog_profile": "zstd"}, "cog_profile default, expected zstd"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_folder_keeps_to_the_options_that_decide_what_is_in_a_map(
    make_series, config, client, tmp_path, options, message
):
    scenes = make_series(dates=3)
    run(config, client, scenes=scenes[:2])
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.*")}
    other = config.model_validate(config.model_dump() | options)
    wanted = rf"{tmp_path}/out holds maps of {message}: choose another folder for these options, or ask for the same$"
    with pytest.raises(OutputError, match=wanted):
        run(other, client, scenes=scenes)
    with pytest.raises(OutputError, match=message):
        describe_plan(make_plan(other, scenes))
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.*")} == before
    free = config.model_copy(update={"max_cloud": 50.0, "max_gap_days": 9.0, "quicklook": False, "chunk": 64})
    same = free.model_copy(update={"mask_classes": (10, 9, 8, 3, 1, 0)})
    assert [record.status for record in run(same, client, scenes=scenes).maps] == ["kept", "written"]


def test_maps_of_an_earlier_version_are_gone_on_with_where_nothing_contradicts(make_series, config, client, tmp_path):
    scenes = make_series(dates=3)
    run(config, client, scenes=scenes[:2])
    age(tmp_path / "out")
    with pytest.raises(OutputError, match="data_type float32, expected uint8"):
        run(config.model_copy(update={"cog_profile": "uint8"}), client, scenes=scenes)
    unstated = config.model_copy(update={"mask_dilation": 0.0, "cog_profile": "zstd"})
    assert [record.status for record in run(unstated, client, scenes=scenes).maps] == ["kept", "written"]


@pytest.mark.parametrize("sooner", [True, False])
def test_a_reprocessing_whose_times_move_across_a_full_second_keeps_its_maps(make_series, config, client, sooner):
    scenes = make_series(dates=3)
    moved = [replace(s, time=s.time - timedelta(milliseconds=1), id=f"{s.id}-moved") for s in scenes]
    first, second = (scenes, moved) if sooner else (moved, scenes)
    maps = {record.name for record in run(config, client, scenes=first).maps}
    report = run(config, client, scenes=second)
    assert {(record.name, record.status) for record in report.maps} == {(name, "kept") for name in maps}
    assert run_status(config.out) == [{"field_of_view": "31UDS R051", "pairs": 2, "finished": 2}]
    assert describe_plan(make_plan(config, second)).rows[0]["finished"] == 2
    other = [replace(s, orbit=94) for s in second]
    assert run(config, client, scenes=other).count("written") == 2


@pytest.mark.parametrize(("dates", "together"), [(7, True), (3, False)])
def test_a_series_goes_to_one_worker_or_each_gets_neighbouring_chunks(make_series, config, dates, together):
    scenes = make_series(dates=dates)
    config = config.model_copy(update={"chunk": 64, "dates_per_task": 3})
    with (
        dask.config.set({"distributed.scheduler.work-stealing": False}),
        Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None) as two,
        get_task_stream(two) as stream,
    ):
        assert run(config, two, scenes=scenes).ok
    workers = defaultdict(list)
    tasks = sorted((task["key"], task["worker"]) for task in stream.data if task["key"][0] == "infer_block")
    for (_, unit, *_), place in tasks:
        workers[unit].append(place)
    assert len(workers) == (dates - 1) // 2
    changes = [sum(a != b for a, b in pairwise(found)) for found in workers.values()]
    assert changes == ([0, 0, 0] if together else [1])
    assert len(set().union(*workers.values())) == 2


def test_chunks_are_worked_row_by_row_so_that_few_blocks_are_kept(make_series, config):
    config = config.model_copy(update={"chunk": 64})
    with (
        Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as one,
        get_task_stream(one) as stream,
    ):
        assert run(config, one, scenes=make_series(dates=3)).count("written") == 2
    # In the order in which they ended: Dask moves their times by what a heartbeat tells of the scheduler's clock.
    chunks = [task["key"][2:] for task in stream.data if task["key"][0] == "infer_block"]
    assert len(chunks) > 9
    assert chunks == sorted(chunks)


def test_units_on_a_worker_are_worked_one_after_the_other(make_series, config, client):
    """Side by side they would hold memory for each, and no map would be finished before the last chunks."""
    config = config.model_copy(update={"chunk": 64, "dates_per_task": 3})
    with get_task_stream(client) as stream:
        assert run(config, client, scenes=make_series(dates=9)).count("written") == 8
    units = [task["key"][1] for task in stream.data if task["key"][0] == "infer_block"]  # as they ended
    assert len(set(units)) == 4
    assert sum(a != b for a, b in pairwise(units)) <= 3 + 2  # two threads may swap places at the border


def test_a_rerun_with_few_pairs_left_has_units_for_all_threads(make_series, config, client, tmp_path):
    (tmp_path / "two.yaml").write_text("kind: local\nthreads: 2\n")
    config = config.model_copy(update={"cluster": str(tmp_path / "two.yaml")})
    scenes = make_series(dates=7)
    assert ", 6 dates a task (auto)" in describe_plan(make_plan(config, scenes)).notes[1]
    assert run(config, client, scenes=scenes).count("written") == 6
    for tiff in sorted((tmp_path / "out").rglob("S2CD_*.tif"))[2:4]:
        tiff.with_suffix(".json").unlink()
    assert ", 2 dates a task (auto)" in describe_plan(make_plan(config, scenes)).notes[1]
    with get_task_stream(client) as stream:
        assert run(config, client, scenes=scenes).count("written") == 2
    assert len({task["key"][1] for task in stream.data if task["key"][0] == "infer_block"}) == 2


def test_the_scheduler_keeps_no_record_of_each_unit(make_series, config, client):
    config = config.model_copy(update={"chunk": 64, "dates_per_task": 3})
    assert run(config, client, scenes=make_series(dates=7)).ok
    spans = client.cluster.scheduler.extensions["spans"].spans.values()
    kept = {group.name for span in spans for group in span.groups}
    assert {"unit_of_work", "infer_block", "write_pair", "survey_scene"} == {name for name in kept if "_" in name}


@pytest.mark.parametrize(
    ("threads", "device", "units"),
    [([], None, 1), ([2], None, 2), ([1, 1], None, 4), ([16] * 8, None, 24), ([16], 5e9, 5), ([2], 5e9, 2)],
)
def test_workers_of_many_threads_get_more_units(threads, device, units):
    assert units_at_a_time(threads, Workers(device=device).threads_a_unit) == units


def test_tasks_have_no_place_while_there_are_no_workers():
    assert places({"chunk": 0, "map": 0}, {"chunk": 0}, ["map"], []) == {"chunk": (), "map": ()}


def test_chunks_go_where_their_turn_is_and_maps_to_workers_in_turn():
    homes = places(["work", "x", "y", "a", "b", "c"], {"x": 0, "y": 1}, ["a", "b", "c"], ["one", "two"])
    one, two = ("one",), ("two",)
    assert homes == {"work": (), "x": one, "y": two, "a": one, "b": two, "c": one}


def test_outputs_are_maps_items_quicklooks_and_a_catalogue(make_series, config, client, tmp_path):
    scenes = make_series(shape=(101, 333), dates=3)
    run(config, client, scenes=scenes)
    root = tmp_path / "out" / "collection.json"
    items = list(pystac.Collection.from_file(str(root)).get_items(recursive=True))
    assert sorted(item.id for item in items) == [
        "S2CD_31UDS_R051_20230501T105000_20230506T105000",
        "S2CD_31UDS_R051_20230506T105000_20230511T105000",
    ]
    for item in items:
        assert item.properties["s2cd:model"] == "generic"
        derived = [link for link in item.links if link.rel == "derived_from"]
        assert len(derived) == 2
        for asset in item.assets.values():
            assert asset.get_absolute_href()
    assert len(list((tmp_path / "out").rglob("*.png"))) == 2


def test_a_date_that_cannot_be_read_takes_only_its_pairs(make_series, config, client, tmp_path):
    scenes = make_series(dates=6, shape=(300, 333))
    path = scenes[2].assets["swir22"].href
    content = open(path, "rb").read()
    open(path, "wb").write(content[: len(content) * 2 // 3])
    report = run(config, client, scenes=scenes)
    assert not report.ok
    assert (report.count("written"), report.count("failed")) == (3, 2)
    for record in report.maps:
        if record.status == "failed":
            assert "002/swir22.tif" in record.error
    assert len(list((tmp_path / "out").rglob("*.tif"))) == 3
    open(path, "wb").write(content)
    repaired = run(config, client, scenes=scenes)
    assert (repaired.count("written"), repaired.count("kept")) == (2, 3)


def test_a_date_that_only_its_overviews_show_takes_only_its_pairs(make_series, config, client):
    """Nothing is wrong with it when it is surveyed: all pairs of its task fail, and the others are made then."""
    scenes = make_series(dates=5, shape=(520, 530))
    href = scenes[2].assets["nir"].href
    with rasterio.open(href, "r+") as dataset:
        dataset.build_overviews([2], rasterio.enums.Resampling.average)
    with rasterio.open(href) as dataset:
        start, stop = access.block_range(dataset, (4, 4))
    with open(href, "r+b") as file:
        file.seek(start)
        file.write(bytes(stop - start))
    report = run(config, client, scenes=scenes)
    assert (report.count("written"), report.count("failed")) == (2, 2)
    assert all("002/nir.tif" in record.error for record in report.maps if record.status == "failed")


def test_dates_with_too_little_to_see_are_left_out_by_pixels(make_series, config, client):
    scenes = make_series(dates=4)
    with rasterio.open(scenes[1].assets["scl"].href, "r+") as dataset:
        dataset.write(np.full(dataset.shape, 9, np.uint8), 1)
    report = run(config.model_copy(update={"min_valid": 0.3}), client, scenes=scenes)
    assert [r.name[-31:] for r in sorted(report.maps, key=lambda r: r.name)] == [
        "20230501T105000_20230511T105000",
        "20230511T105000_20230516T105000",
    ]
    assert any(item.reason == "valid fraction 0.000 below 0.3" for item in report.left_out)


def test_a_validity_layer_tells_why_a_pixel_has_no_value(make_series, config, client, tmp_path):
    scenes = make_series(dates=2, shape=(300, 333))
    for scene, rows in zip(scenes, (slice(0, 50), slice(40, 90)), strict=True):
        with rasterio.open(scene.assets["scl"].href, "r+") as dataset:
            classes = dataset.read(1)
            classes[rows] = 9
            dataset.write(classes, 1)
    plain = run(config, client, scenes=scenes).maps[0].name
    change = read(next((tmp_path / "out").rglob(f"{plain}.tif")))
    told = config.model_copy(update={"validity": True, "out": str(tmp_path / "told"), "mask_dilation": 0.0})
    run(told, client, scenes=scenes)
    (path,) = (tmp_path / "told").rglob("*_validity.tif")
    why, again = read(path), read(next((tmp_path / "told").rglob(f"{plain}.tif")))
    expected = np.zeros((300, 333), np.uint8)
    expected[:100] += 1
    expected[80:180] += 2
    np.testing.assert_array_equal(why, expected)
    np.testing.assert_array_equal(np.isnan(again), expected > 0)
    assert np.isnan(change).sum() > np.isnan(again).sum()
    assert validate(str(tmp_path / "told")) == []


def test_many_short_units_give_the_same_bytes_as_one_long_one(make_series, config, client, tmp_path):
    scenes = make_series(dates=5)
    for out, dates in (("a", 2), ("b", 6)):
        run(config.model_copy(update={"out": str(tmp_path / out), "dates_per_task": dates}), client, scenes=scenes)
    a, b = (sorted((tmp_path / out).rglob("*.tif")) for out in "ab")
    assert len(a) == 4
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]


def test_the_public_steps_write_the_same_values_as_a_run(make_series, config, client, tmp_path):
    scenes = make_series(dates=3)
    run(config, client, scenes=scenes)
    cube, pairs = s2cd.open_cube(scenes), s2cd.consecutive_pairs(scenes)
    items = s2cd.write_change_maps(s2cd.detect_changes(cube, pairs, device="cpu"), tmp_path / "steps")
    assert len(items) == 2
    for name in (p.name for p in pairs):
        (a,), (b,) = ((tmp_path / d).rglob(f"{name}.tif") for d in ("out", "steps"))
        np.testing.assert_allclose(read(a), read(b), atol=1.5 / 1024)


@pytest.mark.parametrize(("rows", "cols"), [(-1, 1), (1, -1), (-1, -1)])
def test_maps_are_north_up_whatever_the_order_of_an_array(make_series, tmp_path, rows, cols):
    scenes = make_series(dates=2)
    change = s2cd.detect_changes(s2cd.open_cube(scenes), s2cd.consecutive_pairs(scenes), device="cpu").compute()
    for name, array in (("as_it_is", change), ("turned", change[:, ::rows, ::cols])):
        s2cd.write_change_maps(array, tmp_path / name)
    for kind in ("tif", "png"):
        (a,), (b,) = ((tmp_path / d).rglob(f"S2CD_*.{kind}") for d in ("as_it_is", "turned"))
        assert a.read_bytes() == b.read_bytes()


def test_a_map_that_another_run_made_with_other_options_fails_its_pair(make_series, config, client, tmp_path):
    """Two runs that begin at the same time both find an empty folder."""
    scenes = make_series(dates=2)
    other = config.model_copy(update={"cog_profile": "uint8"})

    def meanwhile(phase, _done, _total):
        if phase == "survey" and not list((tmp_path / "out").rglob("S2CD_*.json")):
            assert run(other, scenes=scenes).ok

    report = run(config, client, scenes=scenes, progress=meanwhile)
    assert [r.status for r in report.maps] == ["failed"]
    assert "holds maps of cog_profile uint8, expected default" in report.maps[0].error


def test_public_steps_keep_to_the_options_of_a_folder(make_series, config, client, tmp_path):
    scenes = make_series(dates=3)
    run(config, client, scenes=scenes[:2])
    change = s2cd.detect_changes(s2cd.open_cube(scenes), s2cd.consecutive_pairs(scenes), device="cpu")
    assert len(s2cd.write_change_maps(change, config.out)) == 2
    other = change.assign_attrs(mask=s2cd.Mask(dilation=0))
    with pytest.raises(OutputError, match="mask_dilation 60, expected 0"):
        s2cd.write_change_maps(other, config.out)
    s2cd.write_change_maps(other, tmp_path / "steps")
    with pytest.raises(OutputError, match="mask_dilation 0, expected 60"):
        run(config.model_copy(update={"out": str(tmp_path / "steps")}), client, scenes=scenes)


def test_a_folder_keeps_maps_of_whole_tiles_and_of_parts_apart(make_series, config, client, tmp_path):
    scenes = make_series(dates=3)
    pairs, cube = s2cd.consecutive_pairs(scenes), s2cd.open_cube(scenes)
    change = s2cd.detect_changes(cube[:, :, 20:120, 30:200], pairs, device="cpu")
    s2cd.write_change_maps(change[:1], config.out)
    message = (
        r"31UDS of 100 x 170 pixels from \(500280, 5699800\) in .*, expected 200 x 232 pixels from \(499980, 5700000\)"
    )
    for use in (run, lambda config, *_, scenes: describe_plan(make_plan(config, scenes))):
        with pytest.raises(OutputError, match=message):
            use(config, client, scenes=scenes)
    s2cd.write_change_maps(change, config.out)
    with pytest.raises(OutputError, match="100 x 170 pixels from .*, expected 60 x 170 pixels"):
        s2cd.write_change_maps(s2cd.detect_changes(cube[:, :, 20:80, 30:200], pairs, device="cpu"), config.out)
    assert validate(config.out) == []


def test_a_folder_keeps_to_one_processing_level(make_series, config, client):
    """Maps of L1C have the names of those of L2A."""
    scenes = make_series(dates=3)
    run(config, client, scenes=[replace(s, level="L1C") for s in scenes[1:]])
    for use in (run, lambda config, *_, scenes: describe_plan(make_plan(config, scenes))):
        with pytest.raises(OutputError, match=r"/out holds S2CD_31UDS_\w+ of L1C, expected L2A: choose another folder"):
            use(config, client, scenes=scenes)
    assert run(config, client, scenes=scenes[:2]).ok  # another pair, which has no map yet


def test_grids_are_the_same_to_a_hundredth_of_a_pixel(make_series, config):
    scenes = make_series(dates=2)
    change = s2cd.detect_changes(s2cd.open_cube(scenes), s2cd.consecutive_pairs(scenes), device="cpu")
    s2cd.write_change_maps(change, config.out)
    names, grid = finished(config.out), common_grid(scenes, s2cd.load_model().bands)
    a, b, left, d, e, top = grid.transform
    require_grids(config.out, names, {"31UDS": replace(grid, transform=(a, b, left + 0.05, d, e, top))})
    for other in (replace(grid, transform=(a, b, left, d, e, top - 20)), replace(grid, epsg=32632)):
        with pytest.raises(OutputError, match=r"31UDS of .* in EPSG:32631, expected "):
            require_grids(config.out, names, {"31UDS": other})


@pytest.mark.parametrize("damage", [{"transform": [1, 2]}, {"transform": ["x"] * 6}, {"shape": ["x", 1]}])
def test_an_item_without_a_grid_is_named(make_series, config, client, tmp_path, damage):
    scenes = make_series(dates=2)
    run(config, client, scenes=scenes)
    (path,) = (tmp_path / "out").rglob("S2CD_*.json")
    item = json.loads(path.read_text())
    item["properties"] |= {f"proj:{key}": value for key, value in damage.items()}
    path.write_text(json.dumps(item))
    with pytest.raises(OutputError, match=rf"^{tmp_path}/out: 31UDS/{path.name}: .*, expected the item of a map$"):
        run(config, client, scenes=scenes)


def test_a_run_whose_cluster_does_not_start_leaves_the_record_of_the_one_before(make_series, config, client, tmp_path):
    scenes, out = make_series(dates=3), tmp_path / "out"
    run(config, client, scenes=scenes[:2])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (tmp_path / "away.yaml").write_text(f"kind: existing\nscheduler_file: {tmp_path}/none.json\ntimeout: 1 s\n")
    with pytest.raises(ClusterError, match=r"none\.json: found none after 1 s"):
        run(config.model_copy(update={"min_valid": 0.5, "cluster": str(tmp_path / "away.yaml")}), scenes=scenes)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_workers_that_come_with_the_work_are_counted_then(make_series, config):
    """Six pairs on eight threads are as many units; on a thread, as is supposed while there is none, they are two."""
    with (
        LocalCluster(processes=False, n_workers=0, threads_per_worker=8, dashboard_address=None) as batch,
        Client(batch) as client,
        get_task_stream(client) as stream,
    ):
        assert run(config, client, scenes=make_series(dates=7), progress=lambda *_: batch.scale(1)).ok
    assert len({task["key"][1] for task in stream.data if task["key"][0] == "infer_block"}) == 6


def test_a_run_without_any_worker_says_so_once_a_wait(make_series, config, monkeypatch):
    monkeypatch.setattr(runner, "ALONE", 0.0)
    told = []

    def come_later(record):
        told.append(record.getMessage())
        threading.Timer(4 * runner.HEED, batch.scale, [1]).start()
        return True

    with (
        LocalCluster(processes=False, n_workers=0, dashboard_address=None) as batch,
        Client(batch) as client,
        monkeypatch.context() as patch,
    ):
        patch.setattr(runner.LOG, "filters", [come_later])
        assert run(config, client, scenes=make_series(dates=2)).ok
    assert told == ["no worker for 0 s, the run waits for one; on a batch system its jobs may be queued"]


def test_what_the_cluster_refuses_is_told_before_anything_is_searched_or_written(config, tmp_path):
    wrong = config.model_copy(update={"cluster": "nope.yaml", "catalog": str(tmp_path / "nowhere.json")})
    with pytest.raises(ClusterError, match="nope"):
        run(wrong)
    assert not (tmp_path / "out").exists()


def test_pixels_of_floating_point_numbers_may_be_none(make_series, config, client, tmp_path):
    scenes = make_series(dates=2)
    for scene in scenes:
        with rasterio.open(scene.assets["red"].href) as dataset:
            data, profile = dataset.read(1).astype(np.float32), dataset.profile
        data[60:64, 70:74] = np.nan
        with rasterio.open(scene.assets["red"].href, "w", **profile | {"dtype": "float32"}) as dataset:
            dataset.write(data, 1)
    assert run(config, client, scenes=scenes).ok
    missing = np.isnan(read(next((tmp_path / "out").rglob("S2CD_*.tif"))))
    assert missing.sum() == 16
    assert missing[60:64, 70:74].all()


def test_what_users_did_to_the_array_is_written_as_it_is_or_refused(make_series, client, tmp_path):
    scenes = make_series(dates=2)
    change = s2cd.detect_changes(s2cd.open_cube(scenes), s2cd.consecutive_pairs(scenes), device="cpu").compute()
    turned = change.transpose("x", "y", "pair"), change.copy(data=np.asfortranarray(change.values))
    for out, array in zip("ab", turned, strict=True):
        s2cd.write_change_maps(array, tmp_path / out)
        np.testing.assert_allclose(read(next((tmp_path / out).rglob("*.tif"))), change.values[0], atol=0.5 / 1024)
    with pytest.raises(ConfigError, match=r"has the dimensions \('y', 'x'\), expected \('pair', 'y', 'x'\)"):
        s2cd.write_change_maps(change[0], tmp_path / "one")
    with pytest.raises(ConfigError, match="holds bool, expected probabilities as floating point numbers"):
        s2cd.write_change_maps(change > 0.5, tmp_path / "found")
    row = s2cd.detect_changes(
        s2cd.open_cube(scenes)[:, :, 10:11, 20:70], list(change.attrs["pairs"].values()), device="cpu"
    )
    (item,) = s2cd.write_change_maps(row, tmp_path / "row")
    assert item["properties"]["proj:transform"] == [10, 0, 499980 + 200, 0, -10, 5700000 - 100]
    with pytest.raises(OutputError, match=r"S2CD_31UDS\S+: probabilities from \S+ to 2\S*, expected 0 to 1 or NaN"):
        s2cd.write_change_maps((change + 1).assign_attrs(change.attrs), tmp_path / "more")
    assert not list((tmp_path / "more").rglob("S2CD_*"))


def test_a_map_of_the_public_steps_that_is_there_no_more_is_an_error(make_series, tmp_path):
    def lose(key, *_):
        if str(key).startswith("_write_array"):
            next(tmp_path.rglob("S2CD_*.tif")).unlink()

    scenes = make_series(dates=2)
    change = s2cd.detect_changes(s2cd.open_cube(scenes), s2cd.consecutive_pairs(scenes), device="cpu")
    message = rf"S2CD_31UDS\S+: written to {tmp_path} on {socket.gethostname()}, but it is there no more"
    with dask.config.set(scheduler="sync"), Callback(posttask=lose), pytest.raises(OutputError, match=message):
        s2cd.write_change_maps(change, tmp_path)


def test_frozen_scenes_run_again_exactly(make_series, config, client, tmp_path):
    scenes = make_series(dates=3)
    run(config, client, scenes=scenes)
    frozen = tmp_path / "out" / "scenes.parquet"
    assert frozen.exists()
    again = config.model_copy(update={"catalog": str(frozen), "out": str(tmp_path / "again")})
    assert run(again, client).count("written") == 2
    a, b = (sorted((tmp_path / d).rglob("*.tif")) for d in ("out", "again"))
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]
    assert s2cd.RunConfig.load(tmp_path / "out" / "run.yaml") == config
    assert json.loads((tmp_path / "out" / "report.json").read_text())["maps"]


def test_no_secret_of_an_address_reaches_what_a_run_leaves(make_series, config, client, tmp_path, monkeypatch):
    """Of three dates behind addresses with password and signature the last lacks a file."""
    monkeypatch.setattr(access, "FIRST_DELAY", 0.01)
    scenes = make_series(dates=3)
    Path(scenes[2].assets["nir"].href).unlink()
    with FaultServer(tmp_path / "series") as server:
        place = server.url.replace("//", "//user:SECRET@")
        scenes = [
            replace(s, assets={
                band: replace(a, href=a.href.replace(str(tmp_path / "series"), place) + "?sig=SECRET")
                for band, a in s.assets.items()
            })
            for s in scenes
        ]  # fmt: skip
        config = config.model_copy(update={"catalog": f"{place}?sig=SECRET", "quicklook": False})
        report = run(config, client, scenes=scenes)
        assert [r.status for r in report.maps] == ["failed", "written"]
        assert report.maps[0].error.startswith(f"cannot read {server.url}/002/nir.tif: server answered 404")
        assert s2cd.RunConfig.load(tmp_path / "out" / "run.yaml").catalog == server.url
    texts = [p for p in (tmp_path / "out").rglob("*") if p.suffix in {".json", ".yaml"}]
    assert len(texts) >= 5
    assert not any("SECRET" in p.read_text() for p in texts)


def test_a_reprocessed_date_is_compared_in_the_baseline_of_the_other(client, tmp_path):
    """The first of five dates exists in 05.00 too, the next have only 03.00: as if it had not been reprocessed."""
    maps = {}
    for name in (False, True):
        folder = tmp_path / str(name)
        catalog = str(simulate(folder / "in", size=128, dates=5, orbits=(51,), clouds=False, reprocessed=name))
        config = s2cd.RunConfig(catalog=catalog, out=str(folder / "out"), min_valid=0.0)
        with warnings.catch_warnings(action="ignore", category=S2cdWarning):
            assert run(config, client).ok
        maps[name] = {path.name: path for path in (folder / "out").rglob("*.tif")}
    assert len(maps[True]) == 4
    assert {n: p.read_bytes() for n, p in maps[True].items()} == {n: p.read_bytes() for n, p in maps[False].items()}
    first = json.loads(min(maps[True].values()).with_suffix(".json").read_text())
    assert first["properties"]["s2cd:baselines"] == ["03.00", "03.00"]
    assert "the other date has no 05.00" in first["properties"]["s2cd:notes"][0]


def test_a_map_of_half_a_date_is_not_the_map_of_the_whole_date(config, client, tmp_path):
    scenes = sorted(
        s2cd.search(str(simulate(tmp_path / "in", size=128, dates=3, orbits=(51,), clouds=False, split=True))),
        key=lambda s: (s.time, s.id),
    )
    half = [scenes[0], *scenes[2:]]  # the largest piece, whose time the date bears, is missing
    with warnings.catch_warnings(action="ignore", category=S2cdWarning):
        old = {record.name for record in run(config, client, scenes=half).maps}
        plan = make_plan(config, scenes)
        assert describe_plan(plan).rows[0]["finished"] == 0
        report = run(config, client, scenes=scenes)
    assert (len(old), report.count("written")) == (2, 2)
    assert {p.stem for p in (tmp_path / "out").rglob("S2CD_*.tif")} == {r.name for r in report.maps}
    assert not old & {r.name for r in report.maps}
    assert len(list((tmp_path / "out").rglob("S2CD_*.*"))) == 6
    assert validate(config.out) == []


def test_plan_says_what_is_compared_before_anything_is_read(make_series, config, tmp_path):
    scenes = make_series(dates=4)
    freeze([*scenes[:3], replace(scenes[3], cloud_cover=90.0)], tmp_path / "s.parquet")
    table = describe_plan(make_plan(config.model_copy(update={"catalog": str(tmp_path / "s.parquet")})))
    assert table.pairs == 2
    assert table.rows[0]["field of view"] == "31UDS R051"
    assert "cloud cover 90.0 %" in table.left_out[0].reason
    assert any(
        note.startswith("chunks of 240 px (auto), ") and " dates a task (auto): about 0.03 GB" in note
        for note in table.notes
    )
    assert not (tmp_path / "out").exists()


def displace(scene):
    """Move an image by 20 m."""
    for band, asset in scene.assets.items():
        with rasterio.open(asset.href, "r+") as dataset:
            dataset.write(np.roll(dataset.read(1), 1 if GSD[band] == 20 else 2, axis=0), 1)


def test_strict_runs_stop_at_displaced_images_every_time_and_list_what_is_finished(make_series, config, tmp_path):
    scenes = make_series(dates=4, shape=(256, 256), change=False)
    displace(scenes[3])
    strict = config.model_copy(update={"strict": True, "dates_per_task": 2})
    displaced = (
        r"strict: S2CD\S+_20230516T105000: the images are displaced by 2\.0\d pixels of 10 m, expected at most 0\.5"
    )
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as one:
        for _ in range(2):
            with pytest.raises(S2cdError, match=displaced):
                run(strict, one, scenes=scenes)
            assert len(list((tmp_path / "out").rglob("S2CD_*.tif"))) == 2
            assert validate(config.out) == []
        with pytest.warns(ShiftWarning):
            assert run(config, one, scenes=scenes).count("written") == 1


def test_an_interrupted_run_lists_what_is_finished(make_series, config, client):
    def interrupt(phase, _done, _total):
        if phase == "maps":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config.model_copy(update={"dates_per_task": 2}), client, scenes=make_series(dates=5), progress=interrupt)
    collection = pystac.Collection.from_file(f"{config.out}/collection.json")
    assert list(collection.get_items(recursive=True))


def test_a_map_that_is_not_where_the_client_looks_is_reported_as_failed(make_series, config, client, tmp_path):
    def lose(phase, done, total):
        if phase == "maps" and done == total:
            next((tmp_path / "out").rglob("S2CD_*.tif")).unlink()

    report = run(config, client, scenes=make_series(dates=3), progress=lose)
    assert (report.ok, report.count("written"), report.count("failed")) == (False, 1, 1)
    (error,) = (record.error for record in report.maps if record.error)
    assert f"written to {tmp_path}/out on {socket.gethostname()}, but it is there no more" in error
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sorted(record["status"] for record in saved["maps"]) == ["failed", "written"]


def test_a_relative_folder_is_the_clients_wherever_workers_run(make_series, config, tmp_path, monkeypatch):
    scenes = make_series(dates=2)
    monkeypatch.chdir(tmp_path)
    relative = config.model_copy(update={"out": "maps"})
    with Client(n_workers=1, threads_per_worker=2, dashboard_address=None) as other:
        (tmp_path / "elsewhere").mkdir()
        other.run(os.chdir, tmp_path / "elsewhere")
        assert run(relative, other, scenes=scenes).count("written") == 1
        change = s2cd.detect_changes(s2cd.open_cube(scenes), s2cd.consecutive_pairs(scenes), device="cpu")
        s2cd.write_change_maps(change, "steps")
    assert not list((tmp_path / "elsewhere").rglob("*"))
    assert validate(str(tmp_path / "maps")) == validate(str(tmp_path / "steps")) == []
    assert s2cd.RunConfig.load("maps/run.yaml").out == str(tmp_path / "maps")


@pytest.mark.parametrize("text", ["[]", "{}", '{"properties": {}, "bbox": 1}', "\xff"])
def test_a_damaged_item_is_named_by_what_reads_it(make_series, config, client, tmp_path, text):
    run(config, client, scenes=make_series(dates=2))
    (path,) = (tmp_path / "out").rglob("S2CD_*.json")
    path.write_text(text, "latin-1")
    for read in (write_page, write_catalog):
        with pytest.raises(OutputError, match=rf"^{tmp_path}/out: 31UDS/{path.name}: .*, expected the item of a map$"):
            read(config.out)


@pytest.mark.parametrize("suffix", [".tif", ".json"])
def test_an_empty_file_is_no_finished_map(make_series, config, client, tmp_path, suffix):
    """As a machine that lost its power may leave: the name is there, the bytes are not."""
    scenes = make_series(dates=2)
    run(config, client, scenes=scenes)
    (path,) = (tmp_path / "out").rglob(f"S2CD_*{suffix}")
    path.write_bytes(b"")
    assert finished(config.out) == set()
    assert [record.status for record in run(config, client, scenes=scenes).maps] == ["written"]
    assert validate(config.out) == []


def test_a_rerun_with_nothing_to_do_starts_no_cluster_and_looks_at_no_pixels(make_series, config, client, tmp_path):
    scenes = make_series(dates=3)
    first = run(config, client, scenes=scenes)
    for path in (tmp_path / "series").rglob("*.tif"):
        path.unlink()
    away = tmp_path / "away.yaml"
    away.write_text(f"kind: existing\nscheduler_file: {tmp_path}/none.json\ntimeout: 1 s\n")
    again = run(config.model_copy(update={"cluster": str(away)}), scenes=scenes)
    assert sorted(again.maps, key=str) == sorted((replace(m, status="kept") for m in first.maps), key=str)
    assert all(record.valid_fraction is not None for record in again.maps)


def test_a_rerun_pairs_dates_by_what_the_first_run_saw(make_series, config, client, tmp_path):
    """A date that was too cloudy then is so now; with another limit it is looked at, and paired, again."""
    scenes = make_series(dates=3)
    with rasterio.open(scenes[1].assets["scl"].href, "r+") as dataset:
        dataset.write(np.full(dataset.shape, 9, np.uint8), 1)
    strict = config.model_copy(update={"min_valid": 0.5})
    first, again = (run(strict, client, scenes=scenes) for _ in range(2))
    assert [len(first.maps), len(again.maps)] == [1, 1]
    assert [item.what for item in first.left_out] == [item.what for item in again.left_out] == ["scene-001"]
    report = run(config, client, scenes=scenes)
    assert sorted(record.status for record in report.maps) == ["written", "written"]


def test_a_map_that_another_run_made_meanwhile_is_left_alone(make_series, config, client, tmp_path):
    scenes = make_series(dates=2)
    first = run(config, client, scenes=scenes)
    (path,) = (tmp_path / "out").rglob("S2CD_*.tif")
    before = path.stat().st_mtime_ns
    plan = make_plan(config, scenes)
    (pair,) = consecutive_pairs(scenes)
    assert plan.map_of(pair)
    grid, ref = common_grid(scenes, ["red"]), ModelRef(config.model, load_model("generic").hash, "cpu")
    block = Block((None,), (Shift(0.0, 0.0, 1.0),))
    figures = write_pair([[block]], position=0, pair=pair, grid=grid, ref=ref, config=config)
    assert figures["valid_fraction"] == first.maps[0].valid_fraction
    assert path.stat().st_mtime_ns == before


def test_a_picture_that_cannot_be_drawn_costs_no_map(make_series, client, tmp_path):
    scenes = make_series(dates=2)
    change = s2cd.detect_changes(s2cd.open_cube(scenes), s2cd.consecutive_pairs(scenes), device="cpu").compute()
    Path(scenes[0].assets["green"].href).unlink()
    s2cd.write_change_maps(change, tmp_path / "out")
    assert len([*(tmp_path / "out").rglob("S2CD_*.png")]) == 1
    assert validate(str(tmp_path / "out")) == []


@pytest.mark.parametrize("text", ["", "[]", '{"name": "31UDS R051"}', '{"name": "31UDS R051", "pairs": ["x"]}', "\xff"])
def test_a_damaged_record_of_pairs_is_named(make_series, config, client, tmp_path, text):
    run(config, client, scenes=make_series(dates=2))
    (tmp_path / "out/views/31UDS_R051.json").write_text(text, "latin-1")
    with pytest.raises(
        OutputError, match=rf"^{tmp_path}/out: views/31UDS_R051.json: .*, expected the pairs of a field"
    ):
        run_status(config.out)


def test_what_others_leave_among_the_records_of_pairs_is_none(make_series, config, client, tmp_path):
    run(config, client, scenes=make_series(dates=2))
    for name in (".DS_Store", "._31UDS_R051.json"):
        (tmp_path / "out" / "views" / name).write_bytes(b"\0\1")
    assert [row["finished"] for row in run_status(config.out)] == [1]


def test_one_date_only(make_series, config, client):
    with pytest.raises(NoScenesError, match="1 scenes found, but no two dates of one tile and orbit"):
        run(config, client, scenes=make_series(dates=1))


def test_a_band_nobody_offers(make_series, config, client):
    scenes = make_series(dates=2, bands=("blue", "green", "red", "nir"))
    with pytest.raises(
        ConfigError,
        match=r"none of 2 scenes can be used, the first: scene-000 offers no nir08, ",
    ):
        run(config, client, scenes=scenes)


def test_unknown_model(make_series, config, client):
    with pytest.raises(S2cdError, match="nosuch"):
        run(config.model_copy(update={"model": "nosuch"}), client, scenes=make_series(dates=2))


def test_output_folder_that_is_a_file(make_series, config, client, tmp_path):
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(OutputError, match="out"):
        run(config, client, scenes=make_series(dates=2))
    assert (tmp_path / "out").read_text() == "in the way"


def test_a_configuration_file_that_is_none_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    for content, message in ((b"\xff\xfe\x00\x81", "cannot read"), (b"1: 2", "has the name 1"), (b"- 1", "holds list")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message) as caught:
            s2cd.RunConfig.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_cloud": 120}, "max_cloud: .*less than or equal to 100, found 120"),
        ({"orbit": 200}, "orbit: "),
        ({"bbox": (3, 51, 4, 50)}, "south 51 is not below north 50"),
        ({"bbox": (300, 50, 301, 51)}, "bbox: .*found 300"),
        ({"chunks": 3}, "chunks: .*not permitted"),
        ({"min_valid": float("nan")}, "min_valid"),
    ],
)
def test_configuration_errors_are_one_line_with_both_values(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        s2cd.RunConfig(catalog="x", out="y", **values)
    assert "\n" not in str(caught.value)
