"""The command line on a person's terms: one clear line for bad input, exit codes, an interrupt leaves finished maps."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import rasterio
import torch
from click.testing import CliRunner

from s2cd.catalog import freeze
from s2cd.cli import main
from s2cd.demo import simulate_catalogue
from s2cd.outputs import validate
from s2cd.simulate import simulate

COMMAND = [sys.executable, "-c", "from s2cd.cli import main; main()"]
# A background job of a shell, and what it starts, ignores interrupts until told otherwise.
HEEDING = [*COMMAND[:2], "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); " + COMMAND[2]]

DEAF = [*COMMAND[:2], "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); " + COMMAND[2]]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("scenes"), size=256, dates=4, seed=1, clouds=False)


def invoke(*arguments):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_every_command_has_help_with_defaults():
    for command in ("search", "plan", "run", "status", "validate", "models", "demo", "cluster", "watch", "view"):
        assert invoke(command, "--help").exit_code == 0
    text = invoke("run", "--help").output
    assert "default: 60.0; 0<=x<=100" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/catalog.json"], "nowhere/catalog.json"),
        (["{not_stac}"], "not_stac.json"),
        (["{catalog}", "--datetime", "1999-01-01/1999-12-31"], "4 by datetime left out"),
        (["{catalog}", "--tiles", "99ZZZ"], "4 by tiles left out"),
        (["{catalog}", "--bbox", "50.95,2.34,50.96,2.37"], "swapped"),
        (["{catalog}", "--bbox", "10,10,11,11"], "10"),
        (["{catalog}", "--model", "nosuch"], "nosuch"),
        (["{catalog}", "--cluster", "nosuch.yaml"], "nosuch"),
        (["{catalog}", "--model", "{not_stac}"], "not_stac.json: found a file of type .json, expected .pt2, .onnx or"),
        (["{catalog}", "--chunk", "1"], "chunk: input should be 'auto' or greater than or equal to 64, found 1"),
        (["{catalog}", "--orbit", "foo"], "orbit: input should be 'same' or 'any' or a valid integer"),
        (["s3://bucket/catalog.json"], "found an address of kind s3://, expected a path, http(s):// or file://"),
        (["{catalog}", "--out", ""], "out: string should have at least 1 character, found ''"),
        (["{one_date}"], "no two dates"),
    ],
)
def test_bad_input_is_one_clear_line(catalog, tmp_path, arguments, message):
    import s2cd

    (tmp_path / "not_stac.json").write_text('{"hello": "world"}')
    freeze(s2cd.search(str(catalog))[:1], tmp_path / "one_date.parquet")
    places = {
        "catalog": catalog,
        "not_stac": tmp_path / "not_stac.json",
        "one_date": tmp_path / "one_date.parquet",
    }
    filled = [a.format(**places) for a in arguments]
    result = invoke("run", "--out", tmp_path / "out", *filled, "-q")
    assert result.exit_code == 1
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not list((tmp_path / "out").rglob("*.tif"))


@pytest.mark.parametrize("value", ["1,2,3", "a,b,c,d"])
def test_a_bbox_that_is_none(catalog, tmp_path, value):
    result = invoke("run", catalog, "--out", tmp_path, "--bbox", value)
    assert result.exit_code == 2
    assert "expected four numbers" in result.output


def test_a_chunk_that_is_no_number(catalog, tmp_path):
    result = invoke("plan", catalog, "--out", tmp_path, "--chunk", "²")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: chunk: ")


def test_tiles_are_told_in_any_case(shared_data):
    result = invoke("search", shared_data / "oscd", "--tiles", "OSCD-abudhabi,oscd-bercy", "--json")
    assert {json.loads(line)["tile"] for line in result.output.splitlines()} == {"OSCD-abudhabi", "OSCD-bercy"}


def test_search_lists_and_freezes(catalog, tmp_path):
    result = invoke("search", catalog, "--json", "--save", tmp_path / "s.parquet")
    rows = [json.loads(line) for line in result.output.splitlines()]
    assert len(rows) == 4
    assert {"id", "tile", "orbit", "baseline", "offset", "offset_reason"} <= rows[0].keys()
    again = invoke("search", tmp_path / "s.parquet", "--json")
    assert [json.loads(line)["id"] for line in again.output.splitlines()] == [r["id"] for r in rows]


def test_a_search_that_cannot_be_saved_is_not_begun(tmp_path):
    for name, message in (("s.json", "found a name in '.json', expected .parquet"), ("no/s.parquet", "no folder")):
        result = invoke("search", "nowhere", "--save", tmp_path / name)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"error: {tmp_path / name}: ")
        assert message in result.stderr


def test_run_status_validate_and_plan(catalog, tmp_path):
    out = tmp_path / "maps[" / "of]:warning:"  # as rich would write a tag's end and an emoji
    planned = invoke("plan", catalog, "--out", out)
    assert planned.exit_code == 0
    assert "2 pairs in 2 fields of view" in planned.output
    result = subprocess.run(
        [*COMMAND, "run", str(catalog), "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"dashboard: http://\S+/status", result.stderr)
    assert re.search(rf"^2 maps written, .*: {re.escape(str(out))}$", result.stdout, re.MULTILINE)
    assert f"2 of 2 maps finished: {out}\n" in invoke("status", out).output
    assert f"2 maps, 0 problems: {out}\n" in invoke("validate", out).output
    (path, _) = sorted(out.rglob("*.tif"))
    with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as dataset:
        dataset.write(np.full(dataset.shape, 7, np.float32), 1)
    broken = invoke("validate", out)
    assert broken.exit_code == 1
    path.with_suffix(".json").unlink()
    assert f"1 of 2 maps finished: {out}\n" in invoke("status", out).output
    assert path.stem in broken.output


def test_no_secret_of_an_address_is_told(catalog, bucket):
    out = "s3://user:HIDDEN@maps/told?token=HIDDEN"
    told = [invoke(*command) for command in (["run", catalog, "--out", out], ["status", out], ["validate", out])]
    for result in told:
        assert result.exit_code == 0
        assert "s3://maps/told\n" in result.output
    assert invoke("view", out).output == "s3://maps/told/index.html\n"
    assert "HIDDEN" not in "".join(result.output for result in told)
    again = invoke("run", "s3://maps/told/scenes.parquet", "--out", "s3://maps/told", "-q")
    assert "0 maps written, 2 were there" in again.output


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["models", "list"], ["models", "show", "urban", "--json"], ["run", "--help"]])
def test_an_output_that_cannot_be_written_is_one_line(arguments, buffered):
    environment = os.environ | {"PYTHONUNBUFFERED": buffered}
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment
        )
    assert result.stderr == "error: standard output cannot be written: No space left on device\n"
    assert result.returncode == 1


def test_letters_that_an_encoding_lacks_are_told_by_their_number(tmp_path):
    (tmp_path / "größe").mkdir()
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [*COMMAND, "validate", str(tmp_path / "größe")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert "gr\\xf6\\xdfe: no maps\n" in result.stdout
    assert result.stderr == ""


def test_status_of_a_folder_without_a_run(tmp_path):
    result = invoke("status", tmp_path)
    assert result.exit_code == 1
    assert "holds no run" in result.stderr
    for command in ("status", "validate", "view"):
        result = invoke(command, tmp_path / "mistyped")
        assert result.exit_code == 1
        assert (
            result.stderr == f"error: {tmp_path / 'mistyped'}: is no folder, expected one that a run has written to\n"
        )
    assert not (tmp_path / "mistyped").exists()


@pytest.mark.parametrize("interval", ["nan", "inf"])
def test_an_interval_that_never_ends_is_refused(catalog, tmp_path, interval):
    result = invoke("watch", catalog, "--out", tmp_path / "out", "--interval", interval)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: interval: found {interval} s, expected more than 0 and at most a year")
    assert not (tmp_path / "out").exists()


def test_a_home_is_no_folder_called_tilde(catalog, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert invoke("run", catalog, "--out", "~/maps", "-q").exit_code == 0
    assert (tmp_path / "home/maps/collection.json").is_file()
    assert not (tmp_path / "~").exists()
    assert invoke("run", "~/maps/scenes.parquet", "--out", "file", "-q").exit_code == 0


def test_what_the_machine_lacks_is_told_before_a_cluster_starts(catalog, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    for command in ("plan", "run"):
        result = invoke(command, catalog, "--out", tmp_path / "out", "--device", "cuda")
        assert result.exit_code == 1
        assert result.stderr.startswith("error: device 'cuda' asked for, 0 CUDA devices found")
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "run.yaml").exists()


def test_nothing_to_do_is_said_too(catalog, tmp_path):
    result = invoke("run", catalog, "--out", tmp_path / "out", "--max-gap-days", "0.5", "-q")
    assert result.exit_code == 1
    assert "no pair is left to map" in result.stderr
    assert "0 maps written, 0 were there, 0 failed" in result.output
    assert result.output.count("days apart, more than 0.5") == 2
    assert "max_cloud: input should be" in invoke("search", catalog, "--max-cloud", "nan").stderr


def test_a_demo_is_not_taken_for_another(tmp_path):
    for arguments, code in ((["--size", "64", "--dates", "3"], 0), (["--size", "96", "--dates", "3"], 1)):
        result = invoke("demo", "--out", tmp_path, *arguments, "-q")
        assert result.exit_code == code, result.output
    assert 'found scenes of {"size": 64, "dates": 3, "seed": 0}, expected {"size": 96, "dates": 3, ' in result.stderr
    (tmp_path / "scenes" / "demo.json").write_text("{")
    result = invoke("demo", "--out", tmp_path, "--size", "64", "--dates", "3", "-q")
    assert 'found scenes of {, expected {"size": 64' in result.stderr
    shutil.rmtree(tmp_path / "scenes")
    result = invoke("demo", "--out", tmp_path, "--size", "96", "--dates", "3", "-q")
    assert "maps: found maps without their scenes, expected none: remove" in result.stderr


def test_a_large_demo_is_continued_by_mirror_images(tmp_path, monkeypatch):
    monkeypatch.setattr("s2cd.demo.DRAW_SIZE", 32)
    simulate_catalogue(tmp_path, size=96, dates=1)
    with rasterio.open(next(tmp_path.rglob("B04.tif"))) as red:
        pixels = red.read(1)
    assert np.array_equal(pixels[:32], pixels[32:64][::-1])


def test_a_demo_whose_scenes_are_damaged_says_so(tmp_path):
    demo = ("demo", "--out", tmp_path, "--size", "64", "--dates", "3", "-q")
    simulate_catalogue(tmp_path, size=64, dates=3)
    red = next((tmp_path / "scenes").glob("*/B04.tif"))
    red.unlink()
    result = invoke(*demo)
    assert result.exit_code == 1
    assert re.search(r"^error: .*maps holds no map to score: cannot read .*B04.tif", result.stderr, re.MULTILINE)


def test_a_demo_that_cannot_write_says_so(tmp_path):
    (tmp_path / "file").touch()
    result = invoke("demo", "--out", tmp_path / "file", "-q")
    assert re.fullmatch(r"error: .*file/scenes cannot be used: .*\n", result.stderr)
    assert invoke("demo", "--out", "", "-q").stderr == "error: out: found '', expected a folder\n"


def test_models_list_and_show():
    assert "generic" in invoke("models", "list").output
    assert "licence" in invoke("models", "show", "urban").output.lower()
    assert json.loads(invoke("models", "show", "generic", "--json").output)
    assert invoke("models", "show", "nosuch").exit_code == 1


def test_damaged_files_are_told_of_without_a_traceback(tmp_path):
    """GDAL's errors cannot be unpickled: with them Dask would lose ours on the way from a worker process."""
    catalog = simulate(tmp_path / "scenes", size=256, dates=4, orbits=(51,), seed=1, clouds=False)
    first, *_, last = sorted(catalog.parent.rglob("B04.tif"))
    first.write_text("no image")
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    arguments = ["run", str(catalog), "--out", str(tmp_path / "maps"), "-q"]
    result = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert invoke("watch", "--once", *arguments[1:]).exit_code == 1
    report = json.loads((tmp_path / "maps" / "report.json").read_text())
    told = sorted(record["error"] for record in report["maps"] if record["status"] == "failed")
    assert re.match(rf"cannot read \S+{first.parent.name}/B04.tif: '.*' not recognized as", told[0]), told
    assert re.match(rf"cannot read \S+{last.parent.name}/B04.tif: B04.tif, band 1: IReadBlock failed at", told[-1]), (
        told
    )


