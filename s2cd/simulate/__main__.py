"""`python -m s2cd.simulate OUT`: write a simulated series."""

from __future__ import annotations

import sys

import click

from s2cd.errors import S2cdError
from s2cd.simulate.series import START, simulate, simulate_full_tile


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--size", type=click.IntRange(1, 10980), default=1024, help="Rows and columns at 10 m.")
@click.option("--dates", type=click.IntRange(1), default=8, help="Number of acquisitions.")
@click.option("--orbit", "orbits", type=click.IntRange(1, 143), multiple=True, default=(51, 94), help="Relative orbit.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Another seed, another landscape.")
@click.option("--tile", default="31UDS", help="MGRS tile the cut lies in.")
@click.option("--start", default=START, help="Earliest date of the first acquisition.")
@click.option("--step-days", type=click.FloatRange(0, min_open=True), default=22.5, help="Days between acquisitions.")
@click.option("--clouds/--no-clouds", default=True, help="Whether there are clouds.")
@click.option("--full-tile", is_flag=True, help="10980 x 10980 px for benchmarks; --dates, --seed and --orbit apply.")
def main(out: str, full_tile: bool, **options: object) -> None:
    """Write a simulated Sentinel-2 L2A series with changes of known truth to the folder OUT."""
    try:
        if full_tile:
            picked = {key: options[key] for key in ("dates", "seed", "orbits")}
            click.echo(simulate_full_tile(out, **picked))  # type: ignore[arg-type]
        else:
            click.echo(simulate(out, **options))  # type: ignore[arg-type]
    except S2cdError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
