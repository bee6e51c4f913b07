"""When each stage ran in each thread of a worker: wraps the engine's own functions, in this process only."""

from __future__ import annotations

import functools
import importlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

# module, attribute, stage. Nested ones count for the outermost.
STAGES = (
    ("s2cd.reader", "read_window", "decode"),
    ("s2cd.inference", "read_window", "decode"),
    ("s2cd.inference", "_read_date", "decode"),
    ("s2cd.device_reader", "DeviceReader.read", "decode"),
    ("s2cd.inference", "observed", "mask"),
    ("s2cd.model.registry", "Model.encode", "network"),
    ("s2cd.model.registry", "Model.decode", "network"),
    ("s2cd.model.registry", "Model.decode_codes", "network"),
    ("s2cd.survey", "survey_scene", "survey"),
    ("s2cd.outputs.parts", "map_part", "encode"),
    ("s2cd.outputs", "write_map", "encode"),
    ("s2cd.maps", "thumbnail", "encode"),
    ("s2cd.inference", "phase_shift", "displacement"),
)
_events: list[tuple[int, int, str, float, float, float]] = []
_inside = threading.local()


def install() -> list[str]:
    """Wrap what there is of STAGES; return the names."""
    _events.clear()
    return [f"{module}.{name}" for module, name, stage in STAGES if _wrap(module, name, stage)]


def collect() -> list[tuple[int, int, str, float, float, float]]:
    """Return (process, thread, stage, start, stop, CPU seconds of the thread) of every call so far."""
    return list(_events)


def decoded_bytes() -> int:
    """Bytes of pixels that this process has decoded."""
    from s2cd.reader import COUNTS

    return COUNTS.decoded


def _wrap(module: str, name: str, stage: str) -> bool:
    *path, attribute = name.split(".")
    try:
        holder: Any = functools.reduce(getattr, path, importlib.import_module(module))
        function = getattr(holder, attribute)
    except (ImportError, AttributeError):
        return False
    if not hasattr(function, "traced"):
        setattr(holder, attribute, _traced(function, stage))
    return True


def _traced(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if getattr(_inside, "stage", None):
            return function(*args, **kwargs)
        _inside.stage = stage
        start, cpu = time.time(), time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            _inside.stage = None
            spent = time.thread_time() - cpu
            _events.append((os.getpid(), threading.get_ident(), stage, start, time.time(), spent))

    call.traced = True  # type: ignore[attr-defined]
    return call
