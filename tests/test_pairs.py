"""Pairs: consecutive, within a tile and orbit, with reasons for what is left out."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2cd.catalog.scene import Asset, Grid, Scene
from s2cd.errors import BaselineWarning, ConfigError, GridError, LevelWarning, OrbitWarning
from s2cd.pairs import Pair, consecutive_pairs

GRID = Grid(32631, (10.0, 0.0, 499980.0, 0.0, -10.0, 5700000.0), (64, 64))
FOOTPRINT = {"type": "Polygon", "coordinates": [[[3, 50], [4, 50], [4, 51], [3, 51], [3, 50]]]}


def scene(day, *, orbit=51, tile="31UDS", cloud=0.0, baseline="05.09", grid=GRID):
    time = datetime(2023, 1, 1, 10, 50, (orbit or 0) % 60, tzinfo=UTC) + timedelta(days=day)
    asset = Asset("red", f"{tile}-{day}.tif", grid, 1e-4, 0.0, "test")
    return Scene(
        f"S2_{tile}_{orbit}_{day:03d}", "static", "test", "L2A", tile, orbit, time, "sentinel-2a", baseline,
        cloud, None, FOOTPRINT, {"red": asset},
    )  # fmt: skip


@given(
    st.lists(
        st.tuples(st.integers(0, 300), st.sampled_from([51, 94]), st.sampled_from(["31UDS", "31UES"])),
        unique=True,
        max_size=30,
    )
)
def test_every_pair_is_consecutive_in_one_tile_and_orbit(keys):
    scenes = [scene(day, orbit=orbit, tile=tile) for day, orbit, tile in keys]
    pairs = consecutive_pairs(scenes)
    groups = {
        (s.tile, s.orbit): sorted(x.time for x in scenes if (x.tile, x.orbit) == (s.tile, s.orbit)) for s in scenes
    }
    assert len(pairs) == sum(len(times) - 1 for times in groups.values())
    for pair in pairs:
        assert (pair.before.tile, pair.before.orbit) == (pair.after.tile, pair.after.orbit)
        times = groups[(pair.tile, pair.after.orbit)]
        assert times.index(pair.after.time) == times.index(pair.before.time) + 1


def test_left_out_scenes_and_pairs_have_reasons():
    scenes = [scene(0), scene(5, cloud=80.0), scene(10), scene(15), scene(90), scene(3, orbit=94)]
    scenes.append(scene(20))
    fractions = {scenes[3].id: 0.2, scenes[-1].id: math.nan}
    pairs = consecutive_pairs(scenes, max_cloud=60, max_gap_days=30, min_valid=0.5, valid_fractions=fractions)
    assert [pair.name for pair in pairs] == ["S2CD_31UDS_R051_20230101T105051_20230111T105051"]
    reasons = {item.what: item.reason for item in pairs.left_out}
    assert reasons == {
        "S2_31UDS_51_005": "cloud cover 80.0 % above 60 %",
        "S2_31UDS_51_015": "valid fraction 0.200 below 0.5",
        "S2_31UDS_51_020": "valid fraction nan is no number",
        "S2_31UDS_94_003": "the only date left of its tile and orbit",
        "S2CD_31UDS_R051_20230111T105051_20230401T105051": "80.0 days apart, more than 30",
    }


def test_limits_are_the_last_that_pass():
    scenes = [scene(0, cloud=60.0), scene(30)]
    fractions = dict.fromkeys((s.id for s in scenes), 0.5)
    limits = {"max_cloud": 60, "max_gap_days": 30, "min_valid": 0.5, "valid_fractions": fractions}
    assert len(consecutive_pairs(scenes, **limits)) == 1


def test_time_orders_dates_and_not_their_ids():
    """Those of two satellites: S2B may come before S2A, and names of other catalogues tell no time at all."""
    scenes = [replace(scene(day), id=name) for day, name in ((0, "c"), (5, "a"), (10, "b"))]
    assert [(p.before.id, p.after.id) for p in consecutive_pairs(scenes[::-1])] == [("c", "a"), ("a", "b")]


def test_unknown_orbit_is_its_own_field_of_view():
    with pytest.warns(OrbitWarning, match="_000 and .*_005: relative orbits unknown: where viewing angles differ"):
        (pair,) = consecutive_pairs([scene(0, orbit=None), scene(5, orbit=None), scene(7)])
    assert (pair.orbit, pair.notes) == ("R000", ("relative orbits unknown",))


def test_pairs_across_orbits_only_when_asked_and_with_a_warning():
    scenes = [scene(0), scene(3, orbit=94)]
    assert not consecutive_pairs(scenes)
    with pytest.warns(OrbitWarning, match="relative orbits differ: 51 and 94: where viewing angles differ, shadows"):
        (pair,) = consecutive_pairs(scenes, orbit="any")
    assert pair.orbit == "R051-094"
    assert pair.notes == ("relative orbits differ: 51 and 94",)


def test_mixed_baselines_are_said():
    with pytest.warns(BaselineWarning, match=r"02\.14 and 05\.09"):
        (pair,) = consecutive_pairs([scene(0, baseline="02.14"), scene(5)])
    assert pair.notes == ("processing baselines differ: 02.14 and 05.09",)


def test_mixed_levels_are_said():
    with pytest.warns(LevelWarning, match="processing levels differ: L1C and L2A: the atmosphere is"):
        (pair,) = consecutive_pairs([replace(scene(0), level="L1C"), scene(5)])
    assert pair.notes == ("processing levels differ: L1C and L2A",)


def test_a_pair_prefers_equal_baselines_and_says_which_date_stepped_back():
    """Newest 05.09, 02.14, 05.09, 05.09; the first and third exist in 02.14 as well."""
    scenes = [scene(0), scene(5, baseline="02.14"), scene(10), scene(15)]
    for index in (0, 2):
        old = replace(scenes[index], id=f"{scenes[index].id}_old", baseline="02.14")
        scenes[index] = replace(scenes[index], editions=(old,))
    with warnings.catch_warnings(action="error"):
        pairs = consecutive_pairs(scenes)
    assert [(p.before.id, p.after.id) for p in pairs] == [
        ("S2_31UDS_51_000_old", "S2_31UDS_51_005"),
        ("S2_31UDS_51_005", "S2_31UDS_51_010_old"),
        ("S2_31UDS_51_010", "S2_31UDS_51_015"),
    ]
    assert pairs[0].notes == (
        "S2_31UDS_51_000_old of baseline 02.14 stands for S2_31UDS_51_000: the other date has no 05.09",
    )
    assert pairs[2].notes == ()


def test_two_crs_in_one_tile_are_refused():
    other = replace(GRID, epsg=32632)
    with pytest.raises(GridError, match=r"tile 31UDS: S2_31UDS_51_000 lies on EPSG:32631 .* EPSG:32632"):
        consecutive_pairs([scene(0), scene(5, grid=other)])


def test_no_scene_gives_no_pair():
    assert consecutive_pairs([]) == []


def test_name_and_gap():
    pair = Pair(scene(0), scene(5))
    assert pair.gap_days == 5
    assert pair.name == "S2CD_31UDS_R051_20230101T105051_20230106T105051"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orbit": 51}, "orbit: found 51, expected 'same' or 'any'"),
        ({"max_cloud": float("nan")}, "max_cloud: found nan, expected a number"),
        ({"max_gap_days": "30"}, "max_gap_days: found '30', expected a number"),
        ({"min_valid": 0.5}, "min_valid: found 0.5 without valid_fractions"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        consecutive_pairs([scene(0), scene(5)], **options)


def test_some_of_the_pairs_are_a_list_of_pairs():
    pairs = consecutive_pairs([scene(day) for day in (0, 5, 10, 15)])
    assert pairs[1:].scenes == pairs.scenes[1:]
    assert pairs[-1] == list(pairs)[-1]
