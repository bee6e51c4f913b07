"""What is set in every worker process, and why: allocator, threads, GDAL."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import math
import os
import resource
import threading
import time
from collections.abc import Iterator, Mapping

from distributed import Worker, WorkerPlugin
from tornado.ioloop import PeriodicCallback

from s2cd import errors
from s2cd.catalog.access import OPEN_FILES
from s2cd.errors import S2cdError
from s2cd.reader import ROOMS, drop_blocks

# Features of one chunk are buffers of 100 MB and more. glibc returns such a buffer to the kernel at every free, and
# each reuse costs a page fault per 4 KiB: half of the network's time. Large thresholds keep it. One arena, because
# the others (one a thread) hold at most 64 MiB a heap and send every larger request to the kernel whatever the
# thresholds say. Measured in one Dask thread, a 32-channel convolution of 1024 x 1024 px: 0.72 s with Dask's
# defaults, 0.79 s with the thresholds alone, 0.36 s with one arena too.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_ARENA_MAX": "1",
}
_MALLOPT = {"M_TRIM_THRESHOLD": -1, "M_MMAP_THRESHOLD": -3, "M_ARENA_MAX": -8}
_THREAD_POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_RELIEF_MS, _RELIEF_FRACTION = 2000, 0.6
_TRIM_EVERY = 4.0  # seconds
_UNREAD = 60.0  # seconds after which a file is closed
_UNUSED = 60.0  # seconds after which memory of decoded blocks goes back to the kernel
_UNWANTED = 300.0  # seconds after which nobody will come for a decoded block any more; it can be decoded again
_FILES_A_THREAD = 64  # that stay open: those of a unit of work are 48
_GDAL_CACHE_MB = "64"  # a run keeps blocks that it needs again itself; GDAL's own default is 5 % of memory


def worker_environment(threads: int = 1, cores: int | None = None) -> dict[str, str]:
    """Environment variables of a worker process of `threads` Dask threads on `cores` cores (default: the same).

    Dask threads are the parallelism: each runs numpy and torch on one core, and GDAL on its share of the cores.
    The allocator's variables are read when a process starts: set them before it does.
    """
    share = max(1, (cores or threads) // max(1, threads))
    pools = dict.fromkeys(_THREAD_POOLS, "1")
    return ALLOCATOR | pools | {"GDAL_NUM_THREADS": str(share), "GDAL_CACHEMAX": _GDAL_CACHE_MB}


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables of this process, and put the former values back."""
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


class SetupWorker(WorkerPlugin):
    """Prepare a worker process, which others may have started: torch's threads, the allocator. Idempotent.

    A process that keeps freed memory looks full: Dask would pause it, and it would stay paused. So what is free is
    returned to the kernel when the process comes near the limit at which Dask begins to spill, and when it is idle.
    """

    name = "s2cd-setup"

    def __init__(self, cluster: str = "") -> None:
        """Prepare a worker of the cluster whose scheduler has this id."""
        self.cluster = cluster

    def setup(self, worker: Worker) -> None:
        """Run once in each worker process, before its first task."""
        self._relief = PeriodicCallback(lambda: _relieve(worker), _RELIEF_MS)
        self._relief.start()
        logging.getLogger("distributed.worker").addFilter(_in_one_line)
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        OPEN_FILES.most = min(_FILES_A_THREAD * worker.state.nthreads, allowed // 2)
        if os.environ.get("OMP_NUM_THREADS") != "1":  # else torch obeys that, and is imported when first needed
            import torch

            torch.set_num_threads(1)
        if "MALLOC_ARENA_MAX" not in os.environ:
            _tune_running_allocator()
        threading.Thread(target=load_libraries, daemon=True).start()  # while the client searches and plans

    def teardown(self, worker: Worker) -> None:
        """Run when the worker ends or another client registers the plugin anew."""
        self._relief.stop()


def load_libraries() -> None:
    """Import what takes seconds, torch and Numba, and all that the first tasks would."""
    for name in ("s2cd.maps", "s2cd.model.compiled", "s2cd.outputs.halving", "s2cd.predictor"):
        importlib.import_module(name)


def _in_one_line(record: logging.LogRecord) -> bool:
    """Let Dask log without a traceback our own errors, which reach the client, and heartbeats that a cluster missed."""
    if str(record.msg).startswith("Failed to communicate with scheduler during heartbeat"):
        record.exc_info = None
    arguments = record.args if isinstance(record.args, tuple) else ()
    told = next((a for a in arguments if isinstance(a, str) and a.partition("(")[0] in _OUR_ERRORS), None)
    if record.levelno == logging.ERROR and told:
        record.msg, record.args = "%s", (told,)
    return True


_OUR_ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, S2cdError)}


class _Trimmer:
    """Returns to the kernel what this process has freed, at most every few seconds: page faults are what it costs.

    No effect where the C library cannot (macOS, musl).
    """

    def __init__(self) -> None:
        self._last = -math.inf
        self._lock = threading.Lock()

    def __call__(self) -> None:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        with self._lock:
            due = time.monotonic() > self._last + _TRIM_EVERY
            self._last = time.monotonic() if due else self._last
        if due and trim is not None:
            trim(0)


return_free_memory = _Trimmer()


def _relieve(worker: Worker) -> None:
    OPEN_FILES.close(idle=_UNREAD)
    drop_blocks(idle=_UNWANTED)
    limit = worker.memory_manager.memory_limit
    pressed = limit is not None and worker.monitor.get_process_memory() > _RELIEF_FRACTION * limit
    ROOMS.free(idle=0 if pressed else _UNUSED)
    if pressed or not worker.state.executing:
        return_free_memory()


def _tune_running_allocator() -> None:
    """Apply `ALLOCATOR` to a running process; no effect where the C library has no mallopt (macOS, musl)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        limit = (1 << 31) - 1  # mallopt takes an int
        mallopt(_MALLOPT["M_TRIM_THRESHOLD"], limit)
        mallopt(_MALLOPT["M_MMAP_THRESHOLD"], limit)
        mallopt(_MALLOPT["M_ARENA_MAX"], 1)
