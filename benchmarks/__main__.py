"""`python -m benchmarks prepare|run|compare|report|europe`."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from benchmarks import europe, suite
from benchmarks.data import prepare as prepare_data
from benchmarks.machine import load
from benchmarks.report import table, write_report
from s2cd.errors import S2cdError

HERE = Path(__file__).parent
SHORT = {"size": 3660, "small": 732, "rounds": 1}


def _data_options(command):
    options = (
        click.option(
            "--data", default=str(HERE / "data"), help="Folder of prepared data.", show_default="benchmarks/data"
        ),
        click.option(
            "--size", type=click.IntRange(256, 10980), default=10980, show_default=True, help="Rows and columns."
        ),
        click.option("--dates", type=click.IntRange(3, 72), default=6, show_default=True),
        click.option("--source", type=click.Choice(["auto", "shared", "simulated"]), default="auto", show_default=True),
    )
    for option in reversed(options):
        command = option(command)
    return command


_work_option = click.option(
    "--work", default=str(HERE / "work"), show_default="benchmarks/work", help="Folder for the maps."
)


@click.group()
def main() -> None:
    """Measure s2cd on a full tile, beside the scripts that people write today."""


@main.command()
@_data_options
def prepare(data: str, size: int, dates: int, source: str) -> None:
    """Write the series of a tile and freeze its catalogue."""
    made = prepare_data(Path(data), size=size, dates=min(dates, 6), source=source)
    click.echo(
        f"{len(made.scenes)} dates of {size} x {size} px ({made.source}), {made.unique_bytes / 1e9:.2f} GB of pixels"
    )


@main.command()
@_data_options
@_work_option
@click.option("--short", is_flag=True, help="A ninth of a tile, peers included: under five minutes.")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice((*suite.PARTS, *suite.GPU_PARTS)),
    help="Only these; by default all but gpu.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    help="How often stages, scaling and the first case of dates and tiles are measured.",
    show_default="3, short 1",
)
def run(
    data: str, size: int, dates: int, source: str, work: str, short: bool, parts: tuple[str, ...], rounds: int | None
) -> None:
    """Measure s2cd end to end and its stages alone; print the table of targets."""
    asked = click.get_current_context().get_parameter_source("size") is not ParameterSource.DEFAULT
    if short and asked:
        raise click.UsageError(f"--short is of {SHORT['size']} px, found --size {size}, expected one of the two")
    before = load()
    changes = {**(SHORT if short else {"size": size}), **({"rounds": rounds} if rounds else {})}
    settings = suite.Settings(folder=data, work=work, dates=dates, source=source, **changes)
    chosen = parts or (("engine", "stages") if short else suite.PARTS)
    results = suite.run_parts(settings, chosen, click.echo)
    if short and not parts:
        results["compare"] = suite.compare(settings, 1, click.echo)
    path = None if short else suite.save("run", settings, results, before)
    if settings.size < suite.Settings.size:
        click.echo(f"Of {settings.size} px, where start and end weigh more; targets are for {suite.Settings.size} px.")
    click.echo(table(results))
    if path:
        click.echo(f"recorded in {path.name}")


@main.command()
@_data_options
@_work_option
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True, help="How often each runs, in turn.")
def compare(data: str, size: int, dates: int, source: str, work: str, rounds: int) -> None:
    """Measure s2cd and the peers in alternation; the report tells how far their maps agree."""
    before = load()
    settings = suite.Settings(folder=data, work=work, size=size, dates=dates, source=source)
    results = {"compare": suite.compare(settings, rounds, click.echo)}
    path = suite.save("compare", settings, results, before)
    click.echo(table(results))
    click.echo(f"recorded in {path.name}")


@main.command("europe")
@click.option("--tiles", type=click.IntRange(1, 5000), default=europe.TILES, show_default=True)
@click.option("--nodes", multiple=True, type=click.IntRange(1, 1024), default=(64,), show_default=True)
@click.option("--motion", type=float, default=0.001, show_default=True, help="Stretch of every sleep; 1 is real time.")
@click.option("--read", type=float, help="Core-seconds to read a date; by default as recorded on a GPU's host.")
@click.option("--device", type=float, help="Seconds of the GPU a pair; by default as recorded.")
def europe_command(
    tiles: int,
    nodes: tuple[int, ...],
    motion: float,
    read: float | None,
    device: float | None,
) -> None:
    """Run the task stream of Europe's year through a real scheduler; its tasks sleep."""
    before = load()
    node = europe.measured_node(suite.RESULTS, device=device, read=read)
    runs = [europe.simulate(tiles, count, node, motion=motion) for count in nodes]
    click.echo(europe.describe(runs))
    path = suite.save(f"europe-{tiles}tiles", suite.Settings("", ""), {"europe": {"runs": runs}}, before)
    click.echo(f"recorded in {path.name}")


@main.command()
def report() -> None:
    """Put the recorded results into one table and one plot."""
    for path in write_report(suite.RESULTS):
        click.echo(path)


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except (S2cdError, suite.BenchmarkError, click.ClickException) as error:
        raise SystemExit(f"error: {error}") from None
