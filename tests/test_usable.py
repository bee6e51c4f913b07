"""Scenes that a run cannot read are left out, each with its reason, and do not end it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from distributed import Client

import s2cd
from s2cd.catalog.scene import Grid, Scene
from s2cd.errors import GridError, S2cdError, S2cdWarning
from s2cd.plan import make_plan
from s2cd.runner import run

MakeSeries = Callable[..., list[Scene]]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        yield client


@pytest.fixture
def config(tmp_path: Path) -> s2cd.RunConfig:
    return s2cd.RunConfig(catalog="given", out=str(tmp_path / "out"), device="cpu", min_valid=0.0)


def without(scene: Scene, band: str) -> Scene:
    return replace(scene, assets={name: asset for name, asset in scene.assets.items() if name != band})


def moved(scene: Scene, change: Callable[[Grid], tuple[float, ...]]) -> Scene:
    """Return a scene of other transforms, by its metadata."""
    grids = {n: replace(asset.grid, transform=change(asset.grid)) for n, asset in scene.assets.items()}
    return replace(scene, assets={n: replace(asset, grid=grids[n]) for n, asset in scene.assets.items()})


def on_a_shifted_grid(scene: Scene) -> Scene:
    return moved(scene, lambda grid: (*grid.transform[:2], grid.transform[2] + 10, *grid.transform[3:]))


def with_coarse_pixels(scene: Scene) -> Scene:
    return moved(scene, lambda grid: tuple(v * (2 if n in {0, 4} else 1) for n, v in enumerate(grid.transform)))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda scene: without(scene, "swir22"), r"offers no swir22, only blue, .*"),
        (lambda scene: without(scene, "scl"), r"offers no scl, only blue, .*"),
        (with_coarse_pixels, r"has pixels of 20 m, expected 10 m"),
        (on_a_shifted_grid, r"lies on Grid\(.*\), 3 of 4 of its tile on Grid\(.*\)"),
    ],
)
def test_a_scene_that_cannot_be_read_is_left_out_and_its_neighbours_are_paired(
    make_series: MakeSeries, config: s2cd.RunConfig, client: Client, spoil: Callable[[Scene], Scene], reason: str
) -> None:
    scenes = make_series(dates=4)
    scenes[1] = spoil(scenes[1])
    with pytest.warns(S2cdWarning, match=rf"1 scenes left out, the first: scene-001 {reason}"):
        report = run(config, client, scenes=scenes)
    assert report.ok
    times = [f"{scenes[n].time:%Y%m%dT%H%M%S}" for n in (0, 2, 3)]
    assert sorted(result.name[-31:] for result in report.maps) == ["_".join(pair) for pair in pairwise(times)]
    (told,) = (item for item in report.left_out if item.what == "scene-001")
    assert re.fullmatch(reason, told.reason)
    with pytest.raises(S2cdError, match="strict: 1 scenes left out"):
        run(config.model_copy(update={"strict": True}), client, scenes=scenes)


def test_neither_half_of_the_scenes_is_left_out_for_the_grid_of_the_other(
    make_series: MakeSeries, config: s2cd.RunConfig
) -> None:
    scenes = make_series(dates=4)
    with pytest.raises(GridError, match="scene-001 lies on .*, but scene-002 on"):
        make_plan(config, [*scenes[:2], *map(on_a_shifted_grid, scenes[2:])])


def test_the_older_edition_of_a_date_stands_for_a_newer_one_that_lacks_a_band(
    make_series: MakeSeries, config: s2cd.RunConfig, client: Client
) -> None:
    scenes = make_series(dates=2)
    newer = replace(without(scenes[1], "swir22"), id="newer", baseline="05.11")
    with pytest.warns(S2cdWarning, match="newer offers no swir22"):
        report = run(config, client, scenes=[*scenes, newer])
    assert [result.status for result in report.maps] == ["written"]


def test_a_series_without_scene_classification_is_masked_by_its_spectra_and_told(
    make_series: MakeSeries, config: s2cd.RunConfig, client: Client
) -> None:
    with pytest.warns(S2cdWarning, match="2 L2A scenes have no scene classification, the first: scene-000"):
        assert run(config, client, scenes=make_series(dates=2, scl=False)).ok
