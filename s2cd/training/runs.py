"""A training run on disk: weights, plan and the cities it did not see; and its model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from s2cd.errors import ConfigError
from s2cd.model.device import Engine
from s2cd.model.network import HALO, STRIDE, ChangeNet, Committee, network_of
from s2cd.model.registry import WEIGHTS, Model, list_models
from s2cd.training.data import City, Image, load_cities, load_series
from s2cd.training.fcsiam import FCSiamDiff
from s2cd.training.fitting import Plan, fit
from s2cd.training.metrics import Histogram
from s2cd.training.sampling import LabelledSampler, Mixture, Sampler
from s2cd.training.scoring import Map, Report, predictor, score
from s2cd.training.simulated import URBAN_KINDS, Place, SimulatedSampler

FOLD_SEED = 4
NETWORKS = ("s2cd", "fc-siam-diff")
POOL = (3.0, 6.0)  # weights of the background and of the magnitude beside a network trained without labels
HALF_POOL = (POOL[0] / 2, POOL[1] / 2)  # beside one that learns from labels what they leave open; calibrated alike

Trainable = ChangeNet | Committee | FCSiamDiff


@dataclass(frozen=True)
class Run:
    """A finished training: `held_out` are the cities whose labels and pixels it did not see.

    `norm` tells whether its network still has batch normalisation, `labels` whether it was trained on labels, `kind`
    which of NETWORKS it is, `start` whose weights it started from, None for random ones.
    """

    path: Path
    held_out: tuple[str, ...]
    norm: bool
    labels: bool
    kind: str
    start: str | None

    @classmethod
    def open(cls, path: Path) -> Run:
        """Read the run at `path`."""
        described = json.loads((path / "run.json").read_text())
        held_out = tuple(described["held_out"])
        figures = (described[name] for name in ("norm", "labels", "network", "start"))
        return cls(path, held_out, *figures)

    def network(self) -> Trainable:
        """Return the trained network as it is."""
        return self.loaded(load_file(self.path / "network.safetensors"))

    def loaded(self, state: dict[str, Tensor]) -> Trainable:
        """Return a network of this run's kind with these weights."""
        if self.kind == NETWORKS[0]:
            return network_of(state, norm=self.norm)
        net = FCSiamDiff()
        net.load_state_dict(state)
        return net.eval()


