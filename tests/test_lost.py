"""A worker process that gives up is replaced, and its successor knows."""

from __future__ import annotations

import os

from distributed import LocalCluster

import s2cd
from s2cd import lost
from s2cd.lost import give_up, given_up


def give_up_once():
    first = not given_up()
    if first:
        give_up(RuntimeError("CUDA error: an illegal memory access\nwas encountered"))
    return os.getpid(), first


def test_a_worker_that_gives_up_is_replaced_and_its_successor_knows():
    with s2cd.cluster({"kind": "local", "processes": 1, "threads": 1, "dashboard": 0}) as client:
        before = client.submit(os.getpid).result(timeout=60)
        after, first = client.submit(give_up_once, pure=False).result(timeout=60)
    assert after != before
    assert not first


def test_another_cluster_at_the_same_address_knows_nothing_of_it(tmp_path):
    found, port = [], 0
    for _ in range(2):
        options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None, "local_directory": str(tmp_path)}
        with LocalCluster(scheduler_port=port, **options) as started:
            port = int(started.scheduler_address.rpartition(":")[2])
            with s2cd.cluster({"kind": "existing", "address": started.scheduler_address}) as client:
                found.append(client.submit(given_up, pure=False).result(timeout=60))
                client.submit(give_up_once, pure=False).result(timeout=60)
    assert found == [False, False]


def test_what_is_no_worker_goes_on_and_remembers(monkeypatch):
    monkeypatch.setattr(lost, "_given_up", [])
    assert not given_up()
    give_up(RuntimeError("CUDA error"))
    assert given_up()
