"""Training on a tiny catalogue made here, and the scores."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner
from rasterio.transform import Affine
from safetensors.torch import load_file
from scipy.special import expit, logit

from s2cd.errors import CatalogError, ConfigError, ModelError
from s2cd.model import BANDS, load_model
from s2cd.model.network import ChangeNet, Committee, cost, network_of
from s2cd.model.registry import WEIGHTS
from s2cd.training.__main__ import main
from s2cd.training.baselines import BASELINES
from s2cd.training.cards import publish
from s2cd.training.data import City, load_cities
from s2cd.training.fitting import Plan
from s2cd.training.metrics import Histogram
from s2cd.training.nuisance import Nuisances, displaced
from s2cd.training.runs import HALF_POOL, Run, as_model, averaged, combined, cross_validate, fold_cities, train
from s2cd.training.sampling import LabelledSampler, batch, to_tensor
from s2cd.training.simulated import Place, SimulatedSampler

COARSE = ("nir08", "swir16", "swir22")


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three places of two dates; a bright block appears in each."""
    root = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    links = []
    for place in ("alba", "brno", "como"):
        truth = np.zeros((137, 141), np.uint8)
        truth[30:70, 40:90] = 1
        write(root / "labels" / f"{place}.tif", truth)
        ground = rng.uniform(500, 2000, (len(BANDS), 9, 9)).repeat(16, 1).repeat(16, 2)[:, :137, :141]
        for date in ("20200101", "20210101"):
            pixels = ground + rng.normal(0, 20, ground.shape)
            if date.startswith("2021"):
                pixels += truth * 3000.0
            links.append({"rel": "item", "href": f"./{place}_{date}.json"})
            write_item(root, place, date, pixels)
    (root / "catalog.json").write_text(json.dumps({"type": "Catalog", "links": links}))
    return root


def write(path: Path, data: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", height=data.shape[0], width=data.shape[1], count=1, dtype=data.dtype,
        crs="EPSG:32631", transform=Affine(10, 0, 500000, 0, -10, 5700000),
    ) as dataset:  # fmt: skip
        dataset.write(data, 1)


def write_item(root: Path, place: str, date: str, pixels: np.ndarray) -> None:
    assets = {}
    for band, plane in zip(BANDS, pixels, strict=True):
        href = f"assets/{place}/{date}/{band}.tif"
        write(root / href, (plane[::2, ::2] if band in COARSE else plane).astype(np.uint16))
        assets[band] = {"href": href, "raster:bands": [{"nodata": 0, "scale": 1e-4, "offset": 0.0}]}
    properties = {"datetime": f"{date[:4]}-01-01T00:00:00Z", "grid:code": f"TEST-{place}"}
    item = {"type": "Feature", "properties": properties, "assets": assets}
    (root / f"{place}_{date}.json").write_text(json.dumps(item))


def places(cities: list[City]) -> list[Place]:
    guesses = [None, *(c.label.astype(np.float32) for c in cities[1:])]
    return [Place.of([c.before, c.after], guess) for c, guess in zip(cities, guesses, strict=True)]


def test_cities_are_read_on_the_fine_grid(catalogue):
    cities = load_cities(catalogue)
    assert [c.name for c in cities] == ["alba", "brno", "como"]
    assert cities[0].before.reflectance.shape == (7, 137, 141)
    assert cities[0].label.sum() == 40 * 50
    assert cities[0].before.time < cities[0].after.time


def test_a_catalogue_without_labels_is_named(catalogue, tmp_path):
    with pytest.raises(CatalogError, match=r"no catalog\.json"):
        load_cities(tmp_path)
    (tmp_path / "catalog.json").write_text(json.dumps({"links": []}))
    with pytest.raises(CatalogError, match="no labelled pair"):
        load_cities(tmp_path)


def test_the_input_of_training_is_that_of_the_model(catalogue):
    model = load_model("generic", device="cpu")
    image = load_cities(catalogue)[0].before
    crop = image.normalised[:, :96, :64].copy()
    crop[:, 5:9, 7] = np.nan
    ours = to_tensor([crop])[0]
    reflectance = image.reflectance[:, :96, :64].copy()
    reflectance[:, 5:9, 7] = np.nan
    from s2cd.model.normalise import network_input

    valid = np.isfinite(reflectance).all(axis=0)
    theirs = network_input(reflectance, model.affine(image.stats), valid, 4, 16)
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), theirs, atol=2e-5)


@pytest.mark.parametrize("kind", ["labelled", "simulated"])
def test_samples_are_finite_and_labelled(catalogue, kind):
    cities = load_cities(catalogue)
    sampler = LabelledSampler(cities, 64) if kind == "labelled" else SimulatedSampler(places(cities), [], 64)
    before, after, level, truth, weight = batch(sampler, 12, np.random.default_rng(1))
    assert before.shape == after.shape == (12, 20, 32, 32)
    assert level.shape == (12, 1, 1, 1)
    assert (level > 0).all()
    assert np.isfinite(before.numpy()).all()
    assert 0 < truth.mean() < 0.6
    assert 0.5 < weight.mean() <= 1


