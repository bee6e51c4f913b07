"""Pictures of maps."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from s2cd.outputs.quicklook import MAX_PIXELS, paint_probability, quicklook, side_by_side

LABELS = ("before 2023-01-02", "after 2023-02-03", "change, generic")


def opened(png: bytes) -> Image.Image:
    return Image.open(BytesIO(png))


@pytest.mark.parametrize("shape", [(1, 1), (17, 19), (343, 343), (1000, 40), (40, 1000)], ids=str)
@pytest.mark.parametrize("with_rgb", [True, False])
def test_picture_is_never_larger_than_it_may_be(shape, with_rgb):
    rng = np.random.default_rng(0)
    probability = rng.random(shape, dtype=np.float32)
    rgb = rng.integers(0, 255, (*shape, 3), dtype=np.uint8) if with_rgb else None
    image = opened(quicklook(probability, rgb, rgb, LABELS))
    assert image.format == "PNG"
    assert max(image.size) <= MAX_PIXELS


def test_panels_stand_side_by_side_with_their_colours():
    red, blue = (np.full((200, 200, 3), c, np.uint8) for c in ((255, 0, 0), (0, 0, 255)))
    image = side_by_side({"a": red, "b": None, "c": blue})
    assert image.size[0] == pytest.approx(400, abs=8)
    assert image.getpixel((100, 120)) == (255, 0, 0)
    assert image.getpixel((310, 120)) == (0, 0, 255)


def test_high_probability_is_bright_and_low_shows_the_ground():
    backdrop = np.full((10, 10, 3), 100, np.uint8)
    probability = np.zeros((10, 10), np.float32)
    probability[5:] = 1
    painted = paint_probability(probability, backdrop)
    low, high = painted[0, 0].astype(int), painted[9, 9].astype(int)
    assert np.ptp(low) <= 1  # grey
    assert high[0] - high[2] > 50  # yellow


def test_no_observation_is_hatched_not_coloured():
    probability = np.full((24, 24), np.nan, np.float32)
    painted = paint_probability(probability)
    assert len(np.unique(painted.reshape(-1, 3), axis=0)) == 2
    assert np.ptp(painted, axis=-1).max() == 0
