"""A training run on disk: weights, plan and the cities it did not see; and its model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from s2cd.errors import ConfigError, ModelError
from s2cd.model.device import Engine
from s2cd.model.network import HALO, STRIDE, ChangeNet, Committee, network_of
from s2cd.model.registry import WEIGHTS, Model, list_models, load_model
from s2cd.training.data import City, ground
from s2cd.training.fcsiam import FCSiamDiff
from s2cd.training.fitting import Plan, fit, require_same
from s2cd.training.folders import made, written
from s2cd.training.material import Material
from s2cd.training.metric import spectral_metric
from s2cd.training.metrics import Histogram
from s2cd.training.scoring import Map, Report, judged, predictor, score
from s2cd.training.simulated import BLOCK

FOLD_SEED = 4
NETWORKS = ("s2cd", "fc-siam-diff")
POOL = (4.0, 6.0)  # weights of the background and of the magnitude beside a network trained without labels
STARTED = 3.0  # votes in a committee of a network that started from trained weights; one from scratch has one
HALF_POOL = (POOL[0] / 2, POOL[1] / 2)  # beside one that learns from labels what they leave open; calibrated alike

NO_START: dict[str, Any] = {
    "start": None, "start_sha256": None, "start_labels": False, "start_held_out": [], "start_licence": None
}  # fmt: skip

Trainable = ChangeNet | Committee | FCSiamDiff


@dataclass(frozen=True)
class Run:
    """A finished training: `held_out` are the cities whose labels and pixels it did not see.

    norm            whether its network still has batch normalisation
    labels          whether it was trained on labels
    kind            which of NETWORKS it is
    start           whose weights it started from, by name, None for random ones
    start_sha256    of these weights (hex), None for random ones
    start_labels    whether they had seen labels
    start_held_out  cities of which they had seen none
    start_licence   of these weights, where their card tells one
    """

    path: Path
    held_out: tuple[str, ...]
    norm: bool
    labels: bool
    kind: str
    start: str | None
    start_sha256: str | None
    start_labels: bool
    start_held_out: tuple[str, ...]
    start_licence: str | None

    @classmethod
    def open(cls, path: Path) -> Run:
        """Read the run at `path`. Raises ConfigError if there is none."""
        try:
            described = json.loads((path / "run.json").read_text())
            held_out, start_held_out = (tuple(described[name]) for name in ("held_out", "start_held_out"))
            norm, labels, kind, start = (described[name] for name in ("norm", "labels", "network", "start"))
            digest, seen, licence = (described[f"start_{name}"] for name in ("sha256", "labels", "licence"))
            return cls(path, held_out, norm, labels, kind, start, digest, seen, start_held_out, licence)
        except KeyError as error:
            raise ConfigError(f"{path / 'run.json'}: found no {error}, expected a run of this version") from None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{path}: found no run, expected a folder that `fit` wrote: run.json: {reason}") from None

    @property
    def unlearnt(self) -> list[str]:
        """Cities whose labels reached its weights in no way: held out here and, where that saw labels, by its start."""
        return [name for name in self.held_out if not self.start_labels or name in self.start_held_out]

    @property
    def start_may_know(self) -> bool:
        """Whether its start may have seen labels of a city that is held out here."""
        return self.start_labels and not set(self.held_out).issubset(self.start_held_out)

    @property
    def weights(self) -> Path:
        """The file of the weights."""
        return self.path / "network.safetensors"

    def network(self) -> Trainable:
        """Return the trained network as it is. Raises ModelError if its file is missing, damaged or of another."""
        try:
            return self.loaded(load_file(self.weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ModelError(f"{self.weights}: cannot be read: {str(error).splitlines()[0]}") from None

    def loaded(self, state: dict[str, Tensor]) -> Trainable:
        """Return a network of this run's kind with these weights."""
        if self.kind == NETWORKS[0]:
            return network_of(state, norm=self.norm)
        net = FCSiamDiff()
        net.load_state_dict(state)
        return net.eval()


