"""Workers as jobs of a real Slurm (`make services` starts one)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import as_completed
from places_support import BIN, PAIRS, call, demo_catalogue, maps_by, maps_of, refuses_strangers, run_in_small_parts

from s2cd.clusters import check_profile, cluster, worker_environment
from s2cd.clusters.check import probe
from s2cd.errors import ClusterError

ROOT = Path(__file__).resolve().parents[1]
SERVICES = ROOT / ".services" / "env"
WORKER = {"kind": "slurm", "cores": 1, "memory": "1 GiB", "dashboard": 0}

pytestmark = pytest.mark.services


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory):
    """Let Slurm's commands find the test's Slurm; job logs land in a folder of their own."""
    settings = (
        dict(line.split("=", 1) for line in SERVICES.read_text().split() if "=" in line) if SERVICES.is_file() else {}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", settings.get("SLURM_CONF", "absent"))
        try:
            subprocess.run(["sinfo"], check=True, capture_output=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            pytest.skip("no Slurm answers: `make services` starts one")
        patch.chdir(tmp_path_factory.mktemp("slurm"))
        yield
        assert _wait_until_empty(30)


def _jobs() -> list[str]:
    return subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True, text=True, check=True).stdout.split()


def _wait_until_empty(seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while _jobs():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _make_where():
    """Return a task that travels by value: workers cannot import this module."""

    def where(seconds: float) -> str:
        time.sleep(seconds)
        return os.environ["SLURM_JOB_ID"]

    return where


_where = _make_where()


@pytest.fixture(scope="module")
def client(slurm):
    """Jobs with a blank in every path that goes into their script."""
    python = Path("my python")
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    options = {"python": str(python.absolute()), "scratch_folder": "$PWD/my scratch", "log_folder": "my logs"}
    options |= {"gpus": 1, "walltime": "10 minutes", "jobs": {"maximum": 2}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-for-the-test")
        with cluster(WORKER | options) as client:
            yield client


def test_no_job_is_held_before_there_is_work(client):
    assert client.nthreads() == {}
    assert _jobs() == []


def test_a_worker_sees_its_own_gpu_and_the_environment_on_purpose(client):
    def look(number):
        time.sleep(1)
        return os.environ["SLURM_JOB_ID"], os.environ["CUDA_VISIBLE_DEVICES"]

    devices = dict(client.gather(client.map(look, range(12), pure=False)))
    assert len(devices) == 2
    assert len(list(Path("my logs").glob("s2cd-worker-*.log"))) == 2
    assert list(Path("my scratch").iterdir())
    assert sorted(devices.values()) == ["0", "1"]
    seen = client.submit(probe, key="probe").result()
    assert seen["environment"] == worker_environment(1)
    assert (seen["threads"], seen["torch_threads"], seen["returned"]) == (1, 1, 0)


def test_credentials_reach_the_workers_by_environment_only(client):
    assert client.submit(os.environ.get, "AWS_SECRET_ACCESS_KEY").result() == "a-secret-for-the-test"
    for job in _jobs():
        script = subprocess.run(
            ["scontrol", "write", "batch_script", job, "-"], capture_output=True, text=True, check=True
        )
        assert "MALLOC_ARENA_MAX" in script.stdout
        assert "a-secret" not in script.stdout
    assert not [log for log in Path("my logs").glob("*.log") if "a-secret" in log.read_text()]


def test_a_stranger_is_refused_by_the_scheduler_and_by_workers(client):
    """Every user of the site reaches them, and they run what they are sent."""
    client.submit(_where, 0, pure=False).result()
    (worker, *_) = client.scheduler_info(n_workers=-1)["workers"]
    for address in (client.scheduler.address, worker):
        call(address, client.security)
        refuses_strangers(address)


def test_no_other_user_reads_the_certificate(client):
    (folder,) = Path("my logs").glob("tls-*")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_a_cancelled_job_is_replaced_and_its_work_done(client):
    futures = client.map(_where, [0.5] * 24, pure=False)
    cancelled = next(as_completed(futures)).result()
    subprocess.run(["scancel", cancelled], check=True)
    assert set(client.gather(futures)) - {cancelled}
    assert client.submit(_where, 0, pure=False).result() != cancelled


def test_idle_jobs_are_given_back_while_the_client_stays(client):
    client.submit(_where, 0).result()
    assert _wait_until_empty(30)
    assert client.submit(_where, 0, pure=False).result()


def test_a_run_outlives_its_jobs():
    jobs: list[str] = []
    deadline = time.monotonic() + 300
    with cluster(WORKER | {"walltime": "24 s", "jobs": {"maximum": 2}}) as client:
        while len(set(jobs)) < 3 and time.monotonic() < deadline:
            jobs += client.gather(client.map(_where, [0.5] * 20, pure=False))
    assert len(set(jobs)) >= 3
    assert len(jobs) % 20 == 0


@pytest.mark.parametrize(
    ("wrong", "reason"), [({"queue": "nowhere"}, "partition"), ({"cores": 4000}, "configuration is not available")]
)
def test_what_slurm_refuses_is_said_at_once(wrong, reason):
    with pytest.raises(ClusterError, match=f"Slurm refuses the job .*{reason}"), cluster(WORKER | wrong):
        pass


def test_the_demo_catalogue_gives_the_same_maps_and_no_job_stays(tmp_path):
    catalog = demo_catalogue(tmp_path / "scenes")
    with cluster(WORKER | {"memory": "2 GiB", "jobs": {"maximum": 2}}) as client:
        assert run_in_small_parts(catalog, tmp_path / "maps", client).ok
    assert _wait_until_empty(30)
    assert maps_of(tmp_path / "maps") == maps_by("threads", catalog, tmp_path / "threads")


def test_the_client_itself_runs_as_a_job(tmp_path):
    catalog = demo_catalogue(tmp_path / "scenes")
    profile = tmp_path / "mine.yaml"
    profile.write_text(json.dumps(WORKER | {"memory": "2 GiB", "jobs": {"maximum": 1}}))
    out = tmp_path / "maps"
    command = ["s2cd", "run", catalog, "--out", str(out), "--cluster", str(profile), "-q"]
    submit = ["sbatch", "--wait", "--mem=2G", "--cpus-per-task=1", str(ROOT / "cluster" / "submit.sh"), *command]
    path = f"{BIN}:{os.environ['PATH']}"
    done = subprocess.run(
        submit, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300, check=False
    )
    log = "".join(path.read_text() for path in tmp_path.glob("s2cd-*.log"))
    assert done.returncode == 0, done.stderr + log
    assert f"{PAIRS} maps written" in log
    assert len(maps_of(out)) == PAIRS


def test_check_starts_one_worker_and_reports(slurm):
    report = {name: (ok, detail) for name, ok, detail in check_profile(WORKER)}
    assert {name for name, (ok, _) in report.items() if not ok} == set()
    report = {name: (ok, detail) for name, ok, detail in check_profile(WORKER | {"gpus": 1})}
    assert report["gpu"] == (False, "none")
    assert {path.suffix for path in Path("s2cd-logs").iterdir()} == {".log"}  # the certificates are gone
