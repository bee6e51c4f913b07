"""Networks that users bring, exported here as a user would."""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from distributed import Client
from onnx import TensorProto, helper
from torch import nn

import s2cd
from s2cd.codes import CODE_SCALE
from s2cd.errors import ModelError
from s2cd.model import ModelRef, load_model
from s2cd.runner import run

DESCRIPTION = {"bands": ["B04", "nir"], "scale": 10000.0, "stride": 4, "halo": 4, "output": "probability"}


class Distance(nn.Module):
    """Probability from the smoothed difference of two dates of digital numbers."""

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        difference = (before - after).abs().mean(dim=1, keepdim=True) / 10000
        return 1 - torch.exp(-10 * nn.functional.avg_pool2d(difference, 3, 1, 1))


class Streak(nn.Module):
    """Logits that look far along rows, and nowhere else."""

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        difference = (before - after).abs().mean(dim=1, keepdim=True)
        return nn.functional.avg_pool2d(difference, (1, 65), 1, (0, 32))


class SmoothIndex(nn.Module):
    """Difference of a smoothed vegetation index, which is 0/0 around each pixel without observation."""

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        first, second = (
            nn.functional.avg_pool2d((x[:, 1:] - x[:, :1]) / (x[:, 1:] + x[:, :1]), 5, 1, 2) for x in (before, after)
        )
        return (first - second).abs() / 2


class Brightening(nn.Module):
    """A ratio that is no number where the bands' sum is negative."""

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return 1 - torch.exp(-(after.sum(1, keepdim=True).sqrt() - before.sum(1, keepdim=True).sqrt()).abs())


class Centred(nn.Module):
    """Logits that are centred over the whole block."""

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        difference = (before - after).abs().mean(dim=1, keepdim=True)
        return difference - difference.mean()


class Detected(nn.Module):
    """Numbers of classes."""

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return ((before - after).abs().mean(dim=1, keepdim=True) > 0.1).long()


class InPlace(Distance):
    """Writes to the date that it is given."""

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return super().forward(before.div_(2).mul_(2.5), after)


class Latest(Distance):
    """Looks at one date only."""

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.zeros_like(before), after)


class Percent(Distance):
    """Probability in percent."""

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return 100 * super().forward(before, after)


def exported(network: nn.Module, path: Path, largest: int = 2048) -> Path:
    """Export a network for blocks of 8 to 4 * `largest` pixels."""
    rows, cols = torch.export.Dim("rows", min=2, max=largest), torch.export.Dim("cols", min=2, max=largest)
    shape = {2: 4 * rows, 3: 4 * cols}
    example = (torch.zeros(1, 2, 16, 24), torch.ones(1, 2, 16, 24))
    torch.export.save(torch.export.export(network, example, dynamic_shapes=(shape, shape)), path)
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(Distance(), tmp_path_factory.mktemp("export") / "distance.pt2")


def described(program: Path, folder: Path, **fields: object) -> str:
    """Copy the program to `folder` with a description that differs in `fields`; None leaves a field out."""
    copy = folder / "mine.pt2"
    copy.write_bytes(program.read_bytes())
    description = {k: v for k, v in {**DESCRIPTION, **fields}.items() if v is not None}
    (folder / "mine.json").write_text(json.dumps(description))
    return str(copy)


def test_an_exported_program_is_a_model(program, tmp_path):
    model = load_model(described(program, tmp_path), device="cpu")
    assert (model.bands, model.stride, model.halo) == (("red", "nir"), 4, 4)
    rng = np.random.default_rng(0)
    before, after = rng.uniform(0, 0.4, (2, 2, 17, 19)).astype(np.float32)
    after[:, 3, 5] = np.nan
    result = model.predict(before, after)
    difference = np.abs(np.nan_to_num(before) - np.where(np.isnan(after), 0, after)).mean(axis=0)
    assert np.isnan(result[3, 5])
    expected = 1 - np.exp(-10 * difference[10:13, 10:13].mean())
    assert result[11, 11] == pytest.approx(expected, abs=1e-5)
    numbers = [np.nan_to_num(d * 10000 + 1000).astype(np.float32) for d in (before, after)]
    affine = model.affine(model.statistics(before), 1e-4, -0.1)
    a, b = (model.encode(n, affine, np.isfinite(after).all(axis=0)) for n in numbers)
    np.testing.assert_allclose(model.decode(a, b, 1.0)[8:, 8:], result[8:, 8:], atol=1e-4)


