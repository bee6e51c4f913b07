"""From runs to a shipped model: calibrated weights and the card that goes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from s2cd.model.network import cost
from s2cd.training.data import City
from s2cd.training.robustness import f1_under, false_change
from s2cd.training.runs import Run, as_model, cross_validate
from s2cd.training.scoring import Report, predictor, score

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
        "(Daudt et al., IGARSS 2018; labels CC BY-NC-SA). Contains modified Copernicus Sentinel data 2015-2018.",
    },
}


def publish(name: str, run: Run, folds: list[Run], cities: list[City], folder: Path) -> dict[str, Any]:
    """Write the weights of `run` and their card to `folder` and return the card.

    With `folds`, scores are those of cross-validation, and the calibration that it gives goes into the weights;
    without, `run` has seen no labels and is scored on `cities` as it is. Disturbances are tried on every third city.
    """
    if folds:
        raw, report, (threshold, temperature) = cross_validate(folds, cities)
        protocol = (
            f"leave-cities-out cross-validation, {len(folds)} folds: labels of a city never reach the network that is "
            "scored on it (the network they start from saw its pixels, without labels); threshold and temperature "
            "from the cities of the other folds"
        )
    else:
        threshold, temperature = 0.0, 1.0
        raw = report = score(predictor(run.model()), cities)
        protocol = "no labels seen in training; best F1 picks the threshold on the labels it is scored on"
    net = run.network().folded(temperature, -threshold / temperature)
    model = as_model(net, name)
    card: dict[str, Any] = {"name": name, **SUMMARY.get(name, {})}
    card |= {
        "architecture": "siamese U-Net, absolute difference at every scale, 20 m grid inside",
        "framework_version": torch.__version__.split("+")[0],
        "cost": cost(net),
        "training": json.loads((run.path / "run.json").read_text()),
        "calibration": {"threshold_logit": round(threshold, 4), "temperature": round(temperature, 4)},
        "scores": scores(report, protocol) | {"pooled_uncalibrated": raw.pooled.scores().rounded()},
        "disturbed": [city.name for city in cities[::3]],
        "unchanged_pairs_disturbed": {
            kind: {"mean_probability": round(mean, 5), "share_above_half": round(share, 6), "largest": round(top, 4)}
            for kind, (mean, share, top) in false_change(model, cities[::3]).items()
        },
        "f1_with_later_date_disturbed_in_sample": {k: round(v, 4) for k, v in f1_under(model, cities[::3]).items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(card, indent=1) + "\n")
    return card


def scores(report: Report, protocol: str) -> dict[str, Any]:
    """Return the scores of a report as a card holds them."""
    cities = {name: histogram.scores().rounded() for name, histogram in report.cities.items()}
    return {"protocol": protocol, "pooled": report.pooled.scores().rounded(), "cities": cities}
