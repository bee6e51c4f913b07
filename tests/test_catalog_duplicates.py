"""Reprocessings are one date, split datatakes are one date, and neither is taken for the other."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine

from s2cd.catalog import freeze, scene_from_item, search
from s2cd.catalog.duplicates import cloud_cover, reduce_duplicates
from s2cd.catalog.scene import Asset, Grid, Scene
from s2cd.catalog.static import read_document
from s2cd.errors import BaselineWarning
from s2cd.pairs import consecutive_pairs, select_scenes
from s2cd.reader import band_source, read_window


@pytest.fixture
def page(shared_data: Path) -> list[dict[str, Any]]:
    """Recorded answer of Earth Search: four tiles, two dates, each in baselines 02.14 and 05.00."""
    folder = shared_data / "stac" / "earth-search"
    names = ("search_10items_548f14c6.json", "search_6items_2e87fb9b.json")
    return [item for name in names for item in read_document(str(folder / name))["features"]]


def halves(item: dict[str, Any], at: float = 0.4, gap: int = 14, overlap: float = 0.1) -> list[dict[str, Any]]:
    """Split an item's product as two ground stations do: two datastrips of one datatake, which overlap."""
    west, south, east, north = item["bbox"]
    middle = north - at * (north - south)
    both = overlap * (north - south)
    strip = item["properties"]["s2:datastrip_id"]
    start = strip.split("_S")[-1].split("_N")[0]
    later = f"{start[:-2]}{int(start[-2:]) + gap:02d}"
    pieces = []
    for number, (bottom, top, begins) in enumerate(((middle, north, start), (south, middle + both, later))):
        piece = deepcopy(item)
        ring = [[west, bottom], [east, bottom], [east, top], [west, top], [west, bottom]]
        piece["id"] = f"{item['id']}-{number}"
        piece["geometry"] = {"type": "Polygon", "coordinates": [ring]}
        piece["properties"]["s2:datastrip_id"] = strip.replace(start, begins)
        for asset in piece["assets"].values():
            asset["href"] = f"{asset['href']}-{number}"
        pieces.append(piece)
    return pieces


def without(item: dict[str, Any], *names: str) -> dict[str, Any]:
    """An item that does not state some properties."""
    return item | {"properties": {k: v for k, v in item["properties"].items() if k not in names}}


def scenes(*items: dict[str, Any]) -> list[Scene]:
    return [scene_from_item(item) for item in items]


def test_reprocessings_reduce_to_the_newest_baseline(page: list[dict[str, Any]]) -> None:
    kept, left_out = reduce_duplicates(scenes(*page))
    assert len(page) == 16
    assert len(kept) == 8
    assert {s.baseline for s in kept} == {"05.00"}
    assert all(
        reason.startswith(f"duplicate of {s.id.replace('_0_', '_1_')}: baseline 02.14") for s, reason in left_out
    )
    assert [(s.tile, s.time) for s in kept] == sorted((s.tile, s.time) for s in kept)


def test_older_baselines_stay_at_hand_and_in_what_is_frozen(page: list[dict[str, Any]], tmp_path: Path) -> None:
    kept, _ = reduce_duplicates(scenes(*page))
    assert {tuple(e.baseline for e in s.editions) for s in kept} == {("02.14",)}
    assert all(e.time == s.time for s in kept for e in s.editions)
    assert reduce_duplicates(kept)[0] == kept
    freeze(kept, tmp_path / "scenes.parquet")
    assert search(tmp_path / "scenes.parquet") == kept


def test_baselines_that_share_an_id_are_not_taken_for_each_other(page: list[dict[str, Any]], tmp_path: Path) -> None:
    """As in items of stactools, whose ids tell neither baseline nor time of processing."""
    newer, older = scenes(*page[:2])
    assert (newer.baseline, older.baseline) == ("05.00", "02.14")
    later = replace(older, id="later", time=older.time + timedelta(days=5), datatake=None)
    found = [newer, replace(older, id=newer.id), later]
    kept, _ = reduce_duplicates(found)
    assert kept == [newer, later]
    freeze(kept, tmp_path / "scenes.parquet")
    assert search(tmp_path / "scenes.parquet") == kept
    with pytest.warns(BaselineWarning, match=r"differ: 05\.00 and 02\.14"):
        pairs = consecutive_pairs(found)
    assert [(p.before, p.after) for p in pairs] == [tuple(pairs.scenes)]


def test_of_older_baselines_that_share_an_id_the_newest_stays_at_hand(page: list[dict[str, Any]]) -> None:
    newer, older = scenes(*page[:2])
    kept, _ = reduce_duplicates([newer, older, replace(older, baseline="02.12")])
    assert [(e.id, e.baseline) for e in kept[0].editions] == [(older.id, "02.14")]


