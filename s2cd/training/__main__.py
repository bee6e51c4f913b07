"""`python -m s2cd.training fit|score|card`; see docs/training.md."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import click
import torch

from s2cd.errors import S2cdError
from s2cd.model import list_models, load_model
from s2cd.model.registry import WEIGHTS
from s2cd.training.baselines import BASELINES
from s2cd.training.cards import publish
from s2cd.training.data import City, ground, load_cities
from s2cd.training.fitting import Plan
from s2cd.training.material import fold_places
from s2cd.training.robustness import of_baseline, of_model, table
from s2cd.training.runs import NETWORKS, Run, cross_validate, fold_cities, protocol, train
from s2cd.training.scoring import Report, baseline, predictor, score

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
DATA = click.option(
    "--data", type=FOLDER, required=True, help="Static STAC catalogue with labels/<place>.tif beside it."
)


class _Commands(click.Group):
    """Prints an S2cdError on one line and exits with 1; an interrupt exits with 130."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except S2cdError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted: the same command goes on from its last checkpoint, if it wrote one", err=True)
            sys.exit(130)


@click.group(cls=_Commands, context_settings={"show_default": True})
def main() -> None:
    """Train, score and describe the networks that s2cd ships."""


@main.command()
@DATA
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the run.")
@click.option("--labels/--label-free", default=True, help="Train on labels, or on simulated changes.")
@click.option("--series", multiple=True, type=FOLDER, help="Unlabelled catalogues.")
@click.option("--folds", type=click.IntRange(1), default=1, help="Folds of the cross-validation; 1 = all cities.")
@click.option("--fold", type=click.IntRange(0), default=0, help="The fold to hold out, from 0.")
@click.option("--start", help="Shipped model, or path of a run or a model of `card`, to start from.")
@click.option("--simulated", type=click.FloatRange(0, 1), default=0.0, help="Share of simulated samples beside labels.")
@click.option(
    "--blend", type=click.FloatRange(0, 1), default=1.0, help="Share of the trained weights; the rest: --start's."
)
@click.option("--steps", type=click.IntRange(1), default=Plan.steps, help="Optimisation steps.")
@click.option("--batch-size", type=click.IntRange(1), default=Plan.batch_size, help="Crops in a step.")
@click.option("--size", type=click.IntRange(64), default=128, help="Edge of a crop [px], a multiple of 64.")
@click.option("--rate", type=float, default=Plan.rate, help="Largest learning rate.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Of all random choices.")
@click.option("--network", "kind", type=click.Choice(NETWORKS), default=NETWORKS[0], help="What to train.")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(1), default=2, help="Threads of the arithmetic.")
def fit(
    data: Path, out: Path, labels: bool, series: tuple[Path, ...], folds: int, fold: int, start: str | None,
    simulated: float, steps: int, batch_size: int, size: int, rate: float, seed: int,
    threads: int, blend: float, kind: str, device: str,
) -> None:  # fmt: skip
    """Train one network; interrupted, the same command goes on where it was."""
    torch.set_num_threads(threads)
    if fold >= folds:
        raise click.BadParameter(f"{fold}, expected less than --folds {folds}", param_hint="--fold")
    if start and kind != NETWORKS[0]:
        raise click.UsageError(f"--network {kind} does not start from --start {start}, expected one of the two")
    held_out = _held_out(fold_places(data, labels=labels), folds, fold) if folds > 1 else ()
    plan = Plan(steps=steps, batch_size=batch_size, rate=rate, seed=seed)
    train(
        data,
        out,
        plan,
        labels=labels,
        held_out=held_out,
        series=series,
        start=start,
        simulated=simulated,
        blend=blend,
        size=size,
        kind=kind,
        device=device,
    )


def _held_out(names: list[str], folds: int, fold: int) -> tuple[str, ...]:
    number = len({ground(name) for name in names})
    if folds > number:
        found = f"{folds}, expected at most {number}, the number of places to hold out"
        raise click.BadParameter(found, param_hint="--folds")
    return fold_cities(names, folds, fold)


@main.command(name="score")
@DATA
@click.option("--model", help="Name of a shipped model, or path of an exported one.")
@click.option("--baseline", "method", type=click.Choice(sorted(BASELINES)), help="A classical method instead.")
@click.option("--runs", multiple=True, type=FOLDER, help="Folds, for cross-validation.")
@click.option("--pictures", type=click.Path(path_type=Path), help="Folder for a picture of each city.")
@click.option(
    "--disturbed",
    is_flag=True,
    help="Instead: what --model or --baseline sees when one date is disturbed.",
)
@click.option(
    "--share", type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="A last row: the pooled scores where this share of the pixels has changed.",
)  # fmt: skip
def score_command(
    data: Path, model: str | None, method: str | None, runs: tuple[Path, ...], pictures: Path | None,
    disturbed: bool, share: float | None,
) -> None:  # fmt: skip
    """Print precision, recall, F1, AP and ECE per city and pooled."""
    _require_one_way(model, method, runs)
    if disturbed and (runs or pictures or share is not None):
        raise click.UsageError("--disturbed takes --model or --baseline, and neither --runs, --pictures nor --share")
    if share is not None and math.isnan(share):  # which is in no range, nor outside
        raise click.BadParameter("nan, expected a share between 0 and 1", param_hint="--share")
    cities = load_cities(data)
    if disturbed:
        predict = of_model(load_model(model)) if model else of_baseline(str(method))
        click.echo(f"\n{table(predict, cities)}")
        return
    for title, report in _reports(cities, model, method, runs, pictures).items():
        click.echo(f"\n{title}\n\n{report.table(share)}")


def _require_one_way(model: str | None, method: str | None, runs: tuple[Path, ...]) -> None:
    given = [name for name, value in {"--model": model, "--baseline": method, "--runs": runs}.items() if value]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise click.UsageError(
            f"found {found}, expected one of --model ({', '.join(list_models())}), --baseline, --runs"
        )


def _reports(
    cities: list[City], model: str | None, method: str | None, runs: tuple[Path, ...], pictures: Path | None
) -> dict[str, Report]:
    if runs:
        opened = [Run.open(p) for p in runs]
        raw, calibrated, (threshold, temperature) = cross_validate(opened, cities, pictures)
        final = f"over all cities: threshold {threshold:.3f}, temperature {temperature:.3f}"
        click.echo(f"\n{protocol(opened)}")
        return {"As trained": raw, f"Calibrated on the cities of the other folds ({final})": calibrated}
    if method:
        return {method: score(baseline(method), cities, pictures)}
    return {str(model): score(predictor(load_model(str(model))), cities, pictures)}


@main.command()
@DATA
@click.argument("name")
@click.option(
    "--run", "shipped", type=FOLDER, multiple=True, required=True,
    help="The run to ship; of several with one start the mean of their weights, of others a committee.",
)  # fmt: skip
@click.option("--runs", multiple=True, type=FOLDER, help="Runs of the folds.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=WEIGHTS, help="Folder of the weights.", show_default=False
)
def card(data: Path, name: str, shipped: tuple[Path, ...], runs: tuple[Path, ...], out: Path) -> None:
    """Calibrate runs, and write it with its card as model NAME."""
    document = publish(name, [Run.open(p) for p in shipped], [Run.open(p) for p in runs], load_cities(data), out)
    click.echo(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
