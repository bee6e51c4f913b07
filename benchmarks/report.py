"""Recorded results -> one table of targets, one page, one plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Parts = dict[str, Any]
Origins = dict[str, list[dict[str, Any]]]  # of each part the documents that it came from, in order of time
WHY = "../../docs/performance.md#targets-one-by-one"


@dataclass(frozen=True)
class Target:
    """One row of the table: how its value follows from the parts, when it is met, and what case the value is of."""

    what: str
    target: str
    value: Callable[[Parts], float]
    shown: str
    met: Callable[[float], bool]
    case: Callable[[Parts], str] = lambda _: ""


def _spread(part: str) -> Callable[[Parts], float]:
    def value(parts: Parts) -> float:
        peaks = [row["peak_gb"] for row in parts[part]["rows"]]
        return max(peaks) / peaks[0]

    return value


def _fastest(parts: Parts) -> dict[str, Any]:
    """Return the run on a GPU that took the least time a map."""
    return min(parts["gpu"]["runs"], key=lambda run: run["seconds_per_map"])


def _fewest_and_most(parts: Parts) -> list[dict[str, Any]]:
    """Return the simulations of Europe with the fewest and the most tiles, of those made to see memory."""
    runs = sorted((run for run in parts["europe"]["runs"] if run["motion"] < 1), key=lambda run: run["tiles"])
    if len(runs) < 2:
        raise KeyError("two runs of europe")
    return [runs[0], runs[-1]]


def _growth(parts: Parts) -> float:
    """Return by how much driver or scheduler, the one that does so more, grow from few tiles to many."""
    few, many = (run["memory"] for run in _fewest_and_most(parts))
    return max(max(row[who] for row in many) / max(row[who] for row in few) for who in ("driver_mb", "scheduler_mb"))


def _size(part: str) -> Callable[[Parts], str]:
    return lambda parts: f"{parts[part]['size']} px"


def _speedup(name: str) -> Callable[[Parts], float]:
    return lambda parts: statistics.median(row["1 thread"] / row[name] for row in parts["scaling"]["rounds"])


TARGETS = (
    Target(
        "end to end on these cores, a map",
        "<= 25 s",
        lambda p: p["engine"]["seconds_per_map"],
        "{:.1f} s",
        lambda v: v <= 25,
    ),
    Target(
        "peak memory of the whole cluster", "<= 6 GB", lambda p: p["engine"]["peak_gb"], "{:.2f} GB", lambda v: v <= 6
    ),
    Target(
        "against the stackstac script",
        ">= 4x",
        lambda p: p["compare"]["ratio"]["stackstac script"],
        "{:.1f}x",
        lambda v: v >= 4,
    ),
    Target(
        "against the rasterio loop",
        ">= 2.5x",
        lambda p: p["compare"]["ratio"]["rasterio loop"],
        "{:.1f}x",
        lambda v: v >= 2.5,
    ),
    Target(
        "largest difference to the peers' maps",
        "<= 0.01",
        lambda p: max(p["compare"]["largest_difference"].values()),
        "{:.4f}",
        lambda v: v <= 0.01,
    ),
    Target("distance to the limit", ">= 0.85", lambda p: p["stages"]["of_limit"], "{:.2f}", lambda v: v >= 0.85),
    Target(
        "bytes decoded over bytes needed",
        "1.00",
        lambda p: p["engine"]["decoded_over_needed"],
        "{:.3f}",
        lambda v: abs(v - 1) < 0.005,
    ),
    Target("tasks a pair", "<= 40", lambda p: p["engine"]["tasks_per_pair"], "{:.1f}", lambda v: v <= 40),
    Target("scaling, 1 -> 2 threads of a worker", ">= 1.8x", _speedup("2 threads"), "{:.2f}x", lambda v: v >= 1.8),
    Target("scaling, 1 -> 2 worker processes", ">= 1.8x", _speedup("2 processes"), "{:.2f}x", lambda v: v >= 1.8),
    Target("memory, 72 dates over 6", "<= 1.10", _spread("dates"), "{:.2f}", lambda v: v <= 1.1, _size("dates")),
    Target("memory, 16 tiles over 1", "<= 1.10", _spread("tiles"), "{:.2f}", lambda v: v <= 1.1, _size("tiles")),
    Target(
        "memory of driver and scheduler, simulated",
        "<= 1.10",
        _growth,
        "{:.2f}",
        lambda v: v <= 1.1,
        lambda p: "{:,} tiles over {:,}".format(*(run["tiles"] for run in reversed(_fewest_and_most(p)))),
    ),
    Target(
        "end to end on one H200-class GPU, a map",
        "<= 1.0 s",
        lambda p: _fastest(p)["seconds_per_map"],
        "{:.2f} s",
        lambda v: v <= 1.0,
        lambda p: _fastest(p)["what"],
    ),
    Target(
        "GPU busy",
        ">= 60 %",
        lambda p: _fastest(p)["gpu_busy"],
        "{:.0%}",
        lambda v: v >= 0.6,
        lambda p: _fastest(p)["what"],
    ),
)


def table(parts: Parts, *, all_rows: bool = False) -> str:
    """Return the targets as a Markdown table: those that `parts` can tell, or all of them."""
    lines = ["| what | target | measured | |", "|---|---|---|---|"]
    for row in TARGETS:
        try:
            value = row.value(parts)
        except KeyError:
            if all_rows:
                lines.append(f"| {row.what} | {row.target} | not measured | |")
            continue
        what = ", ".join(filter(None, (row.what, row.case(parts))))
        lines.append(f"| {what} | {row.target} | {row.shown.format(value)} | {'met' if row.met(value) else 'missed'} |")
    return "\n".join(lines)


def latest(results: Path) -> tuple[Parts, Origins]:
    """Return the newest recording of each part on the largest tile, of Europe of each size, and their documents."""
    parts: Parts = {}
    origins: Origins = {}
    for path in sorted(results.glob("*.json")):
        document = {**json.loads(path.read_text()), "file": path.name}
        for name, part in document["parts"].items():
            if name == "europe":
                parts[name] = _with_runs(parts.get(name, {}), part)
                origins[name] = [d for d in (*origins.get(name, []), document) if _has_runs(d, parts[name])]
            elif name not in origins or document["settings"]["size"] >= origins[name][0]["settings"]["size"]:
                parts[name], origins[name] = part, [document]
    return parts, origins


def _has_runs(document: dict[str, Any], part: dict[str, Any]) -> bool:
    return any(run in part["runs"] for run in document["parts"]["europe"]["runs"])


def _with_runs(before: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Return the runs of both, the newest of each number of tiles and nodes and stretch of time."""
    runs = [*before.get("runs", []), *part["runs"]]
    return {"runs": list({(run["tiles"], run["nodes"], run["motion"]): run for run in runs}.values())}


