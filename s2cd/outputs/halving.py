"""The means of four codes, compiled."""

from __future__ import annotations

from typing import Any

import numpy as np

from s2cd.jit import compiled


@compiled()
def halve(codes: Any, nodata: Any, out: Any) -> None:
    """Write into out (y, x) the mean of the observed ones of each four codes, `nodata` where there are none."""
    rows, columns = codes.shape
    pairs = columns // 2
    for i in range(out.shape[0]):
        upper, lower = codes[2 * i], codes[min(2 * i + 1, rows - 1)]
        line = out[i]
        whole = 2 * i + 1 < rows
        for j in range(pairs):
            a, b, c, d = upper[2 * j], upper[2 * j + 1], lower[2 * j], lower[2 * j + 1]
            line[j] = _mean(a, b, c if whole else nodata, d if whole else nodata, nodata)
        if columns % 2:
            line[pairs] = _mean(upper[-1], nodata, lower[-1] if whole else nodata, nodata, nodata)


@compiled()
def _mean(a: Any, b: Any, c: Any, d: Any, nodata: Any) -> Any:
    total, count = np.uint32(0), np.uint32(0)
    for code in (a, b, c, d):
        observed = code != nodata
        total += np.uint32(code) * np.uint32(observed)
        count += np.uint32(observed)
    return nodata if count == 0 else np.uint16((total + count // 2) // count)
