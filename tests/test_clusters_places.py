"""The same catalogue gives the same maps, to the byte, wherever it is computed."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from distributed.comm import CommClosedError
from places_support import BIN, PAIRS, background, demo_catalogue, maps_by, maps_of, run_in_small_parts, wait_for_file
from rasterio.io import MemoryFile

import s2cd
from s2cd.clusters.check import probe
from s2cd.errors import ClusterError


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return demo_catalogue(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def expected(catalog, tmp_path_factory):
    maps = maps_by("threads", catalog, tmp_path_factory.mktemp("threads"))
    assert len(maps) == PAIRS
    return maps


def test_synchronous_equals_threads(catalog, expected, tmp_path):
    assert maps_by("synchronous", catalog, tmp_path) == expected


def test_local_processes_equal_threads(catalog, expected, tmp_path):
    profile = {"kind": "local", "processes": 2, "threads": 1, "memory": "2 GiB", "dashboard": 0}
    with s2cd.cluster(profile) as client:
        assert run_in_small_parts(catalog, tmp_path, client).ok
    assert maps_of(tmp_path) == expected


@pytest.mark.gpu
def test_gpu_workers_give_the_maps_of_the_cpu(catalog, expected, tmp_path):
    """Not to the byte: a GPU rounds to bfloat16. There is a worker a device, and the network runs there."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("dask_cuda")
    with s2cd.cluster({"kind": "cuda", "dashboard": 0}) as client:
        seen = client.run(probe).values()
        assert run_in_small_parts(catalog, tmp_path / "gpu", client).ok
        memory = client.run(torch.cuda.max_memory_allocated)
    assert len(seen) == torch.cuda.device_count()
    assert all(worker["gpus"] for worker in seen)
    assert any(memory.values())
    found = maps_of(tmp_path / "gpu")
    assert found.keys() == expected.keys()
    for name in found:
        with MemoryFile(found[name]) as gpu, MemoryFile(expected[name]) as cpu, gpu.open() as a, cpu.open() as b:
            difference = np.abs(a.read(1) - b.read(1))
            assert np.nanmean(difference) < 0.01


def test_an_existing_scheduler_equals_threads(catalog, expected, tmp_path):
    file = tmp_path / "scheduler.json"
    scheduler = [str(BIN / "dask"), "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    worker = [str(BIN / "dask"), "worker", "--nthreads", "1", "--memory-limit", "2GiB", "--no-dashboard"]
    located = ["--scheduler-file", str(file)]
    with background([*scheduler, *located], tmp_path / "scheduler.log"):
        wait_for_file(file)
        with (
            background([*worker, *located], tmp_path / "worker-0.log"),
            background([*worker, *located, "--no-nanny"], tmp_path / "worker-1.log"),
            s2cd.cluster({"kind": "existing", "scheduler_file": str(file), "workers": 2}) as client,
        ):
            assert run_in_small_parts(catalog, tmp_path / "maps", client).ok
            assert set(client.run(torch.get_num_threads).values()) == {1}
    assert maps_of(tmp_path / "maps") == expected


def test_a_run_goes_on_when_its_only_worker_was_killed(catalog, expected, tmp_path):
    profile = {"kind": "local", "processes": 1, "threads": 1, "memory": "2 GiB", "dashboard": 0}
    killed = []

    def kill(phase, done, _total):
        if phase == "maps" and done and not killed:
            (process,) = client.run(os.getpid).values()
            os.kill(process, signal.SIGKILL)
            killed.append(process)

    with s2cd.cluster(profile) as client:
        assert run_in_small_parts(catalog, tmp_path, client, kill).ok
        assert killed != list(client.run(os.getpid).values())
    assert maps_of(tmp_path) == expected


@pytest.mark.parametrize("asked", [False, True])
def test_a_scheduler_that_is_gone_ends_a_run_with_one_line(catalog, expected, tmp_path, asked):
    """Also where a question that is under way learns of it before Dask's client does."""
    file = tmp_path / "scheduler.json"
    located = ["--scheduler-file", str(file)]
    scheduler = [str(BIN / "dask"), "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    worker = [str(BIN / "dask"), "worker", "--nthreads", "1", "--memory-limit", "2GiB", "--no-dashboard"]
    with background([*scheduler, *located], tmp_path / "scheduler.log") as process:
        wait_for_file(file)

        def kill(phase, done, _total):
            if phase == "maps" and done:
                process.kill()
                if asked:
                    raise CommClosedError("connection reset by peer")

        with (
            background([*worker, *located], tmp_path / "worker.log"),
            s2cd.cluster({"kind": "existing", "scheduler_file": str(file), "workers": 1}) as client,
            pytest.raises(ClusterError, match=r"tcp://127\.0\.0\.1:\d+: the scheduler is gone, expected it to stay"),
        ):
            run_in_small_parts(catalog, tmp_path / "maps", client, kill)
    found = maps_of(tmp_path / "maps")
    assert found
    assert found.items() <= expected.items()
