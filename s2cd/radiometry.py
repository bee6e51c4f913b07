"""Digital numbers to reflectance, and whether two dates agree on it. NumPy in, NumPy out."""

from __future__ import annotations

import warnings

import numpy as np

from s2cd.errors import OffsetError, OffsetWarning

SCALE = 1e-4
RADIO_ADD_OFFSET = -0.1
FIRST_BASELINE_WITH_OFFSET = (4, 0)
# Scales that digital numbers can have: others are what a program writes that knows none, such as the 1 of rio-stac.
SCALES = (1e-5, 1e-3)
LARGEST_OFFSET = 0.2  # of reflectance: what is beyond is stated in digital numbers, or wrong

# How evenly over the bands, and how close to RADIO_ADD_OFFSET, dark pixels must move to tell of a lost
# offset.
UNIFORM_WITHIN = 0.035
SIZED_WITHIN = 0.035
# No surface is this dark: so low a median over the bands means an offset subtracted twice.
BELOW_ZERO = -0.03


def resolve(
    *,
    level: str,
    baseline: str | None,
    stated_scale: float | None = None,
    stated_offset: float | None = None,
    offset_applied: bool | None = None,
    whole_numbers: bool = False,
) -> tuple[float, float, str]:
    """Decide scale and offset of a reflectance asset: reflectance = scale * digital number + offset.

    Since processing baseline 04.00 (January 2022, and every reprocessing since) ESA adds 1000 to the digital
    numbers, RADIO_ADD_OFFSET for L1C and BOA_ADD_OFFSET for L2A. The baseline is the test and the sensing
    date is none, because old dates are reprocessed.

    Args:
        level: "L1C" or "L2A".
        baseline: processing baseline "05.11", or None if nothing states it.
        stated_scale, stated_offset: what the document says of the asset (`raster:bands`, `raster:offset`).
        offset_applied: Earth Search's `boa_offset_applied`: True if the provider took the offset out of the
            pixels.
        whole_numbers: whether the document says that pixels are integers. A scale that these cannot have counts as
            not stated, and so does the offset beside it. Where pixels may be reflectance already, as the scale 1
            says, an offset that is not stated is none.

    Returns (scale, offset, reason).
    """
    note = ""
    if stated_scale and stated_offset is None and not whole_numbers and not is_scale_of_numbers(stated_scale):
        return float(stated_scale), 0.0, f"reflectance of scale {stated_scale:g}, the document states no offset"
    if whole_numbers and stated_scale and not is_scale_of_numbers(stated_scale):
        note = f"; the stated scale {stated_scale:g} is none of digital numbers"
        stated_scale = stated_offset = None
    offset, reason = _resolve_offset(level, baseline, stated_offset, offset_applied)
    return float(stated_scale or SCALE), offset, reason + note


def is_scale_of_numbers(scale: float) -> bool:
    """Tell whether digital numbers can have a scale, about `SCALE`."""
    return SCALES[0] <= scale <= SCALES[1]


def _resolve_offset(level: str, baseline: str | None, stated: float | None, applied: bool | None) -> tuple[float, str]:
    if applied and level == "L2A":
        return 0.0, "provider has applied the offset to the pixels (boa_offset_applied)"
    since_04 = None if baseline is None else _number(baseline) >= FIRST_BASELINE_WITH_OFFSET
    if since_04 is False:
        contradicts = f"; the stated {stated:g} is not possible there" if stated else ""
        return 0.0, f"baseline {baseline} is before 04.00, which has no offset{contradicts}"
    if stated is not None and not (applied is False and since_04 and stated == 0):
        return float(stated), f"stated by the document ({_says(baseline)})"
    if since_04:
        return RADIO_ADD_OFFSET, f"baseline {baseline} has the offset, the document states none"
    return 0.0, "neither offset nor baseline is stated, none assumed"


def _says(baseline: str | None) -> str:
    return "no baseline" if baseline is None else f"baseline {baseline}"


def _number(baseline: str) -> tuple[int, int]:
    major, minor = baseline.split(".")
    return int(major), int(minor)


def reflectance(dn: np.ndarray, scale: float, offset: float, nodata: int = 0) -> np.ndarray:
    """Convert digital numbers to reflectance: `scale * dn + offset`, NaN where `dn` is `nodata`.

    Takes any shape of any integer dtype; returns float32 of that shape, clipped nowhere.
    """
    result = dn.astype(np.float32)
    result *= np.float32(scale)
    result += np.float32(offset)
    result[dn == nodata] = np.nan
    return result


def offset_difference(dark_before: np.ndarray, dark_after: np.ndarray) -> float | None:
    """Find an offset that was applied to one date of a pair only.

    The darkest valid pixels of a scene (deep water, shadow) reflect almost nothing in every band, on both
    dates. An offset applied to one date only moves them all by the same 0.1; haze moves blue far more than
    short-wave infrared. An offset subtracted twice also leaves them below zero.

    Args:
        dark_before, dark_after: a low percentile (0.1 to 1 %) of the valid reflectance, one number per band,
            the same bands in the same order, NaN where a band has none.

    Returns the offset of the later date against the earlier one where it looks like a lost or doubled
    RADIO_ADD_OFFSET, else None.
    """
    before, after = np.asarray(dark_before, dtype=float), np.asarray(dark_after, dtype=float)
    known = np.isfinite(before) & np.isfinite(after)
    if not known.any():
        return None
    step = (after - before)[known]
    centre = float(np.median(step))
    uniform = np.abs(step - centre).max() <= UNIFORM_WITHIN
    sized = abs(abs(centre) + RADIO_ADD_OFFSET) <= SIZED_WITHIN
    levels = sorted(float(np.median(dark[known])) for dark in (before, after))
    impossible = levels[0] < BELOW_ZERO <= levels[1]
    return centre if (uniform and sized) or impossible else None


def check_offsets(dark_before: np.ndarray, dark_after: np.ndarray, what: str, *, strict: bool = False) -> float | None:
    """Warn (OffsetWarning) or, if `strict`, raise OffsetError where pixels contradict the offsets of a pair.

    `what` names the pair; the other arguments and the result are those of `offset_difference`.
    """
    found = offset_difference(dark_before, dark_after)
    if found is not None:
        message = (
            f"{what}: the darkest valid pixels differ by {found:+.3f} in every band, expected about 0: "
            f"an offset of {RADIO_ADD_OFFSET:g} was applied to one date only"
        )
        if strict:
            raise OffsetError(message)
        warnings.warn(message, OffsetWarning, stacklevel=2)
    return found