def write_report(results: Path) -> list[Path]:
    """Write report.md and benchmark.png beside the recorded results; return their paths."""
    parts, origins = latest(results)
    page, picture = results / "report.md", results / "benchmark.png"
    page.write_text("\n\n".join(_page(parts, origins, results)) + "\n")
    draw(parts, picture)
    return [page, picture]


def _page(parts: Parts, origins: Origins, results: Path) -> list[str]:
    newest = max((d[-1] for name, d in origins.items() if name != "gpu"), key=lambda d: d["date"])
    machine, versions = newest["machine"], newest["versions"]
    blocks = [
        "# Benchmark",
        f"Made by `python -m benchmarks report` from the recorded results in this folder. {newest['date']}.",
        f"Newest machine: {machine['processor']}, {machine['cores']} cores ({machine['threads_per_core']} hardware "
        f"threads a core), {machine['memory_gb']} GB; GPU: {machine['device'] or 'none'}. Versions: "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + ".",
        table(parts, all_rows=True).replace("| missed |", f"| missed ([why]({WHY})) |"),
        "![time by stage, timeline, memory](benchmark.png)",
        "Where each row comes from:",
        "\n".join(
            f"- {name}: {d['file']}, {d['date']}, {d['machine']['processor'].partition(' (')[0]}{_extent(name, d)}, "
            f"load {d['load']['before']} before{_others(d['parts'][name])}{_chosen(d['parts'][name])}"
            for name, documents in origins.items()
            for d in documents
        ),
    ]
    blocks += [block(parts) for name, block in _SECTIONS.items() if name in parts]
    blocks += [_europe_block(parts)] if "europe" in parts else []
    blocks += [_gpu_block(parts, origins["gpu"][-1])] if "gpu" in parts else []
    return blocks


def _extent(name: str, document: dict[str, Any]) -> str:
    """Return what a part was measured on, nothing for Europe's."""
    if name == "europe":
        return ""
    part, settings = document["parts"][name], document["settings"]
    dates = {"dates": "6, 24 and 72", "gpu": "21"}.get(name, settings["dates"])
    return f", {part.get('size', settings['size'])} px, {dates} dates, source {settings['source']}"


def _others(part: dict[str, Any]) -> str:
    return f", others kept {part['others_cores']:.1f} cores busy" if "others_cores" in part else ""


def _chosen(part: dict[str, Any]) -> str:
    """Return what a run worked with, where that was recorded."""
    if "settings" not in part:
        return ""
    s = part["settings"]
    return (
        f"; model {s['model']} in {s['precision']}, chunks of {s['chunk']} px, {s['dates_a_task']} dates a task, "
        f"workers {s['workers']} with {s['threads']} threads in all, COG profile {s['cog_profile']}"
    )


