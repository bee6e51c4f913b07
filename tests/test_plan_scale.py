"""Scenes kept in little memory: nothing is lost, and a plan does not grow with what it holds."""

from __future__ import annotations

import gc
import tracemalloc
from itertools import groupby, islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.europe import catalogue
from s2cd.catalog import freeze, search
from s2cd.catalog.packed import WAITING, Packed, grouped
from s2cd.config import RunConfig
from s2cd.errors import NoScenesError
from s2cd.plan import describe_plan, make_plan

PROFILE = str(Path(__file__).parents[1] / "cluster" / "slurm.yaml")  # 8 jobs of 8 threads
RECORDS = st.lists(st.tuples(st.sampled_from("abc"), st.integers()), max_size=4 * WAITING)


@given(RECORDS)
def test_groups_hold_all_records_in_the_order_in_which_they_came(records):
    expected = {name: [r for r in records if r[0] == name] for name in sorted({r[0] for r in records})}
    assert list(grouped(iter(records), lambda r: r[0])) == list(expected.items())


@given(st.lists(RECORDS, max_size=3))
def test_packed_records_come_back(pieces):
    packed = Packed()
    for piece in pieces:
        packed.extend(piece)
    records = [record for piece in pieces for record in piece]
    assert list(Packed.joined([packed, Packed(), packed])) == 2 * records
    assert (list(packed), list(packed), len(packed)) == (records, records, len(records))
    assert all(record in packed for record in records)
    assert ("d", 0) not in packed


def test_a_plan_takes_a_tenth_of_the_memory_of_its_scenes(tmp_path):
    config = RunConfig(catalog="given", out=str(tmp_path / "out"))
    held = list(catalogue(4))
    make_plan(config, held)  # what is imported and cached on first use
    gc.collect()
    tracemalloc.start()
    try:
        others = list(catalogue(4))
        scenes = tracemalloc.get_traced_memory()[0]
        del others
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        plan = make_plan(config, catalogue(4))
        gc.collect()
        planned = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert planned < scenes / 10
    by_id = {scene.id: scene for scene in held}
    assert len(plan.scenes) == len(list(plan.scenes)) > len(held) / 3
    assert all(scene == by_id[scene.id] for scene in plan.scenes)
    assert {item.what for item in plan.left_out} == by_id.keys() - {scene.id for scene in plan.scenes}


def test_a_plan_freezes_and_comes_back(tmp_path):
    plan = make_plan(RunConfig(catalog="given", out=str(tmp_path / "out")), catalogue(2))
    freeze(plan.scenes, tmp_path / "scenes.parquet")
    assert [s.id for s in search(tmp_path / "scenes.parquet")] == [s.id for s in sorted(plan.scenes, key=in_order)]


def in_order(scene):
    return scene.tile, scene.time, scene.id


def test_a_plan_counts_what_was_found_but_cannot_be_compared(tmp_path):
    config = RunConfig(catalog="given", out=str(tmp_path / "out"), max_cloud=0)
    with pytest.raises(NoScenesError, match=r"given: \d+ scenes found, but no two dates .*cloud cover .* above 0 %"):
        make_plan(config, (scene for scene in catalogue(1) if scene.cloud_cover > 0))


def test_dates_share_a_task_where_other_fields_of_view_keep_the_workers_busy(tmp_path):
    config = RunConfig(catalog="given", out=str(tmp_path / "out"), cluster=PROFILE, max_cloud=100)
    tiles = [[*islice(scenes, 6)] for _, scenes in groupby(catalogue(2), lambda s: (s.tile, s.orbit))][:2]
    alone, together = (describe_plan(make_plan(config, scenes)).notes[1] for scenes in (tiles[0], tiles[0] + tiles[1]))
    assert ", 5 dates a task (auto)" in alone
    assert ", 6 dates a task (auto)" in together