def test_samples_leave_the_images_as_they_were(catalogue):
    cities = load_cities(catalogue)
    before = [c.before.normalised.copy() for c in cities]
    for sampler in (LabelledSampler(cities, 64), SimulatedSampler(places(cities), [], 64)):
        batch(sampler, 12, np.random.default_rng(0))
    for city, expected in zip(cities, before, strict=True):
        np.testing.assert_array_equal(city.before.normalised, expected)


def test_a_resumed_run_goes_on_where_it_was(catalogue, tmp_path):
    plan = Plan(steps=4, batch_size=2)
    whole = train(catalogue, tmp_path / "whole", plan, labels=True, held_out=("como",), size=64)
    assert whole.held_out == ("como",)
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        _interrupted(catalogue, cut, plan)
    again = train(catalogue, cut, plan, labels=True, held_out=("como",), size=64)
    for name, value in whole.network().state_dict().items():
        np.testing.assert_allclose(again.network().state_dict()[name], value, atol=1e-6, err_msg=name)


def _interrupted(catalogue: Path, out: Path, plan: Plan) -> None:
    from s2cd.training.fitting import fit

    class Stopping(LabelledSampler):
        drawn = 0

        def sample(self, rng):  # type: ignore[no-untyped-def]
            self.drawn += 1
            if self.drawn > 2 * plan.batch_size:
                raise KeyboardInterrupt
            return super().sample(rng)

    import torch

    torch.manual_seed(plan.seed)
    cities = [c for c in load_cities(catalogue) if c.name != "como"]
    fit(ChangeNet(norm=True).pool(*HALF_POOL), Stopping(cities, 64), plan, out, save_every=0)


def test_the_command_line_fits_and_scores(catalogue, tmp_path):
    runner = CliRunner()
    data = ["--data", str(catalogue)]
    small = ["--steps", "2", "--batch-size", "2", "--size", "64", "--threads", "1", "--folds", "3"]
    for fold in range(3):
        result = runner.invoke(main, ["fit", *data, "--out", str(tmp_path / str(fold)), "--fold", str(fold), *small])
        assert result.exit_code == 0, result.output
    runs = [x for fold in range(3) for x in ("--runs", str(tmp_path / str(fold)))]
    result = runner.invoke(main, ["score", *data, *runs, "--pictures", str(tmp_path / "pictures")])
    assert result.exit_code == 0, result.output
    assert "| **pooled** |" in result.output
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3
    for arguments in ([], ["--disturbed"]):
        result = runner.invoke(main, ["score", *data, *arguments])
        assert result.exit_code == 2
        assert "--model" in result.output
    for what in (["--model", "generic"], ["--baseline", "cva"]):
        result = runner.invoke(main, ["score", *data, *what, "--disturbed"])
        assert result.exit_code == 0, result.output
        assert re.search(r"^\| none \| 0\.00000 \| 0\.0000% \| 0\.000 \| \d\.\d{3} \|$", result.output, re.M), (
            result.output
        )
        assert re.search(r"^\| brdf \| 0\.\d{5} \|", result.output, re.M)


