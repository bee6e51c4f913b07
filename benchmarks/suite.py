"""The measurements of `run` and `compare`: what is run, in which order, and what follows from the figures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import rasterio

from benchmarks.data import prepare
from benchmarks.machine import describe, load
from benchmarks.measure import BenchmarkError, measure
from benchmarks.workloads import CORES, TRY_OUT
from s2cd.catalog.scene import Scene
from s2cd.clusters.environment import environment, worker_environment

HERE = Path(__file__).parent
RESULTS = HERE / "results"
UNLIKE = 0.05  # of a probability: maps that differ by more are not of the same network and dates
PARTS = ("engine", "stages", "scaling", "dates", "tiles", "archive")
GPU_PARTS = ("gpu",)
GPU_DATES = 21  # 20 maps
PROCESSES = 2  # as in cluster/one-gpu.yaml
LATENCIES = (None, 0.02, 0.1)  # seconds; None: local files
WORKLOADS = {"s2cd": "engine", "stackstac script": "stackstac_script", "rasterio loop": "rasterio_loop"}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What a benchmark works on; `small` is the size that comes from an archive.

    rounds  how often what is held against something else runs in turn with it, since the speed of many machines drifts
    """

    folder: str
    work: str
    size: int = 10980
    dates: int = 6
    source: str = "auto"
    small: int = 3660
    rounds: int = 3

    def series(self, **changes: Any) -> dict[str, Any]:
        """Arguments of a workload."""
        base = {"folder": self.folder, "size": self.size, "dates": self.dates, "source": self.source}
        return {**base, **changes}

    def out(self, name: str) -> str:
        """Folder for the maps of `name`."""
        return str(Path(self.work) / name.replace(" ", "-"))


def run_parts(settings: Settings, parts: tuple[str, ...], say: Say) -> dict[str, Any]:
    """Measure some of PARTS; return what they gave, under their names."""
    functions = {
        "engine": engine, "stages": stages, "scaling": scaling, "dates": by_dates, "tiles": by_tiles,
        "archive": by_latency, "gpu": on_gpu,
    }  # fmt: skip
    results = {}
    for part in parts:
        say(f"{part} ...")
        results[part] = functions[part](settings, say)
    return results


def engine(settings: Settings, say: Say) -> dict[str, Any]:
    """This project, end to end, default settings."""
    result = _measure("engine", settings.series(out=settings.out("s2cd")))
    say(f"  {result['seconds_per_map']:.1f} s a map, {result['peak_gb']:.2f} GB")
    return result


def stages(settings: Settings, say: Say) -> dict[str, Any]:
    """Each stage alone, in turn with whole runs that make the maps for it; medians of the rounds."""
    maps, names = settings.out("s2cd"), ("decode", "network", "encode")
    rounds = []
    for _ in range(settings.rounds):
        wall = _measure("engine", settings.series(out=maps, traced=False))["wall_s"]
        with environment(worker_environment(CORES)):  # or the allocator alone would make the limit easier to reach
            alone = _measure("stages", settings.series(maps=maps, out=settings.out("stages")))
        limit = sum(alone[name] for name in names) / alone["cores"]
        rounds.append({**{name: alone[name] for name in names}, "wall_s": wall, "of_limit": limit / wall})
        say(f"  {', '.join(f'{name} {alone[name]:.1f}' for name in names)} core-s alone, a run {wall:.1f} s")
    return {**_medians(rounds), "rounds": rounds}


def scaling(settings: Settings, say: Say) -> dict[str, Any]:
    """One worker against two: as threads of one process (the default), and as processes; medians of rounds in turn."""
    cases = {"1 thread": (1, 1), "2 threads": (1, 2), "2 processes": (2, 1)}
    rounds: list[dict[str, float]] = []
    for _ in range(settings.rounds):
        rounds.append({})
        for name, (processes, threads) in cases.items():
            series = settings.series(out=settings.out("scaling"), processes=processes, threads=threads)
            rounds[-1][name] = _measure("engine", series)["wall_s"]
            say(f"  {name}: {rounds[-1][name]:.1f} s")
    return {"size": settings.size, **_medians(rounds), "rounds": rounds}


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}