def _stages_block(parts: Parts) -> str:
    alone, within = parts["stages"], parts.get("engine", {}).get("stages_cpu_s", {})
    names = ("decode", "network", "encode", "mask", "survey", "displacement")
    rows = [
        f"| {name} | {_number(alone.get(name))} | {_number(within.get(name))} |"
        for name in names
        if name in alone or name in within
    ]
    limits = ", ".join(f"{row['of_limit']:.2f} ({row['wall_s']:.1f} s)" for row in alone["rounds"])
    return "\n".join(
        [
            "## Stages, core-seconds of the whole series",
            "",
            f"Alone, medians of rounds in turn with whole runs, whose distance to the limit was {limits}.",
            "",
            "| stage | alone | within a run |",
            "|---|---|---|",
            *rows,
        ]
    )


def _compare_block(parts: Parts) -> str:
    c = parts["compare"]
    rows = [
        f"| {name} | {c['seconds_per_map'][name]:.1f} | {c['ratio'][name]:.2f} | {c['peak_gb'][name]:.2f} | "
        f"{_times(c['rounds'][name])} |"
        for name in c["wall_s"]
    ]
    return "\n".join(
        ["## Beside the peers", "", "| | s a map | ratio | peak GB | runs, s |", "|---|---|---|---|---|", *rows]
    )


def _scaling_block(parts: Parts) -> str:
    s = parts["scaling"]
    rows = [
        f"| {name} | {s[name]:.1f} | {_speedup(name)(parts):.2f} | {_times(row[name] for row in s['rounds'])} |"
        for name in s["rounds"][0]
    ]
    head = [f"## Scaling on {s['size']} px", "", "Medians of rounds in turn.", ""]
    return "\n".join([*head, "| worker | s | speed-up | runs, s |", "|---|---|---|---|", *rows])


def _times(seconds: Iterable[float]) -> str:
    return ", ".join(f"{s:.1f}" for s in seconds)


def _memory_block(axis: str) -> Callable[[Parts], str]:
    def block(parts: Parts) -> str:
        rows = [
            f"| {r[axis]} | {r['maps']} | {r['peak_gb']:.3f}{_range(r.get('peaks_gb', []))} |"
            f" {r['wall_s'] / r['maps']:.2f} | {r['decoded_over_needed']:.3f} |"
            for r in parts[axis]["rows"]
        ]
        head = [f"## Memory against {axis}, {parts[axis]['size']} px", ""]
        return "\n".join(
            [*head, f"| {axis} | maps | peak GB | s a map | decoded / needed |", "|---|---|---|---|---|", *rows]
        )

    return block


def _range(peaks: list[float]) -> str:
    """Tell of which runs a peak is the median, if there are several."""
    return f" ({', '.join(f'{peak:.2f}' for peak in peaks)})" if len(peaks) > 1 else ""


def _archive_block(parts: Parts) -> str:
    first, *_ = rows = parts["archive"]["rows"]
    lines = [
        f"| {r['from']} | {r['seconds_per_map']:.2f} | {r['seconds_per_map'] / first['seconds_per_map']:.2f} |"
        for r in rows
    ]
    head = [f"## From an archive that takes its time to answer each request, {parts['archive']['size']} px", ""]
    return "\n".join([*head, "| | s a map | ratio |", "|---|---|---|", *lines])


def _gpu_block(parts: Parts, origin: dict[str, Any]) -> str:
    machine = origin["machine"]
    lines = [
        f"## On a GPU: {machine['device']}, {machine['cores']} cores of {machine['processor']}",
        "",
        "Twenty maps of one tile. Versions: " + ", ".join(f"{n} {v}" for n, v in origin["versions"].items()) + ".",
        "",
        "| | s a map | GPU busy | GPU memory, GB | host memory, GB | worker CPU, core-s a map | decoded / needed |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['what']} | {r['seconds_per_map']:.2f} | {_share(r.get('gpu_busy'))} | {_number(r.get('gpu_gb'))} |"
        f" {r['peak_gb']:.1f} | {r['worker_cpu_s'] / r['maps']:.1f} | {r['decoded_over_needed']:.3f} |"
        for r in parts["gpu"]["runs"]
    ]
    if parts["gpu"].get("alone"):
        lines += ["", "| chunk, px | a date, ms a tile | a pair, ms a tile |", "|---|---|---|"]
        lines += [f"| {r['edge']:.0f} | {r['date_ms']:.0f} | {r['pair_ms']:.0f} |" for r in parts["gpu"]["alone"]]
    return "\n".join([*lines, *(["", origin["note"]] if "note" in origin else [])])


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _europe_block(parts: Parts) -> str:
    from benchmarks.europe import describe

    return f"## Europe for a year, simulated\n\n{describe(parts['europe']['runs'])}"