@pytest.mark.parametrize(("number", "command", "status"), [(signal.SIGINT, HEEDING, 130), (signal.SIGTERM, DEAF, 143)])
def test_an_interrupt_while_the_cluster_starts_is_one_line(catalog, tmp_path, number, command, status):
    """As a terminal or a service sends it: to the worker process too, which is still importing."""
    arguments = ["run", str(catalog), "--out", str(tmp_path), "-q"]
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not _starts_a_worker(process) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status, stderr
    lines = [line for line in stderr.splitlines() if not line.startswith("warning: ")]
    assert lines == ["interrupted: finished maps are complete, run the same command to go on"]


def test_a_watch_that_is_terminated_gives_the_folder_back(catalog, tmp_path):
    command = [*COMMAND, "watch", str(catalog), "--out", str(tmp_path), "-q"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "watch.lock").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "watch.lock").exists()


def _starts_a_worker(process):
    with suppress(psutil.Error):  # another child may end meanwhile
        return any("spawn_main" in " ".join(child.cmdline()) for child in psutil.Process(process.pid).children())


@pytest.mark.parametrize(("number", "command", "status"), [(signal.SIGINT, HEEDING, 130), (signal.SIGTERM, DEAF, 143)])
def test_an_interrupt_stops_the_workers_and_leaves_finished_maps(tmp_path, number, command, status):
    """A signal as soon as the first map is there: its exit code, whole maps only, and the next run goes on."""
    catalog = simulate(tmp_path / "scenes", size=512, dates=16, orbits=(51,), seed=2, clouds=False)
    out = tmp_path / "maps"
    arguments = ["run", str(catalog), "--out", str(out), "--dates-per-task", "2", "-q"]
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(out.rglob("S2CD_*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == status, stderr
    assert "Traceback" not in stderr
    finished = {p.stem for p in out.rglob("S2CD_*.json")}
    assert 0 < len(finished) <= 15
    assert finished <= {p.stem for p in out.rglob("S2CD_*.tif")}
    leftovers = [p for p in Path(out).rglob("*") if "#" in p.name or ".tmp" in p.name]
    assert leftovers == []
    assert not any("not listed" in problem or "not exist" in problem for problem in validate(str(out)))
    result = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"{15 - len(finished)} maps written, {len(finished)} were there" in result.stdout
