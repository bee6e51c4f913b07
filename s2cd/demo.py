"""`s2cd demo`: a simulated series through the real pipeline, scored against its known truth.

Nothing here is a special case of the pipeline: it is `s2cd run` on a catalogue that `s2cd.simulate` wrote.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image

from s2cd.catalog import search
from s2cd.catalog.scene import Scene
from s2cd.config import RunConfig
from s2cd.errors import ConfigError, OutputError
from s2cd.outputs.quicklook import paint_probability, side_by_side
from s2cd.runner import Progress, Report, run
from s2cd.simulate import CHANGE_KINDS, DRAW_SIZE, HARVEST, simulate, truth_between
from s2cd.thumbnails import thumbnail

THRESHOLD = 0.5


@dataclass(frozen=True)
class Score:
    """How one map agrees with the truth, over pixels observed on both dates.

    Harvested fields are left out: an abrupt change of the surface, but not one that the truth counts.
    """

    name: str
    changed: float
    precision: float
    recall: float
    f1: float


def simulate_catalogue(out: str | Path, size: int = 1024, dates: int = 8, seed: int = 0) -> Path:
    """Return the simulated catalogue in `out`, drawn now unless it is there already.

    Beyond 2746 pixels the landscape is continued by mirror images, so that any size takes at most 4 GB of memory.

    Raises ConfigError if `out` is empty, if one of another size, number of dates or seed is there, or maps of one that
    is gone, which would be kept; OutputError if `out` cannot be used.
    """
    if not str(out):
        raise ConfigError(f"out: found {out!r}, expected a folder")
    folder, asked = Path(out) / "scenes", json.dumps({"size": size, "dates": dates, "seed": seed})
    ready, drawn = folder / "catalog.json", folder / "demo.json"
    advice = f"remove {out} or choose another folder"
    try:
        if not ready.exists():
            if (maps := Path(out) / "maps").exists():
                raise ConfigError(f"{maps}: found maps without their scenes, expected none: {advice}")
            folder.mkdir(parents=True, exist_ok=True)
            drawn.write_text(asked)  # before the catalogue, so that none is there without it
            simulate(folder, size=size, dates=dates, seed=seed, draw_size=DRAW_SIZE)
        found = " ".join(drawn.read_text().split()) if drawn.exists() else asked
    except (OSError, UnicodeError) as error:
        raise OutputError(f"{folder} cannot be used: {error}") from None
    if found != asked:
        raise ConfigError(f"{folder}: found scenes of {found}, expected {asked}: {advice}")
    return ready


def run_demo(
    out: str | Path, catalog: Path, cluster: str = "local", progress: Progress | None = None
) -> tuple[Report, list[Score], Path]:
    """Map the changes in the simulated `catalog`; return the report, the scores and the path of a picture.

    Raises OutputError if no map could be made or the picture cannot be written.
    """
    maps = Path(out) / "maps"
    report = run(RunConfig(catalog=str(catalog), out=str(maps), cluster=cluster), progress=progress)
    scenes = {f"{s.time:%Y%m%dT%H%M%S}": s for s in search(str(catalog))}
    names = sorted(r.name for r in report.maps if r.status != "failed")
    if not names:
        why = next((r.error for r in report.maps if r.error), "no two dates make a pair")
        raise OutputError(f"{maps} holds no map to score: {why}")
    scores = [score_map(catalog.parent, maps, name, scenes) for name in names]
    best = max(scores, key=lambda s: np.nan_to_num(s.f1))
    picture = Path(out) / "demo.png"
    drawing = draw(catalog.parent, maps, best.name, scenes)
    try:
        drawing.save(picture)
    except OSError as error:
        raise OutputError(f"{picture} cannot be written: {error}") from None
    return report, scores, picture


def score_map(series: Path, maps: Path, name: str, scenes: dict[str, Scene]) -> Score:
    """Score one map at a threshold of 0.5; a share that nothing stands for is NaN."""
    before, after = (scenes[t] for t in name.split("_")[-2:])
    probability = read_map(maps, name)
    truth = truth_between(series, before.time, after.time, CHANGE_KINDS).astype(bool)
    harvested = truth_between(series, before.time, after.time, (HARVEST,)).astype(bool)
    counts = np.isfinite(probability) & ~(harvested & ~truth)
    found = probability[counts] > THRESHOLD
    true = truth[counts]
    hits, alarms, misses = (found & true).sum(), (found & ~true).sum(), (~found & true).sum()
    return Score(
        name=name,
        changed=float(true.mean()) if true.size else float("nan"),
        precision=_share(hits, hits + alarms),
        recall=_share(hits, hits + misses),
        f1=_share(2 * hits, 2 * hits + alarms + misses),
    )


def draw(series: Path, maps: Path, name: str, scenes: dict[str, Scene]) -> Image.Image:
    """Paint before, after, probability and truth beside one another."""
    before, after = (scenes[t] for t in name.split("_")[-2:])
    pixels = read_map(maps, name)
    factor = max(1, -(-max(pixels.shape) // 512))
    truth = truth_between(series, before.time, after.time).astype(np.float32)
    panels = {
        f"before {before.time:%Y-%m-%d}": thumbnail(before),
        f"after {after.time:%Y-%m-%d}": thumbnail(after),
        "probability of change": paint_probability(pixels[::factor, ::factor]),
        "truth": paint_probability(truth[::factor, ::factor]),
    }
    return side_by_side(panels)


def read_map(maps: Path, name: str) -> np.ndarray:
    """Return the map as float32 (y, x), NaN where there is no observation."""
    (path,) = maps.rglob(f"{name}.tif")
    with rasterio.open(path) as dataset:
        return dataset.read(1)


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else float("nan")
