"""How busy a GPU is, as its driver tells."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from statistics import fmean
from typing import Any

INTERVAL = 0.05  # s between two looks

Sample = tuple[float, float, float]
"""Moment, percent of the driver's last sampling period in which a kernel ran, bytes of memory in use."""


@contextmanager
def watched() -> Iterator[list[Sample]]:
    """Yield a list that a thread fills with what the first GPU does meanwhile."""
    import pynvml

    pynvml.nvmlInit()
    gpu, samples, stop = pynvml.nvmlDeviceGetHandleByIndex(0), [], threading.Event()

    def look() -> None:
        while not stop.wait(INTERVAL):
            with suppress(pynvml.NVMLError):  # in a part of a card (MIG), say, the driver does not tell
                busy, used = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu, pynvml.nvmlDeviceGetMemoryInfo(gpu).used
                samples.append((time.time(), float(busy), float(used)))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()
        pynvml.nvmlShutdown()


def seen_since(samples: list[Sample], start: float) -> dict[str, Any]:
    """Return the mean share of time that the GPU was busy since `start`, and the most memory in use [GB]."""
    since = [s for s in samples if s[0] >= start]
    if not since:
        return {}
    return {"gpu_busy": fmean(s[1] for s in since) / 100, "gpu_gb": max(s[2] for s in since) / 1e9}
