"""A worker whose GPU has failed it is replaced: after an illegal access no process gets a GPU to work again.

Its successors read on the host. Blocks of a damaged file are the likeliest reason: nvCOMP trusts what it is given, and
the host names the file.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path

from distributed import Worker, get_worker

_LOG = logging.getLogger(__name__)


def replace_worker(why: BaseException) -> None:
    """End the process of this task's worker, so that its nanny starts another; do nothing where there is none."""
    worker = _watched_worker()
    if worker is None:
        return
    _mark(worker).touch()
    _LOG.error("%s: its process ends and another one reads on the host: %s", worker.address, " ".join(str(why).split()))
    logging.shutdown()
    os._exit(1)


@cache
def replaced() -> bool:
    """Tell whether this process took the place of one whose GPU had failed it."""
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