def test_a_relative_path_is_the_clients_wherever_workers_run(program, tmp_path, monkeypatch, make_series):
    described(program, tmp_path)
    scenes = make_series(dates=2)
    monkeypatch.chdir(tmp_path)
    with Client(n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        client.run(os.chdir, "/")
        config = s2cd.RunConfig(catalog="given", out="maps", model="mine.pt2", device="cpu", min_valid=0.0)
        assert [record.status for record in run(config, client, scenes=scenes).maps] == ["written"]
        change = s2cd.detect_changes(
            s2cd.open_cube(scenes), s2cd.consecutive_pairs(scenes), model="mine.pt2", device="cpu"
        )
        (item,) = s2cd.write_change_maps(change, "maps")
    assert item["properties"]["s2cd:model"] == "mine.pt2"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"halo": None}, "lacks 'halo'"),
        ({"halo": 6}, "a halo that is a multiple of it"),
        ({"stride": 3}, "even stride"),
        ({"bands": ["red", "ultraviolet"]}, "unknown band 'ultraviolet'"),
        ({"bands": ["red", "nir", "blue"]}, "fails on two dates"),
        ({"output": "maybe"}, "output is 'maybe'"),
        ({"output": ["x"]}, r"output is \['x'\]"),
        ({"scale": "much"}, "scale is 'much', expected int or float"),
        ({"scale": True}, "scale is True"),
        ({"scale": float("nan")}, "scale nan"),
        ({"scale": 1e-300}, "scale 1e-300"),
        ({"scale": 10**400}, "too large"),
        ({"halo": float("inf")}, "halo is inf, expected int"),
        ({"halo": 400000}, "halo 400000"),
        ({"halo": -4}, "halo -4"),
        ({"stride": 4.7}, "stride is 4.7"),
        ({"stride": 100000, "halo": 0}, "stride 100000"),
        ({"stride": 0}, "stride 0"),
        ({"bands": "red"}, "bands is 'red', expected list"),
        ({"bands": ["B04", "red"]}, "each once"),
        ({"bands": [3]}, "unknown band 3"),
    ],
)
def test_a_wrong_description_is_named(program, tmp_path, fields, message):
    with pytest.raises(ModelError, match=message) as caught:
        load_model(described(program, tmp_path, **fields), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("network", "fields", "message"),
    [
        (SmoothIndex(), {"scale": 1.0}, r"mine\.pt2 gives NaN at 24 of 511 pixels of two dates of random reflectance"),
        (Distance(), {"halo": 0}, r"mine\.pt2: results differ by up to 0\.\d+ between .* a halo of 0 pixels"),
        (Streak(), {"scale": 1.0, "output": "logits"}, r"results differ by up to .* a halo of 4 pixels"),
        (Centred(), {"scale": 1.0, "output": "logits"}, "what looks at the whole block, such as a mean, makes maps"),
        (InPlace(), {}, r"mine\.pt2 changes the dates that it is given, expected new tensors"),
        (Latest(), {}, r"mine\.pt2 gives the same whatever the first date shows"),
        (Percent(), {}, r"mine\.pt2 returns \d\.\d+ to 9\d\.\d, expected a probability, 0 to 1"),
        (Detected(), {"scale": 1.0, "output": "logits"}, r"returns torch\.int64 .*, expected torch\.float32"),
    ],
)
def test_a_network_that_would_give_wrong_maps_is_not_loaded(tmp_path, network, fields, message):
    with pytest.raises(ModelError, match=message) as caught:
        load_model(described(exported(network, tmp_path / "it.pt2"), tmp_path, **fields), device="cpu")
    assert "\n" not in str(caught.value)


