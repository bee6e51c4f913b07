"""Scores of probability maps against truth, from histograms, so that any number of pixels can be pooled."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit

from s2cd.errors import CatalogError

BINS = 2000
LOGIT_RANGE = 12.0
CENTRES = (np.arange(BINS) + 0.5) / BINS * 2 * LOGIT_RANGE - LOGIT_RANGE
SLACK = 0.005  # of F1


@dataclass(frozen=True)
class Scores:
    """Of the changed class at threshold 0.5; `best_f1` at `best_threshold`; `ap` average precision; `ece`
    expected calibration error over 15 equal bins (Guo et al., ICML 2017) of the probability of change."""

    precision: float
    recall: float
    f1: float
    best_f1: float
    best_threshold: float
    ap: float
    ece: float
    changed: float

    def rounded(self) -> dict[str, float]:
        """Return the scores to four decimals."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


@dataclass
class Histogram:
    """Counts of pixels by the logit of their probability: unchanged and changed, each (BINS,)."""

    counts: npt.NDArray[np.int64] | npt.NDArray[np.float64]

    @classmethod
    def of(cls, probability: npt.NDArray[np.float32], truth: npt.NDArray[np.bool_]) -> Histogram:
        """Count the pixels of a map; NaN does not count."""
        seen = np.isfinite(probability)
        values = logit(np.clip(probability[seen].astype(np.float64), 1e-7, 1 - 1e-7))
        index = ((values / LOGIT_RANGE + 1) / 2 * BINS).astype(np.int64).clip(0, BINS - 1)
        split = [np.bincount(index[truth[seen] == side], minlength=BINS) for side in (False, True)]
        return cls(np.stack(split))

    def scores(self, threshold: float = 0.0, temperature: float = 1.0) -> Scores:
        """Return the scores after logit -> (logit - threshold) / temperature."""
        logits = (CENTRES - threshold) / temperature
        changed = self.counts[1]
        hits, alarms, total = self._found()
        f1, precision, recall = _ratio(2 * hits, alarms + total), _ratio(hits, alarms), _ratio(hits, total)
        at = int(np.searchsorted(logits, 0.0))
        best = int(np.argmax(f1))
        ap = float(np.sum((recall - np.append(recall[1:], 0)) * precision))
        return Scores(
            precision=float(precision[at]) if at < BINS else 0.0,
            recall=float(recall[at]) if at < BINS else 0.0,
            f1=float(f1[at]) if at < BINS else 0.0,
            best_f1=float(f1[best]),
            best_threshold=float(expit(logits[best])),
            ap=ap,
            ece=self._calibration_error(logits),
            changed=float(changed.sum() / max(self.counts.sum(), 1)),
        )

    def _calibration_error(self, logits: npt.NDArray[np.float64]) -> float:
        probability = expit(logits)
        group = np.minimum((probability * 15).astype(int), 14)
        pixels = self.counts.sum(axis=0)
        predicted = np.bincount(group, probability * pixels, minlength=15)
        found = np.bincount(group, self.counts[1], minlength=15)
        return float(np.abs(predicted - found).sum() / max(pixels.sum(), 1))

    def with_share(self, share: float) -> Histogram:
        """Return the histogram of places where `share` of the pixels has changed, each kind found as often as here."""
        unchanged, changed = self.counts
        weight = share * unchanged.sum() / max((1 - share) * changed.sum(), 1e-9)
        return Histogram(np.stack([unchanged, changed * weight]))

    def _found(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float]:
        """Return the hits and the alarms above each bin's lower edge, and the number of changed pixels."""
        unchanged, changed = self.counts
        hits = np.cumsum(changed[::-1])[::-1].astype(np.float64)
        return hits, hits + np.cumsum(unchanged[::-1])[::-1], float(changed.sum())

    def calibration(self) -> tuple[float, float]:
        """Return (threshold, temperature): the lowest logit of about the best F1, the temperature of least ECE there.

        F1 is flat around its best; of thresholds within SLACK of it the lowest serves places where more has changed.

        Raises CatalogError without a changed pixel: F1 would be 0 everywhere.
        """
        if not self.counts[1].any():
            raise CatalogError(
                f"found no changed pixel among {self.counts.sum():g} observed, expected some to calibrate"
            )
        hits, alarms, total = self._found()
        f1 = _ratio(2 * hits, alarms + total)
        threshold = float(CENTRES[np.argmax(f1 >= f1.max() - SLACK)])
        temperatures = np.geomspace(0.25, 4, 33)
        errors = [self.scores(threshold, t).ece for t in temperatures]
        return threshold, float(temperatures[int(np.argmin(errors))])


def _ratio(part: npt.NDArray[np.float64], whole: npt.NDArray[np.float64] | float) -> npt.NDArray[np.float64]:
    """Return part / whole, 0 where there is no whole; the counts of `with_share` may be less than 1."""
    return np.divide(part, whole, out=np.zeros_like(part), where=np.greater(whole, 0))
