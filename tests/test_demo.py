"""The scores that `s2cd demo` ends with, counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio

from s2cd.catalog import search
from s2cd.demo import score_map, simulate_catalogue
from s2cd.pairs import consecutive_pairs
from s2cd.simulate import CHANGE_KINDS, HARVEST, truth_between


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate_catalogue(tmp_path_factory.mktemp("demo"), size=256, dates=8).parent


def test_a_score_counts_hits_alarms_and_misses_where_both_dates_are_seen(series: Path, tmp_path: Path) -> None:
    scenes = search(str(series / "catalog.json"))
    by_time = {f"{s.time:%Y%m%dT%H%M%S}": s for s in scenes}
    scored = 0
    for pair in consecutive_pairs(scenes):
        truth = truth_between(series, pair.before.time, pair.after.time, CHANGE_KINDS).astype(bool)
        harvested = truth_between(series, pair.before.time, pair.after.time, (HARVEST,)).astype(bool) & ~truth
        true, plain = np.argwhere(truth), np.argwhere(~truth & ~harvested)
        if len(true) < 40 or not harvested.any():
            continue
        probability = np.zeros(truth.shape, np.float32)
        probability[tuple(true[:30].T)] = 0.9
        probability[tuple(plain[:10].T)] = 0.6  # alarms
        probability[harvested] = 0.9  # abrupt, but not what the truth counts
        probability[tuple(true[30:35].T)] = np.nan  # neither found nor missed
        with rasterio.open(
            tmp_path / f"{pair.name}.tif", "w", driver="GTiff", width=256, height=256, count=1, dtype="float32"
        ) as dataset:
            dataset.write(probability, 1)
        score = score_map(series, tmp_path, pair.name, by_time)
        seen = len(true) - 5
        assert score.precision == pytest.approx(30 / 40)
        assert score.recall == pytest.approx(30 / seen)
        assert score.f1 == pytest.approx(60 / (60 + 10 + seen - 30))
        assert score.changed == pytest.approx(seen / (seen + len(plain)))
        scored += 1
    assert scored
