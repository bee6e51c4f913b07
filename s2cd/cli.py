"""The command line: each command parses, calls the function of the same name, and prints."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import TextIOWrapper
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from s2cd.addresses import public_href
from s2cd.config import RunConfig
from s2cd.errors import S2cdError, S2cdWarning
from s2cd.interrupts import terminated_like_interrupts

# Names of users may look like rich's markup or emoji: "x[/y]".
OUT = Console(soft_wrap=True, markup=False, emoji=False, width=None if sys.stdout and sys.stdout.isatty() else 160)
WORDY = ("detail", "bands")
ERR = Console(stderr=True, soft_wrap=True, markup=False, emoji=False)


class _Commands(click.Group):
    """Prints an S2cdError on one line and exits with 1; Ctrl-C exits with 130, SIGTERM with 143."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run the program; that its output cannot be written, even its help, is one line as well."""
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # letters that its encoding lacks
        try:
            return super().main(*arguments, **options)
        except OSError:
            if reason := _stdout_failure():
                ERR.print(f"error: standard output cannot be written: {reason}", style="red", highlight=False)
                sys.exit(1)
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        terminated = threading.Event()
        try:
            with terminated_like_interrupts(terminated):
                return super().invoke(ctx)
        except S2cdError as error:
            ERR.print(f"error: {error}", style="red", highlight=False)
            sys.exit(1)
        except KeyboardInterrupt:
            ERR.print("interrupted: finished maps are complete, run the same command to go on")
            sys.exit(143 if terminated.is_set() else 130)


