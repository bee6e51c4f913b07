"""Work that was meant for workers which are gone goes to those that come."""

from __future__ import annotations

from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin


class Anywhere(SchedulerPlugin):
    """Let a worker that joins take tasks that no worker is there for, wherever they were sent.

    Dask heeds `allow_other_workers` as a task becomes ready; one that waits for a worker it gives to none but those
    named, whose addresses never come again. Without this a run whose workers were all gone for a moment (killed for
    their memory, preempted) would wait for ever.
    """

    name = "s2cd-anywhere"
    idempotent = True

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Lift the preference of the tasks that wait, before Dask looks for some for this worker."""
        for task in scheduler.unrunnable:
            if task.loose_restrictions:
                task.worker_restrictions = set()