def by_dates(settings: Settings, say: Say) -> dict[str, Any]:
    """Peak memory against the number of dates."""
    return _memory(settings, say, "dates", [{"dates": n} for n in (6, 24, 72)])


def by_tiles(settings: Settings, say: Say) -> dict[str, Any]:
    """Peak memory against the number of tiles."""
    return _memory(settings, say, "tiles", [{"tiles": n} for n in (1, 4, 16)])


def by_latency(settings: Settings, say: Say) -> dict[str, Any]:
    """Time a map against the time that an archive takes to answer a request; medians of rounds in turn."""
    size = min(settings.size, settings.small)
    rounds: list[dict[str, float]] = []
    for _ in range(settings.rounds):
        rounds.append({})
        for latency in LATENCIES:
            series = settings.series(size=size, out=settings.out("archive"), latency=latency, traced=False)
            rounds[-1][_distance(latency)] = _measure("engine", series)["seconds_per_map"]
            say(f"  {_distance(latency)}: {rounds[-1][_distance(latency)]:.2f} s a map")
    medians = _medians(rounds).items()
    return {"size": size, "rows": [{"from": name, "seconds_per_map": s} for name, s in medians], "rounds": rounds}


def on_gpu(settings: Settings, say: Say) -> dict[str, Any]:
    """This project on a GPU, end to end, over twenty maps; and what the GPU is busy with alone."""
    threads = max(1, CORES // PROCESSES)
    cases = {
        "a worker": {"gpu": "cuda"},
        f"{PROCESSES} workers that share it": {"gpu": "local", "processes": PROCESSES, "threads": threads},
    }
    runs = []
    for what, case in cases.items():
        result = _measure("engine", settings.series(dates=GPU_DATES, out=settings.out("gpu"), **case))
        result.pop("gantt")
        runs.append({"what": what, **result})
        say(f"  {what}: {_gpu_line(result)}")
    alone = _measure("device", settings.series(out=settings.out("device")))
    return {"runs": runs, "alone": alone["rows"]}


def _gpu_line(result: dict[str, Any]) -> str:
    busy = f"busy {result['gpu_busy']:.0%}" if "gpu_busy" in result else "the driver does not tell how busy"
    return f"{result['seconds_per_map']:.2f} s a map, {busy}"


def _measure(workload: str, series: dict[str, Any]) -> dict[str, Any]:
    """Measure a workload on data that are there before, since preparing them takes memory, and in the page cache."""
    for needed in (series, *([series | TRY_OUT] if "gpu" in series else [])):
        dates = min(needed["dates"], 6)
        _read_once(prepare(Path(needed["folder"]), size=needed["size"], dates=dates, source=needed["source"]).scenes)
    return measure(workload, series)


def _read_once(scenes: Iterable[Scene]) -> None:
    """Read all files: else what a peer drove out of the page cache would come from the disk, in the next one's time."""
    for href in {asset.href for scene in scenes for asset in scene.assets.values()}:
        with open(href, "rb") as file:
            while file.read(1 << 24):
                pass


def _distance(latency: float | None) -> str:
    return "local files" if latency is None else f"an archive {1000 * latency:.0f} ms away"


def _memory(settings: Settings, say: Say, axis: str, cases: list[dict[str, int]]) -> dict[str, Any]:
    """Peak memory of each case; of the first, which others are held against, the median of rounds."""
    rows = []
    for number, case in enumerate(cases):
        runs = []
        for _ in range(1 if number else settings.rounds):
            runs.append(_measure("engine", settings.series(out=settings.out(axis), traced=False, **case)))
            say(f"  {case[axis]} {axis}: {runs[-1]['peak_gb']:.3f} GB, {runs[-1]['seconds_per_map']:.2f} s a map")
        runs.sort(key=lambda run: run["peak_gb"])
        kept = {k: runs[len(runs) // 2][k] for k in ("peak_gb", "wall_s", "maps", "decoded_over_needed")}
        rows.append({axis: case[axis], **kept, "peaks_gb": [run["peak_gb"] for run in runs]})
    return {"size": settings.size, "rows": rows}


def compare(settings: Settings, rounds: int, say: Say) -> dict[str, Any]:
    """This project and the peers in alternation on the same data; their maps must agree.

    Raises BenchmarkError if they do not.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WORKLOADS}
    for number in range(rounds):
        for name, workload in WORKLOADS.items():
            with environment(worker_environment(CORES)):  # the allocator's settings, which s2cd's workers have
                result = _measure(workload, settings.series(out=settings.out(name)))
            result.pop("gantt", None)
            runs[name].append(result)
            say(f"  round {number + 1}, {name}: {result['wall_s']:.1f} s, {result['peak_gb']:.2f} GB")
    agreement = {name: _agreement(settings.out("s2cd"), settings.out(name)) for name in list(WORKLOADS)[1:]}
    wall = {name: statistics.median(r["wall_s"] for r in results) for name, results in runs.items()}
    return {
        "wall_s": wall,
        "seconds_per_map": {name: wall[name] / results[0]["maps"] for name, results in runs.items()},
        "peak_gb": {name: max(r["peak_gb"] for r in results) for name, results in runs.items()},
        "ratio": {name: wall[name] / wall["s2cd"] for name in wall},
        "largest_difference": agreement,
        "others_cores": max(r["others_cores"] for results in runs.values() for r in results),
        "rounds": {name: [r["wall_s"] for r in results] for name, results in runs.items()},
    }


def _agreement(ours: str, theirs: str) -> float:
    """Largest difference between two folders of maps. Raises BenchmarkError if it is more than UNLIKE.

    The target, 0.01, is judged in the table: a single pixel misses it where bfloat16 rounds its inputs another way.
    """
    found = [{path.name: path for path in Path(out).rglob("S2CD_*.tif")} for out in (ours, theirs)]
    if not found[0] or found[0].keys() != found[1].keys():
        raise BenchmarkError(f"{theirs} holds {len(found[1])} maps, expected the {len(found[0])} of {ours}")
    worst = max(_difference(found[0][name], found[1][name]) for name in found[0])
    if not worst <= UNLIKE:
        raise BenchmarkError(f"maps in {theirs} differ by {worst:g} from those in {ours}, expected {UNLIKE} at most")
    return worst


def _difference(a: Path, b: Path) -> float:
    """Largest difference of two maps, infinite where only one has a value; read in strips."""
    worst = 0.0
    with rasterio.open(a) as first, rasterio.open(b) as second:
        for top in range(0, first.height, 1024):
            window = rasterio.windows.Window(0, top, first.width, min(1024, first.height - top))
            one, two = first.read(1, window=window), second.read(1, window=window)
            if (np.isnan(one) != np.isnan(two)).any():
                return float("inf")
            worst = max(worst, float(np.nanmax(np.abs(one - two), initial=0)))
    return worst


def save(kind: str, settings: Settings, parts: dict[str, Any], load_before: float, folder: Path | None = None) -> Path:
    """Record what was measured, by default in RESULTS; return the file."""
    folder = folder or RESULTS
    shown = {k: v for k, v in asdict(settings).items() if k not in {"folder", "work"}}
    document = {
        "kind": kind,
        **describe(),
        "load": {"before": load_before, "after": load()},
        "settings": {**shown, "cores": CORES},
        "parts": parts,
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{datetime.now(UTC):%Y%m%dT%H%M}-{kind}-{settings.size}px.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path
