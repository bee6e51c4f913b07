"""Profiles, local workers, schedulers that already run."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
import yaml
from distributed import get_worker
from places_support import BIN, background

from s2cd import reader
from s2cd.clusters import PROFILES, check_profile, cluster, load_profile, show_profile, worker_environment
from s2cd.clusters import environment as environment_module
from s2cd.clusters.check import probe
from s2cd.clusters.environment import environment
from s2cd.clusters.machine import available_cores, available_memory
from s2cd.clusters.profiles import LocalProfile
from s2cd.errors import ClusterError

ONE_WORKER = {"kind": "local", "threads": 1, "memory": "1 GiB", "dashboard": 0}
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def client():
    with cluster({"kind": "local", "threads": 2, "memory": "2 GiB", "dashboard": 0}) as client:
        yield client


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_file_says_the_defaults_of_its_bare_name(name):
    assert load_profile(ROOT / "cluster" / f"{name}.yaml") == PROFILES[name]
    assert load_profile(name) == PROFILES[name]


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_file_states_every_option(name):
    stated = yaml.safe_load((ROOT / "cluster" / f"{name}.yaml").read_text())
    assert set(stated) == set(type(PROFILES[name]).model_fields)


def test_the_profile_for_one_gpu_is_understood():
    assert load_profile(ROOT / "cluster" / "one-gpu.yaml") == LocalProfile(processes=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind: local\nthreds: 4\n", "threds: unknown key, expected one of dashboard, environment, kind, memory"),
        ("kind: slrum\n", "kind: found 'slrum', expected one of cuda, existing, local, pbs, slurm"),
        ("threads: 4\n", "kind: found 'nothing', expected one of"),
        ("kind: local\nthreads: many\n", "threads: found 'many', expected"),
        ("kind: local\nprocesses: 0\n", "processes: found 0, expected"),
        ("kind: local\nprocesses: 1.5\n", "processes: found 1.5, expected"),
        ("kind: local\nmemory: lots\n", "memory: found 'lots', expected"),
        ("kind: slurm\nmemory: 32\n", "memory: found 32, expected a size with its unit, such as '16 GiB'"),
        ("kind: local\nmemory: .inf\n", "memory: found inf, expected a size with its unit"),
        ("kind: slurm\nwalltime: soon\n", "walltime: found 'soon', expected"),
        ("kind: slurm\nwalltime: 60\n", "walltime: found 60, expected a duration with its unit, such as '01:00:00'"),
        ("kind: pbs\nwalltime: '90'\n", "walltime: found '90', expected a duration with its unit"),
        ("kind: slurm\ngpus: 4\n", "gpus: found 4, expected"),
        ("kind: slurm\njobs: {maximum: few}\n", "jobs.maximum: found 'few', expected"),
        ("kind: slurm\njobs: {most: 3}\n", "jobs.most: unknown key, expected one of maximum, minimum"),
        ("kind: slurm\njobs: {minimum: 3, maximum: 2}\n", "jobs: found {'minimum': 3, 'maximum': 2}, expected"),
        ("kind: pbs\ngpu_type: a100\n", "gpu_type: unknown key"),
        ("kind: existing\ntls: {cert: a.pem}\n", "tls: found {'cert': 'a.pem'}, expected"),
        ("- local\n", "found list, expected a mapping"),
        ("kind: [\n", "not YAML"),
        ("", "found NoneType, expected a mapping"),
    ],
)
def test_a_wrong_profile_is_refused_in_one_line_that_names_file_and_key(tmp_path, text, expected):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ClusterError) as caught:
        load_profile(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_absent_profile_names_the_known_ones():
    with pytest.raises(ClusterError, match=r"nowhere.yaml: cannot be read .* one of local, cuda, slurm"):
        load_profile("nowhere.yaml")


@pytest.mark.parametrize(
    ("walltime", "seconds"),
    [
        ('"01:00:00"', 3600),
        ("12:00:00", 43200),
        ('"1-00:00:00"', 86400),
        ("90 minutes", 5400),
        ("600", 600),
        ("9 minutes", 540),
    ],
)
def test_walltime_is_read_as_people_and_yaml_write_it(tmp_path, walltime, seconds):
    path = tmp_path / "slurm.yaml"
    path.write_text(f"kind: slurm\nwalltime: {walltime}\n")
    assert load_profile(path).walltime == seconds


def _limits(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_limits_of_cgroup_v2_bind_on_every_level(tmp_path):
    files = {
        "sys/fs/cgroup/job/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/job/memory.max": "1000000000\n",
        "sys/fs/cgroup/job/step/cpu.max": "max 100000\n",
        "sys/fs/cgroup/job/step/memory.max": "max\n",
    }
    root = _limits(tmp_path, "0::/job/step\n", files)
    assert (available_cores(root), available_memory(root)) == (1, 1_000_000_000)


def test_limits_of_cgroup_v1_bind(tmp_path):
    files = {
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "2000000000\n",
    }
    root = _limits(tmp_path, "4:memory:/job\n3:cpu,cpuacct:/job\n", files)
    assert (available_cores(root), available_memory(root)) == (1, 2_000_000_000)


def test_without_cgroups_affinity_and_physical_memory_count(tmp_path):
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        f"from s2cd.clusters.machine import *; print(available_cores({str(tmp_path)!r}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "1"
    assert available_memory(tmp_path) > 1 << 28


def test_local_workers_have_the_threads_the_memory_and_the_environment_of_the_profile(client):
    seen = client.submit(probe).result()
    assert seen["threads"] == 2
    assert seen["memory"] == 2 << 30
    assert seen["environment"] == worker_environment(2)
    assert seen["torch_threads"] == 1


def test_local_workers_keep_large_buffers_instead_of_returning_them_to_the_kernel(client):
    if not sys.platform.startswith("linux"):
        pytest.skip("the allocator's settings are those of glibc")
    assert client.submit(probe, key="allocator").result()["returned"] == 0


def test_the_dashboard_is_for_this_machine_alone(client):
    assert client.cluster.scheduler.http_server.address == "127.0.0.1"
    assert requests.get(client.dashboard_link, timeout=30).ok


def test_files_stay_open_in_proportion_to_the_threads(client):
    def most():
        from s2cd.catalog.access import OPEN_FILES

        return OPEN_FILES.most

    (threads,) = client.nthreads().values()
    assert client.submit(most).result() == 64 * threads


def test_a_worker_that_looks_full_returns_its_free_memory(client):
    if not sys.platform.startswith("linux"):
        pytest.skip("the allocator's settings are those of glibc")

    def fill_and_free():
        import numpy as np
        import psutil

        blocks, pins = [], []
        for _ in range(20):
            blocks.append(np.ones(64 << 20, np.uint8))
            pins.append(np.ones(1 << 16, np.uint8))  # between the blocks, so that the heap cannot shrink from its end
        blocks.clear()
        get_worker().pins = pins
        return psutil.Process().memory_info().rss

    def resident():
        import psutil

        return psutil.Process().memory_info().rss

    full = client.submit(fill_and_free).result()
    assert full > 5 << 28
    deadline = time.monotonic() + 60
    while client.submit(resident, pure=False).result() > full - (1 << 30):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_what_a_worker_logs_at_the_end_of_a_cluster_is_one_line(client):
    def missed():
        try:
            raise OSError("Stream is closed")
        except OSError:
            logger = logging.getLogger("distributed.worker")
            text = "Failed to communicate with scheduler during heartbeat."
            record = logger.makeRecord(logger.name, logging.ERROR, "", 0, text, (), sys.exc_info())
            return logger.filter(record) and logging.Formatter().format(record)

    assert client.submit(missed).result() == "Failed to communicate with scheduler during heartbeat."


def test_a_script_needs_no_guard_around_what_starts_workers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import s2cd\n"
        "print('once')\n"
        "def double(x): return 2 * x\n"
        "with s2cd.cluster('local') as client: print(client.submit(double, 4).result(), __file__)\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout) == (0, f"once\n8 {script}\n"), result.stderr


def test_an_idle_worker_returns_freed_memory(client):
    def resident():
        return psutil.Process().memory_info().rss

    def resident_after_freeing():
        blocks = [reader.ROOMS.copy(np.ones(1 << 20, np.uint8)) for _ in range(100)]
        features, _still_used = np.ones(300 << 20, np.uint8), bytearray(1 << 20)  # the second lies above the first
        del blocks, features
        return resident()

    def hold_rooms(seconds):
        environment_module._UNUSED = seconds

    before = environment_module._UNUSED
    client.run(hold_rooms, 0.0)
    held = client.submit(resident_after_freeing, pure=False).result()
    until, freed = time.monotonic() + 30, 0
    while freed < 380 << 20 and time.monotonic() < until:
        time.sleep(0.5)
        freed = held - next(iter(client.run(resident).values()))
    client.run(hold_rooms, before)
    assert freed >= 380 << 20


def test_this_process_keeps_its_own_environment(client):
    assert "MALLOC_ARENA_MAX" not in os.environ
    with environment({"S2CD_TEST": "1"}):
        assert os.environ["S2CD_TEST"] == "1"
    assert "S2CD_TEST" not in os.environ


def test_several_processes_share_cores_and_memory():
    with cluster({"kind": "local", "processes": 2, "dashboard": 0, "environment": {"S2CD_TEST": "2"}}) as two:
        info = two.scheduler_info(n_workers=-1)["workers"].values()
        assert [worker["nthreads"] for worker in info] == [max(1, available_cores() // 2)] * 2
        assert sum(worker["memory_limit"] for worker in info) < available_memory()
        assert set(two.run(lambda: os.environ["S2CD_TEST"]).values()) == {"2"}


def test_show_prints_what_would_run():
    assert "export MALLOC_ARENA_MAX=1" in show_profile("local")
    assert "dask worker <scheduler address> --nworkers 1" in show_profile("local")
    assert "dask cuda worker" in show_profile("cuda")
    assert "tcp://10.0.0.5:8786" in show_profile({"kind": "existing", "address": "tcp://10.0.0.5:8786"})
    by_file = show_profile({"kind": "existing", "scheduler_file": "my scheduler.json"})
    assert "dask worker --scheduler-file 'my scheduler.json' --nworkers 1" in by_file


def test_what_show_exports_means_what_the_profile_says(tmp_path):
    value = f"Authorization: Bearer x; touch {tmp_path}/done"
    shown = show_profile({"kind": "local", "environment": {"GDAL_HTTP_HEADERS": value}})
    exports = "\n".join(line for line in shown.splitlines() if line.startswith("export "))
    result = subprocess.run(
        ["bash", "-c", f'{exports}\necho "$GDAL_HTTP_HEADERS"'], capture_output=True, text=True, check=True
    )
    assert result.stdout == value + "\n"
    assert not (tmp_path / "done").exists()


def test_show_prints_the_job_scripts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    slurm = show_profile({"kind": "slurm", "gpus": 1, "gpu_type": "a100", "queue": "gpu", "cores": 6})
    for line in ("#SBATCH -p gpu", "#SBATCH --gres=gpu:a100:1", "#SBATCH --cpus-per-task=6", "--lifetime 3060s"):
        assert line in slurm
    pbs = show_profile({"kind": "pbs", "gpus": 1, "memory": "2 GiB", "walltime": "02:00:00"})
    for line in ("select=1:ncpus=8:mem=2048MB:ngpus=1", "#PBS -l walltime=02:00:00", "#PBS -V"):
        assert line in pbs
    assert list(tmp_path.iterdir()) == []


def test_check_reports_what_a_worker_sees(tmp_path):
    report = check_profile(ONE_WORKER)
    found = {name: ok for name, ok, _ in report}
    assert found == dict.fromkeys(["worker", "packages", "gpu", "torch threads", "environment", "allocator"], True)


def test_check_tries_output_and_source_from_the_worker(client, tmp_path, make_series):
    existing = {"kind": "existing", "address": client.scheduler.address}
    href = make_series(shape=(17, 19), dates=1)[0].assets["red"].href
    report = {
        name: (ok, detail) for name, ok, detail in check_profile(existing, out=str(tmp_path / "out"), source=href)
    }
    assert report["out"] == (True, f"{tmp_path / 'out'}: writable")
    assert report["source"] == (True, f"{href}: 19 x 17 px, uint16")
    (tmp_path / "file").touch()
    report = {name: (ok, detail) for name, ok, detail in check_profile(existing, str(tmp_path / "file"), f"{href}x")}
    assert not report["out"][0]
    assert str(tmp_path / "file") in report["out"][1]
    assert not report["source"][0]
    assert f"{href}x" in report["source"][1]


def test_a_machine_without_the_batch_system_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for kind, command in (("slurm", "sbatch"), ("pbs", "qsub")):
        with pytest.raises(ClusterError, match=f"found no command '{command}'"), cluster({"kind": kind}):
            pass


def test_cuda_without_a_gpu_is_refused_clearly():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ClusterError, match="found no CUDA device"), cluster("cuda"):
        pass


def test_an_existing_scheduler_is_used_and_left_running(client):
    address = client.scheduler.address
    with cluster({"kind": "existing", "address": address}) as second:
        assert second.submit(probe, key="existing").result()["torch_threads"] == 1
    assert client.submit(lambda: 7).result() == 7


def test_a_scheduler_file_that_does_not_come_is_named(tmp_path):
    profile = {"kind": "existing", "scheduler_file": str(tmp_path / "s.json"), "timeout": 1}
    with pytest.raises(ClusterError, match=r"scheduler_file .*s\.json: found none after 1 s"), cluster(profile):
        pass
    (tmp_path / "s.json").touch()
    with pytest.raises(ClusterError, match=r"s\.json: found JSONDecodeError after 1 s, expected one"), cluster(profile):
        pass


def test_a_scheduler_without_s2cd_is_named(tmp_path):
    """It unpickles task graphs."""
    (tmp_path / "s2cd").mkdir()
    (tmp_path / "s2cd" / "__init__.py").write_text("raise ImportError('no s2cd here')")
    file = tmp_path / "scheduler.json"
    located = ["--no-dashboard", "--scheduler-file", str(file)]
    scheduler = [str(BIN / "dask"), "scheduler", "--host", "127.0.0.1", "--port", "0", *located]
    worker = [str(BIN / "dask"), "worker", "--nthreads", "1", "--no-nanny", *located]
    lacks = r"^tcp://\S+: the scheduler lacks s2cd \(no s2cd here\), expected the version of this client$"
    with (
        background(scheduler, tmp_path / "scheduler.log", {"PYTHONPATH": str(tmp_path)}),
        background(worker, tmp_path / "worker.log"),
        pytest.raises(ClusterError, match=lacks),
        cluster({"kind": "existing", "scheduler_file": str(file)}),
    ):
        pass


def test_an_existing_scheduler_with_too_few_workers_is_refused(client):
    profile = {"kind": "existing", "address": client.scheduler.address, "workers": 3, "timeout": 1}
    with pytest.raises(ClusterError, match="found 1 workers after 1 s, expected 3"), cluster(profile):
        pass


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch):
    profile = {"kind": "existing", "address": "tcp://127.0.0.1:9", "timeout": 1}
    with pytest.raises(ClusterError, match=r"tcp://127.0.0.1:9: no scheduler answers within 1 s"), cluster(profile):
        pass
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match="found neither address nor scheduler_file"), cluster("existing"):
        pass
