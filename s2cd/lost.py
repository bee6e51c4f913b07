"""A worker whose GPU can no longer be trusted is replaced, and from then on its cluster reads on the host.

That is after an illegal access, when no process gets a GPU to work again, and where decompressing a damaged block wrote
beyond its place: nvCOMP "can only operate on valid input data", say its makers
(https://docs.nvidia.com/cuda/nvcomp/release_notes.html), so that pixels of other chunks may be overwritten. What the
process holds goes with it, and Dask makes it anew. Where there is no worker to replace, this process reads on the host
from then on.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from distributed import Worker, get_worker

_LOG = logging.getLogger(__name__)
_given_up: list[BaseException] = []


def give_up(why: BaseException) -> None:
    """End the process of this task's worker, so that its nanny starts another; without one, inflate nothing more."""
    _given_up.append(why)
    worker = _watched_worker()
    if worker is None:
        return
    _mark(worker).touch()
    _LOG.error("%s: its process ends and another one reads on the host: %s", worker.address, " ".join(str(why).split()))
    logging.shutdown()
    os._exit(1)


def given_up() -> bool:
    """Tell whether this process has given up, or one of the same cluster that could write to the same folder."""
    if not _given_up and (worker := _watched_worker()) is not None and (mark := _mark(worker)).exists():
        _given_up.append(RuntimeError("another process gave up"))
        _LOG.warning("%s reads on the host from now on: %s exists", worker.address, mark)
    return bool(_given_up)


def _watched_worker() -> Worker | None:
    try:
        worker = get_worker()
    except ValueError:
        return None
    return worker if worker.nanny else None


def _mark(worker: Worker) -> Path:
    """A file that the workers of a cluster share, if they share a scratch folder: named by its scheduler's id.

    Another cluster may have its address one day.
    """
    known = getattr(worker.plugins.get("s2cd-setup"), "cluster", "") or str(worker.scheduler.address)
    cluster = hashlib.sha256(known.encode()).hexdigest()[:16]
    return Path(worker.local_directory).parent / f"s2cd-no-inflating-{cluster}"