def _stdout_failure() -> str | None:
    """Say why nothing can be printed, if so, and drop what was, so that Python does not try once more at its end."""
    try:
        print(flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error.strerror
    return None


@click.group(cls=_Commands, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.version_option(package_name="s2cd")
def main() -> None:
    """Change detection on Sentinel-2 time series, from a laptop to a continent."""
    warnings.showwarning = _show_warning
    logging.getLogger("distributed").setLevel(logging.ERROR)
    logging.getLogger("distributed.client").addFilter(_is_critical)  # importing it sets its level
    logger = logging.getLogger("s2cd")  # not the root logger: through it Dask would report every start and stop
    logger.propagate = False
    logger.handlers[:] = [logging.StreamHandler()]


def _is_critical(record: logging.LogRecord) -> bool:
    """Let nothing else pass: where a client fails, the run ends with a line that says so."""
    return record.levelno >= logging.CRITICAL


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Print what s2cd warns of on one line; what libraries say to programmers is not for users."""
    if issubclass(category, S2cdWarning):
        ERR.print(f"warning: {message}", style="yellow", highlight=False)


def _search_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what selects scenes: shared by search, plan, run and watch."""
    for option in reversed(
        [
            click.argument("catalog"),
            click.option("--bbox", metavar="W,S,E,N", callback=_bbox, help="Degrees; tiles it meets are mapped whole."),
            click.option("--datetime", metavar="RANGE", help="Such as 2023-01-01/2023-12-31; '..' leaves an end open."),
            click.option("--tiles", metavar="31UDS,...", callback=_names, help="MGRS tiles."),
            click.option("--collection", help="STAC collection, where the provider has several."),
            click.option("--orbit", default="same", metavar="same|any|1-143", callback=_number,
                         help="Pair within a relative orbit, only in one, or across orbits (risks false change)."),
            click.option("--mask", default="scl", metavar="scl|ASSET|MODULE:FUNCTION",
                         help="Source of the cloud mask; PYTHONPATH leads to MODULE."),
            click.option("--max-cloud", type=click.FloatRange(0, 100), default=60.0,
                         help="Skip cloudier scenes, percent by metadata."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def _run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        [
            click.option("--out", required=True, metavar="DIR|URL", help="Where the maps go."),
            click.option("--min-valid", type=click.FloatRange(0, 1), default=0.1,
                         help="Skip dates with a smaller valid fraction, before clouds grow."),
            click.option("--max-gap-days", type=click.FloatRange(0, min_open=True),
                         help="Longest gap between the dates of a pair."),
            click.option("--mask-classes", metavar="3,8-10",
                         help="Values of the mask that are no observation; nodata of another ASSET belongs to them."),
            click.option("--mask-dilation", type=click.FloatRange(0, 600), default=60.0, help="Metres clouds grow by."),
            click.option("--model", default="generic", help="Shipped model, or path of an exported or trained one."),
            click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
                         help="Where the network runs."),
            click.option("--cluster", default="local", help="Kind, or a profile: cluster/slurm.yaml."),
            click.option("--chunk", default="auto", metavar="auto|64-16384", callback=_number,
                         help="Edge of a processing chunk, pixels."),
            click.option(
                "--dates-per-task", default="auto", metavar="auto|2-64", callback=_number,
                help="Dates that share reads and features.",
            ),
            click.option("--cog-profile", type=click.Choice(["default", "zstd", "lerc", "uint8"]), default="default",
                         help="Compression of the maps; default: for any GDAL >= 3.1."),
            click.option("--quicklook/--no-quicklook", default=True, help="A PNG beside each map."),
            click.option("--validity", is_flag=True, help="A layer that tells why a pixel has no value."),
            click.option(
                "--strict", is_flag=True,
                help="Warnings (offsets, baselines, levels, orbits, shifts, items left out) end runs; plan shows them.",
            ),
            click.option("-q", "--quiet", is_flag=True, help="No progress bars."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def _bbox(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        west, south, east, north = (float(v) for v in value.replace(",", " ").split())
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected four numbers, west,south,east,north") from None
    return west, south, east, north


def _names(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return tuple(v.strip() for v in value.split(",") if v.strip()) if value else None


def _number(_ctx: click.Context, _param: click.Parameter, value: str) -> str | int:
    return int(value) if value.isdecimal() else value


@main.command()
@_search_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object a scene.")
@click.option("--save", metavar="X.parquet", help="Freeze the scenes to stac-geoparquet, to run on exactly these.")
def search(as_json: bool, save: str | None, **options: Any) -> None:
    """List the scenes of CATALOG in one form, wherever they come from.

    CATALOG is earth-search, planetary-computer or cdse, the URL of a STAC API, a static catalogue, a folder of .SAFE
    products or frozen scenes.
    """
    from s2cd import catalog
    from s2cd.catalog.frozen import writable
    from s2cd.pairs import select_scenes
    from s2cd.plan import search_scenes

    config = RunConfig(out=".", **options)
    if save:
        writable(save)
    scenes, left_out = select_scenes(search_scenes(config), max_cloud=config.max_cloud)
    if save:
        catalog.freeze(scenes, save)
    if as_json:
        for row in catalog.scene_rows(scenes):
            click.echo(json.dumps(row, default=str))
        return
    rows = catalog.scene_rows(scenes)
    shown = ("id", "tile", "orbit", "time", "platform", "level", "baseline", "cloud", "offset")
    title = f"{len(scenes)} scenes of {rows[0]['provider']} {rows[0]['collection']}" if rows else "no scenes"
    _print_rows(title, [{name: row[name] for name in shown} for row in rows])
    for row in {(row["offset"], row["offset_reason"]): row for row in rows}.values():
        OUT.print(f"offset {row['offset']:g}: {row['offset_reason']}", highlight=False)
    _print_left_out(left_out)


@main.command()
@_search_options
@_run_options
def plan(quiet: bool, **options: Any) -> None:
    """Say what a run would compare with what, read and write, without reading a pixel."""
    from s2cd.plan import describe_plan, make_plan

    described = describe_plan(make_plan(RunConfig(**options)))
    _print_rows(f"{described.pairs} pairs in {len(described.rows)} fields of view", described.rows)
    _print_left_out(described.left_out)
    for line in described.notes:
        OUT.print(line)


@main.command()
@_search_options
@_run_options
def run(quiet: bool, **options: Any) -> None:
    """Make every change map of CATALOG that is not there yet.

    Exit code 0 only if there are maps and none failed. Run it again to go on after an interruption.
    """
    from s2cd.runner import run as run_all

    with _progress(quiet) as progress:
        report = run_all(RunConfig(**options), progress=progress)
    _print_report(report)
    if not report.maps:
        ERR.print("no pair is left to map: see above why dates and pairs were left out", style="red", highlight=False)
    sys.exit(0 if report.ok and report.maps else 1)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """The dashboard's link and, on a terminal, a bar a phase; nothing if quiet."""
    logging.getLogger("s2cd").setLevel(logging.WARNING if quiet else logging.INFO)
    if quiet or not ERR.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=ERR) as bars:
        tasks: dict[str, Any] = {}

        def update(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield update


def _print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    OUT.print(title, style="italic", highlight=False)  # not the table's own title, which is wrapped to its width
    if not rows:
        return
    table = Table()
    for name in rows[0]:
        table.add_column(name.replace("_", " "), overflow="fold", no_wrap=name not in WORDY)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    OUT.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _print_left_out(left_out: list[Any]) -> None:
    for item in left_out:
        OUT.print(f"left out: {item.what}: {item.reason}", highlight=False)


def _print_report(report: Any) -> None:
    rows = [
        {"map": r.name, "status": r.status, "valid": r.valid_fraction, "changed": r.changed_fraction}
        for r in sorted(report.maps, key=lambda r: r.name)
    ]
    _print_rows(
        f"{report.count('written')} maps written, {report.count('kept')} were there, "
        f"{report.count('failed')} failed, in {report.seconds:.1f} s: {public_href(report.out)}",
        rows,
    )
    _print_left_out(report.left_out)
    for record in report.maps:
        if record.error:
            ERR.print(f"failed: {record.name}: {record.error}", style="red", highlight=False)


@main.command()
@click.argument("out", metavar="DIR|URL")
def status(out: str) -> None:
    """Say how far the run that writes to DIR has come."""
    from s2cd.runner import run_status

    rows = run_status(out)
    done, pairs = (sum(row[name] for row in rows) for name in ("finished", "pairs"))
    _print_rows(f"{done} of {pairs} maps finished: {public_href(out)}", rows)


@main.command()
@click.argument("out", metavar="DIR|URL")
def validate(out: str) -> None:
    """Check every map in DIR: COG, values, grid, item, catalogue. Exit code 0 only if nothing is wrong."""
    from s2cd import outputs

    problems = outputs.validate(out)
    for problem in problems:
        OUT.print(problem, highlight=False)
    OUT.print(f"{len(outputs.finished(out))} maps, {len(problems)} problems: {public_href(out)}")
    if problems:
        OUT.print("a run that was interrupted goes on with its command; to make a map anew, delete its .json before")
    sys.exit(1 if problems else 0)


@main.group()
def models() -> None:
    """The shipped models."""


@models.command("list")
def models_list() -> None:
    """List the shipped models."""
    from s2cd.model import list_models, load_model

    rows = []
    for name in list_models():
        model = load_model(name, device="cpu")
        rows.append({"model": name, "hash": model.hash[:12], "bands": ", ".join(model.bands), "halo": model.halo})
    _print_rows(f"{len(rows)} models", rows)


@models.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="The STAC mlm metadata.")
def models_show(name: str, as_json: bool) -> None:
    """Print the card of a model: data, licence, scores and how they were measured."""
    from s2cd.model import load_model

    model = load_model(name, device="cpu")
    if as_json:
        click.echo(json.dumps(model.mlm(), indent=2))
        return
    for line in _card_lines(model.card):
        OUT.print(line, highlight=False)


def _card_lines(value: Any, indent: str = "") -> Iterator[str]:
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(entry, dict) or (isinstance(entry, list) and entry and isinstance(entry[0], dict)):
            yield f"{indent}{key}:"
            yield from _card_lines(entry, indent + "  ")
        else:
            yield f"{indent}{key}: {_cell(entry) if not isinstance(entry, list) else ', '.join(map(_cell, entry))}"


@main.group()
def cluster() -> None:
    """Cluster profiles: what they would start, and whether it works."""


@cluster.command("show")
@click.argument("profile")
def cluster_show(profile: str) -> None:
    """Print the job script or worker command that PROFILE would use."""
    from s2cd.clusters import show_profile

    click.echo(show_profile(profile))


@cluster.command("check")
@click.argument("profile")
@click.option("--out", metavar="DIR|URL", help="An output folder that workers must be able to write to.")
@click.option("--source", metavar="PATH|URL", help="An asset that workers must be able to read.")
def cluster_check(profile: str, out: str | None, source: str | None) -> None:
    """Start one worker of PROFILE (cuda: one a GPU; existing: none) and report what one sees.

    Exit code 0 only if all is well.
    """
    from s2cd.clusters import check_profile

    checks = check_profile(profile, out=out, source=source)
    rows = [{"check": name, "ok": "yes" if ok else "NO", "detail": detail} for name, ok, detail in checks]
    _print_rows(f"cluster {profile}", rows)
    sys.exit(0 if all(ok for _, ok, _ in checks) else 1)


@main.command()
@click.option("--out", default="demo", metavar="DIR", help="Where scenes, maps and picture go.")
@click.option("--size", type=click.IntRange(64, 10980), default=1024, help="Pixels along a side.")
@click.option("--dates", type=click.IntRange(3, 36), default=8, help="Acquisitions, of two orbits.")
@click.option("--cluster", "profile", default="local", help="Kind of cluster, or a profile.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bars.")
def demo(out: str, size: int, dates: int, profile: str, quiet: bool) -> None:
    """Map the changes of a simulated series of known truth: the real pipeline, offline."""
    from s2cd.demo import run_demo, simulate_catalogue

    catalog = simulate_catalogue(out, size=size, dates=dates)
    OUT.print(f"catalogue: {catalog}")
    with _progress(quiet) as progress:
        report, scores, picture = run_demo(out, catalog, profile, progress)
    _print_report(report)
    _print_rows("score against the known truth, at 0.5", [asdict(score) for score in scores])
    OUT.print(f"picture: {picture}")
    sys.exit(0 if report.ok else 1)


@main.command()
@click.argument("out", metavar="DIR|URL")
@click.option("--open", "launch", is_flag=True, help="Open it in the browser.")
def view(out: str, launch: bool) -> None:
    """Write index.html into DIR: the quicklooks of all maps, most changed first."""
    from s2cd.outputs.page import write_page

    page = write_page(out)
    OUT.print(page)
    if launch:
        click.launch(page)


@main.command()
@_search_options
@_run_options
@click.option("--interval", type=click.FloatRange(min=1), default=900.0, help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Look once and stop, for cron.")
def watch(interval: float, once: bool, quiet: bool, **options: Any) -> None:
    """Follow CATALOG: a new acquisition becomes a pair and a map within one interval.

    With --once the exit code is 1 where a map failed, as that of run.
    """
    from s2cd.watch import watch as follow

    for report in follow(RunConfig(**options), interval=interval, once=once):
        if report.maps:
            _print_report(report)
        if once and not report.ok:
            sys.exit(1)
