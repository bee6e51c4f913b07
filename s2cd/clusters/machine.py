"""The cores and the memory that this process may use, by CPU affinity and cgroup limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number close to 2**63


def available_cores(root: str | Path = "/") -> int:
    """Cores this process may run on: the smaller of its CPU affinity and its cgroups' quota, at least 1.

    `root` is where /proc and /sys are found.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    for folder in _cgroup_folders(Path(root), "cpu"):
        quota, period = _quota(folder)
        if quota > 0 and period > 0:
            cores = min(cores, quota / period)
    return max(1, int(cores))


def available_memory(root: str | Path = "/") -> int:
    """Bytes of memory this process may use: the smaller of physical memory and its cgroups' limits."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _cgroup_folders(Path(root), "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name)
            if text.isdigit() and 0 < int(text) < _UNLIMITED:
                limit = min(limit, int(text))
    return limit


def _quota(folder: Path) -> tuple[float, float]:
    """CPU quota and period in microseconds, of cgroup v2 or v1; (0, 0) is no limit."""
    words = _read(folder / "cpu.max").split()
    if not words:
        words = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
    try:
        return float(words[0]), float(words[1])
    except (ValueError, IndexError):
        return 0.0, 0.0


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """This process's cgroup and its ancestors, since a limit on any of them binds."""
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            tops = [mount, mount / "unified"]
        elif controller in controllers.split(","):
            tops = [mount / controllers, mount / controller]
        else:
            continue
        for top in tops:
            folder = top / path.lstrip("/")
            yield from (top, *(top / parent for parent in folder.relative_to(top).parents), folder)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
