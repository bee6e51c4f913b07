"""Functions of ours that Numba compiles."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numba
from numba.core.caching import FunctionCache

Function = Callable[..., Any]


class _Cache(FunctionCache):
    """What was compiled, on disk; a full disk, or a quota that is used up, costs the next process time, not its run."""

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled function if that is possible."""
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


def compiled(**options: Any) -> Callable[[Function], Function]:
    """Compile a function when it is first called, once a machine; it then runs without Python's lock.

    The result lies beside the function's file, or else in the user's cache. There it outlives a change of what other
    modules hold, so that no constant of those is used inside.
    """

    def compile_it(function: Function) -> Function:
        dispatcher = numba.njit(nogil=True, **options)(function)
        with contextlib.suppress(RuntimeError):  # neither the package's folder nor the user's cache can be written
            dispatcher._cache = _Cache(function)  # what `cache=True` does with Numba's own
        return dispatcher

    return compile_it
