"""The notebook runs from top to bottom, and is kept without outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks need the extra s2cd[notebook]")
nbclient = pytest.importorskip("nbclient", reason="notebooks need the extra s2cd[notebook]")

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "change_detection.ipynb"


def test_notebook_is_kept_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_notebook_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    parameters.source += "\nSIZE, DATES = 192, 4"
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert len(list((tmp_path / "notebook" / "maps").rglob("S2CD_*.tif"))) == 3
    shown = [o for c in notebook.cells for o in c.get("outputs", []) if o.output_type == "display_data"]
    assert sum("image/png" in o.data for o in shown) == 2
