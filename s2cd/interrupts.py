"""Ctrl-C, and what ends jobs, where it may not hit anything: noted, to be acted on at the next good moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any


@contextmanager
def noted_interrupts(interrupted: threading.Event) -> Iterator[None]:
    """Note the first Ctrl-C instead of raising it anywhere: Python drops one that hits while it frees an object.

    A second one is raised where it hits. Handlers that others installed, and other threads, are left alone.
    """
    default = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or _noted:
        yield
        return

    def note(_number: int, _frame: Any) -> None:
        signal.signal(signal.SIGINT, default)
        interrupted.set()

    heard = signal.getsignal(signal.SIGINT) is default  # a job in the background ignores it
    _noted.append(interrupted)
    if heard:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        _noted.clear()
        if heard:
            signal.signal(signal.SIGINT, default)


_noted: list[threading.Event] = []
"""What tells of an interrupt while it is noted."""


@contextmanager
def terminated_like_interrupts(terminated: threading.Event) -> Iterator[None]:
    """Let the first SIGTERM, by which batch systems and services end a program, do what Ctrl-C does; note which it was.

    A second one ends the program at once. Other threads, and handlers that others installed, are left alone.
    """
    default = signal.SIG_DFL
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not default:
        yield
        return

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, default)
        terminated.set()
        if not _noted:
            signal.default_int_handler(number, frame)
        for interrupted in _noted:
            interrupted.set()

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, default)


@contextmanager
def deaf_processes() -> Iterator[None]:
    """Let processes that start meanwhile, here or in threads that start meanwhile, never hear a Ctrl-C.

    A terminal sends it to all of them: one that is still importing would print its traceback. Whoever started them has
    to end them.
    """
    resource_tracker.ensure_running()  # what starts it later would let its thread, and so the next process, hear again
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
