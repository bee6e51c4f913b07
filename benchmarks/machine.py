"""What a result was measured on, in words that name no host and no folder."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import rasterio

PACKAGES = ("s2cd", "dask", "distributed", "numpy", "rasterio", "stackstac", "torch", "xarray")


def describe() -> dict[str, Any]:
    """Return date, processor, cores, memory, device and versions."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "threads_per_core": _threads_per_core(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "device": _device(),
        },
        "versions": {
            "python": platform.python_version(),
            "gdal": rasterio.__gdal_version__,
            **{p: version(p) for p in PACKAGES},
        },
    }


def load() -> float:
    """Return the load average of the last minute: what else kept the machine busy."""
    return round(os.getloadavg()[0], 2)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    kinds = [kind for kind in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if kind in flags.split()]
    return f"{names[0] if names else platform.machine()} ({', '.join(kinds)})"


def _threads_per_core() -> int:
    siblings = Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
    text = siblings.read_text().strip() if siblings.exists() else "0"
    return max(len(text.replace("-", ",").split(",")), 1)


def _device() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
