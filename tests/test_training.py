"""Training on a tiny catalogue made here, and the scores."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from click.testing import CliRunner
from rasterio.transform import Affine
from safetensors.torch import load_file, save_file
from scipy.special import expit, logit

from s2cd.errors import CatalogError, ConfigError, ModelError, OutputError, ReadError
from s2cd.model import BANDS, load_model
from s2cd.model.network import ChangeNet, Committee, cost, network_of
from s2cd.model.registry import WEIGHTS
from s2cd.training.__main__ import main
from s2cd.training.baselines import BASELINES
from s2cd.training.cards import publish
from s2cd.training.data import City, Image, load_cities, load_series
from s2cd.training.fcsiam import FCSiamDiff
from s2cd.training.fitting import Plan, fit
from s2cd.training.material import Material
from s2cd.training.metric import spectral_metric
from s2cd.training.metrics import Histogram
from s2cd.training.nuisance import Nuisances, displaced
from s2cd.training.robustness import disturbed, false_change, of_baseline, of_model
from s2cd.training.runs import (
    HALF_POOL,
    POOL,
    Run,
    as_model,
    averaged,
    combined,
    cross_validate,
    fold_cities,
    protocol,
    train,
)
from s2cd.training.sampling import LabelledSampler, Sample, batch, to_tensor
from s2cd.training.scoring import baseline, predictor, score
from s2cd.training.simulated import Place, SimulatedSampler

COARSE = ("nir08", "swir16", "swir22")


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three places of two dates; a bright block appears in each."""
    return made(tmp_path_factory.mktemp("labelled"), ("alba", "brno", "como"))


@pytest.fixture
def copy(catalogue: Path, tmp_path: Path) -> Path:
    """A copy of the catalogue, to be damaged."""
    return shutil.copytree(catalogue, tmp_path / "data")


def made(root: Path, names: tuple[str, ...]) -> Path:
    rng = np.random.default_rng(0)
    links = []
    for place in names:
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


def write(
    path: Path, data: np.ndarray, *, epsg: int = 32631, west: float = 500000, pixel: float = 10, **options: float
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", height=data.shape[0], width=data.shape[1], count=1, dtype=data.dtype,
        crs=f"EPSG:{epsg}", transform=Affine(pixel, 0, west, 0, -pixel, 5700000), **options,
    ) as dataset:  # fmt: skip
        dataset.write(data, 1)


def write_item(root: Path, place: str, date: str, pixels: np.ndarray) -> None:
    assets = {}
    for band, plane in zip(BANDS, pixels, strict=True):
        href = f"assets/{place}/{date}/{band}.tif"
        step = 2 if band in COARSE else 1
        write(root / href, plane[::step, ::step].astype(np.uint16), pixel=10 * step)
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
    with pytest.raises(CatalogError, match=r"without catalog\.json"):
        load_cities(tmp_path)
    (tmp_path / "catalog.json").write_text(json.dumps({"type": "Catalog", "links": []}))
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
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), theirs, rtol=6e-4, atol=2e-5)  # float16


def change(data: Path, name: str, changes: dict[str, Any], asset: str | None = None) -> None:
    """Change properties of an item, fields of one of its assets or, if that is "", its assets; None takes one out."""
    path = data / f"{name}.json"
    item = json.loads(path.read_text())
    target = item["properties"] if asset is None else item["assets"][asset] if asset else item["assets"]
    target.update(changes)
    for key in [key for key, value in changes.items() if value is None]:
        del target[key]
    path.write_text(json.dumps(item))


BLOCK = np.zeros((137, 141), np.uint8)
BLOCK[30:70, 40:90] = 1


@pytest.mark.parametrize(
    ("label", "options", "message"),
    [
        (BLOCK, {"epsg": 32632}, "found EPSG:32632, expected EPSG:32631 as blue"),
        (BLOCK, {"west": 500010}, r"displaced by \(1\.0, 0\.0\) px against blue"),
        (BLOCK[::2, ::2], {}, "found 69 x 71 pixels, expected 137 x 141 as blue"),
        (BLOCK + 1, {}, "found the value 2, expected 0 = unchanged, 1 = changed"),
        (BLOCK.astype(np.int8) * -1, {}, "found the value -1"),
        (BLOCK * 255, {}, "found the value 255"),
        (np.ones_like(BLOCK), {}, "found no unchanged pixel"),
        (np.full_like(BLOCK, 255), {"nodata": 255}, "found no unchanged pixel"),
    ],
)
def test_labels_that_are_not_understood_are_refused(copy, label, options, message):
    write(copy / "labels" / "brno.tif", label, **options)
    with pytest.raises(CatalogError, match=rf"brno\.tif: .*{message}"):
        load_cities(copy)


def test_what_a_label_does_not_tell_counts_nowhere(copy):
    label = BLOCK.copy()
    label[:, :70] = 255
    write(copy / "labels" / "brno.tif", label, nodata=255)
    city = load_cities(copy)[1]
    assert city.label.sum() == 40 * 20
    assert city.known.sum() == 137 * 71
    report = score(lambda c: np.full(c.label.shape, 0.9, np.float32), [city])
    assert report.pooled.counts.sum() == 137 * 71
    assert report.pooled.counts[1].sum() == 40 * 20
    for sampler in (LabelledSampler([city], 128, Nuisances(hidden_chance=0)), Material([city], [], []).sampler(128, 1)):
        _, _, _, truth, weight = batch(sampler, 8, np.random.default_rng(0))
        assert weight.mean() < 0.9
        assert (truth * weight).sum() > 0


def test_a_date_that_lacks_a_band_is_absent(copy):
    for date in ("20200101", "20210101"):
        for place in ("alba", "brno", "como"):
            write(copy / "assets" / place / date / "swir22.tif", np.zeros((69, 71), np.uint16), pixel=20)
    with pytest.raises(CatalogError, match=r"alba\.tif: found 0 dates that show more than half of their pixels"):
        load_cities(copy)


