"""Run one measurement in a process of its own and watch the memory of all its processes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
INTERVAL = 0.2  # s between two looks at the memory
LISTED = 10  # looks between two at which processes there are, which takes more than a look at their memory


class BenchmarkError(RuntimeError):
    """A measurement did not come to its end."""


def measure(workload: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Run `benchmarks.workloads.<workload>(**settings)` in a fresh process; return its result and the peak memory.

    `others_cores` is how many cores other programs kept busy meanwhile: with more than a few tenths, wall times say
    little. Peak memory is the largest sum, at any moment, over that process and all its descendants: client,
    scheduler and workers. Raises BenchmarkError if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        before = _busy(), _own(), time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.child", workload, json.dumps(settings), str(answer)]
        child = subprocess.Popen(command, cwd=ROOT)
        try:
            peak = _watch(child)
        finally:
            if child.poll() is None:
                child.kill()
        if child.returncode or not answer.exists():
            raise BenchmarkError(f"{workload} ended with status {child.returncode}")
        result = json.loads(answer.read_text())
        own, wall = _own() - before[1], time.perf_counter() - before[2]
        return {**result, "peak_gb": peak / 1e9, "others_cores": max(0.0, _busy() - before[0] - own) / wall}


def _busy() -> float:
    """CPU seconds that the whole machine has spent so far."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system


def _own() -> float:
    """CPU seconds of this process and of the children that have ended."""
    return sum(os.times()[:4])


def _watch(child: subprocess.Popen[bytes]) -> int:
    peak, look, tree = 0, 0, [child.pid]
    while child.poll() is None:
        if look % LISTED == 0:
            with contextlib.suppress(psutil.Error):
                tree = [child.pid, *(p.pid for p in psutil.Process(child.pid).children(recursive=True))]
        peak, look = max(peak, _memory_of(tree)), look + 1
        time.sleep(INTERVAL)
    return peak


def _memory_of(tree: list[int]) -> int:
    """Bytes of memory of these processes: what is their own, and the largest share of mapped files."""
    parts = [_resident(pid) for pid in tree]
    return sum(own for own, _ in parts) + max(mapped for _, mapped in parts)


def memory(pid: int) -> int:
    """Resident memory of one process in bytes; 0 if it is gone."""
    return sum(_resident(pid))


def _resident(pid: int) -> tuple[int, int]:
    """Anonymous and shared memory, and mapped files, in bytes. (Proportional set sizes cost a look at every page.)"""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {name: int(text.split()[0]) * 1024 for name, _, text in (x.partition(":") for x in lines) if "Rss" in name}
    return sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0), sizes.get("RssFile", 0)
