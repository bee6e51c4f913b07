"""A training run on disk: weights, plan and the cities it did not see; and its model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from s2cd.model.device import Engine
from s2cd.model.network import HALO, STRIDE, ChangeNet
from s2cd.model.registry import Model
from s2cd.training.data import City, Image, load_cities, load_series
from s2cd.training.fitting import Plan, fit
from s2cd.training.metrics import Histogram
from s2cd.training.sampling import LabelledSampler, Mixture, Sampler
from s2cd.training.scoring import Map, Report, predictor, score
from s2cd.training.simulated import URBAN_KINDS, Place, SimulatedSampler, ranked

FOLD_SEED = 4


@dataclass(frozen=True)
class Run:
    """A finished training: `held_out` are the cities whose labels and pixels it did not see."""

    path: Path
    held_out: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> Run:
        """Read the run at `path`."""
        return cls(path, tuple(json.loads((path / "run.json").read_text())["held_out"]))

    def network(self) -> ChangeNet:
        """Return the trained network, normalisation not folded."""
        net = ChangeNet(norm=True)
        net.load_state_dict(load_file(self.path / "network.safetensors"))
        return net.eval()

    def model(self, threshold: float = 0.0, temperature: float = 1.0) -> Model:
        """Return the model on the CPU after logit -> (logit - threshold) / temperature."""
        return as_model(self.network().folded(temperature, -threshold / temperature), self.path.name)


def as_model(net: ChangeNet, name: str) -> Model:
    """Return a folded network as a model on the CPU."""
    engine = Engine(net, torch.device("cpu"), stride=STRIDE // 2, halo=HALO // 2)
    return Model(name, "", engine, {})


def fold_cities(names: Iterable[str], folds: int, fold: int) -> tuple[str, ...]:
    """Return the names of the cities held out in `fold` of `folds`, a fixed shuffle of the sorted names."""
    names = sorted(names)
    order = np.random.default_rng(FOLD_SEED).permutation(len(names))
    return tuple(names[i] for i in sorted(order[fold::folds]))


def train(
    data: Path,
    out: Path,
    plan: Plan,
    *,
    labels: bool,
    held_out: tuple[str, ...] = (),
    series: tuple[Path, ...] = (),
    start: Path | None = None,
    guesses: Path | None = None,
    simulated: float = 0.0,
    blend: float = 1.0,
    size: int = 128,
) -> Run:
    """Fit one network and write it to `out`, going on from a checkpoint there.

    labels    train on the labels of `data`, or on simulated changes in its pixels and those of `series`
    held_out  places of `data` that are not used
    start     run whose weights to start from
    blend     share of the trained weights in the result, the rest are those of `start`: what fine-tuning on few places
              gains without what it forgets (WiSE-FT, Wortsman et al., CVPR 2022)
    simulated with labels: share of samples with simulated changes beside the labelled ones
    guesses   without labels: run whose sure guesses on the pairs of `data` stand in for labels (self-training)
    """
    cities = [city for city in load_cities(data) if city.name not in held_out]
    quiet = [images for root in series for images in load_series(root).values() if len(images) > 1]
    sampler = _labelled(cities, quiet, size, simulated) if labels else _simulated(cities, quiet, size, guesses)
    torch.manual_seed(plan.seed)
    net = Run.open(start).network() if start else ChangeNet(norm=True)
    first = {name: value.clone() for name, value in net.state_dict().items()}
    trained = fit(net, sampler, plan, out).state_dict()
    mixed = {k: v.lerp(first[k], 1 - blend) if v.is_floating_point() else v for k, v in trained.items()}
    save_file({k: v.contiguous() for k, v in mixed.items()}, out / "network.safetensors")
    description = {"held_out": list(held_out), "labels": labels, "plan": asdict(plan), "size": size}
    description |= {"start": start.name if start else None, "guesses": guesses.name if guesses else None}
    description |= {"simulated": simulated if labels else 1.0, "blend": blend}
    (out / "run.json").write_text(json.dumps(description, indent=1))
    return Run(out, held_out)


def _labelled(cities: list[City], quiet: list[list[Image]], size: int, simulated: float) -> Sampler:
    labelled = LabelledSampler(cities, size)
    if not simulated:
        return labelled
    places = [Place.of([c.before, c.after], c.label.astype(np.float32)) for c in cities]
    return Mixture(labelled, SimulatedSampler(places, quiet, size, kinds=URBAN_KINDS), simulated)


def _simulated(cities: list[City], quiet: list[list[Image]], size: int, guesses: Path | None) -> Sampler:
    places = [Place.of([c.before, c.after]) for c in cities]
    if guesses is not None:
        predict = predictor(Run.open(guesses).model())
        for place, city in zip(places, cities, strict=True):
            place.guess = ranked(predict(city), city.before.normalised, city.after.normalised)
    return SimulatedSampler(places, quiet, size)


def cross_validate(
    runs: list[Run], cities: list[City], pictures: Path | None = None
) -> tuple[Report, Report, tuple[float, float]]:
    """Score each city by the run that held it out.

    Returns the report as trained; the report after calibration, where the threshold and temperature for the cities of
    one run come from the cities of the other runs; and (threshold, temperature) over all, for the final model.
    """
    raw: dict[str, Histogram] = {}
    maps: dict[str, Map] = {}
    for run in runs:
        predict = predictor(run.model())
        for city in cities:
            if city.name in run.held_out:
                maps[city.name] = predict(city)
                raw[city.name] = Histogram.of(maps[city.name], city.label)
    calibrated: dict[str, Histogram] = {}
    for run in runs:
        threshold, temperature = Report({n: h for n, h in raw.items() if n not in run.held_out}).pooled.calibration()
        for city in cities:
            if city.name in run.held_out:
                probability = shifted(maps[city.name], threshold, temperature)
                report = score(lambda _, p=probability: p, [city], pictures)  # type: ignore[misc]
                calibrated |= report.cities
    return Report(raw), Report(calibrated), Report(raw).pooled.calibration()


def shifted(probability: Map, threshold: float, temperature: float) -> Map:
    """Return the probability of which the logit is (logit - threshold) / temperature."""
    p = np.clip(probability.astype(np.float64), 1e-7, 1 - 1e-7)
    return (1 / (1 + np.exp(-(np.log(p / (1 - p)) - threshold) / temperature))).astype(np.float32)
