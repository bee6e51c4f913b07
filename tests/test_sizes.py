"""What a task takes, from what the workers offer."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st

from s2cd.clusters import load_profile
from s2cd.clusters.machine import available_cores
from s2cd.clusters.start import THREADS_A_GPU
from s2cd.config import RunConfig
from s2cd.model import load_model
from s2cd.outputs.parts import STEP
from s2cd.reader import Tiling
from s2cd.sizes import LARGEST_SERIES, TASK_SHARE, Workers, auto_chunk, task_sizes

TILE = (10980, 10980)
GB = 1e9


def sizes(workers: Workers, shape: tuple[int, int] = TILE, pairs: int = 71, **options: object):
    config = RunConfig(catalog="any", out="maps", **options)
    return task_sizes(config, shape, pairs, load_model("generic", "cpu"), workers)


@pytest.mark.parametrize("size", [1, 63, 64, 511, 512, 1023, 1024, 1025, 10980])
def test_auto_chunk_is_aligned_and_covers(size):
    chunk = auto_chunk((size, max(1, size // 2)), 8)
    assert chunk % 8 == 0
    assert chunk <= 2048
    assert -(-size // chunk) * chunk >= size


@pytest.mark.parametrize(
    ("size", "expected"), [(1100, 552), (1830, 1024), (3660, 2048), (2300, 1152), (4100, 1536), (10980, 2048)]
)
def test_chunks_are_whole_blocks_of_a_map_where_that_takes_no_more_of_them(size, expected):
    assert auto_chunk((size, size), 8) == expected


def test_ample_memory_gives_the_default_sizes_and_so_does_an_unknown_one():
    for workers in (Workers(), Workers(1, 2, 10 * GB), Workers(64, 1024, 8 * GB)):
        found = sizes(workers, pairs=10**6)
        assert (found.chunk, found.dates) == (2048, LARGEST_SERIES)
    on_gpu = sizes(Workers(64, 1024, 8 * GB, device=5 * GB), pairs=10**6)
    assert (on_gpu.chunk, on_gpu.dates) == (3072, LARGEST_SERIES)


@pytest.mark.parametrize("workers", [Workers(1, 8, 0.6 * GB), Workers(1, 16, 8 * GB, device=0.3 * GB)])
def test_little_memory_on_the_host_or_the_device_gives_smaller_chunks(workers):
    found = sizes(workers)
    assert found.chunk < 1300
    assert found.need <= 1.2 * TASK_SHARE * workers.memory
    assert found.device_need <= 1.2 * TASK_SHARE * (workers.device or 0)


def test_little_memory_gives_fewer_dates_and_many_threads_too():
    assert sizes(Workers(1, 4, 2 * GB)).dates == 4
    assert sizes(Workers(1, 4, 0.2 * GB)).dates == 2
    assert sizes(Workers(1, 16, 0.5 * GB)).dates < sizes(Workers(1, 8, 1 * GB)).dates  # works on one unit more
    small = (1830, 1830)
    assert sizes(Workers(1, 2, 8 * GB), small, pairs=10).dates == LARGEST_SERIES
    assert sizes(Workers(8, 40, 8 * GB), small, pairs=10).dates == 2


def test_what_is_asked_for_is_taken_rounded_up_to_the_stride():
    found = sizes(Workers(1, 8, 0.1 * GB), chunk=1000, dates_per_task=9)
    assert (found.chunk, found.dates) == (1008, 9)


@given(st.integers(1, 256), st.integers(1, 12000), st.just("auto") | st.integers(64, 4096))
def test_chunks_suit_a_network_of_any_stride_and_the_overviews_of_a_map(half_stride, size, chunk):
    network = SimpleNamespace(stride=2 * half_stride, halo=2 * half_stride, feature_bytes=40.0)
    config = RunConfig(catalog="any", out="maps", chunk=chunk)
    found = task_sizes(config, (size, 7), 5, network, Workers(1, 2, 4 * GB)).chunk
    tiling = Tiling((size, 7), found, network.halo, network.stride)
    for row in range(tiling.blocks[0]):
        start = tiling.core(row, 0)[0].start
        assert start % network.stride == 0
        assert start % STEP == 0


@given(
    st.integers(1, 12000), st.integers(1, 12000), st.integers(1, 200), st.integers(1, 64), st.integers(1, 64),
    st.none() | st.floats(1e6, 1e12), st.none() | st.floats(1e6, 1e11),
)  # fmt: skip
def test_any_cluster_and_field_of_view_gives_a_usable_task(rows, cols, pairs, count, threads, memory, device):
    found = sizes(Workers(count, count * threads, memory, device), (rows, cols), pairs)
    assert found.chunk % load_model("generic", "cpu").stride == 0
    assert found.chunk > 0
    assert 2 <= found.dates <= LARGEST_SERIES


def test_workers_are_asked_and_none_is_told_from_some():
    with Client(n_workers=2, threads_per_worker=2, memory_limit="3 GB", processes=False, dashboard_address=None) as c:
        assert Workers.of_client(c, "auto") == Workers(2, 4, 1.5 * GB)
    with Client(n_workers=0, processes=False, dashboard_address=None) as client:
        assert Workers.of_client(client, "cpu") is None


def test_workers_that_share_a_gpu_have_a_part_of_its_memory_each(monkeypatch):
    names = itertools.repeat("GPU-1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GB, uuid=next(names))
    )
    four = load_profile({"kind": "local", "processes": 4, "threads": 5, "memory": "10 GB"})
    assert Workers.of_profile(four, "auto") == Workers(4, 20, 2 * GB, device=4 * GB)
    with Client(n_workers=2, threads_per_worker=4, memory_limit="8 GB", processes=False, dashboard_address=None) as c:
        assert Workers.of_client(c, "auto") == Workers(2, 8, 2 * GB, device=10 * GB)
        assert Workers.of_client(c, "cpu") == Workers(2, 8, 2 * GB)
        names = itertools.cycle(["GPU-1", "GPU-2"])
        assert Workers.of_client(c, "auto") == Workers(2, 8, 2 * GB, device=20 * GB)


def test_profiles_tell_what_they_will_offer(tmp_path):
    local = Workers.of_profile(load_profile({"kind": "local", "processes": 2, "threads": 3, "memory": "6 GB"}), "cpu")
    assert local == Workers(2, 6, 2 * GB)
    slurm = load_profile({"kind": "slurm", "cores": 8, "memory": "32 GB", "jobs": {"maximum": 5}})
    assert Workers.of_profile(slurm, "cpu") == Workers(5, 40, 4 * GB)
    slurm_gpu = Workers.of_profile(load_profile("slurm-gpu"), "auto")
    assert slurm_gpu == Workers(4, 16, 16 * 2**30, device=math.inf)
    found = sizes(slurm_gpu)
    assert found.chunk == 3072
    assert 0 < found.device_need < 2 * GB
    cuda = load_profile({"kind": "cuda", "threads": 4, "memory": "16 GB"})
    assert Workers.of_profile(cuda, "cpu") == Workers(1, 4, 4 * GB)
    shared = load_profile({"kind": "cuda", "gpus": [0], "memory": "16 GB"})
    threads = min(available_cores(), THREADS_A_GPU)
    assert Workers.of_profile(shared, "cpu") == Workers(1, threads, 16 * GB / threads)
    assert Workers.of_profile(load_profile({"kind": "existing", "address": "tcp://host:8786"}), "cpu") == Workers()