def test_a_product_made_with_the_toolbox_goes_after_official_ones(page: list[dict[str, Any]]) -> None:
    newer, older = page[:2]
    own = deepcopy(newer) | {"id": f"{newer['id']}_own"}
    own["properties"]["s2:processing_baseline"] = "99.99"
    kept, _ = reduce_duplicates(scenes(newer, own, older))
    assert [s.baseline for s in kept] == ["05.00"]
    assert [e.baseline for e in kept[0].editions] == ["02.14", "99.99"]


def test_order_of_the_catalogue_does_not_matter(page: list[dict[str, Any]]) -> None:
    expected = reduce_duplicates(scenes(*page))[0]
    for seed in range(5):
        random.Random(seed).shuffle(page)
        assert reduce_duplicates(scenes(*page))[0] == expected


def test_reprocessings_without_datatake_or_datastrip(page: list[dict[str, Any]]) -> None:
    bare = [without(item, "s2:datatake_id", "s2:datastrip_id", "s2:product_uri") for item in page]
    kept, left_out = reduce_duplicates(scenes(*bare))
    assert (len(kept), len(left_out)) == (8, 8)


def test_two_reprocessings_of_one_baseline_reduce_to_the_last(shared_data: Path) -> None:
    folder = shared_data / "stac" / "stactools-sentinel2"
    found = [
        scene for path in sorted(folder.glob("S2A_MSIL2A_20230625T234621_N0509_R073_T01WC*")) for scene in search(path)
    ]
    kept, left_out = reduce_duplicates(found)
    assert {s.tile for s in kept} == {"01WCP", "01WCS"}
    assert [reason.split(": ")[1] for _, reason in left_out] == ["the same acquisition again"]


@pytest.mark.parametrize("hidden", [(), ("s2:datastrip_id",), ("s2:datastrip_id", "s2:datatake_id", "s2:product_uri")])
def test_halves_of_a_split_datatake_become_one_scene(page: list[dict[str, Any]], hidden: tuple[str, ...]) -> None:
    pieces = [without(piece, *hidden) for piece in halves(page[0])]
    kept, left_out = reduce_duplicates(scenes(*pieces))
    assert left_out == []
    assert len(kept) == 1
    assert kept[0].id.endswith("-1")
    assert [part.id for part in kept[0].parts] == [pieces[0]["id"]]
    assert band_source(kept[0], "red").hrefs == (
        pieces[1]["assets"]["red"]["href"],
        pieces[0]["assets"]["red"]["href"],
    )


def test_clouds_of_a_split_datatake_are_those_of_both_halves(page: list[dict[str, Any]]) -> None:
    pieces = scenes(*halves(page[0], at=0.25, overlap=0.0))
    covers = {pieces[0].id: 80.0, pieces[1].id: 20.0}
    kept, _ = reduce_duplicates([replace(piece, cloud_cover=covers[piece.id]) for piece in pieces])
    assert cloud_cover(kept[0]) == pytest.approx(0.25 * 80 + 0.75 * 20, abs=1)
    assert cloud_cover(replace(kept[0], parts=(replace(kept[0].parts[0], cloud_cover=None),))) == 20
    for limit, count in ((34.0, 0), (36.0, 1)):
        assert len(select_scenes(kept, max_cloud=limit)[0]) == count


def test_a_small_half_that_lies_almost_within_the_other(page: list[dict[str, Any]]) -> None:
    """As in tile 16SGD on 10 October 2025: 1,609 and 11,868 km2, of which 1,439 are in both."""
    pieces = [without(p, "s2:datastrip_id") for p in halves(page[0], at=0.134, overlap=0.12)]
    kept, left_out = reduce_duplicates(scenes(*pieces))
    assert (len(kept), len(kept[0].parts), left_out) == (1, 1, [])


def test_halves_each_with_a_reprocessing(page: list[dict[str, Any]], tmp_path: Path) -> None:
    newer, older = page[0], page[1]
    assert newer["properties"]["s2:processing_baseline"] > older["properties"]["s2:processing_baseline"]
    pieces = scenes(*halves(newer), *halves(older))
    kept, left_out = reduce_duplicates(pieces)
    assert len(kept) == 1
    assert {kept[0].baseline, kept[0].parts[0].baseline} == {"05.00"}
    assert [reason.split(": ")[1] for _, reason in left_out] == ["baseline 02.14, that one has 05.00"] * 2
    (older,) = kept[0].editions
    assert {older.baseline, older.parts[0].baseline} == {"02.14"}
    freeze(kept, tmp_path / "scenes.parquet")
    assert search(tmp_path / "scenes.parquet") == kept


