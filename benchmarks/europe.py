"""Europe for a year: its plan, and its whole task stream through a real scheduler.

Real are the plan, the runner, its graphs, the client, the scheduler and the messages between them. Simulated are the
catalogue (drawn from the orbits, the revisit and the clouds of Europe) and what tasks do: they sleep (see
`benchmarks.nodes`) for the time that reading, the GPU and encoding were measured to take on one node.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import dask
import numpy as np
import psutil
from distributed import Client

from benchmarks import nodes
from benchmarks.measure import ROOT, BenchmarkError, memory
from s2cd import inference, runner
from s2cd.catalog.bands import BANDS, SCL
from s2cd.catalog.scene import Asset, Grid, Scene
from s2cd.clusters.start import SCHEDULING
from s2cd.config import RunConfig
from s2cd.sizes import Workers

TILES = 1300
YEAR = datetime(2023, 1, 1, tzinfo=UTC)
REVISIT = 5  # days, of two satellites over one orbit
ORBITS_OF_A_TILE = (0.28, 0.55, 0.17)  # shares of tiles that one, two or three relative orbits see
CLOUD_WINTER, CLOUD_SUMMER = 0.58, 0.38  # mean cover over Europe; single dates are mostly clear or mostly covered
USED = ("blue", "green", "red", "nir", "nir08", "swir16", "swir22")
GSD = {band.common_name: band.gsd for band in BANDS} | {SCL: 20}


@dataclass(frozen=True)
class Node:
    """What one node is taken to be, and its times for a full tile in seconds.

    cores   of the host, a thread each
    read    of one date, by one core: from the file to the GPU, and what is computed on the host meanwhile
    encode  of one map, by one core
    survey  of one date, by one core
    device  of one pair: how long the GPU was busy
    memory  of the GPU, in bytes
    """

    cores: int = 16
    read: float = 1.0
    encode: float = 5.7
    survey: float = 0.15
    device: float = 0.5
    memory: float = 141e9

    def pairs_per_hour(self) -> tuple[float, str]:
        """What the node could do if it never waited, and what bounds it."""
        host = (self.read + self.encode + self.survey) / self.cores
        return 3600 / max(host, self.device), "its cores" if host > self.device else "its GPU"


def catalogue(tiles: int, seed: int = 0) -> Iterator[Scene]:
    """Draw the scenes of `tiles` tiles, tile by tile: 1 to 3 orbits, every fifth day, clouds by season."""
    rng = np.random.default_rng(seed)
    for number in range(tiles):
        tile = f"{28 + number % 12}{'STUVW'[number % 5]}{chr(65 + number // 26 % 26)}{chr(65 + number % 26)}"
        tile = f"{tile}{number:04d}"
        grids = {10: _grid(number, 10), 20: _grid(number, 20)}
        for orbit in rng.choice(np.arange(1, 144), size=1 + rng.choice(3, p=ORBITS_OF_A_TILE), replace=False):
            first = int(rng.integers(REVISIT))
            for day in range(first, 365, REVISIT):
                yield _scene(tile, int(orbit), YEAR + timedelta(days=day, hours=10.5), _cloud(rng, day), grids)


def _cloud(rng: np.random.Generator, day: int) -> float:
    summer = 0.5 - 0.5 * np.cos(2 * np.pi * (day - 15) / 365)
    mean = CLOUD_WINTER + (CLOUD_SUMMER - CLOUD_WINTER) * summer
    return round(float(100 * rng.beta(0.7 * mean, 0.7 * (1 - mean))), 2)


def _grid(number: int, gsd: int) -> Grid:
    edge = 109800 // gsd
    west, north = 300000.0 + 99960 * (number % 40), 4000000.0 + 99960 * (number // 40)
    return Grid(32628 + number % 12, (float(gsd), 0.0, west, 0.0, -float(gsd), north), (edge, edge))


def _scene(tile: str, orbit: int, time: datetime, cloud: float, grids: dict[int, Grid]) -> Scene:
    name = f"S2A_{tile}_{orbit:03d}_{time:%Y%m%d}_0_L2A"
    folder = f"https://sentinel-cogs.s3.us-west-2.amazonaws.com/sentinel-s2-l2a-cogs/{tile[:2]}/{time:%Y/%m}/{name}"
    assets = {
        band: Asset(band, f"{folder}/{band}.tif", grids[GSD[band]], *((1.0, 0.0) if band == SCL else (1e-4, 0.0)), "")
        for band in (*USED, SCL)
    }
    ring = [[0.0, 0.0], [1.4, 0.0], [1.4, 1.0], [0.0, 1.0], [0.0, 0.0]]
    return Scene(
        id=name,
        provider="earth-search",
        collection="sentinel-2-l2a",
        level="L2A",
        tile=tile,
        orbit=orbit,
        time=time,
        platform="sentinel-2a",
        baseline="05.09",
        cloud_cover=cloud,
        datatake=None,
        footprint={"type": "Polygon", "coordinates": [ring]},
        assets=assets,
    )


def simulate(tiles: int, count: int, node: Node, *, motion: float) -> dict[str, Any]:
    """Run the task stream of `tiles` tiles on `count` simulated nodes; return times, loads and memory.

    `motion` stretches every sleep: 1 is real time, and with more each node asks for less of what all have in common,
    of which the scheduler's, the driver's and this machine's time is. The scheduler runs in a process of its own, the
    driver in this one, the nodes in two more.
    """
    environment = {f"S2CD_BENCH_{what.upper()}": str(getattr(node, what) * motion) for what in nodes.TIMES}
    rows: list[dict[str, float]] = []
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(tempfile.TemporaryDirectory())
        scheduler, address = stack.enter_context(_scheduler())
        for part in _split(count, 2):
            stack.enter_context(_started("benchmarks.nodes", address, str(part), str(node.cores), extra=environment))
        client = stack.enter_context(Client(address))
        client.wait_for_workers(count)
        stack.enter_context(_simulated_tasks(Workers(count, count * node.cores, device=node.memory / node.cores)))
        driver = psutil.Process()
        begin = [_cpu(driver), _cpu(scheduler), time.perf_counter()]

        def look(phase: str, done: int, total: int) -> None:
            if phase == "survey" and done % max(1, total // 40) == 0:
                figures = memory(os.getpid()), memory(scheduler.pid)
                seconds = time.perf_counter() - begin[2]
                rows.append(
                    {"fields": done, "driver_mb": figures[0] / 1e6, "scheduler_mb": figures[1] / 1e6, "s": seconds}
                )

        config = RunConfig(catalog="synthetic", out=out, device="cpu", quicklook=False)
        report = runner.run(config, client, scenes=catalogue(tiles), progress=look)
        spent = [_cpu(driver) - begin[0], _cpu(scheduler) - begin[1], time.perf_counter() - begin[2]]
    pairs = report.count("written")
    if pairs < len(report.maps):
        failed = next(m for m in report.maps if m.status != "written")
        raise BenchmarkError(f"{len(report.maps) - pairs} simulated maps were not written, the first: {failed.error}")
    working = spent[2] - rows[0]["s"]
    rate, _ = node.pairs_per_hour()
    return {
        "tiles": tiles,
        "nodes": count,
        "motion": motion,
        "pairs": pairs,
        "wall_s": spent[2],
        "before_first_task_s": rows[0]["s"],
        "driver_cpu_ms_per_pair": 1000 * spent[0] / pairs,
        "scheduler_cpu_ms_per_pair": 1000 * spent[1] / pairs,
        "driver_busy": spent[0] / spent[2],
        "scheduler_busy": spent[1] / spent[2],
        "pairs_per_hour": 3600 * motion * pairs / working,
        "busy": 3600 * motion * pairs / working / (count * rate),
        "node": asdict(node),
        "memory": rows,
    }


def measured_node(results: Path, *, device: float | None = None, read: float | None = None) -> Node:
    """Return the node that the newest recording of a GPU tells of, where it made a map in the shortest time.

    Raises BenchmarkError where none is recorded.
    """
    recorded = [json.loads(path.read_text()) for path in sorted(results.glob("*-run-*px.json"))]
    newest = next((d for d in reversed(recorded) if "gpu" in d["parts"]), None)
    if newest is None:
        raise BenchmarkError(f"{results}: found no recorded run on a GPU, expected one: benchmarks run --part gpu")
    run = min(newest["parts"]["gpu"]["runs"], key=lambda r: r["seconds_per_map"])
    stages, maps = run["stages_cpu_s"], run["maps"]
    dates = (maps + 1) * run["decoded_over_needed"]  # as often as they were read
    beside = stages["decode"] + stages["mask"] + stages["network"]
    return Node(
        cores=newest["machine"]["cores"],
        read=beside / dates if read is None else read,
        encode=(run["worker_cpu_s"] - beside - stages["survey"]) / maps,
        survey=stages["survey"] / (maps + 1),
        device=run["gpu_busy"] * run["wall_s"] / maps if device is None else device,
    )


def describe(runs: list[dict[str, Any]]) -> str:
    """Say what runs of the simulation mean, in Markdown."""
    node = Node(**runs[-1]["node"])
    rate, bound = node.pairs_per_hour()
    longest = max(runs, key=lambda r: r["pairs"])
    lines = [
        f"A node: a GPU and {node.cores} cores, as measured: for a full tile {node.read:.2f} core-s to read a date, "
        f"{node.encode:.1f} core-s to encode a map, {node.device:.2f} s of the GPU a pair: {rate:,.0f} pairs an hour "
        f"where nothing waits, bound by {bound}.",
        "",
        "| nodes | tiles | pairs | sleeps stretched | wall s | plan s | pairs an hour | of what the nodes can |"
        " scheduler, ms a pair | busy | driver, ms a pair | busy |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(runs, key=lambda r: (r["nodes"], r["motion"], r["tiles"])):
        kept_busy = r["motion"] >= 1  # with shorter sleeps the nodes are not what a run waits for
        cells = (
            f"{r['nodes']}",
            f"{r['tiles']:,}",
            f"{r['pairs']:,}",
            f"{r['motion']:g}",
            f"{r['wall_s']:,.0f}",
            f"{r['before_first_task_s']:.0f}",
            f"{r['pairs_per_hour']:,.0f}" if r["motion"] == 1 else "",
            f"{r['busy']:.0%}" if kept_busy else "",
            f"{r['scheduler_cpu_ms_per_pair']:.1f}",
            f"{r['scheduler_busy']:.0%}",
            f"{r['driver_cpu_ms_per_pair']:.1f}",
            f"{r['driver_busy']:.0%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    widest = max((r for r in runs if r["motion"] >= 1), key=lambda r: r["nodes"], default=None)
    if widest:
        most = 3.6e6 / max(widest["scheduler_cpu_ms_per_pair"], widest["driver_cpu_ms_per_pair"])
        lines += [
            "",
            f"Busy as on {widest['nodes']} nodes, the scheduler and the driver, a core each, can serve {most:,.0f} "
            f"pairs an hour: {most / rate:.0f} nodes that never wait.",
        ]
    lines += ["", f"Memory while {longest['tiles']} tiles run, MB:", ""]
    lines += ["| fields of view | driver | scheduler |", "|---|---|---|"]
    rows = longest["memory"]
    for row in rows[:: max(1, len(rows) // 8)]:
        lines.append(f"| {row['fields']:.0f} | {row['driver_mb']:.0f} | {row['scheduler_mb']:.0f} |")
    return "\n".join(lines)


@contextlib.contextmanager
def _simulated_tasks(workers: Workers) -> Iterator[None]:
    """The runner as it is, but for the three functions that its tasks call, and for what the workers say they have."""
    with (
        mock.patch.object(runner.Workers, "of_client", return_value=workers),
        mock.patch.object(runner, "survey_scene", nodes.survey_scene),
        mock.patch.object(runner, "write_pair", nodes.write_pair),
        mock.patch.object(inference, "_infer_block", nodes.infer_block),
    ):
        yield


@contextlib.contextmanager
def _scheduler() -> Iterator[tuple[psutil.Process, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ("scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard", "--no-jupyter")
    with dask.config.set(SCHEDULING):
        settings = dask.config.serialize(dask.config.config)
    with _started("dask", *arguments, extra={"DASK_INTERNAL_INHERIT_CONFIG": settings}) as process:
        yield psutil.Process(process.pid), f"tcp://127.0.0.1:{port}"


@contextlib.contextmanager
def _started(module: str, *arguments: str, extra: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **(extra or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()


def _split(count: int, parts: int) -> list[int]:
    return [n for n in (len(range(i, count, parts)) for i in range(parts)) if n]


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
