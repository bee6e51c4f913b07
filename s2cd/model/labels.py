"""What a labelled array, such as xarray's, tells of its bands and its grid: plain arrays tell nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from s2cd.errors import ModelError

SAME = 0.01  # of a pixel, by which the grids of two dates may differ


def band_names(date: Any) -> list[str]:
    """Return the bands of a date by `band` or else by its first axis; none where these have no names."""
    coordinates = getattr(date, "coords", {})
    axis = "band" if "band" in coordinates else (*_axes(date), "")[0]
    labels = np.atleast_1d(coordinates.get(axis, ()))
    names = [str(label) for label in labels] if labels.dtype.kind in "OU" else []
    return [] if all(map(str.isdigit, names)) else names


def require_bands_first(name: str, date: Any) -> None:
    """Raise ModelError, for the model `name`, if a date has a dimension `band` that is not its first."""
    axes = _axes(date)
    if "band" in axes[1:]:
        raise ModelError(f"model {name!r} takes (band, y, x), found {axes}")


def require_alike(name: str, before: Any, after: Any) -> None:
    """Raise ModelError, for the model `name`, unless the rows and columns of two dates are the same."""
    if not (_axes(before) and _axes(after)):
        return
    (_, *rest), (_, *others) = _axes(before), _axes(after)
    if rest != others:
        raise ModelError(f"model {name!r} compares dates of the same axes, found {_axes(before)} and {_axes(after)}")
    for axis in rest:
        if axis in before.coords and axis in after.coords and before.sizes[axis] == after.sizes[axis]:
            _require_same(name, axis, *(np.asarray(date.coords[axis], np.float64) for date in (before, after)))


def _require_same(name: str, axis: str, first: np.ndarray, second: np.ndarray) -> None:
    pixel = abs(first[-1] - first[0]) / max(1, len(first) - 1)
    if not np.allclose(first, second, rtol=0, atol=SAME * pixel):
        raise ModelError(
            f"model {name!r} compares dates of one grid, found {axis} from {first[0]:.10g} to {first[-1]:.10g} and "
            f"from {second[0]:.10g} to {second[-1]:.10g}"
        )


def _axes(date: Any) -> tuple[str, ...]:
    """Return the names of an array's axes; none where it has none, as of a dataset."""
    axes = getattr(date, "dims", ())
    return axes if isinstance(axes, tuple) and hasattr(date, "coords") else ()