def test_nan_where_both_dates_show_a_pixel_is_an_error(tmp_path):
    model = load_model(described(exported(Brightening(), tmp_path / "it.pt2"), tmp_path, scale=1.0), device="cpu")
    before, after = np.full((2, 2, 20, 24), 0.1, np.float32)
    before[:, 3, 4] = np.nan
    assert np.argwhere(np.isnan(model.predict(before, after))).tolist() == [[3, 4]]
    after[:, 15, 10:12] = -0.002
    message = r"mine\.pt2' gives NaN at 2 of 479 pixels that both dates show, expected a number"
    with pytest.raises(ModelError, match=message):
        model.predict(before, after)
    seen = [np.isfinite(date).all(axis=0) for date in (before, after)]
    dates = [model.encode(d, model.affine(model.statistics(d)), v) for d, v in zip((before, after), seen, strict=True)]
    for reasons in (False, True):
        with pytest.raises(ModelError, match=message):
            model.decode_codes(*dates, 1.0, reasons=reasons)
        codes = model.decode_codes(*dates, 1.0, (slice(0, 8), slice(0, 8)), reasons=reasons)
        assert np.argwhere(codes > CODE_SCALE).tolist() == [[3, 4]]


def test_a_block_too_large_for_the_program_is_named(tmp_path):
    path = described(exported(Distance(), tmp_path / "it.pt2", largest=16), tmp_path)
    dates = np.full((2, 2, 64, 68), 0.1, np.float32)
    assert load_model(path, device="cpu").predict(*dates[..., :64]).max() == 0
    with pytest.raises(
        ModelError, match=r"mine\.pt2 fails on .*\(1, 2, 64, 68\): .*Dim\(max=\.\.\.\).* --chunk"
    ) as caught:
        load_model(path, device="cpu").predict(*dates)
    assert "\n" not in str(caught.value)


def test_metadata_say_only_what_is_known(program, tmp_path):
    found = load_model(described(program, tmp_path, cost=5, architecture=["x"]), device="cpu").mlm()
    assert (found["mlm:architecture"], found["mlm:framework"]) == ("unknown", "pytorch")
    assert not {"mlm:total_parameters", "mlm:framework_version", "mlm:pretrained"} & set(found)
    for date in found["mlm:input"]:
        assert (date["bands"], date["input"]["shape"]) == (["red", "nir"], [-1, 2, -1, -1])
        assert date["value_scaling"] == [{"type": "scale", "value": 1e-4}]
        assert date["pre_processing_function"] is None
    onnx_distance(tmp_path / "mine.onnx")
    described(program, tmp_path, architecture="BIT", scale=1)
    found = load_model(str(tmp_path / "mine.onnx"), device="cpu").mlm()
    assert (found["mlm:architecture"], found["mlm:framework"]) == ("BIT", "ONNX")
    assert found["mlm:input"][0]["value_scaling"] is None


def test_a_program_that_is_exported_anew_is_loaded_anew(program, tmp_path):
    path, (before, after) = tmp_path / "mine.onnx", np.full((2, 2, 16, 16), 0.1, np.float32)
    after[:] = 0.2
    onnx_distance(path, minus_ten=-10.0)
    described(program, tmp_path)
    first = load_model(str(path), device="cpu")
    assert load_model(str(path), device="cpu") is first
    onnx_distance(path, minus_ten=-20.0)
    second = load_model(str(path), device="cpu")
    found = [model.predict(before, after)[8, 8] for model in (first, second)]
    assert found == pytest.approx([1 - np.exp(-1), 1 - np.exp(-2)], abs=1e-5)
    assert ModelRef(str(path), second.hash, "cpu").load() is second
    described(program, tmp_path, halo=8)
    assert load_model(str(path), device="cpu").halo == 8
    path.unlink()
    assert load_model(str(path), device="cpu").halo == 8


