"""Scores of models on labelled pairs: per city and pooled, with a picture of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image as Picture

from s2cd.errors import ModelError
from s2cd.model import BANDS, Model
from s2cd.training.baselines import BASELINES
from s2cd.training.data import City, Image
from s2cd.training.folders import made, written
from s2cd.training.metrics import Histogram, Scores

Map = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Report:
    """Histograms by city; `pooled` counts all pixels of all cities together."""

    cities: dict[str, Histogram]

    @property
    def pooled(self) -> Histogram:
        """All cities together."""
        return Histogram(np.sum([h.counts for h in self.cities.values()], axis=0))

    def table(self, share: float | None = None) -> str:
        """Return a Markdown table of the scores at threshold 0.5, pooled last; then as if `share` had changed."""
        rows = [(name, h.scores()) for name, h in self.cities.items()] + [("**pooled**", self.pooled.scores())]
        if share is not None:
            rows.append(("reweighted", self.pooled.with_share(share).scores()))
        return "\n".join([HEADER, *(f"| {name} | {_cells(scores)} |" for name, scores in rows)])


HEADER = """| city | changed | precision | recall | F1 | best F1 | at | AP | ECE |
|---|---|---|---|---|---|---|---|---|"""


def _cells(s: Scores) -> str:
    values = (s.precision, s.recall, s.f1, s.best_f1, s.best_threshold, s.ap)
    return " | ".join([f"{s.changed:.2%}", *(f"{v:.3f}" for v in values), f"{s.ece:.4f}"])


def score(predict: Callable[[City], Map], cities: Iterable[City], pictures: Path | None = None) -> Report:
    """Score a map for each city; with `pictures`, write one there for each. Raises OutputError if that cannot be."""
    if pictures is not None:
        made(pictures)
    histograms = {}
    for city in cities:
        probability = judged(predict(city), city)
        histograms[city.name] = Histogram.of(probability, city.label)
        if pictures is not None:
            with written(pictures / f"{city.name}.png") as path:
                picture(probability, city.label).save(path)
    return Report(histograms)


def judged(probability: Map, city: City) -> Map:
    """Return a map of a city, NaN where its label tells nothing."""
    return np.where(city.known, probability, np.float32(np.nan))


def mapping(model: Model) -> Callable[[Map, Map], Map]:
    """Return what maps two dates, float32 (band, y, x) with all BANDS, with a model: of those it takes its own.

    Raises ModelError for a model of other bands; what it returns raises it for NaN where both dates are observed.
    """
    others = set(model.bands) - set(BANDS)
    if others:
        raise ModelError(f"model {model.name!r} takes {', '.join(sorted(others))}, expected only {', '.join(BANDS)}")
    index = [BANDS.index(band) for band in model.bands]

    def predict(before: Map, after: Map) -> Map:
        dates = before[index], after[index]
        probability = model.predict(*dates)
        if np.isnan(probability[np.isfinite(dates).all(axis=(0, 1))]).any():
            raise ModelError(f"model {model.name!r}: found NaN where both dates are observed, expected a probability")
        return probability

    return predict


def predictor(model: Model) -> Callable[[City], Map]:
    """Return what scores a model: its maps of a city. Raises ModelError for a model of other bands than BANDS."""
    predict = mapping(model)
    return lambda city: predict(city.before.reflectance, city.after.reflectance)


def baseline(name: str) -> Callable[[City], Map]:
    """Return what scores a baseline: its magnitude, scaled so that probability 0.5 is the 97.5th percentile."""

    def predict(city: City) -> Map:
        found = magnitude(name, city.before, city.after)
        return scaled(found, found)

    return predict


def magnitude(name: str, before: Image, after: Image) -> Map:
    """Return the magnitude of change by a baseline, float32 (y, x), NaN where either date does not show all bands."""
    seen = before.seen & after.seen
    dates = [np.where(seen, image.normalised.clip(-6, 6), np.float32(0)) for image in (before, after)]
    return np.where(seen, BASELINES[name](*dates), np.float32(np.nan))


def scaled(found: Map, usual: Map) -> Map:
    """Return a magnitude as probabilities, 0.5 at the 97.5th percentile of `usual`; NaN does not count and stays."""
    return np.asarray(found / (found + np.nanquantile(usual, 0.975)), np.float32)


def picture(probability: Map, truth: npt.NDArray[np.bool_]) -> Picture.Image:
    """Return probability (grey) beside hits (white), false alarms (magenta) and misses (green)."""
    grey = (np.nan_to_num(probability) * 255).astype(np.uint8)
    found = probability > 0.5
    colours = np.zeros((*truth.shape, 3), np.uint8)
    colours[truth & found] = (255, 255, 255)
    colours[truth & ~found] = (0, 200, 80)
    colours[~truth & found] = (220, 0, 180)
    gap = np.full((truth.shape[0], 8, 3), 128, np.uint8)
    return Picture.fromarray(np.concatenate([grey[..., None].repeat(3, axis=2), gap, colours], axis=1))