def test_the_network_compared_with_is_trained_by_the_same_command_and_not_shipped(catalogue, tmp_path):
    runner = CliRunner()
    fit = ["fit", "--data", str(catalogue), "--network", "fc-siam-diff", "--threads", "1", "--size", "64"]
    small = ["--steps", "2", "--batch-size", "2", "--folds", "3"]
    for fold in ("0", "1"):
        result = runner.invoke(main, [*fit, *small, "--fold", fold, "--out", str(tmp_path / fold)])
        assert result.exit_code == 0, result.output
    runs = [Run.open(tmp_path / fold) for fold in ("0", "1")]
    assert sum(p.numel() for p in runs[0].network().parameters()) == 1_350_577
    cities = load_cities(catalogue)
    raw, _, _ = cross_validate(runs, cities)
    assert raw.pooled.counts.sum() == 2 * 137 * 141
    with pytest.raises(ConfigError, match="found 1 fold"):
        cross_validate(runs[:1], cities)
    with pytest.raises(ModelError, match=r"found network 'fc-siam-diff', expected 's2cd'"):
        publish("siam", runs[:1], [], cities, tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()
    result = runner.invoke(main, [*fit, *small, "--out", str(tmp_path / "2"), "--start", "generic"])
    assert result.exit_code == 2
    assert "expected one of the two" in result.output


def load_network(name: str) -> Committee | ChangeNet:
    return network_of(load_file(WEIGHTS / f"{name}.safetensors"))


def test_runs_of_one_start_are_averaged_and_others_form_a_committee(catalogue, tmp_path):
    small = {"steps": 2, "batch_size": 2}
    tuned = [
        train(catalogue, tmp_path / f"tuned-{s}", Plan(**small, seed=s), labels=True, size=64, start="generic")
        for s in (0, 1)
    ]
    fresh = train(catalogue, tmp_path / "fresh", Plan(**small), labels=True, size=64)
    city = load_cities(catalogue)[0]

    def logits(net: Committee | ChangeNet) -> np.ndarray:
        return logit(as_model(net, "x").predict(city.before.reflectance, city.after.reflectance).astype(np.float64))

    net = combined([*tuned, fresh])
    expected = (logits(averaged(tuned)) + logits(averaged([fresh]))) / 2
    np.testing.assert_allclose(logits(net), expected, atol=1e-3)
    card = publish("mine", [*tuned, fresh], [], load_cities(catalogue), tmp_path / "shipped")
    assert card["architecture"].startswith("mean of 2")
    assert [run["start"] for run in card["training"]] == ["generic", "generic", None]
    assert card["scores"]["protocol"].startswith("in sample: scored and calibrated on the places that it was trained")
    mine = tmp_path / "shipped" / "mine.safetensors"
    calibrated = (expected - card["calibration"]["threshold_logit"]) / card["calibration"]["temperature"]
    probability = load_model(str(mine), "cpu").predict(city.before.reflectance, city.after.reflectance)
    np.testing.assert_allclose(probability, expit(calibrated), atol=0.01)
    weights = load_file(mine)
    assert cost(network_of(weights))["parameters"] == card["cost"]["parameters"] == 2 * 117_428
    siam = train(catalogue, tmp_path / "siam", Plan(**small), labels=True, size=64, kind="fc-siam-diff")
    with pytest.raises(ConfigError, match="siam: found a fc-siam-diff, expected single networks 's2cd'"):
        combined([fresh, siam])
    again = train(catalogue, tmp_path / "again", Plan(**small, rate=1e-6), labels=True, size=64, start="urban")
    assert np.abs(logits(combined([again])) - logits(load_network("urban"))).max() < 0.1
    with pytest.raises(ConfigError, match="again: found a committee, expected single networks 's2cd'"):
        combined([fresh, again])


def test_folds_hold_out_each_city_once():
    names = [f"c{i}" for i in range(14)]
    folds = [fold_cities(names, 3, i) for i in range(3)]
    assert sorted(sum(folds, ())) == sorted(names)


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_baselines_find_the_block(catalogue, name):
    city = load_cities(catalogue)[0]
    magnitude = BASELINES[name](city.before.normalised, city.after.normalised)
    assert magnitude.shape == city.label.shape
    assert magnitude[city.label].mean() > 3 * magnitude[~city.label].mean()


def test_scores_of_a_known_map():
    probability = np.array([[0.9, 0.8, 0.2], [0.6, 0.1, np.nan]], np.float32)
    truth = np.array([[True, True, True], [False, False, True]])
    scores = Histogram.of(probability, truth).scores()
    assert (scores.precision, scores.recall) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert scores.f1 == pytest.approx(2 / 3)
    assert scores.best_f1 == pytest.approx(6 / 7)
    assert scores.ap == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert scores.changed == pytest.approx(3 / 5)


def separable() -> Histogram:
    rng = np.random.default_rng(0)
    truth = rng.random((200, 200)) < 0.05
    logits = rng.normal(-4, 1, truth.shape) + 2.5 * truth
    return Histogram.of((1 / (1 + np.exp(-logits))).astype(np.float32), truth)


def test_calibration_puts_one_half_at_the_lowest_threshold_of_about_the_best_f1():
    histogram = separable()
    before, after = histogram.scores(), histogram.scores(*histogram.calibration())
    assert before.best_threshold < 0.3
    assert after.best_f1 - 0.0051 <= after.f1 < after.best_f1
    assert after.recall > 0.02 + histogram.scores(np.log(before.best_threshold / (1 - before.best_threshold))).recall
    assert after.ece < before.ece


def test_another_share_of_change_leaves_the_recall_and_raises_the_f1():
    here = separable()
    there = here.with_share(0.2)
    assert there.scores().changed == pytest.approx(0.2)
    assert there.scores().recall == pytest.approx(here.scores().recall)
    assert there.scores().best_f1 > here.scores().best_f1
    np.testing.assert_allclose(here.with_share(here.scores().changed).counts, here.counts)


def test_displacement_keeps_a_plane_and_moves_an_edge():
    x = np.zeros((1, 20, 20), np.float32)
    x[:, :, 10:] = 1
    moved = displaced(x, 0.0, 0.5)
    assert moved[0, 5, 10] == pytest.approx(0.5)
    np.testing.assert_allclose(displaced(np.ones((2, 9, 9), np.float32), 0.3, -1.2), 1)


def test_nuisances_disturb_but_do_not_destroy():
    x = np.random.default_rng(0).standard_normal((7, 64, 64)).astype(np.float32)
    disturbed = Nuisances().disturb(x, np.random.default_rng(1))
    assert disturbed.dtype == np.float32
    assert np.corrcoef(x.ravel(), disturbed.ravel())[0, 1] > 0.9


def test_the_shipped_urban_model_finds_change_in_a_real_city(shared_data):
    model = load_model("urban", device="cpu")
    city = next(c for c in load_cities(shared_data / "oscd") if c.name == "rennes")
    probability = model.predict(city.before.reflectance, city.after.reflectance)
    assert Histogram.of(probability, city.label).scores().f1 > 0.3
