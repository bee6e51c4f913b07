"""A picture of one map: before, after and the probability of change side by side."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MAX_PIXELS = 1024
GAP = 4
LABEL_HEIGHT = 16
HATCH = 6
BACKGROUND = (255, 255, 255)

# Anchors of matplotlib's "inferno" (van der Walt and Smith, CC0): perceptually uniform, dark to bright.
_INFERNO = np.array(
    [
        (0, 0, 4), (22, 11, 57), (66, 10, 104), (106, 23, 110), (147, 38, 103), (188, 55, 84),
        (221, 81, 58), (243, 120, 25), (252, 165, 10), (246, 215, 70), (252, 255, 164),
    ],
    np.float32,
)  # fmt: skip


def paint_probability(probability: np.ndarray, backdrop: np.ndarray | None = None) -> np.ndarray:
    """Return uint8 (y, x, 3): the probability in colour, hatched where there is no observation.

    probability  float32 (y, x) in [0, 1], NaN = no observation
    backdrop     uint8 (y, x, 3): its grey shows through where the probability is low; without one low is dark
    """
    missing = np.isnan(probability)
    value = np.where(missing, 0, probability)[..., None]
    colour = _colour(value[..., 0])
    if backdrop is not None:
        grey = 90 + 0.55 * (backdrop @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
        opacity = np.clip(value * 2, 0, 1)
        colour = opacity * colour + (1 - opacity) * grey
    return _hatched(colour.astype(np.uint8), missing)


def side_by_side(panels: Mapping[str, np.ndarray | None], max_pixels: int | None = None) -> Image.Image:
    """Put labelled panels, uint8 (y, x, 3), beside one another; those that are None are left out.

    All panels are brought to the size of the largest, and the picture to at most `max_pixels` along either side.
    """
    shown = {label: panel for label, panel in panels.items() if panel is not None}
    height, width = max((panel.shape[:2] for panel in shown.values()), key=lambda s: s[0] * s[1])
    if max_pixels is not None:
        fit = min((max_pixels - GAP * (len(shown) - 1)) / len(shown) / width, (max_pixels - LABEL_HEIGHT) / height)
        width, height = max(1, int(width * fit)), max(1, int(height * fit))
    total = len(shown) * (width + GAP) - GAP
    picture = Image.new("RGB", (total, height + LABEL_HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for position, (label, panel) in enumerate(shown.items()):
        left = position * (width + GAP)
        picture.paste(_resized(panel, width, height), (left, LABEL_HEIGHT))
        draw.text((left + 2, 1), _fitted(label, width), fill=(0, 0, 0), font=_font())
    return picture


def quicklook(
    probability: np.ndarray,
    before: np.ndarray | None,
    after: np.ndarray | None,
    labels: tuple[str, str, str],
) -> bytes:
    """Return a PNG of at most 1024 px: before | after | probability.

    probability    float32 (y, x) of any size, NaN = no observation
    before, after  uint8 (y, x, 3), black where unobserved; None leaves the panel out
    labels         what stands over the three panels
    """
    backdrop = None
    if after is not None:
        rows, columns = probability.shape
        backdrop = np.asarray(Image.fromarray(after).resize((columns, rows), Image.Resampling.BILINEAR))
    panels = {
        labels[0]: None if before is None else _hatched(before, (before == 0).all(axis=-1)),
        labels[1]: None if after is None else _hatched(after, (after == 0).all(axis=-1)),
        labels[2]: paint_probability(probability, backdrop),
    }
    png = BytesIO()
    side_by_side(panels, MAX_PIXELS).save(png, "PNG")
    return png.getvalue()


def _colour(value: np.ndarray) -> np.ndarray:
    position = np.linspace(0, 1, len(_INFERNO))
    return np.stack([np.interp(value, position, channel) for channel in _INFERNO.T], axis=-1)


def _hatched(rgb: np.ndarray, missing: np.ndarray) -> np.ndarray:
    y, x = np.ogrid[: missing.shape[0], : missing.shape[1]]
    stripes = np.where((x + y) % HATCH < 2, 150, 215)[..., None]
    return np.where(missing[..., None], stripes, rgb).astype(np.uint8)


def _resized(panel: np.ndarray, width: int, height: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(panel))
    shrinks = width < image.width
    return image.resize((width, height), Image.Resampling.BOX if shrinks else Image.Resampling.NEAREST)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=11)


def _fitted(label: str, width: int) -> str:
    """Cut a label to the width of its panel."""
    while label and _font().getlength(label) > width - 2:
        label = label[:-1]
    return label
