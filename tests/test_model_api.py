"""The promises of a loaded model, on the shipped weights."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch.nn import functional

from s2cd import jit
from s2cd.codes import encode_codes, split_reasons
from s2cd.errors import ModelError
from s2cd.model import BANDS, ModelRef, appearance, compiled, device, list_models, load_model, normalise, registry
from s2cd.model.appearance import BAND_COUNT, INPUTS, RED, along_edges, box, edges
from s2cd.model.device import Engine, fast_bfloat16, out_of_memory, with_memory
from s2cd.model.network import HALO, REACH, STRIDE, STRIP, ChangeNet, Committee, cost, network_of
from s2cd.model.tensors import codes_by_torch, to_codes, to_input


def ground(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Reflectance of patches of several sizes, seven bands on the 10 m grid."""
    rng = np.random.default_rng(seed)
    image = np.zeros((len(BANDS), *shape), np.float32)
    for cell in (4, 16, 48):
        size = (len(BANDS), shape[0] // cell + 1, shape[1] // cell + 1)
        coarse = rng.uniform(0.01, 0.12, size).astype(np.float32)
        image += coarse.repeat(cell, axis=1).repeat(cell, axis=2)[:, : shape[0], : shape[1]]
    coarse = image[4:, ::2, ::2].repeat(2, axis=1).repeat(2, axis=2)
    image[4:] = coarse[:, : shape[0], : shape[1]]
    return image


@pytest.fixture(params=["generic", "urban"])
def model(request: pytest.FixtureRequest) -> registry.Model:
    return load_model(request.param, device="cpu")


def test_both_models_are_shipped_and_the_default_comes_first():
    assert list_models() == ["generic", "urban"]
    assert load_model().name == "generic"


@pytest.mark.parametrize("shape", [(17, 19), (785, 799), (128, 96), (1, 1)])
def test_result_has_the_shape_of_its_input_and_is_a_probability(model, shape):
    result = model.predict(ground(shape), ground(shape, 1))
    assert result.shape == shape
    assert result.dtype == np.float32
    assert ((result >= 0) & (result <= 1)).all()


def test_symmetric_in_time_to_the_bit(model):
    before, after = ground((75, 130)), ground((75, 130), 1)
    np.testing.assert_array_equal(model.predict(before, after), model.predict(after, before))


def test_identical_dates_give_no_change(model):
    image = ground((200, 216))
    assert model.predict(image, image).max() < 0.02


@settings(max_examples=5)
@given(gain=st.floats(0.8, 1.25), offset=st.floats(-0.1, 0.1))
def test_an_affine_change_of_a_date_cancels(gain, offset):
    model = load_model("generic", device="cpu")
    before, after = ground((64, 80)), ground((64, 80), 1)
    changed = (after * np.float32(gain) + np.float32(offset)).astype(np.float32)
    # Not exactly: float32 rounds the two otherwise, and bfloat16 may then round a difference up here and down there.
    np.testing.assert_allclose(model.predict(before, changed), model.predict(before, after), atol=2e-3)


def test_pixels_without_observation_are_nan_and_no_others(model):
    before, after = ground((70, 90)), ground((70, 90), 1)
    before[2, 10:20, 30:40] = np.nan
    after[:, 60:, :5] = np.nan
    expected = np.zeros((70, 90), bool)
    expected[10:20, 30:40] = expected[60:, :5] = True
    np.testing.assert_array_equal(np.isnan(model.predict(before, after)), expected)
    assert np.isnan(model.predict(np.full_like(before, np.nan), after)).all()


@pytest.mark.parametrize(("bfloat16", "close"), [(False, 1e-5), (True, 0.01)])
def test_chunks_with_halo_equal_the_whole(model, monkeypatch, bfloat16, close):
    """Invariant 1 of the design. How AMX rounds in bfloat16 depends on the size of a block."""
    monkeypatch.setattr(model._engine, "_bfloat16", bfloat16 and fast_bfloat16(model.device))
    shape, edge = (345, 421), 160
    images = ground(shape), ground(shape, 1)
    stats = tuple(model.statistics(i) for i in images)
    level = model.background(*(model.sketch(i, s) for i, s in zip(images, stats, strict=True)))
    whole = model.predict(*images, statistics=stats, background=level)
    assert edge % model.stride == 0
    for y in range(0, shape[0], edge):
        for x in range(0, shape[1], edge):
            y0, x0 = max(0, y - model.halo), max(0, x - model.halo)
            part = (slice(None), slice(y0, y + edge + model.halo), slice(x0, x + edge + model.halo))
            chunk = model.predict(*(i[part] for i in images), statistics=stats, background=level)
            inner = chunk[y - y0 : y - y0 + edge, x - x0 : x - x0 + edge]
            np.testing.assert_allclose(inner, whole[y : y + edge, x : x + edge], atol=close)


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_and_float32_give_alike_maps(model, monkeypatch, seed):
    """On random blocks, which differ more than any real pair that was tried (tests/test_real_data.py)."""
    if not fast_bfloat16(model.device):
        pytest.skip("this processor has no fast bfloat16, so float32 is used")
    images = ground((250, 310), seed), ground((250, 310), seed + 1)
    found = model.predict(*images)
    monkeypatch.setattr(model._engine, "_bfloat16", False)
    assert 0 < np.abs(found - model.predict(*images)).max() <= 0.015


def test_weights_and_inputs_are_what_bfloat16_holds_whatever_the_precision(model, monkeypatch):
    """oneDNN rounds them, biases too, which alone made maps differ by 0.04 from those of float32."""
    monkeypatch.setattr(model._engine, "_bfloat16", False)
    network = model._engine._network
    assert all(torch.equal(p, p.to(torch.bfloat16).to(p.dtype)) for p in network.parameters())
    member = network.networks[0] if isinstance(network, Committee) else network
    x = torch.rand(1, INPUTS, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(member.levels(x)[0], member.levels(x.to(torch.bfloat16).float())[0])


def test_raw_numbers_with_scale_and_offset_equal_reflectance(model):
    numbers = [(ground((64, 50), seed) * 10000).round().astype(np.uint16) + 1000 for seed in (0, 1)]
    reflectance = [(n * np.float32(1e-4) - np.float32(0.1)).astype(np.float32) for n in numbers]
    stats = tuple(model.statistics(r) for r in reflectance)
    valid = np.ones((64, 50), bool)
    codes = [model.encode(n, model.affine(s, 1e-4, -0.1), valid) for n, s in zip(numbers, stats, strict=True)]
    level = model.background(*(model.sketch(r, s) for r, s in zip(reflectance, stats, strict=True)))
    expected = model.predict(*reflectance, statistics=np.stack(stats))
    np.testing.assert_allclose(model.decode(*codes, level), expected, atol=5e-3)  # the input is rounded to float16


@pytest.mark.parametrize("rows", [8, STRIP, STRIP + 8, 2 * STRIP + 72])
@pytest.mark.parametrize("name", ["generic", "urban"])
def test_what_a_cpu_does_in_strips_and_in_one_pass_equals_the_plain_network(name, rows, monkeypatch):
    """Where gradients are asked for, each layer is called by itself; in double precision, to many digits."""
    network = network_of(load_file(registry.WEIGHTS / f"{name}.safetensors"))
    dates = torch.rand(2, 1, INPUTS, rows, 24, generator=torch.Generator().manual_seed(rows)) - 0.5
    dates[1, ..., rows // 2 :, :5] = 0  # not observed
    with monkeypatch.context() as patched:
        patched.setattr("s2cd.model.network.STRIP", 1000)
        expected = copy.deepcopy(network).double()(*dates.half().double(), 1.2).detach()
    with torch.inference_mode():
        found = network(*dates.half(), 1.2)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 96), (75, 93), (2, 1)])
