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
    peak = 0
    root = psutil.Process(child.pid)
    while child.poll() is None:
        with contextlib.suppress(psutil.Error):
            peak = max(peak, tree_memory(root))
        time.sleep(INTERVAL)
    return peak


def tree_memory(root: psutil.Process) -> int:
    """Bytes of memory of a process and its descendants: what is their own, and the largest share of mapped files."""
    parts = [_resident(p.pid) for p in (root, *root.children(recursive=True))]
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
