"""From runs to a shipped model: calibrated weights and the card that goes with them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from scipy.special import logit

from s2cd.errors import ConfigError, ModelError
from s2cd.model import Model
from s2cd.model.network import Committee, cost
from s2cd.training.data import City
from s2cd.training.fcsiam import FCSiamDiff
from s2cd.training.folders import made, written
from s2cd.training.robustness import f1_under, false_change, of_model
from s2cd.training.runs import NETWORKS, Run, as_model, combined, cross_validate, protocol
from s2cd.training.scoring import Report, predictor, score

CHANGED = 0.025  # share of pixels of two dates one to three years apart that are expected to have changed
TEMPERATURE = 1.6  # of a network trained without labels, in its pool: of 0.8 to 2.5 that of the least calibration error
TEST_SHARE = 0.051  # of OSCD's test cities, from the precision, recall and accuracy published for them (Daudt, 2018)
SUMMARY = {
    "generic": {
        "summary": "Change of land cover: construction, clear-cut, burn, flood; trained without change labels.",
        "licence": "Apache-2.0",
        "data": "Pixels of the 14 OSCD training pairs (no labels) and of two Flanders series, with simulated changes. "
        "Contains modified Copernicus Sentinel data 2015-2018.",
    },
    "urban": {
        "summary": "Urban change: new buildings, roads and building sites, as OSCD labels it.",
        "licence": "CC-BY-NC-SA-4.0",
        "data": "The 14 training pairs of the Onera Satellite Change Detection dataset with their labels "
        "(Daudt et al., IGARSS 2018; labels CC BY-NC-SA), and two Flanders series without labels. "
        "Contains modified Copernicus Sentinel data 2015-2018.",
    },
}


def publish(name: str, runs: list[Run], folds: list[Run], cities: list[City], folder: Path) -> dict[str, Any]:
    """Write the network of `runs` (see `combined`) and its card to `folder` and return the card.

    With `folds`, scores are those of cross-validation, and the calibration that it gives goes into the weights.
    Without, runs that have seen no labels are calibrated without them, and others on the places that they were trained
    on, whose scores flatter. Disturbances are tried on all cities.

    Raises ConfigError for a name that is no file's name, ModelError for runs of a network that is only there for
    comparison and for weights that are not finite, CatalogError for labels without change and first dates that
    show nothing, OutputError for `folder`.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(f"name of the model: found {name!r}, expected letters, digits, '_', '-' and '.'")
    net = combined(runs)
    if isinstance(net, FCSiamDiff):
        raise ModelError(f"{runs[0].path.name}: found network {runs[0].kind!r}, expected {NETWORKS[0]!r} to be shipped")
    if not all(value.isfinite().all() for value in net.state_dict().values()):
        raise ModelError(f"{', '.join(run.path.name for run in runs)}: found weights that are not finite: it diverged")
    made(folder)
    if folds:
        raw, report, (threshold, temperature) = cross_validate(folds, cities)
        how = protocol(folds)
    elif any(run.labels or run.start_labels for run in runs):
        raw = score(predictor(as_model(net, name)), cities)
        threshold, temperature = raw.pooled.calibration()
        report = score(predictor(as_model(net, name, threshold, temperature)), cities)
        how = "in sample: scored and calibrated on the places that it was trained on, so the scores flatter"
    else:
        threshold, temperature = unlabelled_calibration(as_model(net, name), cities)
        raw = score(predictor(as_model(net, name)), cities)
        report = score(predictor(as_model(net, name, threshold, temperature)), cities)
        how = (
            f"no labels in training; the threshold takes {CHANGED:.1%} of all pixels for changed; the weights of the "
            "pool, what it takes for usual and its smoothing were chosen by F1 on these cities, the temperature by "
            "their calibration error; best F1 picks the threshold on their labels too"
        )
    model = as_model(net, name, threshold, temperature)
    number = f"mean of {len(net.members)}: " if isinstance(net, Committee) else ""
    card: dict[str, Any] = {"name": name, **SUMMARY.get(name, {})}
    inherited = [card.get("licence"), *(run.start_licence for run in runs)]
    licences = {licence for licence in inherited if licence}
    if len(licences) > 1:
        licences.discard("Apache-2.0")  # of `generic`: it allows whatever the others ask for
    if licences:
        card["licence"] = " AND ".join(sorted(licences))
    card |= {
        "architecture": f"{number}siamese U-Net, absolute difference at every scale, 20 m grid inside",
        "framework_version": torch.__version__.split("+")[0],
        "cost": cost(net.folded()),
        "training": [json.loads((run.path / "run.json").read_text()) for run in runs],
        "calibration": {"threshold_logit": round(threshold, 4), "temperature": round(temperature, 4)},
        "scores": scores(report, how) | {"pooled_uncalibrated": raw.pooled.scores().rounded()},
        "unchanged_pairs_disturbed": {
            kind: {"mean_probability": round(mean, 5), "share_above_half": round(share, 6), "largest": round(top, 4)}
            for kind, (mean, share, top) in false_change(of_model(model), cities).items()
        },
        "f1_with_later_date_disturbed_in_sample": {
            k: round(v, 4) for k, v in f1_under(of_model(model), cities).items()
        },
    }
    text = json.dumps(card, indent=1, allow_nan=False) + "\n"
    weights = net.folded(temperature, -threshold / temperature).state_dict()
    with written(folder / f"{name}.safetensors") as path:
        path.write_bytes(save({k: v.contiguous() for k, v in weights.items()}))  # save_file heeds no umask
    with written(folder / f"{name}.json") as path:
        path.write_text(text)
    return card


def unlabelled_calibration(model: Model, cities: list[City]) -> tuple[float, float]:
    """Return (threshold, temperature) for a pool of two experts, without labels.

    The threshold is the logit that a share CHANGED of all pixels exceeds; the temperature is TEMPERATURE.
    """
    pooled = np.concatenate([predictor(model)(city).ravel() for city in cities]).astype(np.float64)
    return float(logit(np.nanquantile(pooled, 1 - CHANGED).clip(1e-7, 1 - 1e-7))), TEMPERATURE


def scores(report: Report, protocol: str) -> dict[str, Any]:
    """Return the scores of a report as a card holds them."""
    cities = {name: histogram.scores().rounded() for name, histogram in report.cities.items()}
    pooled = report.pooled
    elsewhere = {"pooled_reweighted": pooled.with_share(TEST_SHARE).scores().rounded()}
    return {"protocol": protocol, "pooled": pooled.scores().rounded(), **elsewhere, "cities": cities}