def test_bands_at_20_m_equal_replicated_ones(model, shape):
    rng = np.random.default_rng(3)
    half = tuple(-(-n // 2) for n in shape)
    fine = rng.integers(0, 9000, (model.fine, *shape)).astype(np.uint16)
    coarse = rng.integers(0, 9000, (len(model.bands) - model.fine, *half)).astype(np.uint16)
    replicated = coarse.repeat(2, 1).repeat(2, 2)[:, : shape[0], : shape[1]]
    affine, valid = model.affine(np.full((len(model.bands), 2), 0.1, np.float32), 1e-4), rng.random(shape) < 0.9
    ours = model.encode([*fine, *coarse], affine, valid)
    theirs = model.encode(np.concatenate([fine, replicated]), affine, valid)
    assert all(torch.equal(a, b) for a, b in zip(ours.features, theirs.features, strict=True))
    with pytest.raises(ModelError, match="takes pixels"):
        model.encode([*coarse, *fine], affine, valid)


@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    kind=st.sampled_from([np.uint16, np.uint8, np.int16, np.float32]),
    half=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=60)
def test_the_input_made_on_a_device_is_the_one_made_by_numpy(shape, kind, half, seed):
    rng = np.random.default_rng(seed)
    edge = tuple(-(-n // 2) for n in shape) if half else shape
    planes = [rng.integers(0, 120, shape if band < 4 else edge).astype(kind) for band in range(7)]
    gains = rng.normal(0, 0.1, (7, 2)).astype(np.float32)
    valid = rng.random(shape) < rng.choice([0, 0.8, 1])
    if kind == np.float32:
        planes[0][~valid] = np.nan
    expected = normalise.network_input(planes, gains, valid, 4, STRIDE)
    parts = device._parts(device._staged([*planes, valid]), [*planes, valid])
    found = to_input(parts[:-1], torch.from_numpy(gains), parts[-1], 4, STRIDE)
    np.testing.assert_array_equal(found[0].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("kind", [">u2", "<i4", ">f4", "f2", "f8", "i8", "?"])
def test_input_of_any_type_and_layout_is_that_of_float32(kind):
    rng = np.random.default_rng(0)
    planes = [rng.integers(0, 120, (2 * 31, 2 * 23)).astype(kind)[::2, 1::2] for _ in range(7)]
    for plane in planes:
        plane.flags.writeable = False
    gains, valid = rng.normal(0, 0.1, (7, 2)).astype(np.float32), rng.random((23, 31)).T < 0.8
    found = normalise.network_input(planes, gains, valid, 4, STRIDE)
    same = [plane.astype(np.float32, order="C") for plane in planes]
    np.testing.assert_array_equal(found, normalise.network_input(same, gains, valid.copy(), 4, STRIDE))


def test_pixels_that_lie_on_a_device_are_not_written_to():
    planes = [torch.rand(6, 8) for _ in range(7)]
    before = [plane.clone() for plane in planes]
    to_input(planes, torch.rand(7, 2), torch.ones(6, 8, dtype=torch.bool), 4, STRIDE)
    assert all(torch.equal(a, b) for a, b in zip(planes, before, strict=True))


@pytest.mark.parametrize("reasons", [False, True])
def test_codes_tell_what_decode_does(model, reasons):
    images, rng = [ground((70, 65), seed) for seed in (0, 1)], np.random.default_rng(0)
    seen = [rng.random((70, 65)) < 0.7 for _ in images]
    dates = [model.encode(i, model.affine(model.statistics(i)), v) for i, v in zip(images, seen, strict=True)]
    inner = slice(3, 69), slice(0, 60)
    probability = model.decode(*dates, 1.0)[inner]
    np.testing.assert_array_equal(np.isnan(probability), ~(seen[0] & seen[1])[inner])
    codes = model.decode_codes(*dates, 1.0, inner, reasons=reasons)
    plain, validity = split_reasons(codes) if reasons else (codes, None)
    np.testing.assert_array_equal(plain, encode_codes(probability))
    if reasons:
        np.testing.assert_array_equal(validity, (~seen[0] + 2 * ~seen[1])[inner])


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 70), st.booleans())
def test_codes_are_the_same_as_on_a_gpu(seed, height, width, reasons):
    rng = np.random.default_rng(seed)
    probability = torch.from_numpy(rng.choice([0, 0.5 / 1024, 1.5 / 1024, 0.3, 1, np.nan], (80, 80)).astype(np.float32))
    before, after = (torch.from_numpy(rng.random((height, width)) < 0.8) for _ in range(2))
    part = slice(height // 3, None), slice(0, width - width // 3)
    whole = codes_by_torch(probability[:height, :width], before, after, reasons=reasons)
    assert torch.equal(to_codes(probability, before, after, part, reasons=reasons), whole[part])


def test_background_is_the_usual_difference_of_two_dates():
    image = ground((300, 400))
    stats = normalise.statistics(image)
    first = normalise.sketch(image, stats)

    def moved(by, where=slice(None)):
        second = first.copy()
        second[:, where] += np.float16(by)
        return normalise.background(first, second)

    rows = first.shape[1]
    half = 0.5 / normalise.TYPICAL
    assert moved(0.5) == pytest.approx(half, rel=0.01)
    assert moved(0) == normalise.LEAST_BACKGROUND
    assert moved(5) == normalise.MOST_BACKGROUND
    assert moved(5, slice(rows // 10)) == normalise.LEAST_BACKGROUND, "what changed is not usual"
    assert moved(0.8, slice(rows // 2)) == pytest.approx(0.8 * 4 / 9 / normalise.TYPICAL, rel=0.02), "forest and fields"
    second = first + np.float16(0.5)
    second[:, 10:] = np.nan
    assert normalise.background(first, second) == pytest.approx(half, rel=0.01)
    assert normalise.background(first, np.full_like(first, np.nan)) == 1.0


@pytest.mark.parametrize("experts", [{"discount": 0.5, "evidence": 0.0}, {"discount": 0.0, "evidence": 0.5}], ids=str)
def test_what_two_dates_differ_by_everywhere_counts_against_change(experts):
    """To train or to score with the wrong sign would go unnoticed: chunks and devices would still agree."""
    torch.manual_seed(0)
    net, dates = ChangeNet().pool(**experts).eval(), torch.randn(2, 1, INPUTS, 16, 24)
    dates[:, :, -1] = 1
    with torch.inference_mode():
        features = [net.encode(date) for date in dates]
        usual, much = (net.decode(*features, background) for background in (1.0, np.e))
    torch.testing.assert_close(much, usual - 0.5)


def test_few_pixels_tell_no_background():
    first = np.full((7, 128, 128), np.nan, np.float16)
    first[:, 0, : normalise.FEWEST] = 0
    assert normalise.background(first, first + np.float16(0.5)) == pytest.approx(0.5 / normalise.TYPICAL, rel=0.01)
    first[:, 0, 0] = np.nan
    assert normalise.background(first, first + np.float16(0.5)) == 1.0


@pytest.mark.parametrize(("shape", "factor"), [((100, 100), 1), ((511, 900), 1), ((900, 512), 2), ((10980, 10980), 32)])
def test_scenes_are_looked_at_by_256_pixels_along_a_side_or_more(shape, factor):
    """The README tells of the 320 m that this makes of a tile."""
    assert normalise.decimation(shape) == factor


def test_a_distant_pixel_has_no_influence(model):
    before, after = ground((64, 320)), ground((64, 320), 1)
    stats = (model.statistics(before), model.statistics(after))
    result = model.predict(before, after, statistics=stats, background=1.0)
    after[:, :, 160] += 0.5
    moved = np.abs(model.predict(before, after, statistics=stats, background=1.0) - result).max(axis=0)
    assert moved[160] > 0
    assert moved[: 160 - HALO].max() == 0
    assert moved[160 + HALO + 1 :].max() == 0


@settings(max_examples=30)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 13),
    count=st.integers(1, 2),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    learnt=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_is_compiled_for_cpus_is_what_torch_does(rows, columns, count, dtype, learnt, seed):
    """And gives the same to the bit whichever date comes first."""
    generator = torch.Generator().manual_seed(seed)
    dates = 4 * torch.randn(2, count, INPUTS, 8 * rows, 8 * columns, generator=generator).to(dtype)
    dates[:, :, -1] = torch.randint(0, 5, dates[:, :, -1].shape, generator=generator) / 4
    logits = 5 * torch.randn(count, 1, 8 * rows, 8 * columns, generator=generator)
    metric = torch.randn(BAND_COUNT, BAND_COUNT, generator=generator) if learnt else torch.eye(BAND_COUNT)

    def results(module, a, b):
        (edges_a, cells_a, means_a), (edges_b, cells_b, means_b) = looks = [module.appearance(x) for x in (a, b)]
        hazy = module.haze_between(cells_a, cells_b)
        length = module.magnitude(means_a, means_b, hazy, metric)
        return *looks[0], *looks[1], hazy[:, :-1], length, module.finished(logits, edges_a, edges_b)

    found = results(compiled, *dates)
    torch.testing.assert_close(found, results(appearance, *dates), rtol=1e-4, atol=2e-5)
    swapped = results(compiled, *dates.flip(0))
    assert torch.equal(swapped[-3], -found[-3])
    assert torch.equal(swapped[-2], found[-2])
    assert torch.equal(swapped[-1], found[-1])


def test_the_magnitude_is_float32_where_the_network_is_bfloat16():
    generator = torch.Generator().manual_seed(0)
    dates = torch.rand(2, 1, INPUTS, 32, 32, generator=generator)
    (_, cells_a, means_a), (_, cells_b, means_b) = map(appearance.appearance, dates)
    vectors = means_a, means_b, appearance.haze_between(cells_a, cells_b)
    metric = torch.randn(BAND_COUNT, BAND_COUNT, generator=generator)
    expected = appearance.magnitude(*vectors, metric)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(appearance.magnitude(*vectors, metric), expected)


def test_code_is_compiled_where_nothing_can_be_kept_on_disk():
    """Numba finds no place for what comes from no file, as where neither package nor home can be written."""
    space: dict[str, Any] = {}
    exec("def twice(x):\n    return 2 * x", space)
    assert jit.compiled()(space["twice"])(21) == 42


def test_no_process_gets_the_code_that_another_compiled_for_other_types(tmp_path, monkeypatch):
    """Both find nothing on disk; the first one's file is written when the second is done."""
    first, second = (jit.CacheFiles(str(tmp_path), "f", source_stamp=1) for _ in range(2))
    monkeypatch.setattr(second, "_load_index", lambda: {})
    write = first._save_data
    monkeypatch.setattr(first, "_save_data", lambda *args: (second.save("float32", "for float32"), write(*args)))
    first.save("uint16", "for uint16")
    later = jit.CacheFiles(str(tmp_path), "f", source_stamp=1)
    assert [later.load(key) for key in ("uint16", "float32")] == ["for uint16", "for float32"]
    second.save("float32", "once more")  # and forgets the first: it is compiled again
    assert [later.load(key) for key in ("uint16", "float32")] == [None, "once more"]


def test_code_is_compiled_where_the_disk_is_full(tmp_path):
    """No file of this process may have a byte, as where a quota is used up."""
    program = (
        "import resource; from s2cd.predictor import add_up; import numpy as np\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "out = np.empty((1, 3), np.uint16); add_up(np.ones_like(out), out); print(*out[0])"
    )
    home = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", program], env=home, capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["1", "2", "3"], found.stderr
    assert not list(tmp_path.rglob("*.nbc"))


@pytest.mark.parametrize("module", [appearance, compiled])
def test_what_differs_alike_all_around_is_no_evidence_and_a_large_change_stays_one(module):
    """A veil over everything, and a flood of a square kilometre; nothing is seen in the first rows of one date."""
    first = torch.rand(1, INPUTS, 96, 96)
    first[:, -1] = 1
    second = first.clone()
    second[:, :-1] += 0.7
    second[:, :-1, 24:56, 24:72] += 4
    second[:, :, :8] = 0

    def evidence(a, b):
        (_, cells_a, means_a), (_, cells_b, means_b) = map(module.appearance, (a, b))
        return module.magnitude(means_a, means_b, module.haze_between(cells_a, cells_b), torch.eye(BAND_COUNT))[0, 0]

    found = evidence(first, second)
    torch.testing.assert_close(found, evidence(second, first))
    nothing = 0.5 * math.log(1e-3)
    torch.testing.assert_close(found[88:], torch.full((8, 96), nothing), atol=0.05, rtol=0)
    torch.testing.assert_close(found[:7], torch.full((7, 96), nothing))
    plain = 0.5 * math.log(2 * 7 * 4.7**2)
    assert found[40, 48] > plain - 0.4


def test_logits_follow_the_edges_of_the_image():
    """A field that begins in the middle of 20 m pixels: smooth logits are cut there, though it is 10 m wide of one."""
    columns = torch.arange(48)
    guide = (columns >= 25).float().expand(1, 1, 32, 48)  # 10 m pixels
    blocks = edges(torch.cat([torch.zeros(1, RED.start, 16, 24), functional.pixel_unshuffle(guide, 2)], dim=1))
    truth = torch.where(columns >= 25, 5.0, -5.0).expand(1, 1, 32, 48)
    coarse = box(functional.avg_pool2d(truth, 2))
    found = functional.pixel_shuffle(along_edges(coarse, blocks), 2)
    blurred = coarse.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert (found - truth).abs().max() < 0.8 * (blurred - truth).abs().max()
    assert torch.equal(found > 0, truth > 0)
    assert not torch.equal(blurred > 0, truth > 0)


def test_logits_without_edges_stay_what_they_are_on_the_whole():
    logits, noise = torch.randn(2, 1, 16, 24), torch.randn(2, INPUTS, 16, 24)
    flat = along_edges(torch.full_like(logits, 3.0), edges(noise))
    torch.testing.assert_close(flat, torch.full((2, 4, 16, 24), 3.0))
    smooth = along_edges(logits, edges(torch.ones_like(noise)))
    assert (smooth == smooth[:, :1]).all()
    assert smooth.std() < 0.5 * logits.std()


def shipped_cost(name: str) -> dict[str, float]:
    return cost(network_of(load_file(registry.WEIGHTS / f"{name}.safetensors")))


@pytest.mark.parametrize(("name", "flop"), [("generic", 20_000), ("urban", 40_000)])
def test_cost_is_within_the_budget(name, flop):
    found = shipped_cost(name)
    assert 2 * found["encode_flop_a_pixel"] + found["decode_flop_a_pixel"] <= flop
    assert found["parameters"] <= 2_000_000
    assert found == load_model(name, device="cpu").card["cost"]
    assert HALO <= 64
    assert HALO % STRIDE == 0


def test_threads_get_the_same_result(model):
    pairs = [(ground((200, 180), 2 * i), ground((200, 180), 2 * i + 1)) for i in range(4)]
    expected = [model.predict(*pair) for pair in pairs]
    results: dict[int, np.ndarray] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: model.predict(*pairs[i])})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, result in enumerate(expected):
        np.testing.assert_allclose(results[i], result, atol=1e-6)


def test_a_model_is_loaded_once_and_pickles_as_a_name(model):
    assert load_model(model.name, device="cpu") is model
    data = pickle.dumps(model)
    assert len(data) < 500
    assert pickle.loads(data) is model


def test_unknown_names_devices_and_shapes_are_named():
    with pytest.raises(ModelError, match="unknown model 'nope', expected one of generic, urban"):
        load_model("nope")
    with pytest.raises(ModelError, match="model: found Model, expected the name of a shipped model or a path"):
        load_model(load_model())
    for strange in ("tpu9x", None):
        with pytest.raises(ModelError, match=f"unknown device {strange!r}"):
            load_model("generic", device=strange)
    with pytest.raises(ModelError, match=r"7 bands, found \(6, 5, 5\)"):
        load_model("generic").predict(np.zeros((6, 5, 5), np.float32), np.zeros((6, 5, 5), np.float32))
    with pytest.raises(ModelError, match="CUDA devices found"):
        load_model("generic", device="cuda:63")


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    for name in ("mine.safetensors", "mine.pt2"):
        (tmp_path / name).symlink_to("/proc/self/mem")  # a file that nobody can read from its beginning
        with pytest.raises(ModelError, match=rf"cannot read {name}: Input/output error$"):
            load_model(str(tmp_path / name), device="cpu")
    for name in (str(tmp_path / ("x" * 300 + ".pt2")), "\0.pt2"):  # neither of which can be a file's name
        for loaded in (load_model, ModelRef.of):
            with pytest.raises(ModelError, match="unknown model"):
                loaded(name)


def test_what_a_masked_array_hides_is_no_observation():
    model, before = load_model("generic", device="cpu"), ground((64, 70))
    after = before.copy()
    after[:, 20:40, 20:40] = 0
    hidden = np.ma.masked_equal(after, 0)
    expected = model.predict(before, hidden.filled(np.nan))
    np.testing.assert_array_equal(model.predict(before, hidden), expected)
    assert np.isnan(expected[20:40, 20:40]).all()
    digital = np.ma.masked_equal((after * 10000).astype(np.uint16), 0)
    assert np.isnan(model.predict((before * 10000).astype(np.uint16), digital)[20:40, 20:40]).all()


def test_parts_of_20_m_pixels_that_are_hidden_are_no_change():
    model, before = load_model("generic", device="cpu"), ground((96, 90))
    after = before.copy()
    hidden = np.random.default_rng(0).random(after.shape[1:]) < 0.1
    after[:, hidden] = np.nan
    found = model.predict(before, after)
    np.testing.assert_array_equal(np.isnan(found), hidden)
    assert np.nanmax(found) < 0.05


def test_labelled_bands_must_be_in_order_and_arrays_hold_numbers():
    model, image = load_model("generic", device="cpu"), ground((20, 30))
    labelled = xr.DataArray(image, dims=("band", "y", "x"), coords={"band": list(model.bands)})
    np.testing.assert_array_equal(model.predict(labelled, labelled), model.predict(image, image))
    numbered = labelled.assign_coords(band=np.arange(1, 8))
    np.testing.assert_array_equal(model.predict(numbered, numbered), model.predict(image, image))
    with pytest.raises(ModelError, match="found bands swir22, .*, blue, expected blue, .*, swir22"):
        model.predict(labelled, labelled[::-1])
    as_variables = labelled.to_dataset("band")[list(model.bands)[::-1]].to_array()
    with pytest.raises(ModelError, match=r"takes \(band, y, x\), found \('y', 'x', 'band'\)"):
        model.predict(*[labelled.transpose("y", "x", "band")] * 2)
    with pytest.raises(ModelError, match="found Tensor, expected an array of reflectance float32"):
        model.predict(*[torch.from_numpy(image).requires_grad_()] * 2)
    for strange in (as_variables, labelled[::-1].rename(band="bands")):
        with pytest.raises(ModelError, match="found bands swir22, .*, blue, expected blue, .*, swir22"):
            model.predict(strange, strange)
    with pytest.raises(ModelError, match="found Dataset, expected an array of reflectance float32"):
        model.predict(labelled.to_dataset("band"), labelled.to_dataset("band"))
    for kind in (object, np.complex64, bool):
        with pytest.raises(ModelError, match=f"found an array of {np.dtype(kind)}, expected reflectance float32"):
            model.predict(image, image.astype(kind))


def test_labelled_dates_must_lie_on_one_grid():
    model, image = load_model("generic", device="cpu"), ground((20, 20))
    place = {"y": 5e6 - 10.0 * np.arange(20), "x": 5e5 + 10.0 * np.arange(20)}
    date = xr.DataArray(image, dims=("band", "y", "x"), coords=place)
    near = date.assign_coords(x=date.x + 1e-6)
    np.testing.assert_array_equal(model.predict(date, near), model.predict(image, image))
    with pytest.raises(ModelError, match=r"same axes, found \('band', 'y', 'x'\) and \('band', 'x', 'y'\)"):
        model.predict(date, date.transpose("band", "x", "y"))
    for other, start in ((date.isel(y=slice(None, None, -1)), 4999810), (date.assign_coords(y=date.y + 10), 5000010)):
        with pytest.raises(ModelError, match=f"one grid, found y from 5000000 to 4999810 and from {start} to"):
            model.predict(date, other)


@pytest.mark.parametrize("name", ["generic", "urban"])
@pytest.mark.parametrize("share", [0.04, 0.3, 0.6])
def test_infinite_pixels_are_no_observation(name, share):
    model, shape = load_model(name, device="cpu"), (300, 310)
    before, after = ground(shape), ground(shape, 1)
    hole = np.s_[2, :, : int(share * shape[1])]
    infinite, missing = before.copy(), before.copy()
    infinite[hole], missing[hole] = np.inf, np.nan
    found = model.predict(infinite, after)
    np.testing.assert_array_equal(found, model.predict(missing, after))
    assert np.isfinite(found[:, int(share * shape[1]) :]).all()


@pytest.mark.parametrize("name", ["generic", "urban"])
def test_bytes_of_features_are_those_of_an_encoded_date(name):
    model, edge = load_model(name, device="cpu"), 128
    encoded = model.encode(ground((edge, edge)), np.ones((7, 2), np.float32), np.ones((edge, edge), bool))
    assert model.feature_bytes * edge**2 == sum(f.numel() * f.element_size() for f in encoded.features)


def test_what_torch_is_told_to_prefer_changes_no_map(monkeypatch):
    images = ground((40, 50)), ground((40, 50), 1)
    expected = load_model("generic", device="cpu").predict(*images)
    for prefer, what, before in (
        (torch.set_default_device, "meta", None),
        (torch.set_default_dtype, torch.float64, torch.float32),
        (torch.set_default_dtype, torch.bfloat16, torch.float32),
    ):
        prefer(what)
        try:
            monkeypatch.setattr(registry, "_cache", {})
            np.testing.assert_array_equal(load_model("generic", device="cpu").predict(*images), expected)
        finally:
            prefer(before)


def test_damaged_weights_raise_one_line(tmp_path, monkeypatch):
    good = (registry.WEIGHTS / "generic.safetensors").read_bytes()
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path)
    monkeypatch.setattr(registry, "_cache", {})
    (tmp_path / "cut.json").write_text("{}")
    weights = load_tensors(good)
    weights["stem.0.weight"][0, 0, 0, 0] = float("nan")
    for damaged in (good[: len(good) // 2], b"", good[:8] + b"x" * 100, save_tensors(weights)):
        (tmp_path / "cut.safetensors").write_bytes(damaged)
        with pytest.raises(ModelError, match="weights of model 'cut' are damaged") as caught:
            load_model("cut")
        assert "\n" not in str(caught.value)


def test_mlm_metadata_states_bands_and_shapes(model):
    found = model.mlm()
    assert found["mlm:name"] == model.name
    assert [i["bands"] for i in found["mlm:input"]] == [list(BANDS)] * 2
    assert found["mlm:total_parameters"] == shipped_cost(model.name)["parameters"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("tried to allocate 2 GiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_a_full_gpu_is_told_from_other_errors(error, expected):
    assert out_of_memory(error) is expected


class _Room(torch.nn.Module):
    """A network on a card with room for blocks of `rows` rows."""

    def __init__(self, network, rows):
        super().__init__()
        self.network, self.rows = network, rows

    def encode(self, x):
        self._require(x)
        return self.network.encode(x)

    def decode(self, a, b, background):
        self._require(a[0])
        return self.network.decode(a, b, background)

    def _require(self, x):
        if x.shape[2] > self.rows:
            raise RuntimeError("CUDA error: out of memory")


def compare(engine, images):
    """Probability of two dates, whose arrays must stay as they are."""
    given = [image.copy() for image in images]
    gains, valid = np.tile(np.array([3, -0.3], np.float32), (7, 1)), np.ones(images[0].shape[1:], bool)
    dates = [engine.encode(list(image), gains, valid, 4, STRIDE) for image in given]
    for before, after in zip(images, given, strict=True):
        np.testing.assert_array_equal(after, before)
    return engine.decode(*dates, 1.0, "probability").numpy()


def test_blocks_too_large_for_a_card_are_run_in_parts():
    network, place = load_model("generic", "cpu")._engine._network, torch.device("cpu")
    sizes = {"stride": STRIDE // 2, "halo": HALO // 2}
    usual, small = Engine(network, place, **sizes), Engine(_Room(network, 200), place, **sizes)
    for shape in ((80, 48), (600, 48), (80, 48)):
        images = [ground(shape, seed) for seed in (0, 1)]
        np.testing.assert_allclose(compare(small, images), compare(usual, images), atol=0.01)


def test_an_allocator_that_may_give_memory_away_too_early_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "pluggable")
    with pytest.raises(ModelError, match="expected its own"):
        Engine(torch.nn.Identity(), torch.device("cuda"), stride=8, halo=8)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("tried to allocate 2 GiB"), MemoryError("CuPy's")])
def test_where_memory_is_short_it_is_tried_once_more(error):
    calls = iter([error, 1])

    def call():
        found = next(calls)
        if isinstance(found, Exception):
            raise found
        return found

    assert with_memory(call) == 1
    with pytest.raises(RuntimeError, match="shapes"):
        with_memory(lambda: torch.zeros(2, 3) @ torch.zeros(2, 3))


@pytest.fixture
def on_gpu(model):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return load_model(model.name, device="cuda")


@pytest.mark.gpu
def test_cuda_equals_cpu_to_bfloat16(model, on_gpu):
    images = ground((785, 799)), ground((785, 799), 1)
    found = on_gpu.predict(*images)
    assert np.abs(found - model.predict(*images)).mean() < 0.01


@pytest.mark.gpu
def test_threads_that_share_a_gpu_get_their_own_maps(on_gpu):
    images = [ground((785, 799), seed) for seed in range(8)]
    pairs = list(pairwise(images))
    alone = [on_gpu.predict(*pair) for pair in pairs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda pair: on_gpu.predict(*pair), pairs * 5))
    for found, expected in zip(together, alone * 5, strict=True):
        np.testing.assert_allclose(found, expected, atol=0.01)


@pytest.mark.gpu
def test_what_lies_on_a_gpu_stays_there(on_gpu):
    cupy = pytest.importorskip("cupy")
    images = [ground((333, 401), seed) for seed in range(2)]
    images[0][:, :5] = np.nan
    found = on_gpu.predict(*(cupy.asarray(image) for image in images))
    assert isinstance(found, cupy.ndarray)
    np.testing.assert_array_equal(cupy.asnumpy(found), on_gpu.predict(*images))
    with pytest.raises(ModelError, match=r"7 bands, found \(6, 5, 5\)"):
        on_gpu.predict(*(cupy.zeros((6, 5, 5), np.float32) for _ in range(2)))


@pytest.mark.gpu
def test_a_block_too_large_for_the_gpu_is_split(on_gpu):
    images = ground((2000, 2000)), ground((2000, 2000), 1)
    torch.cuda.empty_cache()
    before, total = torch.cuda.memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.reset_peak_memory_stats()
    expected = on_gpu.predict(*images)
    most = torch.cuda.max_memory_reserved() - before
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.85 * most) / total)
    try:
        np.testing.assert_allclose(on_gpu.predict(*images), expected, atol=0.01)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    np.testing.assert_allclose(on_gpu.predict(*images), expected, atol=0.01)


@pytest.mark.gpu
def test_what_lies_on_a_second_gpu_stays_there(model):
    if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
        pytest.skip("no second CUDA device")
    cupy = pytest.importorskip("cupy")
    second, images = load_model(model.name, device="cuda:1"), [ground((333, 401), seed) for seed in range(2)]
    with cupy.cuda.Device(1):
        found = second.predict(*(cupy.asarray(image) for image in images))
        np.testing.assert_array_equal(cupy.asnumpy(found), second.predict(*images))


def test_reach_is_as_far_as_a_pixel_beyond_an_aligned_edge_matters():
    """With positive weights every path counts: what is REACH away matters, what is further does not."""
    net = ChangeNet().double().eval()
    for parameter in net.parameters():
        torch.nn.init.uniform_(parameter, 0.01, 0.3)
    net.pool(1.0, 1.0)
    edge, size, reach = 64, 128, REACH // 2  # on the 20 m grid; a multiple of the network's stride there
    generator = torch.Generator().manual_seed(0)
    before, after = torch.rand(2, 1, INPUTS, size, size, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        base = net.decode(net.encode(before), net.encode(after))
        for distance, matters in ((reach, True), (reach + 1, False)):
            for column, kept in ((edge - distance, slice(2 * edge, None)), (edge + distance - 1, slice(2 * edge))):
                moved = before.clone()
                moved[..., column] += 100
                result = net.decode(net.encode(moved), net.encode(after))
                assert torch.equal(result[..., kept], base[..., kept]) != matters