_SECTIONS: dict[str, Callable[[Parts], str]] = {
    "stages": _stages_block,
    "compare": _compare_block,
    "scaling": _scaling_block,
    "dates": _memory_block("dates"),
    "tiles": _memory_block("tiles"),
    "archive": _archive_block,
}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


COLOURS = {
    "survey": "#bbbbbb",
    "decode": "#4477aa",
    "mask": "#66ccee",
    "network": "#ee6677",
    "encode": "#ccbb44",
    "displacement": "#228833",
}


def draw(parts: Parts, path: Path) -> None:
    """Draw time by stage, one run, the peers, a GPU, Europe, and time and memory against dates, tiles and workers."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(4, 2, figsize=(11, 11.6), layout="constrained")
    _draw_timeline(axes[0, 0], parts)
    _draw_stages(axes[0, 1], parts)
    _draw_peers(axes[1, 0], parts)
    _draw_scaling(axes[1, 1], parts)
    _draw_growth(axes[2, 0], parts, "seconds a map", lambda row: row["wall_s"] / row["maps"])
    _draw_growth(axes[2, 1], parts, "peak memory of the whole cluster, GB", lambda row: row["peak_gb"])
    runs = {run["what"]: run["seconds_per_map"] for run in parts.get("gpu", {}).get("runs", [])}
    _draw_bars(axes[3, 0], "seconds a map on a GPU", runs, "%.2f")
    europe = sorted(parts.get("europe", {}).get("runs", []), key=lambda run: run["nodes"])
    hourly = {str(run["nodes"]): run["pairs_per_hour"] / 1000 for run in europe if run["motion"] == 1}
    _draw_bars(axes[3, 1], "thousand pairs an hour, by simulated GPU nodes", hourly)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _draw_timeline(axes: Any, parts: Parts) -> None:
    axes.set_title("one run: what each thread did")
    for row, stage, start, stop in parts.get("engine", {}).get("gantt", []):
        axes.barh(row, stop - start, left=start, height=0.8, color=COLOURS[stage])
    rows = {e[0] for e in parts.get("engine", {}).get("gantt", [])}
    axes.set(yticks=sorted(rows), xlabel="s", ylabel="thread")


def _draw_stages(axes: Any, parts: Parts) -> None:
    axes.set_title("core-seconds of the series")
    rows = {"alone": parts.get("stages", {}), "in a run": parts.get("engine", {}).get("stages_cpu_s", {})}
    for row, figures in rows.items():
        left = 0.0
        for stage, colour in COLOURS.items():
            width = figures.get(stage, 0.0)
            axes.barh(row, width, left=left, color=colour, label=stage if row == "in a run" else None)
            left += width
    axes.set(xlabel="core-s", ylim=(-0.5, 2))
    axes.legend(fontsize=7, ncols=len(COLOURS), columnspacing=1, handlelength=1, loc="upper center")


def _draw_peers(axes: Any, parts: Parts) -> None:
    figures = parts.get("compare", {}).get("seconds_per_map", {})
    _draw_bars(axes, "seconds a map, with the peers", figures)


def _draw_scaling(axes: Any, parts: Parts) -> None:
    figures = {name: s for name, s in parts.get("scaling", {}).items() if name not in ("size", "rounds")}
    _draw_bars(axes, "seconds of a run by workers", figures)


def _draw_bars(axes: Any, title: str, figures: dict[str, float], form: str = "%.1f") -> None:
    axes.set_title(title)
    bars = axes.barh(list(figures)[::-1], list(figures.values())[::-1], color="#4477aa")
    axes.bar_label(bars, fmt=form, padding=3)
    if not figures:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
    axes.margins(x=0.12)


def _draw_growth(axes: Any, parts: Parts, title: str, value: Callable[[dict[str, float]], float]) -> None:
    measured = {axis: parts[axis] for axis in ("dates", "tiles") if parts.get(axis, {}).get("rows")}
    for (axis, part), marker in zip(measured.items(), ("o-", "s--"), strict=False):
        rows = part["rows"]
        axes.plot([row[axis] for row in rows], [value(row) for row in rows], marker, label=f"against {axis}")
        axes.legend(fontsize=8, loc="lower right")
        title = f"{title.partition(' (')[0]} ({part['size']} px)"
    axes.set_title(title)
    if not measured:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
    axes.set(xlabel="number", ylim=(0, 1.1 * axes.dataLim.y1) if measured else None)