def combined(runs: list[Run]) -> Trainable:
    """Return the network of several runs: mean weights of those that started from the same ones, a committee of these.

    In it networks that started from trained weights have STARTED votes.

    Raises ConfigError for a committee with networks other than `ChangeNet`.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.start_sha256 or str(run.path), []).append(run)
    members = [averaged(group) for group in groups.values()]
    if len(members) == 1:
        return members[0]
    for group, member in zip(groups.values(), members, strict=True):
        if not isinstance(member, ChangeNet):
            kind = group[0].kind if isinstance(member, FCSiamDiff) else "committee"
            raise ConfigError(f"{group[0].path.name}: found a {kind}, expected single networks {NETWORKS[0]!r}")
    networks = [member for member in members if isinstance(member, ChangeNet)]
    votes = [STARTED if group[0].start_sha256 else 1.0 for group in groups.values()]
    return Committee(net.scale(n * len(votes) / sum(votes)) for net, n in zip(networks, votes, strict=True))


def averaged(runs: list[Run]) -> Trainable:
    """Return the network of the mean weights of runs that started from the same ones (Wortsman et al., ICML 2022)."""
    states = [run.network().state_dict() for run in runs]
    mean = {k: sum(s[k] for s in states) / len(states) if v.is_floating_point() else v for k, v in states[0].items()}
    return runs[0].loaded(mean)


def as_model(net: Trainable, name: str, threshold: float = 0.0, temperature: float = 1.0) -> Model:
    """Return a network as a model on the CPU, after logit -> (logit - threshold) / temperature."""
    folded = net.folded(temperature, -threshold / temperature)
    engine = Engine(folded, torch.device("cpu"), stride=STRIDE // 2, halo=HALO // 2)
    return Model(name, "", engine, {})


def fold_cities(names: Iterable[str], folds: int, fold: int) -> tuple[str, ...]:
    """Return the names of the cities held out in `fold` of `folds`, a fixed shuffle of the sorted names.

    All orbits of a place are held out together: they show the same ground.
    """
    names = sorted(names)
    grounds = sorted({ground(name) for name in names})
    order = np.random.default_rng(FOLD_SEED).permutation(len(grounds))
    held = {grounds[i] for i in order[fold::folds]}
    return tuple(name for name in names if ground(name) in held)


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
    """Fit one network and write it to `out`, going on from a checkpoint of the same training there.

    labels    train on the labels of `data`, or on simulated changes in its pixels and those of `series`
    held_out  places that are not used, of `data` or of `series`, under any orbit
    start     a shipped model, or the path of a run or of a trained model, whose weights to start from
    blend     share of the trained weights in the result, the rest are those of `start`: what fine-tuning on few places
              gains without what it forgets (WiSE-FT, Wortsman et al., CVPR 2022)
    simulated with labels: share of samples with simulated changes beside the labelled ones
    size      edge of a crop [px], a multiple of 64
    kind      one of NETWORKS, where there is no `start`
    device    as in `s2cd.load_model`

    Raises CatalogError for `data` without labelled pairs and for places smaller than a crop, ReadError for a raster,
    ConfigError for options that cannot be used and for an `out` that holds another training, ModelError for a `start`
    that is none, a device that is not there and a loss that is not finite, OutputError for `out`.
    """
    if size % BLOCK or size < BLOCK:
        raise ConfigError(f"size: found {size}, expected a multiple of {BLOCK}")
    for name, share in {"blend": blend, "simulated": simulated}.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"{name}: found {share:g}, expected a share, 0 to 1")
    if blend != 1 and start is None:
        raise ConfigError(f"blend: found {blend:g} without a start, expected one whose weights are the rest")
    made(out)
    material = Material.load(data, series, labels=labels, held_out=held_out, size=size)
    sampler = material.sampler(size, simulated)
    torch.manual_seed(plan.seed)
    net, origin = _first(start) if start else (_fresh(kind, labels=labels), NO_START)
    description = {"held_out": list(held_out), "labels": labels, "plan": asdict(plan), "size": size, **origin}
    description |= {"norm": _has_norm(net), "simulated": simulated if labels else 1.0, "blend": blend}
    description |= {"network": "fc-siam-diff" if isinstance(net, FCSiamDiff) else NETWORKS[0], **material.digests()}
    _require_free(out / "run.json", description)
    parts = [part for part in net.modules() if isinstance(part, ChangeNet)]
    if labels and parts:
        metric = spectral_metric(material.cities, HALF_POOL[1])
        for part in parts:
            part.metric.copy_(metric)
    first = {name: value.clone() for name, value in net.state_dict().items()}
    trained = fit(net, sampler, plan, out, description, device=device)
    if isinstance(trained, ChangeNet) and not labels and start is None:
        trained.pool(*POOL)  # one of two experts from now on: the magnitude of change is the other
    weights = trained.state_dict()
    mixed = {k: v.lerp(first[k], 1 - blend) if v.is_floating_point() else v for k, v in weights.items()}
    with written(out / "network.safetensors") as path:
        path.write_bytes(save({k: v.contiguous() for k, v in mixed.items()}))  # save_file heeds no umask
    with written(out / "run.json") as path:
        path.write_text(json.dumps(description, indent=1))
    return Run.open(out)


def _require_free(path: Path, description: dict[str, Any]) -> None:
    """Raise ConfigError for a run.json that is of another training than `description`, or of none."""
    if not path.is_file():
        return
    try:
        found = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read, delete it to go on: {error}") from None
    require_same(path, found, description)


def _fresh(kind: str, *, labels: bool) -> Trainable:
    if kind != NETWORKS[0]:
        return FCSiamDiff()
    return ChangeNet(norm=True).pool(*HALF_POOL) if labels else ChangeNet(norm=True)


def _first(start: str) -> tuple[Trainable, dict[str, Any]]:
    """Return the network that training starts from, and what a run tells of it.

    A shipped or trained model has its normalisation folded and its calibration. Raises ConfigError for what is no run,
    ModelError for what is no model.
    """
    told: dict[str, Any] = {"start": Path(start).name}
    if start not in list_models() and os.path.isdir(start):
        run = Run.open(Path(start))
        network, told["start_sha256"] = run.network(), hashlib.sha256(run.weights.read_bytes()).hexdigest()
        told |= {"start_labels": run.labels or run.start_labels, "start_held_out": run.unlearnt}
        return network, told | {"start_licence": run.start_licence}
    model = load_model(start, "cpu")
    path = WEIGHTS / f"{start}.safetensors" if start in list_models() else Path(start)
    if path.suffix != ".safetensors":
        raise ModelError(f"start {start}: found an exported model, expected a shipped one, .safetensors or a run")
    told |= {"start_sha256": model.hash, "start_labels": _seen_labels(model), "start_held_out": []}
    return network_of(load_file(path)), told | {"start_licence": _licence(model)}


def _seen_labels(model: Model) -> bool:
    """Tell whether a model may have seen labels: if its card tells no training, too. Raises ModelError for nonsense."""
    history = model.card.get("training") or []
    if not isinstance(history, list) or not all(isinstance(run, dict) for run in history):
        raise ModelError(f"card of {model.name}: training is {history!r:.60}, expected a list of objects")
    return not history or any(bool(run.get("labels") or run.get("start_labels")) for run in history)


def _licence(model: Model) -> str | None:
    """Return the licence that a model's card tells, if it does. Raises ModelError for another type."""
    licence = model.card.get("licence")
    if not isinstance(licence, str | None):
        raise ModelError(f"card of {model.name}: licence is {licence!r:.60}, expected a name")
    return licence