def test_halves_of_different_radiometry_are_not_read_as_one_image(page: list[dict[str, Any]]) -> None:
    """North only in 05.00 with an offset in its pixels, south in 02.14 as well: both halves are taken in 02.14."""
    newer = without(page[0], "earthsearch:boa_offset_applied")
    north_new, _ = halves(newer)
    north_old, south_old = halves(page[1])
    kept, left_out = reduce_duplicates(scenes(north_new, north_old, south_old))
    assert [{s.baseline, *(p.baseline for p in s.parts)} for s in kept] == [{"02.14"}]
    assert len(kept[0].parts) == 1
    assert [s.id for s, _ in left_out] == [north_new["id"]]
    kept, left_out = reduce_duplicates(scenes(north_new, south_old))
    assert [s.id for s in kept] == [north_new["id"]]
    assert left_out[0][1] == f"half of a split datatake whose radiometry or grid differs from that of {north_new['id']}"


def test_two_satellites_and_two_days_are_not_duplicates(page: list[dict[str, Any]]) -> None:
    first = scene_from_item(page[0])
    other = deepcopy(page[0])
    other["properties"]["platform"] = "sentinel-2b"
    other["id"] = "S2B_32TMT_20200305_1_L2A"
    kept, _ = reduce_duplicates([first, scene_from_item(other)])
    assert len(kept) == 2


def test_l1c_gives_way_to_l2a_of_the_same_acquisition(shared_data: Path) -> None:
    folder = shared_data / "stac" / "stactools-sentinel2"
    found = [scene for path in sorted(folder.glob("S2A_OPER*T10SDG*")) for scene in search(path)]
    kept, left_out = reduce_duplicates(found)
    assert [s.level for s in kept] == ["L2A"]
    assert left_out[0][1].endswith("L1C, that one is L2A")


def test_flanders_has_no_duplicates_and_never_pairs_its_orbits(shared_data: Path) -> None:
    found = search(shared_data / "flanders")
    assert reduce_duplicates(found) == (sorted(found, key=lambda s: (s.tile, s.time, s.id)), [])
    pairs = consecutive_pairs(found)
    assert len(pairs) > 150
    assert all(pair.before.orbit == pair.after.orbit for pair in pairs)
    assert {pair.before.orbit for pair in pairs if pair.tile == "31UDS"} == {51, 94}


def test_frozen_halves_come_back_together(page: list[dict[str, Any]], tmp_path: Path) -> None:
    kept, _ = reduce_duplicates(scenes(*halves(page[0]), *page[2:]))
    freeze(kept, tmp_path / "scenes.parquet")
    assert search(tmp_path / "scenes.parquet") == kept


def test_halves_are_read_as_one_image(tmp_path: Path) -> None:
    """Rows of nodata in one half are rows of pixels in the other; where both have pixels the larger half counts."""
    shape = (119, 117)
    truth = np.random.default_rng(0).integers(1, 9000, shape).astype(np.uint16)
    transform = Affine(10, 0, 499980, 0, -10, 5700000)
    grid = Grid(32631, tuple(transform)[:6], shape)
    pieces = []
    for number, rows in enumerate((slice(0, 50), slice(45, 119))):
        pixels = np.zeros(shape, dtype=np.uint16)
        pixels[rows] = truth[rows]
        href = str(tmp_path / f"{number}.tif")
        with rasterio.open(
            href, "w", driver="GTiff", height=shape[0], width=shape[1], count=1, dtype="uint16", crs="EPSG:32631",
            transform=transform, nodata=0,
        ) as dataset:  # fmt: skip
            dataset.write(pixels, 1)
        pieces.append(Asset("red", href, grid, 1e-4, 0.0, "test"))
    item = {"type": "Polygon", "coordinates": [[[3, 50], [4, 50], [4, 51], [3, 50]]]}
    base = search_scene(pieces[1], item)
    whole = reduce_duplicates(
        [base, search_scene(pieces[0], {**item, "coordinates": [[[3, 51], [4, 51], [4, 51.5], [3, 51]]]})]
    )
    assert len(whole[0]) == 1
    window = (slice(3, 110), slice(0, 117))
    assert np.array_equal(read_window(band_source(whole[0][0], "red"), grid, window), truth[window])


def search_scene(asset: Asset, footprint: dict[str, Any]) -> Scene:
    document = {
        "type": "Feature",
        "id": Path(asset.href).stem,
        "geometry": footprint,
        "properties": {"datetime": "2020-01-01T00:00:00Z", "grid:code": "MGRS-31UDS", "proj:epsg": 32631},
        "assets": {
            "red": {
                "href": asset.href,
                "proj:shape": list(asset.grid.shape),
                "proj:transform": list(asset.grid.transform),
            }
        },
    }
    return scene_from_item(document)


def test_a_datastrip_that_reprocessing_moved_by_a_second_is_the_same(page: list[dict[str, Any]]) -> None:
    moved = deepcopy(page[0])
    moved["properties"]["s2:datastrip_id"] = moved["properties"]["s2:datastrip_id"].replace("T103210", "T103211")
    first, second = scenes(moved, page[1])
    assert first.strip_start is not None
    assert second.strip_start is not None
    assert first.strip_start - second.strip_start == timedelta(seconds=1)
    assert len(reduce_duplicates([first, second])[0]) == 1