@pytest.mark.parametrize(("band", "step"), [("swir16", 6), ("green", 3), ("blue", 2)])
def test_bands_of_neither_the_full_nor_half_the_size_are_refused(copy, band, step):
    path = copy / "assets" / "alba" / "20200101" / f"{band}.tif"
    write(path, np.ones((140 // step, 140 // step), np.uint16))
    with pytest.raises(CatalogError, match=r"alba_20200101\.json: \w+: found .* pixels, expected .* of blue, or half"):
        load_cities(copy)


@pytest.mark.parametrize(
    ("band", "shape", "options", "message"),
    [
        ("red", (137, 141), {"west": 500010}, r"displaced by \(1\.0, 0\.0\) px against blue"),
        ("red", (137, 141), {"epsg": 32632}, "found EPSG:32632, expected EPSG:32631 as blue"),
        ("swir22", (69, 71), {"pixel": 20, "west": 499990}, r"displaced by \(-1\.0, 0\.0\) px against blue"),
        ("swir22", (69, 71), {"pixel": 10}, r"displaced by \(0\.0, -68\.0\) px against blue"),
        ("scl", (137, 141), {"west": 500010}, r"displaced by \(1\.0, 0\.0\) px against blue"),
    ],
)
def test_bands_that_lie_elsewhere_than_blue_are_refused(copy, band, shape, options, message):
    change(copy, "alba_20200101", {"scl": {"href": "assets/alba/20200101/scl.tif"}}, "")
    write(copy / "assets" / "alba" / "20200101" / "scl.tif", np.full((137, 141), 4, np.uint8))
    load_cities(copy)
    write(copy / "assets" / "alba" / "20200101" / f"{band}.tif", np.full(shape, 4, np.uint8), **options)
    with pytest.raises(CatalogError, match=rf"alba_20200101\.json: {band}: (found a corner )?{message}"):
        load_cities(copy)


@pytest.mark.parametrize(("shape", "pixel"), [((68, 70), 20), ((69, 71), 20), ((69, 71), 19.8)])
def test_half_of_an_odd_number_of_pixels_may_be_rounded(copy, shape, pixel):
    path = copy / "assets" / "alba" / "20200101" / "swir22.tif"
    write(path, np.arange(1000, 1000 + shape[0] * shape[1], dtype=np.uint16).reshape(shape), pixel=pixel)
    band = load_cities(copy)[0].before.reflectance[BANDS.index("swir22")]
    assert band.shape == (137, 141)
    assert band[3, 5] == np.float32(0.1 + 1e-4 * (shape[1] + 2))


def test_what_a_raster_itself_declares_as_nodata_is_not_observed(copy):
    path = copy / BAND
    with rasterio.open(path) as dataset:
        codes = dataset.read(1)
    codes[:20, :30] = 65535
    write(path, codes, nodata=65535)
    seen = load_cities(copy)[0].before.seen
    assert seen.sum() == seen.size - 20 * 30


def test_reflectance_without_a_scale_is_refused_and_with_one_read(copy):
    expected = load_cities(copy)[0].before.reflectance
    with rasterio.open(copy / BAND) as dataset:
        codes = dataset.read(1)
    write(copy / BAND, codes * np.float32(1e-4))
    change(copy, "alba_20200101", {"raster:bands": [{"scale": 1.0, "offset": 0.0}]}, "red")
    np.testing.assert_allclose(load_cities(copy)[0].before.reflectance, expected, atol=1e-6)
    change(copy, "alba_20200101", {"raster:bands": [{"nodata": 0}]}, "red")
    with pytest.raises(CatalogError, match="item alba_20200101, band red: found float32 without a scale, expected"):
        load_cities(copy)


def test_the_offset_is_that_of_the_search(copy):
    raw = [{"nodata": 0, "scale": 1e-4, "offset": -0.1}]
    change(copy, "alba_20200101", {"raster:bands": raw}, "red")
    change(copy, "alba_20200101", {"earthsearch:boa_offset_applied": True, "s2:product_type": "S2MSI2A"})
    change(copy, "alba_20210101", {"raster:bands": None}, "red")
    change(copy, "alba_20210101", {"s2:processing_baseline": "05.09"})
    city = load_cities(copy)[0]
    plain = load_cities(copy)[1]
    red = BANDS.index("red")
    assert city.before.reflectance[red].min() > 0.04
    assert plain.after.reflectance[red].min() > 0.04
    assert city.after.reflectance[red].min() < -0.04


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


def clouded(data: Path, date: str) -> Path:
    """Hide 6 x 6 pixels of a date of each place."""
    for path in data.glob(f"assets/*/{date}/*.tif"):
        with rasterio.open(path, "r+") as dataset:
            codes = dataset.read(1)
            step = 1 + (path.stem in COARSE)
            codes[20 // step : 26 // step, 20 // step : 26 // step] = 0
            dataset.write(codes, 1)
    return data


def test_changes_simulated_beside_a_cloud_are_marked_as_far_as_they_are_seen(catalogue, copy):
    marked, counted = [], []
    for data in (catalogue, clouded(clouded(copy, "20200101"), "20210101")):
        sampler = SimulatedSampler([Place.of([c.before, c.after]) for c in load_cities(data)], [], 128)
        samples = [sampler.sample(np.random.default_rng(seed)) for seed in range(40)]
        marked.append(sum((s.truth * s.weight).sum() for s in samples))
        counted.append(sum(s.weight.sum() for s in samples))
        for s in samples:
            assert not s.weight[np.isnan(s.before).any(axis=0) | np.isnan(s.after).any(axis=0)].any()
    assert marked[1] > 0.95 * marked[0]
    assert counted[1] > 0.97 * counted[0]


def test_what_a_pasted_crop_does_not_show_hides_nothing_beside_it(catalogue):
    image = load_cities(catalogue)[0].before
    pixels = image.reflectance.copy()
    pixels[:, :, 70:] = np.nan
    sampler = SimulatedSampler([Place.of([Image.of("half", "", pixels)])], [], 64, kinds={"construction": 1.0})
    samples = [sampler.sample(np.random.default_rng(seed)) for seed in range(40)]
    lost = [np.isnan(s.after).any(axis=0) & np.isfinite(s.before).all(axis=0) for s in samples]
    assert 0 < np.mean(lost) < 0.12


@pytest.mark.parametrize("kind", ["s2cd", "fc-siam-diff"])
def test_a_resumed_run_goes_on_where_it_was(catalogue, tmp_path, kind):
    plan = Plan(steps=4, batch_size=2)
    options: dict[str, Any] = {"labels": True, "held_out": ("como",), "size": 64, "kind": kind}
    whole = train(catalogue, tmp_path / "whole", plan, **options)
    assert whole.held_out == ("como",)
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        _interrupted(catalogue, cut, plan, json.loads((whole.path / "run.json").read_text()))
    (cut / "curve.csv").write_text("step,loss,seconds\r\n2,0.9,70.5\r\n3,0.8,90.5\r\n")
    again = train(catalogue, cut, plan, **options)
    for name, value in whole.network().state_dict().items():
        np.testing.assert_allclose(again.network().state_dict()[name], value, atol=1e-6, err_msg=name)
    rows = [row.split(",") for row in (cut / "curve.csv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["step", "2", "4"]
    assert 70.5 <= float(rows[2][2]) < 90.5


def _interrupted(catalogue: Path, out: Path, plan: Plan, description: dict) -> None:
    class Stopping(LabelledSampler):
        drawn = 0

        def sample(self, rng):  # type: ignore[no-untyped-def]
            self.drawn += 1
            if self.drawn > 2 * plan.batch_size:
                raise KeyboardInterrupt
            return super().sample(rng)

    torch.manual_seed(plan.seed)
    cities = [c for c in load_cities(catalogue) if c.name != "como"]
    net = FCSiamDiff() if description["network"] == "fc-siam-diff" else ChangeNet(norm=True).pool(*HALF_POOL)
    if isinstance(net, ChangeNet):
        net.metric.copy_(spectral_metric(cities, HALF_POOL[1]))
    fit(net, Stopping(cities, 64), plan, out, description, save_every=0)


def test_an_interrupt_ends_a_training_after_its_step_with_a_checkpoint(catalogue, tmp_path):
    class Interrupting(LabelledSampler):
        drawn = 0

        def sample(self, rng: np.random.Generator) -> Sample:
            self.drawn += 1
            if self.drawn == 2:
                signal.raise_signal(signal.SIGINT)
            return super().sample(rng)

    cities, plan = load_cities(catalogue), Plan(steps=2, batch_size=2)
    nets = [ChangeNet(norm=True) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    whole = fit(nets[0], LabelledSampler(cities, 64), plan, tmp_path / "whole", {}).state_dict()
    with pytest.raises(KeyboardInterrupt):
        fit(nets[1], Interrupting(cities, 64), plan, tmp_path / "cut", {})
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 1
    again = fit(ChangeNet(norm=True), LabelledSampler(cities, 64), plan, tmp_path / "cut", {}).state_dict()
    for name, value in whole.items():
        np.testing.assert_allclose(again[name], value, atol=1e-6, err_msg=name)


def test_the_metric_learns_which_bands_tell_change(catalogue):
    """Near infrared differs in a place that has not changed; some pixels are hidden, others have no label."""
    city = load_cities(catalogue)[0]
    after = city.before.reflectance.copy()
    after[BANDS.index("red"), city.label] += 0.05
    after[BANDS.index("nir"), 80:] += 0.2
    after[:, :20, :20] = np.nan
    known = city.known & (np.arange(141) > 10)
    city = dataclasses.replace(city, after=Image.of("alba", "", after), known=known)
    metric = spectral_metric([city], HALF_POOL[1])
    torch.testing.assert_close(metric, metric.T)
    assert float(metric.square().sum()) == pytest.approx(7, rel=1e-4)
    red, nir = (float(metric[:, BANDS.index(band)].norm()) for band in ("red", "nir"))
    assert red > 3 * nir
    calm = dataclasses.replace(city, label=np.zeros_like(city.label))
    assert torch.equal(spectral_metric([calm], HALF_POOL[1]), torch.eye(7)), "nothing changed: nothing to learn"


def test_labels_teach_the_metric_and_it_goes_into_the_model(catalogue, tmp_path):
    cities = load_cities(catalogue)
    expected = spectral_metric(cities, HALF_POOL[1])
    for start in (None, "generic", "urban"):
        run = train(catalogue, tmp_path / f"{start}", SMALL, labels=True, start=start, size=64)
        publish("mine", [run], [], cities, tmp_path)
        network = network_of(load_file(tmp_path / "mine.safetensors"))
        for part in network.networks if isinstance(network, Committee) else [network]:
            torch.testing.assert_close(part.metric, expected)
    run = train(catalogue, tmp_path / "unlabelled", SMALL, labels=False, start="urban", size=64)
    learnt = {key: value for key, value in run.network().state_dict().items() if key.endswith("metric")}
    for key, value in learnt.items():
        torch.testing.assert_close(value, load_network("urban").state_dict()[key])


BAND = "assets/alba/20200101/red.tif"


@pytest.mark.parametrize(
    ("changes", "asset", "message"),
    [
        (
            {"grid:code": None},
            None,
            r"alba_20200101\.json: found grid:code and datetime None and '2020-01-01T00:00:00Z'",
        ),
        (
            {"datetime": 1},
            None,
            r"alba_20200101\.json: found grid:code and datetime 'TEST-alba' and 1, expected a name",
        ),
        ({"href": None}, "swir22", r"alba_20200101\.json: found no asset swir22, expected blue, "),
        ({"href": "gone.tif"}, "red", r"cannot read .*gone\.tif: "),
        ({"href": "alba_20200101.json"}, "red", r"cannot read .*alba_20200101\.json: .*not recogni[sz]ed"),
        (
            {"href": "https://x.invalid/red.tif?token=1"},
            "red",
            "https://x.invalid/red.tif: found an address, expected a",
        ),
        ({"raster:bands": 3}, "red", "item alba_20200101, band red: cannot be understood"),
        ({"href": 5}, "red", r"alba_20200101\.json: asset red: found href 5, expected a path"),
        ({"href": ["x"]}, "red", r"alba_20200101\.json: asset red: found href \['x'\], expected a path"),
        ({"red": "x.tif"}, "", r"alba_20200101\.json: assets: red: found 'x\.tif', expected an object"),
        ({"scl": ["x"]}, "", r"alba_20200101\.json: assets: scl: found \['x'\], expected an object"),
        ({"scl": {}}, "", r"alba_20200101\.json: asset scl: found href None, expected a path"),
        ({"sat:relative_orbit": "x"}, None, r"alba_20200101\.json: found sat:relative_orbit 'x', expected a number"),
    ],
)
def test_items_that_cannot_be_used_are_named(copy, changes, asset, message):
    change(copy, "alba_20200101", changes, asset)
    with pytest.raises((CatalogError, ReadError), match=message):
        load_cities(copy)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("properties", [1], r"properties: found \[1\], expected an object"),
        ("properties", "x", "properties: found 'x', expected an object"),
        ("assets", ["blue"], r"assets: found \['blue'\], expected an object"),
        ("assets", "x", "assets: found 'x', expected an object"),
        ("assets", {"scl": None}, "asset scl: found href None, expected a path"),
    ],
)
def test_items_of_another_shape_are_named(copy, field, value, message):
    path = copy / "alba_20200101.json"
    item = json.loads(path.read_text())
    item[field] = {**item[field], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(item))
    with pytest.raises(CatalogError, match=rf"alba_20200101\.json: {message}"):
        load_cities(copy)


def test_an_orbit_that_is_null_is_none(copy):
    path = copy / "alba_20200101.json"
    item = json.loads(path.read_text())
    item["properties"]["sat:relative_orbit"] = None
    path.write_text(json.dumps(item))
    assert [city.name for city in load_cities(copy)] == ["alba", "brno", "como"]


def test_documents_and_dates_that_do_not_fit_are_named(copy):
    change(copy, "alba_20200101", {"href": (copy / BAND).as_uri()}, "red")
    assert len(load_cities(copy)) == 3
    for plane in (copy / "assets" / "brno" / "20210101").glob("*.tif"):
        write(plane, np.ones((50, 60), np.uint16))
    with pytest.raises(
        CatalogError, match=r"brno_20210101\.json: found 50 x 60 pixels, expected 137 x 141 as other dates"
    ):
        load_series(copy)
    (copy / "alba_20210101.json").write_text("{")
    with pytest.raises(CatalogError, match=r"alba_20210101\.json: is not JSON"):
        load_series(copy)


def test_mistakes_on_the_command_line_end_in_one_line(copy, tmp_path):
    def said(*arguments: str | Path) -> str:
        small = ["--steps", "1", "--batch-size", "1", "--threads", "1"] if arguments[0] == "fit" else []
        result = CliRunner().invoke(main, [*map(str, arguments), "--data", str(copy), *small])
        assert result.exit_code in {1, 2}, result.output
        assert isinstance(result.exception, SystemExit), result.output
        return result.output.strip().splitlines()[-1]

    out, run, shipped = tmp_path / "out", tmp_path / "run", tmp_path / "shipped"
    fit = ("fit", "--out", out, "--size", "64")
    train(copy, run, Plan(steps=1, batch_size=1), labels=True, size=64, held_out=("alba",))
    train(copy, tmp_path / "all", Plan(steps=1, batch_size=1), labels=True, size=64)
    assert said("fit", "--out", out, "--size", "100") == "error: size: found 100, expected a multiple of 64"
    assert said("fit", "--out", out, "--size", "192").endswith("found 137 x 141 pixels, expected at least 192 x 192")
    assert said("fit", "--out", copy / "catalog.json" / "x").endswith("Not a directory, expected a folder to write to")
    nowhere = "/proc/self"  # a folder that takes no files
    cannot = f"error: {nowhere}: cannot be written: "
    assert said("fit", "--out", nowhere).startswith(cannot)
    assert said("card", "mine", "--run", run, "--out", nowhere).startswith(cannot)
    assert said("score", "--model", "generic", "--pictures", nowhere).startswith(cannot)
    assert said(*fit, "--simulated", "nan") == "error: simulated: found nan, expected a share, 0 to 1"
    assert said(*fit, "--start", "generic", "--blend", "nan") == "error: blend: found nan, expected a share, 0 to 1"
    assert said(*fit, "--folds", "4").endswith("4, expected at most 3, the number of places to hold out")
    assert said(*fit, "--blend", "0.5").endswith("found 0.5 without a start, expected one whose weights are the rest")
    assert said(*fit, "--rate", "-1") == "error: rate: found -1, expected a positive number"
    assert "'--seed': -1 is not in the range" in said(*fit, "--seed", "-1")
    assert "unknown model 'nowhere'" in said(*fit, "--start", "nowhere")
    assert "found no run, expected a folder that `fit` wrote" in said(*fit, "--start", copy)
    assert "found no run, expected a folder that `fit` wrote" in said("score", "--runs", copy)
    assert said("score", "--runs", tmp_path / "all").endswith(
        "no place held out, expected places of --data: alba, brno, como"
    )
    for name in ("a/b", "../evil", ".hidden", ""):
        assert f"name of the model: found {name!r}" in said("card", name, "--run", run, "--out", shipped)
    change(copy, "alba_20200101", {"grid:code": "TEST-other"})
    change(copy, "alba_20210101", {"grid:code": "TEST-other"})
    shutil.copy(copy / "labels" / "alba.tif", copy / "labels" / "other.tif")
    assert said("score", "--runs", run).endswith("found alba held out, expected places of --data: brno, como, other")
    (run / "network.safetensors").write_bytes(b"x")
    assert "network.safetensors: cannot be read" in said("card", "mine", "--run", run, "--out", shipped)
    assert not out.exists() or not any(out.iterdir())
    assert not shipped.exists()


def test_files_that_cannot_be_written_are_named(catalogue, tmp_path):
    for name in ("network.safetensors", "checkpoint.pt", "curve.csv", "run.json"):
        (tmp_path / name / name).mkdir(parents=True)
        with pytest.raises(OutputError, match=rf"{re.escape(str(tmp_path / name / name))}: cannot be written: \w"):
            train(catalogue, tmp_path / name, Plan(steps=1, batch_size=1), labels=True, size=64)
    (tmp_path / "pictures" / "alba.png").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"alba\.png: cannot be written: Is a directory"):
        score(lambda city: np.zeros(city.label.shape, np.float32), load_cities(catalogue), tmp_path / "pictures")


def test_files_are_for_whom_the_umask_says(catalogue, tmp_path):
    before = os.umask(0o027)
    try:
        run = train(catalogue, tmp_path / "run", Plan(steps=1, batch_size=1), labels=True, size=64)
        publish("mine", [run], [], load_cities(catalogue), tmp_path)
    finally:
        os.umask(before)
    for path in (run.weights, run.path / "run.json", tmp_path / "mine.safetensors", tmp_path / "mine.json"):
        assert stat.filemode(path.stat().st_mode) == "-rw-r-----", path.name


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ('{"training": "text"}', r"card of .*mine\.safetensors: training is 'text', expected a list of objects"),
        ('{"training": {"labels": true}}', r"training is \{'labels': True\}, expected a list of objects"),
        ('{"training": [true]}', r"training is \[True\], expected a list of objects"),
        ('{"licence": ["x"]}', r"licence is \['x'\], expected a name"),
        (DEEP, r"cannot read mine\.json: maximum recursion depth"),
    ],
)
def test_a_card_that_tells_nonsense_starts_no_training(catalogue, tmp_path, card, message):
    shutil.copy(WEIGHTS / "generic.safetensors", tmp_path / "mine.safetensors")
    (tmp_path / "mine.json").write_text(card)
    with pytest.raises(ModelError, match=message) as caught:
        train(catalogue, tmp_path / "run", SMALL, labels=True, size=64, start=str(tmp_path / "mine.safetensors"))
    assert "\n" not in str(caught.value)


def test_runs_that_nest_too_deeply_are_none(catalogue, tmp_path):
    (tmp_path / "run.json").write_text(DEEP)
    with pytest.raises(ConfigError, match="found no run, expected a folder that `fit` wrote"):
        Run.open(tmp_path)
    with pytest.raises(ConfigError, match=r"run\.json: cannot be read, delete it to go on"):
        train(catalogue, tmp_path, SMALL, labels=True, size=64)


def test_series_smaller_than_a_block_are_refused_and_labels_are_not_asked_for_in_vain(copy, tmp_path):
    shutil.rmtree(copy / "labels")
    small = shutil.copytree(copy, tmp_path / "small")
    for path in small.glob("assets/*/*/*.tif"):
        write(path, np.arange(50 * 60, dtype=np.uint16).reshape(50, 60))
    with pytest.raises(CatalogError, match="alba: found 50 x 60 pixels, expected at least 64 x 64"):
        train(copy, tmp_path / "run", SMALL, labels=False, size=64, series=(small,))
    run = train(copy, tmp_path / "run", SMALL, labels=False, size=64, series=(copy,))
    assert not run.labels
    with pytest.raises(CatalogError, match="no labelled pair found"):
        train(copy, tmp_path / "other", SMALL, labels=True, size=64)


SMALL = Plan(steps=2, batch_size=2)


def test_a_folder_keeps_to_one_training(catalogue, copy, tmp_path):
    small: dict[str, Any] = {"labels": True, "size": 64}
    out = tmp_path / "run"
    train(copy, out, SMALL, held_out=("como",), **small)
    before = [(out / name).read_bytes() for name in ("run.json", "network.safetensors", "checkpoint.pt")]
    for message, options in {
        r"found held_out \['como'\], expected \['alba'\]; data_sha256": {"held_out": ("alba",)},
        "found labels True, expected False": {"held_out": ("como",), "labels": False},
        "found size 64, expected 128": {"held_out": ("como",), "size": 128},
        "found start None, expected generic": {"held_out": ("como",), "start": "generic"},
    }.items():
        with pytest.raises(ConfigError, match=f"another training, choose another folder: .*{message}"):
            train(copy, out, SMALL, **(small | options))
    with pytest.raises(ConfigError, match="choose another folder: found steps 2, expected 3$"):
        train(copy, out, Plan(steps=3, batch_size=2), held_out=("como",), **small)
    write(copy / "labels" / "alba.tif", BLOCK.T.copy().repeat(2, 0)[:137].repeat(2, 1)[:, :141])
    with pytest.raises(ConfigError, match="found data_sha256 .*, expected"):
        train(copy, out, SMALL, held_out=("como",), **small)
    assert before == [(out / name).read_bytes() for name in ("run.json", "network.safetensors", "checkpoint.pt")]
    shutil.copy(catalogue / "labels" / "alba.tif", copy / "labels" / "alba.tif")
    (out / "checkpoint.pt").write_bytes(before[2][:5000])
    with pytest.raises(ModelError, match=r"checkpoint\.pt: cannot be read, delete it to begin again"):
        train(copy, out, SMALL, held_out=("como",), **small)
    torch.save({"step": 2}, out / "checkpoint.pt")
    with pytest.raises(ModelError, match=r"checkpoint\.pt: found no description, as of an earlier version; delete it"):
        train(copy, out, SMALL, held_out=("como",), **small)
    (out / "checkpoint.pt").unlink()
    with pytest.raises(ConfigError, match=r"run\.json is of another training, choose another folder: found held_out"):
        train(copy, out, SMALL, held_out=("alba",), **small)
    assert before[:2] == [(out / name).read_bytes() for name in ("run.json", "network.safetensors")]
    train(copy, out, SMALL, held_out=("como",), **small)
    assert (out / "curve.csv").read_text().count("\n") == 2
    (out / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json: cannot be read, delete it to go on"):
        train(copy, out, SMALL, held_out=("como",), **small)


def test_a_training_goes_on_from_the_same_start_under_another_name(catalogue, tmp_path):
    start = train(catalogue, tmp_path / "first", SMALL, labels=True, size=64).path
    out = tmp_path / "run"
    weights = train(catalogue, out, SMALL, labels=True, size=64, start=str(start)).weights.read_bytes()
    moved = start.rename(tmp_path / "second")
    assert train(catalogue, out, SMALL, labels=True, size=64, start=str(moved)).weights.read_bytes() == weights


def test_a_network_that_diverges_ends_its_training_and_is_not_shipped(catalogue, tmp_path):
    with pytest.raises(ModelError, match=r"run: diverged by step \d, .* try a lower rate than 1e\+30"):
        train(catalogue, tmp_path / "run", Plan(steps=3, batch_size=2, rate=1e30), labels=True, size=64)
    with pytest.raises(ModelError, match="huge: diverged by step 1, "):
        train(catalogue, tmp_path / "huge", Plan(steps=1, batch_size=2, rate=1e30), labels=True, size=64)
    with pytest.raises(ConfigError, match="rate: found nan, expected a positive number"):
        Plan(rate=float("nan"))
    run = train(catalogue, tmp_path / "good", SMALL, labels=True, size=64)
    state = load_file(run.weights)
    state["head.bias"][:] = np.nan
    save_file(state, run.weights)
    with pytest.raises(ModelError, match="good: found weights that are not finite"):
        publish("mine", [run], [], load_cities(catalogue), tmp_path)


def test_labels_without_change_train_and_calibrate_nothing(copy, tmp_path):
    for place in ("alba", "brno", "como"):
        write(copy / "labels" / f"{place}.tif", BLOCK * 0)
    with pytest.raises(CatalogError, match="labels of alba, brno, como: found no changed pixel"):
        train(copy, tmp_path / "run", SMALL, labels=True, size=64)
    run = train(copy, tmp_path / "run", SMALL, labels=True, simulated=0.5, size=64)
    with pytest.raises(CatalogError, match=r"found no changed pixel among \d+ observed"):
        publish("mine", [run], [], load_cities(copy), tmp_path)
    assert not (tmp_path / "mine.json").exists()


def test_change_that_no_place_shows_on_both_dates_is_refused_before_training(copy, tmp_path):
    for path in copy.glob("assets/*/20210101/*.tif"):
        with rasterio.open(path, "r+") as dataset:
            codes = dataset.read(1)
            step = 1 + (path.stem in COARSE)
            codes[30 // step : 70 // step, 40 // step : 90 // step] = 0
            dataset.write(codes, 1)
    cities = load_cities(copy)
    assert [(city.label.sum(), city.changed.sum()) for city in cities] == [(40 * 50, 0)] * 3
    assert torch.equal(spectral_metric(cities, HALF_POOL[1]), torch.eye(7))
    with pytest.raises(CatalogError, match="alba, brno, como: found no changed pixel that both dates show, expected"):
        train(copy, tmp_path / "run", SMALL, labels=True, size=64)
    assert not any((tmp_path / "run").iterdir())


def test_crops_lie_around_change_that_is_seen(catalogue):
    """Of two blocks one is hidden on a date: crops are those of the other one alone."""
    city = load_cities(catalogue)[0]
    label = city.label.copy()
    label[100:120, 100:120] = True
    after = city.after.reflectance.copy()
    after[:, 30:70, 40:90] = np.nan
    hidden = dataclasses.replace(city, label=label, after=Image.of("alba", "", after))
    seen = dataclasses.replace(city, label=hidden.changed)
    samples = [
        [LabelledSampler([one], 64).sample(np.random.default_rng(seed)) for seed in range(20)]
        for one in (hidden, dataclasses.replace(seen, after=hidden.after))
    ]
    for one, other in zip(*samples, strict=True):
        np.testing.assert_array_equal(one.before, other.before)
        np.testing.assert_array_equal(one.truth * one.weight, other.truth * other.weight)


def test_a_card_tells_what_the_starts_had_seen(catalogue, tmp_path):
    cities = load_cities(catalogue)
    held = [("alba",), ("brno", "como")]

    def folds(name: str, starts: list[str | None]) -> list[Run]:
        return [
            train(catalogue, tmp_path / f"{name}-{h[0]}", SMALL, labels=True, size=64, held_out=h, start=start)
            for h, start in zip(held, starts, strict=True)
        ]

    leaky = folds("leaky", ["urban", "urban"])
    card = publish("mine", leaky, leaky, cities, tmp_path / "shipped")
    assert "the network they start from (urban) has seen labels; where those" in card["scores"]["protocol"]
    assert card["licence"] == "CC-BY-NC-SA-4.0"
    fresh = folds("fresh", [None, None])
    honest = folds("honest", [str(run.path) for run in fresh])
    for runs, start in ((fresh, False), (honest, True)):
        card = publish("mine", runs[:1], runs, cities, tmp_path / "other")
        assert "labels of a city never reach the network that is scored on it" in card["scores"]["protocol"]
        assert ("may have seen its pixels, without labels" in card["scores"]["protocol"]) == start
        assert "licence" not in card
    crossed = folds("crossed", [str(run.path) for run in fresh[::-1]])
    assert "from (fresh-alba, fresh-brno) has seen labels; where" in protocol(crossed)
    free = train(
        catalogue, tmp_path / "free-alba", SMALL, labels=False, size=64, held_out=("alba",), start=str(fresh[0].path)
    )
    assert not free.start_may_know
    last = train(catalogue, tmp_path / "last", SMALL, labels=True, size=64, held_out=("brno",), start=str(free.path))
    assert last.start_may_know
    again = train(
        catalogue, tmp_path / "again", SMALL, labels=True, size=64, held_out=("alba",), start=str(leaky[0].path)
    )
    assert leaky[0].held_out == again.held_out == ("alba",)
    assert again.start_may_know  # urban, two starts ago, has seen alba
    grandchild = folds("grandchild", [str(tmp_path / "shipped" / "mine.safetensors")] * 2)
    assert [run.start_licence for run in grandchild] == ["CC-BY-NC-SA-4.0"] * 2
    assert "the network they start from (mine.safetensors) has seen labels; where" in protocol(grandchild)
    free = train(catalogue, tmp_path / "free", SMALL, labels=False, size=64, start="urban")
    card = publish("free", [free], [], cities, tmp_path / "shipped")
    assert card["scores"]["protocol"].startswith("in sample")


def test_runs_whose_starts_share_a_name_only_form_a_committee(catalogue, tmp_path):
    tuned = []
    for folder, seed in (("a", 0), ("b", 1)):
        plan = Plan(steps=2, batch_size=2, seed=seed)
        start = train(catalogue, tmp_path / folder / "base", plan, labels=True, size=64).path
        tuned.append(train(catalogue, tmp_path / folder / "tuned", plan, labels=True, size=64, start=str(start)))
    assert isinstance(combined(tuned), Committee)


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
    assert "3 folds, 3 runs in all: labels of a city never reach the network that is scored on it; " in result.output
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3
    cva = ["--baseline", "cva"]
    for arguments, message in (
        ([], "found none, expected one of --model"),
        (["--disturbed"], "found none, expected one of --model"),
        ([*cva, "--model", "generic"], "found --model and --baseline, expected one of --model"),
        ([*cva, *runs], "found --baseline and --runs, expected one of --model"),
        (["--disturbed", *runs], "neither --runs, --pictures nor --share"),
        ([*cva, "--disturbed", "--share", "0.1"], "neither --runs, --pictures nor --share"),
        ([*cva, "--disturbed", "--pictures", str(tmp_path / "none")], "neither --runs, --pictures nor --share"),
        ([*cva, "--share", "nan"], "nan, expected a share between 0 and 1"),
    ):
        result = runner.invoke(main, ["score", *data, *arguments])
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
    for what in (["--model", "generic"], ["--baseline", "cva"]):
        result = runner.invoke(main, ["score", *data, *what, "--disturbed"])
        assert result.exit_code == 0, result.output
        assert re.search(r"^\| none \| 0\.00000 \| 0\.0000% \| 0\.000 \| \d\.\d{3} \|$", result.output, re.M), (
            result.output
        )
        assert re.search(r"^\| brdf \| 0\.\d{5} \|", result.output, re.M)


def test_folds_without_labels_hold_out_what_can_be_scored(tmp_path):
    data = made(tmp_path / "data", ("alba", "brno", "como", "dijon"))
    (data / "labels" / "dijon.tif").unlink()

    def called(command: str, *options: str) -> str:
        result = CliRunner().invoke(main, [command, "--data", str(data), *options])
        assert result.exit_code == 0, result.output
        return result.output

    held: dict[str, list[tuple[str, ...]]] = {"--labels": [], "--label-free": []}
    small = ["--steps", "1", "--batch-size", "1", "--size", "64", "--threads", "1", "--folds", "2"]
    for labels, fold in itertools.product(held, "01"):
        called("fit", labels, "--fold", fold, "--out", str(tmp_path / (labels + fold)), *small)
        held[labels].append(Run.open(tmp_path / (labels + fold)).held_out)
    assert held["--label-free"] == held["--labels"]
    assert sorted(sum(held["--labels"], ())) == ["alba", "brno", "como"]
    runs = [option for fold in "01" for option in ("--runs", str(tmp_path / f"--label-free{fold}"))]
    assert "| **pooled** |" in called("score", *runs)
    shutil.rmtree(data / "labels")
    called("fit", "--label-free", "--out", str(tmp_path / "unlabelled"), *small)
    assert len(Run.open(tmp_path / "unlabelled").held_out) == 2


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


def test_what_starts_from_a_run_without_labels_keeps_the_other_expert(catalogue, tmp_path):
    def weights(run: Run) -> tuple[float, float]:
        net = combined([run])
        assert isinstance(net, ChangeNet)
        return float(net.discount), float(net.evidence)

    free = train(catalogue, tmp_path / "free", SMALL, labels=False, size=64)
    assert weights(free) == POOL
    tuned = train(catalogue, tmp_path / "tuned", SMALL, labels=True, size=64, start=str(free.path))
    assert weights(tuned) == POOL
    generic = load_network("generic")
    again = train(catalogue, tmp_path / "again", SMALL, labels=False, size=64, start="generic")
    assert weights(again) == (float(generic.discount), float(generic.evidence))
    assert weights(again) != POOL


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
    expected = (3 * logits(averaged(tuned)) + logits(averaged([fresh]))) / 4
    # a vote is in the weights, which are rounded to bfloat16
    np.testing.assert_allclose(logits(net), expected, atol=0.05)
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
    again = train(catalogue, tmp_path / "again", Plan(**small, rate=1e-6), labels=False, size=64, start="urban")
    assert np.abs(logits(combined([again])) - logits(load_network("urban"))).max() < 0.1
    with pytest.raises(ConfigError, match="again: found a committee, expected single networks 's2cd'"):
        combined([fresh, again])


def test_folds_hold_out_each_city_once():
    names = [f"c{i}" for i in range(14)]
    folds = [fold_cities(names, 3, i) for i in range(3)]
    assert sorted(sum(folds, ())) == sorted(names)
    assert folds[1] == ("c1", "c10", "c12", "c4", "c7")  # as the folds of earlier runs


def test_what_is_held_out_is_so_under_all_orbits_and_in_the_series(copy):
    names = ["a", "b", "31UDS_R94", "c", "31UDS_R51"]
    folds = [fold_cities(names, 4, i) for i in range(4)]
    assert ("31UDS_R51", "31UDS_R94") in folds
    assert sorted(sum(folds, ())) == sorted(names)
    for place, orbit in (("alba", 51), ("brno", 94)):
        for date in ("20200101", "20210101"):
            change(copy, f"{place}_{date}", {"grid:code": "MGRS-31UDS", "sat:relative_orbit": orbit})
        shutil.copy(copy / "labels" / f"{place}.tif", copy / "labels" / f"31UDS_R{orbit}.tif")
    for labels in (True, False):
        material = Material.load(copy, [copy], labels=labels, held_out=("31UDS_R51",), size=64)
        assert [dates[0].place for dates in (*material.places, *material.quiet)] == ["como", "como"]
    fit = ["fit", "--data", str(copy), "--out", str(copy / "run"), "--folds", "3"]
    result = CliRunner().invoke(main, fit)
    assert result.exit_code == 2
    assert "3, expected at most 2, the number of places to hold out" in result.output


def test_folds_that_share_a_place_are_not_scored(catalogue):
    def fold(*held_out: str) -> Run:
        return Run(Path("x"), held_out, True, True, "s2cd", None, None, False, (), None)

    cities = load_cities(catalogue)
    with pytest.raises(ConfigError, match=r"found alba held out in two folds \(alba; alba, brno\), expected each"):
        cross_validate([fold("alba"), fold("alba", "brno"), fold("como")], cities)
    cities = [replace(cities[0], name="x_R1"), replace(cities[1], name="x_R2")]
    with pytest.raises(ConfigError, match=r"found x held out in two folds \(x_R1; x_R2\), expected each"):
        cross_validate([fold("x_R1"), fold("x_R2")], cities)


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_baselines_find_the_block(catalogue, name):
    city = load_cities(catalogue)[0]
    magnitude = BASELINES[name](city.before.normalised, city.after.normalised)
    assert magnitude.shape == city.label.shape
    assert magnitude[city.label].mean() > 3 * magnitude[~city.label].mean()


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_baselines_tell_nothing_of_what_a_date_does_not_show(copy, name):
    city = load_cities(clouded(copy, "20200101"))[0]
    hidden = ~city.before.seen
    assert hidden.sum() == 36
    probability = baseline(name)(city)
    assert np.array_equal(np.isnan(probability), hidden)
    assert (probability > 0.5).sum() == pytest.approx(0.025 * (~hidden).sum(), abs=1)
    again = of_baseline(name)(city, city.before.reflectance, city.after.reflectance)
    np.testing.assert_array_equal(again, probability)


def test_a_card_of_clouded_places_is_json_and_of_such_that_show_nothing_none(copy, tmp_path):
    run = train(clouded(copy, "20200101"), tmp_path / "run", SMALL, labels=True, size=64)
    card = publish("mine", [run], [], load_cities(copy), tmp_path)
    assert json.loads((tmp_path / "mine.json").read_text(), parse_constant=pytest.fail) == card
    with pytest.raises(CatalogError, match="alba, brno, como: found no pixel that is seen under 'none', expected some"):
        false_change(lambda _, before, after: np.full_like(before[0], np.nan), load_cities(copy))


def test_scores_of_a_known_map():
    probability = np.array([[0.9, 0.8, 0.2], [0.6, 0.1, np.nan]], np.float32)
    truth = np.array([[True, True, True], [False, False, True]])
    scores = Histogram.of(probability, truth).scores()
    assert (scores.precision, scores.recall) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert scores.f1 == pytest.approx(2 / 3)
    assert scores.best_f1 == pytest.approx(6 / 7)
    assert scores.ap == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert scores.changed == pytest.approx(3 / 5)
    assert scores.ece == pytest.approx((0.1 + 0.2 + 0.8 + 0.6 + 0.1) / 5, abs=0.005)
    two = Histogram.of(np.array([0.61, 0.68], np.float32), np.array([True, False]))  # in two of fifteen bins
    assert two.scores().ece == pytest.approx((0.39 + 0.68) / 2, abs=0.005)


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


def test_scores_of_rare_change_and_of_none():
    truth = np.zeros((50, 50), bool)
    truth[:10] = True
    perfect = Histogram.of(np.where(truth, 0.9, 0.1).astype(np.float32), truth).with_share(1e-4).scores()
    assert (perfect.precision, perfect.recall, perfect.f1, perfect.ap) == pytest.approx((1, 1, 1, 1))
    none = Histogram.of(np.full((5, 5), 0.1, np.float32), np.zeros((5, 5), bool)).scores().rounded()
    assert str(none["ap"]) == "0.0"
    assert (none["precision"], none["recall"], none["f1"]) == (0, 0, 0)


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


def test_a_model_of_two_bands_is_scored_on_its_bands(catalogue, tmp_path):
    class Difference(torch.nn.Module):
        def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
            return (after - before).abs().sum(dim=1, keepdim=True) * 20 - 3

    dates, edge = (torch.zeros(1, 2, 64, 96), torch.ones(1, 2, 64, 96)), torch.export.Dim.AUTO
    program = torch.export.export(Difference(), dates, dynamic_shapes=({2: edge, 3: edge},) * 2)
    torch.export.save(program, tmp_path / "net.pt2")
    described = {"bands": ["swir22", "red"], "scale": 1.0, "stride": 16, "halo": 16}
    (tmp_path / "net.json").write_text(json.dumps(described))
    for more in ([], ["--disturbed"]):
        command = ["score", "--data", str(catalogue), "--model", str(tmp_path / "net.pt2"), *more]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
    city = load_cities(catalogue)[0]
    assert score(predictor(load_model(str(tmp_path / "net.pt2"), "cpu")), [city]).pooled.scores().f1 > 0.95
    (tmp_path / "net.json").write_text(json.dumps(described | {"bands": ["B05", "red"]}))
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert re.search(r"^error: model .* takes rededge1, expected only blue, ", result.output, re.M), result.output


@pytest.mark.parametrize("kind", ["cirrus", "shift", "all"])
def test_an_unchanged_city_stays_so_under_another_sky(shared_data, kind):
    """Beihai and Saclay, where cirrus over sea and dark fields once looked like change on 2 and 3 % of the pixels."""
    predict = of_model(load_model("generic", device="cpu"))
    cities = [city for city in load_cities(shared_data / "oscd") if city.name in {"beihai", "saclay_e"}]
    maps = [predict(c, c.before.reflectance, disturbed(c.before, kind, 3)).ravel() for c in cities]
    probability = np.concatenate(maps)
    assert probability.mean() < 0.02
    assert (probability > 0.5).mean() < 0.002


def test_the_shipped_urban_model_finds_change_in_a_real_city(shared_data):
    model = load_model("urban", device="cpu")
    city = next(c for c in load_cities(shared_data / "oscd") if c.name == "rennes")
    probability = model.predict(city.before.reflectance, city.after.reflectance)
    assert Histogram.of(probability, city.label).scores().f1 > 0.3