def _has_norm(net: Trainable) -> bool:
    return any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())


def cross_validate(
    runs: list[Run], cities: list[City], pictures: Path | None = None
) -> tuple[Report, Report, tuple[float, float]]:
    """Score each city by the runs that held it out, several of one fold together (`combined`).

    Returns the report as trained; the report after calibration, where the threshold and temperature for the cities of
    one run come from the cities of the other runs; and (threshold, temperature) over all, for the final model.

    Raises ConfigError for runs of fewer than two folds, for those that hold out no city or others than these, and for
    folds that share the ground of a city; CatalogError if the cities of all other folds have not changed; OutputError
    for `pictures`.
    """
    names = {city.name for city in cities}
    for run in runs:
        if not run.held_out or not names.issuperset(run.held_out):
            held = ", ".join(run.held_out) or "no place"
            raise ConfigError(
                f"{run.path}: found {held} held out, expected places of --data: {', '.join(sorted(names))}"
            )
    raw: dict[str, Histogram] = {}
    maps: dict[str, Map] = {}
    folds = sorted({run.held_out for run in runs})
    if len(folds) < 2:
        raise ConfigError(f"--runs: found {len(folds)} fold ({', '.join(folds[0])} held out), expected at least 2")
    for one, other in combinations(folds, 2):
        shared = {ground(name) for name in one} & {ground(name) for name in other}
        if shared:
            found = f"{', '.join(sorted(shared))} held out in two folds ({', '.join(one)}; {', '.join(other)})"
            raise ConfigError(f"--runs: found {found}, expected each place in one")
    if pictures is not None:
        made(pictures)
    for held_out in folds:
        predict = predictor(as_model(combined([run for run in runs if run.held_out == held_out]), "fold"))
        for city in cities:
            if city.name in held_out:
                maps[city.name] = judged(predict(city), city)
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


def protocol(runs: list[Run]) -> str:
    """Return how the scores of `cross_validate` come about, as cards and tables tell it."""
    head = f"leave-cities-out cross-validation, {len({run.held_out for run in runs})} folds, {len(runs)} runs in all: "
    tail = "; threshold and temperature from the cities of the other folds"
    doubtful = sorted({str(run.start) for run in runs if run.start_may_know})
    if doubtful:
        return (
            f"{head}the network they start from ({', '.join(doubtful)}) has seen labels; where those of the city "
            f"scored are among them, the scores flatter{tail}"
        )
    seen = (
        " (the network they start from may have seen its pixels, without labels)"
        if any(run.start for run in runs)
        else ""
    )
    return f"{head}labels of a city never reach the network that is scored on it{seen}{tail}"


def shifted(probability: Map, threshold: float, temperature: float) -> Map:
    """Return the probability of which the logit is (logit - threshold) / temperature."""
    p = np.clip(probability.astype(np.float64), 1e-7, 1 - 1e-7)
    return (1 / (1 + np.exp(-(np.log(p / (1 - p)) - threshold) / temperature))).astype(np.float32)
