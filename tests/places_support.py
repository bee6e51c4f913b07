"""The demo catalogue, and the maps of it, for tests that run it in several places."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import dask
import pytest
import torch
from distributed import Client
from distributed.comm import connect
from distributed.security import Security

import s2cd
from s2cd.errors import S2cdWarning
from s2cd.runner import Report, run
from s2cd.simulate import simulate

BIN = Path(sys.executable).parent
PAIRS = 6


def demo_catalogue(folder: Path) -> str:
    """Simulate seven clear dates of one orbit; return the catalogue's path."""
    return str(simulate(folder, size=(256, 300), dates=PAIRS + 1, orbits=(51,), clouds=False))


def maps_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.rglob("*.tif")}


def maps_by(scheduler: str, catalog: str, out: Path) -> dict[str, bytes]:
    """Maps of the catalogue by one of Dask's schedulers without workers, step by step.

    With one torch thread, as on workers: with more, sums are taken in another order and a pixel in 500 000 is
    rounded to the next step of 1/1024.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings(action="ignore", category=S2cdWarning), dask.config.set(scheduler=scheduler):
        scenes = s2cd.search(catalog)
        change = s2cd.detect_changes(s2cd.open_cube(scenes), s2cd.consecutive_pairs(scenes))
        s2cd.write_change_maps(change, str(out))
    torch.set_num_threads(threads)
    return maps_of(out)


def run_in_small_parts(
    catalog: str, out: Path, client: Client, progress: Callable[[str, int, int], None] | None = None
) -> Report:
    """Map the catalogue with one task a pair, so that every worker gets some."""
    config = s2cd.RunConfig(catalog=catalog, out=str(out), min_valid=0.0, dates_per_task=2)
    with warnings.catch_warnings(action="ignore", category=S2cdWarning):
        return run(config, client, progress=progress)


@contextmanager
def background(
    command: list[str], log: Path, env: dict[str, str] | None = None, cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block, and what it started with it; its output goes to `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | (env or {}),
            cwd=cwd,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children: politely, then for good."""
    for order in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, order)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)


def wait_for_file(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear within {seconds} s"
        time.sleep(0.1)


def call(address: str, security: Security) -> None:
    """Connect to a scheduler or worker, as a client does first. Raises OSError or TypeError if it refuses."""

    async def connected() -> None:
        comm = await connect(address, timeout=3, **security.get_connection_args("client"))
        await comm.close()

    asyncio.run(connected())


def refuses_strangers(address: str) -> None:
    """Fail if someone without a certificate, or with one of his own, can talk to what listens there."""
    for stranger in (Security(), Security.temporary()):
        with pytest.raises((OSError, TypeError)):
            call(address.replace("tcp:", "tls:"), stranger)
    with pytest.raises(OSError):
        call(address.replace("tls:", "tcp:"), Security())
