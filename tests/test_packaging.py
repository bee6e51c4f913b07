"""What users install: conda and pip agree, pins satisfy ranges, the public surface is there, imports point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import s2cd

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch", "isal": "python-isal"}
CONDA_EXTRAS = ("hpc", "notebook")


def requirements():
    extras = PROJECT["optional-dependencies"]
    listed = [*PROJECT["dependencies"], *(r for e in CONDA_EXTRAS for r in extras[e])]
    return [Requirement(r) for r in listed]


def test_environment_yml_equals_pyproject():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    found = {Requirement(d).name: str(Requirement(d).specifier) for d in listed if isinstance(d, str)}
    python = found.pop("python")
    assert python.split(",")[-1] == PROJECT["requires-python"]
    assert found.pop("pip") == ""
    assert found == {CONDA_NAMES.get(r.name, r.name): str(r.specifier) for r in requirements()}


def test_constraints_pin_every_requirement_within_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(n): v for n, v in (x.split("==") for x in lines if not x.startswith("#"))}
    tests = [Requirement(r) for r in PROJECT["optional-dependencies"]["test"]]
    for requirement in [*requirements(), *tests]:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_type_checkers_find_the_package_and_errors_need_no_import_of_their_own(tmp_path):
    """They look along sys.path, not for what an import hook finds."""
    code = "import pathlib, sys, s2cd; s2cd.errors.GridError; print(*sys.path, sep='\\n')"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert any(Path(folder, "s2cd", "py.typed").is_file() for folder in found.stdout.splitlines())


def test_dask_range_admits_what_dask_cuda_pins():
    (dask,) = (r for r in requirements() if r.name == "dask")
    assert dask.specifier.contains("2026.7.1")


def test_the_cuda_extra_is_for_the_cuda_that_torch_is_built_for():
    extra = {r.name: r for r in map(Requirement, PROJECT["optional-dependencies"]["cuda"])}
    assert extra.keys() == {"cupy-cuda13x", "dask-cuda", "nvidia-libnvcomp-cu13", "torch"}
    assert extra["dask-cuda"].extras == {"cu13"}
    assert not extra["torch"].specifier.contains("2.10.0")  # on PyPI the last one for CUDA 12
    (pinned,) = (x for x in (ROOT / "constraints.txt").read_text().splitlines() if x.startswith("torch=="))
    assert extra["torch"].specifier.contains(pinned.removeprefix("torch=="))


@pytest.mark.parametrize("name", s2cd.__all__)
def test_public_names_exist(name):
    assert callable(getattr(s2cd, name)) or name == "errors"


def test_help_does_not_load_torch():
    code = "import sys, s2cd.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_planning_does_not_load_numba():
    code = (
        "import sys, s2cd.plan, s2cd.runner; s2cd.load_model(device='cpu').feature_bytes; "
        "sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


FORBIDDEN = {
    "catalog": {"dask", "distributed", "xarray", "torch", "s2cd.runner", "s2cd.cli", "s2cd.cube"},
    "pairs.py": {"dask", "distributed", "xarray", "torch", "s2cd.runner", "s2cd.cli"},
    "radiometry.py": {"dask", "distributed", "xarray", "torch", "s2cd.runner", "s2cd.cli"},
    "model": {"xarray", "rasterio", "dask", "distributed", "s2cd.runner", "s2cd.cli", "s2cd.training", "s2cd.outputs"},
    "outputs": {"dask", "distributed", "torch", "s2cd.runner", "s2cd.cli"},
    "inference.py": {"torch", "s2cd.runner", "s2cd.cli", "s2cd.training"},
    "runner.py": {"torch", "s2cd.cli", "s2cd.training"},
}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_point_one_way(room):
    path = ROOT / "s2cd" / room
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            for name in names:
                for forbidden in FORBIDDEN[room]:
                    assert not f"{name}.".startswith(f"{forbidden}."), f"{file.name}: {name}"