def onnx_distance(path: Path, bands: int = 2, minus_ten: float = -10.0) -> None:
    """`Distance`, written as an ONNX network."""
    image = ["n", bands, "rows", "cols"]
    constants = {"thousands": 10000.0, "minus_ten": minus_ten, "one": 1.0}
    nodes = [
        helper.make_node("Sub", ["before", "after"], ["difference"]),
        helper.make_node("Abs", ["difference"], ["distance"]),
        helper.make_node("ReduceMean", ["distance", "axis"], ["mean"], keepdims=1),
        helper.make_node("Div", ["mean", "thousands"], ["reflectance"]),
        helper.make_node(
            "AveragePool", ["reflectance"], ["smooth"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1
        ),
        helper.make_node("Mul", ["smooth", "minus_ten"], ["exponent"]),
        helper.make_node("Exp", ["exponent"], ["same"]),
        helper.make_node("Sub", ["one", "same"], ["change"]),
    ]
    graph = helper.make_graph(
        nodes,
        "distance",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, image) for name in ("before", "after")],
        [helper.make_tensor_value_info("change", TensorProto.FLOAT, ["n", 1, "rows", "cols"])],
        [
            helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
            *(helper.make_tensor(name, TensorProto.FLOAT, [], [value]) for name, value in constants.items()),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def test_an_onnx_network_gives_the_maps_of_the_same_program(program, tmp_path, make_series):
    onnx_distance(tmp_path / "mine.onnx")
    torch_path, onnx_path = described(program, tmp_path), str(tmp_path / "mine.onnx")
    rng = np.random.default_rng(1)
    before, after = rng.uniform(0, 0.4, (2, 2, 33, 21)).astype(np.float32)
    after[:, 3, 5] = np.nan
    results = [load_model(path, device="cpu").predict(before, after) for path in (torch_path, onnx_path)]
    np.testing.assert_allclose(*results, atol=1e-4)
    scenes = make_series(dates=3, shape=(101, 133))
    cube, pairs = s2cd.open_cube(scenes, chunk=64), s2cd.consecutive_pairs(scenes)
    maps = [s2cd.detect_changes(cube, pairs, model=path, device="cpu").values for path in (torch_path, onnx_path)]
    assert maps[0].max() > 0.5
    np.testing.assert_allclose(*maps, atol=1e-4)


def test_an_onnx_network_that_does_not_fit_is_named(program, tmp_path, monkeypatch):
    described(program, tmp_path)
    path = tmp_path / "mine.onnx"
    onnx_distance(path, bands=3)
    with pytest.raises(ModelError, match=r"mine\.onnx fails on two dates"):
        load_model(str(path), device="cpu")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"cannot load mine\.onnx"):
        load_model(str(path), device="cpu")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "one", [value], [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])
    ])  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    with pytest.raises(ModelError, match=r"takes \['x'\] and returns \['y'\], expected two dates and one image"):
        load_model(str(path), device="cpu")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r"needs onnxruntime, which is not installed: pip install -e '\.\[onnx\]'"):
        load_model(str(path), device="cpu")


def test_missing_or_damaged_files_are_named(program, tmp_path):
    path = described(program, tmp_path)
    Path(path).write_bytes(program.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"cannot load mine\.pt2"):
        load_model(path, device="cpu")
    (tmp_path / "mine.json").unlink()
    with pytest.raises(ModelError, match=r"cannot read mine\.json"):
        load_model(path, device="cpu")


class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path):
        self._folder = str(folder)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self._folder,)