def combined(runs: list[Run]) -> Trainable:
    """Return the network of several runs: mean weights of those that started from the same ones, a committee of these.

    Raises ConfigError for a committee with networks other than `ChangeNet`.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.start or str(run.path), []).append(run)
    members = [averaged(group) for group in groups.values()]
    if len(members) == 1:
        return members[0]
    for group, member in zip(groups.values(), members, strict=True):
        if not isinstance(member, ChangeNet):
            kind = group[0].kind if isinstance(member, FCSiamDiff) else "committee"
            raise ConfigError(f"{group[0].path.name}: found a {kind}, expected single networks {NETWORKS[0]!r}")
    return Committee(member for member in members if isinstance(member, ChangeNet))


def averaged(runs: list[Run]) -> Trainable:
    """Return the network of the mean weights of runs that started from the same ones (Wortsman et al., ICML 2022).

    One that was trained without labels becomes one of two experts: the magnitude of change is the other (POOL).
    """
    states = [run.network().state_dict() for run in runs]
    mean = {k: sum(s[k] for s in states) / len(states) if v.is_floating_point() else v for k, v in states[0].items()}
    net = runs[0].loaded(mean)
    return net.pool(*POOL) if isinstance(net, ChangeNet) and not runs[0].labels else net


def as_model(net: Trainable, name: str, threshold: float = 0.0, temperature: float = 1.0) -> Model:
    """Return a network as a model on the CPU, after logit -> (logit - threshold) / temperature."""
    folded = net.folded(temperature, -threshold / temperature)
    engine = Engine(folded, torch.device("cpu"), stride=STRIDE // 2, halo=HALO // 2)
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
    start: str | None = None,
    simulated: float = 0.0,
    blend: float = 1.0,
    size: int = 128,
    kind: str = NETWORKS[0],
    device: str = "auto",
) -> Run:
    """Fit one network and write it to `out`, going on from a checkpoint there.

    labels    train on the labels of `data`, or on simulated changes in its pixels and those of `series`
    held_out  places of `data` that are not used
    start     a shipped model, or the path of a run, whose weights to start from
    blend     share of the trained weights in the result, the rest are those of `start`: what fine-tuning on few places
              gains without what it forgets (WiSE-FT, Wortsman et al., CVPR 2022)
    simulated with labels: share of samples with simulated changes beside the labelled ones
    kind      one of NETWORKS, where there is no `start`
    device    as in `s2cd.load_model`

    Raises CatalogError for `data` without labelled pairs, ModelError if the device is not there.
    """
    cities = [city for city in load_cities(data) if city.name not in held_out]
    quiet = [images for root in series for images in load_series(root).values() if len(images) > 1]
    sampler = _labelled(cities, quiet, size, simulated) if labels else _simulated(cities, quiet, size)
    torch.manual_seed(plan.seed)
    net = _first(start, kind, labels=labels)
    first = {name: value.clone() for name, value in net.state_dict().items()}
    trained = fit(net, sampler, plan, out, device=device).state_dict()
    mixed = {k: v.lerp(first[k], 1 - blend) if v.is_floating_point() else v for k, v in trained.items()}
    save_file({k: v.contiguous() for k, v in mixed.items()}, out / "network.safetensors")
    description = {"held_out": list(held_out), "labels": labels, "plan": asdict(plan), "size": size}
    description |= {"start": Path(start).name if start else None, "norm": _has_norm(net)}
    description |= {"simulated": simulated if labels else 1.0, "blend": blend}
    description |= {"network": "fc-siam-diff" if isinstance(net, FCSiamDiff) else NETWORKS[0]}
    (out / "run.json").write_text(json.dumps(description, indent=1))
    return Run.open(out)


def _first(start: str | None, kind: str, *, labels: bool) -> Trainable:
    """Return the network that training starts from; a shipped one has its normalisation folded and its calibration."""
    if start in list_models():
        return network_of(load_file(WEIGHTS / f"{start}.safetensors"))
    if start:
        return Run.open(Path(start)).network()
    if kind != NETWORKS[0]:
        return FCSiamDiff()
    return ChangeNet(norm=True).pool(*HALF_POOL) if labels else ChangeNet(norm=True)


def _has_norm(net: Trainable) -> bool:
    return any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())


def _labelled(cities: list[City], quiet: list[list[Image]], size: int, simulated: float) -> Sampler:
    labelled = LabelledSampler(cities, size)
    if not simulated:
        return labelled
    places = [Place.of([c.before, c.after], c.label) for c in cities]
    seasons = 1000  # dates of any season: crops come and go
    return Mixture(
        labelled, SimulatedSampler(places, quiet, size, kinds=URBAN_KINDS, quiet=0.4, gap=seasons), simulated
    )


def _simulated(cities: list[City], quiet: list[list[Image]], size: int) -> Sampler:
    return SimulatedSampler([Place.of([c.before, c.after]) for c in cities], quiet, size)


def cross_validate(
    runs: list[Run], cities: list[City], pictures: Path | None = None
) -> tuple[Report, Report, tuple[float, float]]:
    """Score each city by the runs that held it out, several of one fold together (`combined`).

    Returns the report as trained; the report after calibration, where the threshold and temperature for the cities of
    one run come from the cities of the other runs; and (threshold, temperature) over all, for the final model.

    Raises ConfigError for runs of fewer than two folds.
    """
    raw: dict[str, Histogram] = {}
    maps: dict[str, Map] = {}
    folds = sorted({run.held_out for run in runs})
    if len(folds) < 2:
        raise ConfigError(f"--runs: found {len(folds)} fold ({', '.join(folds[0])} held out), expected at least 2")
    for held_out in folds:
        predict = predictor(as_model(combined([run for run in runs if run.held_out == held_out]), "fold"))
        for city in cities:
            if city.name in held_out:
                maps[city.name] = predict(city)
                raw[city.name] = Histogram.of(maps[city.name], city.label)
    calibrated: dict[str, Histogram] = {}
    for held_out in folds:
        threshold, temperature = Report({n: h for n, h in raw.items() if n not in held_out}).pooled.calibration()
        for city in cities:
            if city.name in held_out:
                probability = shifted(maps[city.name], threshold, temperature)
                report = score(lambda _, p=probability: p, [city], pictures)  # type: ignore[misc]
                calibrated |= report.cities
    return Report(raw), Report(calibrated), Report(raw).pooled.calibration()


def shifted(probability: Map, threshold: float, temperature: float) -> Map:
    """Return the probability of which the logit is (logit - threshold) / temperature."""
    p = np.clip(probability.astype(np.float64), 1e-7, 1 - 1e-7)
    return (1 / (1 + np.exp(-(np.log(p / (1 - p)) - threshold) / temperature))).astype(np.float32)
