"""Functions of ours that Numba compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

Function = Callable[..., Any]


def compiled(**options: Any) -> Callable[[Function], Function]:
    """Compile a function when it is first called, once a machine; it then runs without Python's lock.

    The result lies beside the function's file, or else in the user's cache. There it outlives a change of what other
    modules hold, so that no constant of those is used inside.
    """

    def compile_it(function: Function) -> Function:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written
            return numba.njit(nogil=True, **options)(function)

    return compile_it
