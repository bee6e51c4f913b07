"""Simulated nodes: Dask workers that sleep as long as reading, the GPU and encoding would take.

Each process holds many workers, each with as many tasks at a time as a node has threads, and one device that takes one
call at a time. Tasks are coroutines: a thousand threads that sleep would fight for Python's lock.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import defaultdict
from typing import Any

import dask
import numpy as np
from distributed import Worker, get_worker

from s2cd.config import RunConfig
from s2cd.inference import Block, Work
from s2cd.outputs import path_of
from s2cd.outputs.store import open_store
from s2cd.pairs import Pair
from s2cd.survey import Survey

# What a real node does with cores of its own and many simulated ones must share: watching their process twice a second.
QUIET = {"distributed.admin.system-monitor.interval": "60s", "distributed.worker.profile.enabled": False}
TIMES = ("survey", "read", "device", "encode")
_devices: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)


async def _sleep(what: str, amount: float) -> None:
    await asyncio.sleep(float(os.environ[f"S2CD_BENCH_{what.upper()}"]) * amount)


async def survey_scene(scene: Any, mask: Any, model: Any) -> Survey:
    """Take the place of `s2cd.survey.survey_scene`."""
    await _sleep("survey", 1)
    bands = len(scene.sources)
    sketch = np.zeros((bands, 172, 172), np.float16)  # as large as that of a full tile
    return Survey(scene.id, 0.9, np.ones((bands, 2), np.float32), np.zeros(bands, np.float32), sketch)


async def infer_block(work: Work, row: int, col: int) -> Block:
    """Take the place of `s2cd.inference._infer_block`: dates are read one after another, then compared."""
    share = 1 / (work.tiling.blocks[0] * work.tiling.blocks[1])
    await _sleep("read", len(work.series.dates) * share)
    async with _devices[get_worker().address]:
        await _sleep("device", len(work.series.pairs) * share)
    return Block(np.zeros((len(work.series.pairs), 1, 1), np.uint16), None)


async def write_pair(blocks: list[list[Block]], *, pair: Pair, config: RunConfig, **_: Any) -> dict[str, Any]:
    """Take the place of `s2cd.runner.write_pair`; the map is empty, its item no more than the catalogue needs."""
    await _sleep("encode", 1)
    store = open_store(config.out)
    store.put(path_of(pair.name, ".tif"), b"a map")
    store.put(path_of(pair.name, ".json"), b'{"bbox": [0, 0, 1, 1]}')
    return {"valid_fraction": 0.9, "changed_fraction": 0.01, "shift": None, "place": config.out}


async def serve(address: str, nodes: int, threads: int) -> None:
    """Run `nodes` workers of `threads` threads each until the scheduler goes."""
    dask.config.set(QUIET)
    workers = [
        await Worker(address, nthreads=threads, memory_limit=0, heartbeat_interval="5s", dashboard=False)
        for _ in range(nodes)
    ]
    await asyncio.gather(*(worker.finished() for worker in workers))


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
