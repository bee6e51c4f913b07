"""Workers on hosts of their own (network namespaces): a host that is cut off in mid-run costs no map."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from places_support import BIN, PAIRS, background, demo_catalogue, maps_by, maps_of, run_in_small_parts

import s2cd

NETWORK = "10.213.47"
BRIDGE = "s2cdbr"
# a cut-off host says nothing: these are how long the scheduler waits before it gives its work to others
PATIENCE = {
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "13s",
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "8s",
}


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)


@contextmanager
def _hosts(count: int) -> Iterator[list[str]]:
    """Namespaces s2cd1, s2cd2, ... with addresses .11, .12, ... on a bridge that this host has as .1."""
    names = [f"s2cd{number}" for number in range(1, count + 1)]
    with ExitStack() as stack:
        try:
            _ip(f"link add {BRIDGE} type bridge")
            stack.callback(_ip, f"link del {BRIDGE}")
            _ip(f"addr add {NETWORK}.1/24 dev {BRIDGE}")
            _ip(f"link set {BRIDGE} up")
            for number, name in enumerate(names, start=1):
                _ip(f"netns add {name}")
                stack.callback(_ip, f"netns del {name}")
                _ip(f"link add {name}-h type veth peer name eth0 netns {name}")
                _ip(f"link set {name}-h master {BRIDGE} up")
                _ip(f"-n {name} addr add {NETWORK}.{10 + number}/24 dev eth0")
                _ip(f"-n {name} link set lo up")
                _ip(f"-n {name} link set eth0 up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', error)}")
        yield names


@pytest.fixture(scope="module")
def hosts():
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux, root and iproute2")
    with _hosts(3) as names:
        yield names


def test_a_host_that_is_cut_off_in_mid_run_costs_no_map(hosts, tmp_path):
    catalog = demo_catalogue(tmp_path / "scenes")
    expected = maps_by("threads", catalog, tmp_path / "threads")
    address = f"tcp://{NETWORK}.11:8786"
    dask = str(BIN / "dask")
    common = ["--nthreads", "1", "--memory-limit", "2GiB", "--no-dashboard"]
    commands = [
        [dask, "scheduler", "--host", f"{NETWORK}.11", "--port", "8786", "--no-dashboard"],
        [dask, "worker", address, "--name", "stays", *common],
        [dask, "worker", address, "--name", "leaves", *common],
    ]
    cut: list[float] = []

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "maps" and done and not cut:
            _ip(f"link set {hosts[2]}-h down")
            cut.append(time.monotonic())

    with ExitStack() as stack:
        for host, command in zip(hosts, commands, strict=True):
            inside = ["ip", "netns", "exec", host, *command]
            stack.enter_context(background(inside, tmp_path / f"{host}.log", PATIENCE))
        client = stack.enter_context(s2cd.cluster({"kind": "existing", "address": address, "workers": 2}))
        addresses = {worker.split("//")[1].split(":")[0] for worker in client.nthreads()}
        assert addresses == {f"{NETWORK}.12", f"{NETWORK}.13"}
        report = run_in_small_parts(catalog, Path(tmp_path / "maps"), client, progress)
        assert cut
        assert _worker_names(client) == ["stays"]
    assert report.count("written") == PAIRS
    assert maps_of(tmp_path / "maps") == expected


def _worker_names(client) -> list[str]:
    return [worker["name"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