def pickled(thing: object) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def rewritten(program: Path, folder: Path, changes: dict[str, bytes], added: dict[str, bytes] | None = None) -> str:
    """Copy the program to `folder` with other members: changes by the ends of their names, and some more."""
    path = described(program, folder)
    with zipfile.ZipFile(program) as given, zipfile.ZipFile(path, "w") as archive:
        for name in given.namelist():
            archive.writestr(name, next((v for end, v in changes.items() if name.endswith(end)), given.read(name)))
        for name, content in (added or {}).items():
            archive.writestr(f"{given.namelist()[0].split('/')[0]}/{name}", content)
    return path


def listed(path: str, *, use_pickle: object) -> bytes:
    return json.dumps({"config": {"x": {"path_name": path, "is_param": False, "use_pickle": use_pickle}}}).encode()


def test_an_archive_that_could_run_code_is_refused_before_torch_reads_it(program, tmp_path):
    evil = pickled(((Evil(tmp_path / "run"),), {}))
    samples, weights, constants = "sample_inputs/model.pt", "weights_config.json", "constants_config.json"
    for message, changes, added in (
        (f"data/{samples} holds a pickled object", {samples: evil}, {}),
        ("data/weights/model.pt holds a pickled object", {}, {"data/weights/model.pt": evil}),
        ("data/constants/MODEL.PT holds a pickled object", {}, {"data/constants/MODEL.PT": evil}),
        ("lists a pickled object", {weights: listed("weight_0", use_pickle=True)}, {"data/weights/weight_0": evil}),
        ("lists a pickled object", {constants: listed("tensor_0", use_pickle=1)}, {"data/constants/tensor_0": evil}),
        ("custom_obj_0 is an object or", {}, {"data/constants/custom_obj_0": evil}),
        ("opaque_obj_0 is an object or", {}, {"data/constants/opaque_obj_0": evil}),
        (r"x\.so is an object or a compiled library", {}, {"data/aotinductor/model/x.so": b""}),
        ("two files of one name", {}, {"data/SAMPLE_inputs/model.pt": evil}),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            load_model(rewritten(program, tmp_path, changes, added), device="cpu")
        assert "\n" not in str(caught.value)
    path = described(program, tmp_path)
    with zipfile.ZipFile(path, "w") as archive:  # as torch wrote it before 2.8
        archive.writestr("version", "8.8")
        archive.writestr("serialized_state_dict.json", evil)
    with pytest.raises(ModelError, match=r"serialized_state_dict\.json holds a pickled object"):
        load_model(path, device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_program_with_weights_and_constants_is_plain(tmp_path):
    class Weighted(Distance):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.constant = nn.Parameter(torch.ones(1, 2, 1, 1)), torch.ones(1, 2, 1, 1)

        def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
            return super().forward(before * self.weight, after * self.constant)

    path = exported(Weighted(), tmp_path / "it.pt2")
    with zipfile.ZipFile(path) as archive:
        assert any(name.endswith("weights/weight_0") for name in archive.namelist())
    before, after = np.full((2, 2, 16, 16), 0.1, np.float32)
    after[:] = 0.2
    found = load_model(described(path, tmp_path), device="cpu").predict(before, after)[8, 8]
    assert found == pytest.approx(1 - np.exp(-1), abs=1e-5)


def test_a_worker_looks_at_no_other_program_than_the_clients(program, tmp_path):
    path = rewritten(program, tmp_path, {"sample_inputs/model.pt": pickled(((Evil(tmp_path / "run"),), {}))})
    with pytest.raises(ModelError, match=r"mine\.pt2' has weights \w{12} on this worker, expected aaaaaaaaaaaa$"):
        ModelRef(path, "a" * 64, "cpu").load()
    assert not (tmp_path / "run").exists()
    model = load_model(described(program, tmp_path), device="cpu")
    with pytest.raises(ModelError, match=f"has weights {model.hash[:12]} on this worker, expected aaaaaaaaaaaa$"):
        ModelRef(path, "a" * 64, "cpu").load()
    assert ModelRef(path, model.hash, "cpu").load() is model
