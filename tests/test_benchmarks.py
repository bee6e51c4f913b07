"""The benchmark runs from end to end on a tiny tile; nothing is timed here."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner

from benchmarks import data as prepared
from benchmarks import europe, suite
from benchmarks.__main__ import main
from benchmarks.data import prepare, repeated
from benchmarks.device import seen_since, watched
from benchmarks.measure import _memory_of
from benchmarks.report import TARGETS, _memory_block, latest, table, write_report
from s2cd.errors import ConfigError
from s2cd.pairs import consecutive_pairs

TINY = {"size": 512, "dates": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def data(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "FIELDS", 2)  # of six landscapes
        return prepare(folder / "data", source="simulated", **TINY)


def test_the_short_form_has_a_size():
    result = CliRunner().invoke(main, ["run", "--short", "--size", "512"])
    assert result.exit_code == 2
    assert "--short is of 3660 px, found --size 512, expected one of the two" in result.output


def invoke(*arguments):
    result = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_prepared_scenes_make_pairs_and_are_prepared_once(data, folder):
    assert len(consecutive_pairs(data.scenes)) == 2
    assert data.unique_bytes == 3 * (4 * 512 * 512 * 2 + 3 * 256 * 256 * 2 + 256 * 256)
    path = Path(data.scenes[0].assets["red"].href)
    before = path.stat().st_mtime_ns
    assert prepare(folder / "data", source="simulated", **TINY).scenes == data.scenes
    assert path.stat().st_mtime_ns == before


@pytest.mark.usefixtures("shared_data")
def test_the_mosaic_of_real_images_shows_the_same_ground_in_every_band(tmp_path):
    scenes = prepare(tmp_path, source="shared", size=733, dates=3).scenes
    for band, edge in (("red", 733), ("swir16", 367), ("scl", 367)):
        with rasterio.open(scenes[0].assets[band].href) as dataset:
            assert dataset.shape == (edge, edge)
    with rasterio.open(scenes[0].assets["nir"].href) as fine, rasterio.open(scenes[0].assets["nir08"].href) as coarse:
        a = fine.read(1, out_shape=coarse.shape, resampling=rasterio.enums.Resampling.average)
        assert np.corrcoef(a.ravel(), coarse.read(1).ravel())[0, 1] > 0.9


def test_repeated_series_have_files_of_their_own(data, folder):
    longer = repeated(data, folder / "data", dates=5, tiles=2)
    hrefs = [a.href for s in longer.scenes for a in s.assets.values()]
    assert len(hrefs) == len(set(hrefs)) == 2 * 5 * 8
    assert len({s.id for s in longer.scenes}) == 10
    assert len(consecutive_pairs(longer.scenes)) == 8


def test_run_and_compare_record_results_that_the_report_shows(data, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    assert data.source == "simulated"
    options = ("--data", str(folder / "data"), "--work", str(folder / "work"), "--size", "512", "--dates", "3")
    options += ("--source", "simulated")
    monkeypatch.setattr(suite, "LATENCIES", (None, 0.01))
    parts = ("--part", "engine", "--part", "stages", "--part", "archive")
    printed = invoke("run", *options, *parts, "--rounds", "2")
    assert "tasks a pair" in printed
    assert "distance to the limit" in printed
    printed = invoke("compare", *options, "--rounds", "1")
    assert "against the stackstac script" in printed
    documents = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    run = next(d for d in documents if d["kind"] == "run")
    assert 1 <= run["parts"]["engine"]["decoded_over_needed"] < 1.5  # the shift of a pair is measured on its own
    assert run["parts"]["engine"]["maps"] == 2
    chosen = run["parts"]["engine"]["settings"]
    assert chosen["chunk"] % 16 == 0
    assert {e[1] for e in run["parts"]["engine"]["gantt"]} >= {"decode", "network", "encode"}
    compare = next(d for d in documents if d["kind"] == "compare")
    assert max(compare["parts"]["compare"]["largest_difference"].values()) <= 0.01
    assert not any(str(folder) in path.read_text() for path in tmp_path.glob("*.json"))
    invoke("report")
    page = (tmp_path / "report.md").read_text()
    assert "| GPU busy | >= 60 % | not measured | |" in page
    assert "| an archive 10 ms away | " in page
    assert len(run["parts"]["stages"]["rounds"]) == 2
    for row in run["parts"]["stages"]["rounds"]:
        alone = (row["decode"] + row["network"] + row["encode"]) / run["settings"]["cores"]
        assert row["of_limit"] == pytest.approx(alone / row["wall_s"])
    assert f"distance to the limit was {run['parts']['stages']['rounds'][0]['of_limit']:.2f} (" in page
    assert f"chunks of {chosen['chunk']} px, {chosen['dates_a_task']} dates a task" in page
    assert suite._agreement(str(folder / "work" / "s2cd"), str(folder / "work" / "archive")) == 0
    assert (tmp_path / "benchmark.png").stat().st_size > 5000


def test_memory_of_the_first_case_is_the_median_of_rounds(data, folder):
    settings = suite.Settings(str(folder / "data"), str(folder / "work"), data.size, 3, data.source, rounds=2)
    first, second = suite._memory(settings, print, "dates", [{"dates": 3}, {"dates": 4}])["rows"]
    assert first["peaks_gb"] == sorted(first["peaks_gb"])
    assert first["peak_gb"] == first["peaks_gb"][1]
    assert second["peaks_gb"] == [second["peak_gb"]]
    assert (first["maps"], second["maps"]) == (2, 3)
    parts = {"dates": {"size": 512, "rows": [first, second]}}
    assert f"| 3 | 2 | {first['peak_gb']:.3f} ({first['peaks_gb'][0]:.2f}, " in _memory_block("dates")(parts)
    assert f"| 4 | 3 | {second['peak_gb']:.3f} | " in _memory_block("dates")(parts)


def test_maps_that_differ_are_refused(tmp_path):
    for name, value in (("a", 0.5), ("b", 0.56)):
        (tmp_path / name).mkdir()
        with rasterio.open(
            tmp_path / name / "S2CD_x.tif", "w", driver="GTiff", width=4, height=4, count=1, dtype="float32"
        ) as dataset:
            dataset.write(np.full((1, 4, 4), value, np.float32))
    with pytest.raises(suite.BenchmarkError, match=r"differ by 0\.06"):
        suite._agreement(str(tmp_path / "a"), str(tmp_path / "b"))
    with pytest.raises(suite.BenchmarkError, match="holds 0 maps"):
        suite._agreement(str(tmp_path / "a"), str(tmp_path / "c"))


def test_the_table_shows_what_the_parts_can_tell():
    parts = {"engine": {"seconds_per_map": 30.0, "peak_gb": 2.0, "tasks_per_pair": 7.2, "decoded_over_needed": 1.0}}
    lines = table(parts).splitlines()
    assert "| end to end on these cores, a map | <= 25 s | 30.0 s | missed |" in lines
    assert len(lines) == 6
    missing = [line for line in table(parts, all_rows=True).splitlines() if "| not measured |" in line]
    assert sum("GPU" in line for line in missing) == 2


def parts_with(value: float) -> dict[str, Any]:
    """Return parts of which each row of the table shows `value`."""
    rows = [{"peak_gb": 1.0}, {"peak_gb": value}]
    memory = [{"driver_mb": 1.0, "scheduler_mb": 1.0}], [{"driver_mb": 0.5, "scheduler_mb": value}]
    return {
        "engine": dict.fromkeys(("seconds_per_map", "peak_gb", "tasks_per_pair", "decoded_over_needed"), value),
        "compare": {
            "ratio": {"stackstac script": value, "rasterio loop": value},
            "largest_difference": {"stackstac script": 0.0, "rasterio loop": value},
        },
        "stages": {"of_limit": value},
        "scaling": {"rounds": [{"1 thread": value, "2 threads": 1.0, "2 processes": 1.0}]},
        "dates": {"size": 1, "rows": rows},
        "tiles": {"size": 1, "rows": rows},
        "europe": {"runs": [{"motion": 0.1, "tiles": n, "memory": m} for n, m in zip((1, 2), memory, strict=True)]},
        "gpu": {"runs": [{"what": "a worker", "seconds_per_map": value, "gpu_busy": value}]},
    }


LIMITS = {
    "end to end on these cores": 25, "peak memory": 6, "stackstac": 4, "rasterio": 2.5, "largest difference": 0.01,
    "distance": 0.85, "bytes decoded": 1, "tasks": 40, "threads of a worker": 1.8, "worker processes": 1.8,
    "72 dates": 1.1, "16 tiles": 1.1, "driver and scheduler": 1.1, "H200": 1, "busy": 0.6,
}  # fmt: skip


@pytest.mark.parametrize("row", TARGETS, ids=lambda row: row.what)
def test_each_row_of_the_table_is_met_up_to_its_target(row):
    (limit,) = (value for name, value in LIMITS.items() if name in row.what)
    better = limit * (0.99 if row.target.startswith("<=") else 1.01 if row.target.startswith(">=") else 1)
    for value, met in ((limit, True), (better, True), (2 * limit - better if better != limit else 1.01, False)):
        assert row.value(parts_with(value)) == pytest.approx(value)
        assert row.met(row.value(parts_with(value))) is met


def test_memory_is_the_sum_over_processes():
    hold = [sys.executable, "-c", "import sys; x = b'x' * 200_000_000; print('held', flush=True); sys.stdin.read()"]
    both = [subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        assert all(process.stdout.readline() for process in both)
        assert 400e6 < _memory_of([process.pid for process in both]) < 500e6
        assert 200e6 < _memory_of([both[0].pid]) < 250e6
    finally:
        for process in both:
            process.communicate()


def test_what_was_measured_on_a_gpu_is_told_with_its_machine(tmp_path):
    run = {"maps": 20, "peak_gb": 12.9, "worker_cpu_s": 362.0, "decoded_over_needed": 1.14}
    gpu = {
        "runs": [{"what": "a worker", "seconds_per_map": 2.06, "gpu_busy": 0.1, "gpu_gb": 15.3, **run}],
        "alone": [{"edge": 1024.0, "date_ms": 66.0, "date_cpu_ms": 9.0, "pair_ms": 90.0, "pair_cpu_ms": 9.0}],
    }
    settings = suite.Settings("", "")
    suite.save(
        "run", settings, {"archive": {"size": 9, "rows": [{"from": "here", "seconds_per_map": 1.0}]}}, 0.0, tmp_path
    )
    small = suite.Settings("", "", size=99)
    suite.save("run", small, {"archive": {"size": 8, "rows": []}}, 0.0, tmp_path)  # newer, but not of the whole tile
    path = suite.save("gpu", settings, {"gpu": gpu}, 0.0, tmp_path)
    document = json.loads(path.read_text())
    document["machine"]["device"] = "a card"
    path.write_text(json.dumps(document))
    write_report(tmp_path)
    page = (tmp_path / "report.md").read_text()
    why = "missed ([why](../../docs/performance.md#targets-one-by-one))"
    assert f"| end to end on one H200-class GPU, a map, a worker | <= 1.0 s | 2.06 s | {why} |" in page
    assert f"| GPU busy, a worker | >= 60 % | 10% | {why} |" in page
    assert "## On a GPU: a card, " in page
    assert "| a worker | 2.06 | 10% | 15.3 | 12.9 | 18.1 | 1.140 |" in page
    assert "| 1024 | 66 | 90 |" in page
    assert ", 9 px, 6 dates, source auto" in page


def test_a_driver_that_does_not_answer_is_asked_again(monkeypatch):
    class Refused(Exception):
        pass

    def used(gpu):
        if next(looks) < 2:
            raise Refused
        return SimpleNamespace(used=8e9)

    looks = itertools.count()
    driver = SimpleNamespace(
        NVMLError=Refused,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=50),
        nvmlDeviceGetMemoryInfo=used,
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    with watched() as samples:
        deadline = time.monotonic() + 20
        while not samples and time.monotonic() < deadline:
            time.sleep(0.01)
    assert seen_since(samples, 0.0) == {"gpu_busy": 0.5, "gpu_gb": 8.0}
    assert suite._gpu_line({"seconds_per_map": 1.5, **seen_since(samples, 0.0)}) == "1.50 s a map, busy 50%"
    assert "does not tell" in suite._gpu_line({"seconds_per_map": 1.5, **seen_since([], 0.0)})


@pytest.mark.usefixtures("data")
def test_data_are_prepared_here_before_the_memory_of_another_process_is_watched(folder, monkeypatch):
    settings = suite.Settings(str(folder / "data"), str(folder / "work"), source="simulated", **TINY)
    with pytest.raises(ConfigError, match="unknown source 'nowhere'"):
        suite.engine(replace(settings, source="nowhere"), print)
    monkeypatch.setattr(suite, "GPU_DATES", TINY["dates"])
    monkeypatch.setattr(suite, "TRY_OUT", {"source": "nowhere"})
    with pytest.raises(ConfigError, match="unknown source 'nowhere'"):
        suite.on_gpu(settings, print)


def test_europe_draws_about_100_000_pairs_and_its_tasks_run():
    scenes = list(europe.catalogue(60))
    assert len({s.id for s in scenes}) == len(scenes)
    pairs = len(consecutive_pairs(scenes, max_cloud=60))
    assert 70_000 < pairs / 60 * europe.TILES < 130_000
    result = europe.simulate(1, 2, europe.Node(cores=4), motion=0.0005)
    assert result["pairs"] > 10
    assert result["memory"][0]["driver_mb"] > 0


def test_the_report_keeps_the_newest_run_of_europe_of_each_number_of_tiles_and_nodes_and_speed(tmp_path):
    def record(day, **changes):
        run = {"tiles": 2, "nodes": 4, "motion": 1.0, "pairs": 50, "scheduler_cpu_ms_per_pair": 8.0, **changes}
        part = {"europe": {"runs": [run]}}
        (tmp_path / f"2026010{day}-europe.json").write_text(json.dumps({"date": f"2026-01-0{day}", "parts": part}))

    record(1)
    record(2, motion=8.0, scheduler_cpu_ms_per_pair=20.0)
    record(3, tiles=9, scheduler_cpu_ms_per_pair=9.0)
    record(4, scheduler_cpu_ms_per_pair=7.0)
    parts, origins = latest(tmp_path)
    found = {(run["tiles"], run["motion"]): run["scheduler_cpu_ms_per_pair"] for run in parts["europe"]["runs"]}
    assert found == {(2, 1.0): 7.0, (9, 1.0): 9.0, (2, 8.0): 20.0}
    assert [d["date"] for d in origins["europe"]] == ["2026-01-02", "2026-01-03", "2026-01-04"]


def test_the_report_tells_by_how_much_driver_and_scheduler_grow_with_tiles():
    def run(tiles, *memory, motion=0.001):
        rows = [{"driver_mb": driver, "scheduler_mb": scheduler} for driver, scheduler in memory]
        return {"tiles": tiles, "motion": motion, "memory": rows}

    many, few, slow = run(30, (90, 40), (75, 66)), run(3, (50, 40), (60, 50)), run(1, (9, 9), motion=6)
    assert "simulated, 30 tiles over 3 | <= 1.10 | 1.50 | missed" in table({"europe": {"runs": [many, few, slow]}})
    assert "simulated" not in table({"europe": {"runs": [many, slow]}})


def test_a_simulated_node_takes_the_times_of_the_newest_recorded_gpu(tmp_path):
    run = {
        "wall_s": 40.0, "maps": 20, "seconds_per_map": 2.0, "worker_cpu_s": 164.4, "decoded_over_needed": 1.0,
        "gpu_busy": 0.5, "stages_cpu_s": {"decode": 21.0, "mask": 10.5, "network": 10.5, "encode": 9.0, "survey": 2.1},
    }  # fmt: skip
    slower = {**run, "seconds_per_map": 3.0, "gpu_busy": 0.1}
    for day, parts in enumerate(({"gpu": {"runs": [slower]}}, {"gpu": {"runs": [slower, run]}}, {"engine": {}})):
        document = {"machine": {"cores": 8}, "parts": parts}
        (tmp_path / f"2026010{day}T0000-run-10980px.json").write_text(json.dumps(document))
    node = europe.measured_node(tmp_path)
    assert node == europe.Node(cores=8, read=2.0, encode=pytest.approx(6.015), survey=0.1, device=1.0)
    rate, bound = node.pairs_per_hour()
    assert (round(rate), bound) == (3549, "its cores")
    assert europe.measured_node(tmp_path, device=2.0).pairs_per_hour() == (1800, "its GPU")
    with pytest.raises(suite.BenchmarkError, match="found no recorded run on a GPU"):
        europe.measured_node(tmp_path / "none")
