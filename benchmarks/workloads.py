"""What is measured, each in a process of its own: this project, its peers, its stages alone."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rasterio

import s2cd
from benchmarks import data as prepared
from benchmarks import trace
from benchmarks.archive import archive
from benchmarks.device import seen_since, watched
from s2cd.catalog import access
from s2cd.catalog.scene import Scene
from s2cd.clusters.environment import load_libraries
from s2cd.reader import Layout, decoded

if TYPE_CHECKING:
    from distributed import Client

    from s2cd.model import Model

CORES = len(os.sched_getaffinity(0))
TRY_OUT = {"size": 1098, "dates": 3}


def _scenes(folder: str, size: int, dates: int, source: str, tiles: int = 1) -> prepared.Data:
    data = prepared.prepare(Path(folder), size=size, source=source, dates=min(dates, 6))
    if dates == len(data.scenes) and tiles == 1:
        return data
    return prepared.repeated(data, Path(folder), dates=dates, tiles=tiles)


def local_profile(processes: int, threads: int) -> dict[str, Any]:
    """The cluster that this project and the peers get."""
    return {"kind": "local", "processes": processes, "threads": threads, "dashboard": 0}


CUDA = {"kind": "cuda", "dashboard": 0}


def engine(
    *,
    folder: str,
    out: str,
    size: int,
    dates: int,
    source: str = "auto",
    tiles: int = 1,
    processes: int = 1,
    threads: int = CORES,
    options: dict[str, Any] | None = None,
    traced: bool = True,
    latency: float | None = None,
    gpu: str | None = None,
) -> dict[str, Any]:
    """`s2cd.run` on a local cluster; libraries, cluster and model are loaded before the clock, as for the peers.

    latency  seconds that the archive takes to answer, which the files come from; None: local files
    gpu      "cuda" for a worker a GPU, "local" for `processes` that share one; how busy it is is told then
    """
    from distributed import get_task_stream

    from s2cd.runner import run

    data = _scenes(folder, size, dates, source, tiles)
    shutil.rmtree(out, ignore_errors=True)
    config = s2cd.RunConfig(catalog="given", out=out, quicklook=True, **(options or {}))
    with (
        _served(data.scenes, Path(folder), latency) as scenes,
        s2cd.cluster(CUDA if gpu == "cuda" else local_profile(processes, threads)) as client,
        watched() if gpu else nullcontext([]) as samples,
    ):
        _load_model(client)
        if gpu:
            _try_out(client, Path(folder), source)
        found = client.run(trace.install) if traced else {}
        cpu = sum(client.run(time.process_time).values())
        decoded = sum(client.run(trace.decoded_bytes).values())
        with get_task_stream(client) as stream:
            started, origin = time.perf_counter(), time.time()
            report = run(config, client, scenes=scenes)
            wall = time.perf_counter() - started
        seen = seen_since(samples, origin)
        cpu = sum(client.run(time.process_time).values()) - cpu
        events = [e for part in client.run(trace.collect).values() for e in part] if traced else []
        decoded = sum(client.run(trace.decoded_bytes).values()) - decoded
        tasks = [t for t in stream.data if t["status"] == "OK"]
        chosen = _chosen(config, client, data, len(report.maps))
    failed = [m for m in report.maps if m.status != "written"]
    if failed:
        raise RuntimeError(f"{len(failed)} maps were not written, the first: {failed[0]}")
    maps = len(report.maps)
    return {
        "wall_s": wall,
        "maps": maps,
        "seconds_per_map": wall / maps,
        "worker_cpu_s": cpu,
        "decoded_over_needed": decoded / data.unique_bytes,
        "tasks_per_pair": len(tasks) / maps,
        "stages_cpu_s": _cpu_by_stage(events),
        "settings": chosen,
        "traced": sorted({name for names in found.values() for name in names}),
        "gantt": _gantt(events, origin),
        **seen,
    }


def _chosen(config: s2cd.RunConfig, client: Client, data: prepared.Data, maps: int) -> dict[str, Any]:
    """What a run with `config` works with, given or chosen by itself."""
    from s2cd.model.device import fast_bfloat16
    from s2cd.sizes import Workers, task_sizes

    workers, model = Workers.of_client(client, config.device), s2cd.load_model(config.model, config.device)
    assert workers is not None
    sizes = task_sizes(config, (data.size, data.size), maps, model, workers)
    return {
        "model": f"{model.name} {model.hash[:12]}",
        "precision": "bfloat16" if fast_bfloat16(model.device) else "float32",
        "chunk": sizes.chunk,
        "dates_a_task": sizes.dates,
        "workers": workers.count,
        "threads": workers.threads,
        "cog_profile": config.cog_profile,
    }


def _cpu_by_stage(events: list[tuple[int, int, str, float, float, float]]) -> dict[str, float]:
    return {stage: sum(e[5] for e in events if e[2] == stage) for stage in sorted({e[2] for e in events})}


def _gantt(
    events: list[tuple[int, int, str, float, float, float]], origin: float
) -> list[tuple[int, str, float, float]]:
    """(row, stage, start, stop) in seconds, a row for each thread of each worker."""
    rows = {key: row for row, key in enumerate(sorted({e[:2] for e in events}))}
    return [(rows[e[:2]], e[2], round(e[3] - origin, 3), round(e[4] - origin, 3)) for e in events]


def stackstac_script(
    *, folder: str, out: str, size: int, dates: int, source: str = "auto", threads: int = CORES
) -> dict[str, Any]:
    """The script of `benchmarks.peers.stackstac_script` on the same cluster."""
    from benchmarks.peers.stackstac_script import change_maps

    data = _scenes(folder, size, dates, source)
    _fresh(out)
    with s2cd.cluster(local_profile(1, threads)) as client:
        _load_model(client)
        started = time.perf_counter()
        maps = change_maps(data.scenes, Path(out), client)
        wall = time.perf_counter() - started
    return {"wall_s": wall, "maps": maps, "seconds_per_map": wall / maps}


def rasterio_loop(*, folder: str, out: str, size: int, dates: int, source: str = "auto") -> dict[str, Any]:
    """The loop of `benchmarks.peers.rasterio_loop`, in this process, a window on each core."""
    from benchmarks.peers.rasterio_loop import change_maps

    data = _scenes(folder, size, dates, source)
    _fresh(out)
    s2cd.load_model("generic")
    started = time.perf_counter()
    maps = change_maps(data.scenes, Path(out), CORES)
    wall = time.perf_counter() - started
    return {"wall_s": wall, "maps": maps, "seconds_per_map": wall / maps}


@contextmanager
def _served(scenes: list[Scene], folder: Path, latency: float | None) -> Iterator[list[Scene]]:
    """Yield the scenes as they are, or with addresses of an archive that serves the prepared data."""
    if latency is None:
        yield scenes
        return
    root = folder.resolve()
    with archive(root, latency) as url:
        yield [
            replace(s, assets={b: replace(a, href=f"{url}/{_inside(a.href, root)}") for b, a in s.assets.items()})
            for s in scenes
        ]


def _inside(href: str, folder: Path) -> Path:
    return Path(href.removeprefix("file://")).resolve().relative_to(folder)


def _load_model(client: Client) -> None:
    s2cd.load_model("generic")
    client.run(s2cd.load_model, "generic")
    client.run(load_libraries)


def _try_out(client: Client, folder: Path, source: str) -> None:
    """Run on a few pixels, so that CUDA, its kernels and pinned memory are there when the clock starts."""
    from s2cd.runner import run

    scenes = prepared.prepare(folder, source=source, **TRY_OUT).scenes
    with tempfile.TemporaryDirectory() as out:
        report = run(s2cd.RunConfig(catalog="given", out=out), client, scenes=scenes)
    if not report.ok:
        raise RuntimeError(f"the try-out failed: {report.maps}")


def _fresh(out: str) -> None:
    shutil.rmtree(out, ignore_errors=True)
    Path(out).mkdir(parents=True)


def stages(
    *,
    folder: str,
    maps: str,
    out: str,
    size: int,
    dates: int,
    source: str = "auto",
    window: int = 2048,
) -> dict[str, Any]:
    """Each stage alone on every core, in core-seconds of the whole series: the least that the work can cost.

    decode   every block of the bands and of SCL, by this project's own reader, once
    network  every pixel without any halo: each date encoded once, each pair decoded once
    encode   the maps in `maps`, by this project's own writer
    """
    import torch

    torch.set_num_threads(1)
    data = _scenes(folder, size, dates, source)
    _fresh(out)
    return {
        "decode": _decode_alone(data.scenes),
        "network": _network_alone(data.scenes, min(window, size), size),
        "encode": _encode_alone(data.scenes, Path(maps), out),
        "cores": CORES,
    }


def _on_every_core(jobs: list[Callable[[], Any]]) -> float:
    """Run jobs on a thread for each core, so that they share its caches as in a run; return their CPU seconds."""
    waiting, lock = list(jobs), threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                job = waiting.pop(0)
            try:
                job()
            except BaseException as error:
                errors.append(error)
                raise

    threads = [threading.Thread(target=work) for _ in range(CORES)]
    started = time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return time.process_time() - started


def _decode_alone(scenes: list[Scene]) -> float:
    bands = (*s2cd.load_model("generic").bands, "scl")

    def job(href: str) -> Callable[[], Any]:
        def read() -> None:
            with access.open_dataset("benchmark", href) as dataset:
                layout = Layout(dataset.shape, dataset.block_shapes[0])
                blocks = layout.covering(*(slice(0, n) for n in dataset.shape))
                for _ in decoded(dataset, layout, set(blocks)):
                    pass

        return read

    return _on_every_core([job(s.assets[b].href) for s in scenes[:2] for b in bands]) * len(scenes) / 2


def _network_alone(scenes: list[Scene], window: int, size: int) -> float:
    model = s2cd.load_model("generic")
    part = (slice(0, window), slice(0, window))
    pixels = [_read(s, model, part) for s in scenes[:2]]
    statistics = [model.statistics(plane[None].astype(np.float32) * np.float32(1e-4)) for plane in pixels[0]]
    affine = model.affine(np.concatenate(statistics), 1e-4, 0.0)
    valid = np.ones((window, window), bool)

    def encode() -> None:
        model.encode(pixels[0], affine, valid)

    def decode() -> None:
        model.decode(*features, 1.0)

    encode()  # the first call sets torch up
    features = [model.encode(p, affine, valid) for p in pixels]
    decode()
    repeats = 8 * CORES  # for some seconds: the speed of many machines drifts
    share = (size / window) ** 2 / repeats
    per_date, per_pair = (_on_every_core([job] * repeats) * share for job in (encode, decode))
    return per_date * len(scenes) + per_pair * (len(scenes) - 1)


def _read(scene: Scene, model: Model, part: tuple[slice, slice]) -> list[np.ndarray]:
    from s2cd.reader import Tiling, band_source, read_bands

    grid = scene.assets["red"].grid
    sources = [band_source(scene, band) for band in model.bands]
    return read_bands(sources, grid, part, Tiling(grid.shape, max(grid.shape), 0), fine=model.fine)


def _encode_alone(scenes: list[Scene], maps: Path, out: str) -> float:
    from s2cd import outputs
    from s2cd.codes import encode_codes
    from s2cd.thumbnails import thumbnail

    model = s2cd.load_model("generic")
    pairs = s2cd.consecutive_pairs(scenes)
    paths = {path.stem: path for path in maps.rglob("S2CD_*.tif")}
    info = outputs.MapInfo(model=model.name, model_hash=model.hash, bands=model.bands)
    some = pairs[:CORES] if len(pairs) >= CORES else (list(pairs) * CORES)[:CORES]
    codes = []
    for pair in some:
        with rasterio.open(paths[pair.name]) as dataset:
            codes.append(encode_codes(dataset.read(1)))

    def job(number: int) -> Callable[[], Any]:
        pair = some[number]

        def write() -> None:
            rgb = (thumbnail(pair.before), thumbnail(pair.after))
            grid = pair.before.assets["red"].grid
            outputs.write_map(codes[number], pair, grid, info, f"{out}/{number}", quicklook_rgb=rgb)

        return write

    return _on_every_core([job(n) for n in range(len(some))]) * len(pairs) / len(some)


def device(*, folder: str, out: str, size: int, dates: int, source: str = "auto") -> dict[str, Any]:
    """The network alone on a GPU: milliseconds of its work a tile, for a date and for a pair, by edge of the chunk.

    Pixels start in host memory and codes end there; `date_cpu_ms` and `pair_cpu_ms` are what that takes a core.
    """
    scenes = _scenes(folder, size, dates, source).scenes
    model = s2cd.load_model("generic", device="cuda")
    return {"rows": [_on_device(model, scenes, edge, size) for edge in (1024, 1696, 2336, 3264) if edge <= size]}


def _on_device(model: Model, scenes: list[Scene], edge: int, size: int) -> dict[str, float]:
    import torch

    part = (slice(0, edge), slice(0, edge))
    pixels = [_read(scene, model, part) for scene in scenes[:2]]
    affine = model.affine(np.full((len(model.bands), 2), 0.1, np.float32), 1e-4)
    valid = np.ones((edge, edge), bool)
    encoded = [model.encode(p, affine, valid) for p in pixels]
    model.decode_codes(*encoded, 1.0)
    calls = {
        "date": lambda: model.encode(pixels[0], affine, valid),
        "pair": lambda: model.decode_codes(*encoded, 1.0),
    }
    repeats, row = 20, {"edge": float(edge)}
    share = 1e3 * (size / edge) ** 2 / repeats
    for name, call in calls.items():
        torch.cuda.synchronize()
        started, cpu = time.perf_counter(), time.thread_time()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        spent = time.perf_counter() - started, time.thread_time() - cpu
        row |= {f"{name}_ms": spent[0] * share, f"{name}_cpu_ms": spent[1] * share}
    return row
