"""Functions of ours that Numba compiles."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

Function = Callable[..., Any]


class CacheFiles(IndexDataCacheFile):
    """Files of what was compiled, each with a name that follows from its types and processor.

    Numba numbers them, and two processes that compile for other types, or on machines of another kind that share a
    home, may take one number at once: each would then be given the code of the other.
    """

    def save(self, key: Any, data: Any) -> None:
        """Keep what was compiled before it is listed, so that no reader finds an older file of that name."""
        name = self._data_name(int(hashlib.sha256(repr(key).encode()).hexdigest()[:12], 16))
        self._save_data(name, data)
        self._save_index({**self._load_index(), key: name})


class _Cache(FunctionCache):
    """What was compiled, on disk; a full disk, or a quota that is used up, costs the next process time, not its run."""

    def __init__(self, function: Function) -> None:
        super().__init__(function)
        self._cache_file = CacheFiles(
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=self._impl.locator.get_source_stamp(),
        )

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
