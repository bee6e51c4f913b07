"""A worker whose GPU can no longer be trusted is replaced, and its successor reads on the host.

That is after an illegal access, when no process gets a GPU to work again, and after blocks that turned out damaged:
nvCOMP "can only operate on valid input data", say its makers (https://docs.nvidia.com/cuda/nvcomp/release_notes.html),
so that it may have overwritten pixels of other chunks. What the process holds goes with it, and Dask makes it anew.
Where there is no worker to replace, this process reads on the host from then on.
"""

from __future__ import annotations

import logging
import os
from functools import cache
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
    """Tell whether this process, or the one whose place it took, has given up."""
    return bool(_given_up) or _successor()


@cache
def _successor() -> bool:
    worker = _watched_worker()
    return worker is not None and _mark(worker).exists()


def _watched_worker() -> Worker | None:
    try:
        worker = get_worker()
    except ValueError:
        return None
    return worker if worker.nanny else None


def _mark(worker: Worker) -> Path:
    """A file that workers of the same parent share: what they may leave to each other."""
    return Path(worker.local_directory).parent / f"s2cd-no-inflating-{os.getppid()}"
