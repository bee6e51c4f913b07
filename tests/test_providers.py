"""Every recorded document of every provider: scenes with the right tile, orbit, baseline and offset, or a reason.

The table `tables/recorded_scenes.csv` holds one row per recorded item. `offset` is that of every reflectance asset, so
what must be added to 0.0001 x digital number; `duplicate_of` is the item that goes before it among all of its folder.
"""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from s2cd.catalog import scene_from_item, search
from s2cd.catalog.duplicates import reduce_duplicates
from s2cd.catalog.providers import PROVIDERS, infer_provider, provider_of
from s2cd.catalog.scene import Scene
from s2cd.errors import CatalogError, S2cdWarning

TABLE = Path(__file__).parent / "tables" / "recorded_scenes.csv"
FOLDERS = ("earth-search", "planetary-computer", "cdse", "stactools-sentinel2", "odc-stac", "eodag")


def _rows() -> list[dict[str, str]]:
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def _items(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Items of a folder of recorded answers, with the document each came from."""
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        if document.get("type") == "Feature":
            yield document, str(path)
        for item in document.get("features") or ():
            yield item, str(path)


def _recorded(shared_data: Path, folder: str) -> dict[tuple[str, str, str], Scene | str]:
    """Scene or reason for refusal by (collection, id, when processed), each item once."""
    found: dict[tuple[str, str, str], Scene | str] = {}
    for item, base in _items(shared_data / "stac" / folder):
        processed = Path(base).name[:70] if folder == "stactools-sentinel2" else ""
        key = (item.get("collection") or "", item["id"], processed)
        try:
            found[key] = scene_from_item(item, base=base)
        except CatalogError as error:
            found[key] = str(error)
    return found


def _row(folder: str, key: tuple[str, str, str], found: Scene | str, best: dict[int, str]) -> dict[str, str]:
    row = {"folder": folder, "collection": key[0], "id": key[1]}
    if isinstance(found, str):
        return row | {"refused": found.partition(": ")[2]}
    offsets = sorted({a.offset for b, a in found.assets.items() if b != "scl"})
    return row | {
        "provider": found.provider,
        "level": found.level,
        "tile": found.tile,
        "orbit": str(found.orbit or ""),
        "platform": found.platform or "",
        "baseline": found.baseline or "",
        "offset": " ".join(f"{o:g}" for o in offsets),
        "bands": str(len(found.assets)),
        "duplicate_of": best.get(id(found), ""),
    }


def observed_rows(shared_data: Path) -> list[dict[str, str]]:
    """The table as it is observed, in a fixed order."""
    rows = []
    for folder in FOLDERS:
        recorded = _recorded(shared_data, folder)
        _, left_out = reduce_duplicates(s for s in recorded.values() if isinstance(s, Scene))
        best = {id(scene): reason.split(": ")[0].removeprefix("duplicate of ") for scene, reason in left_out}
        rows += [_row(folder, key, found, best) for key, found in recorded.items()]
    return rows


def test_every_recorded_item_is_as_the_table_says(shared_data: Path) -> None:
    expected = [{k: v for k, v in row.items() if v} for row in _rows()]
    observed = [{k: v for k, v in row.items() if v} for row in observed_rows(shared_data)]
    assert observed == expected


def test_every_recorded_document_is_read_or_refused_with_a_reason(shared_data: Path) -> None:
    reasons = {}
    for path in sorted((shared_data / "stac").glob("*/*.json")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", S2cdWarning)
            try:
                assert search(path)
            except CatalogError as error:
                reasons[f"{path.parent.name}/{path.name}"] = str(error).removeprefix(f"{path}: ")
    apis = {name: why for name, why in reasons.items() if "landing" in name or "collection" in name}
    assert len(apis) == 9
    assert all("belongs to the STAC API at https://" in why for why in apis.values())
    assert {name: why for name, why in reasons.items() if name not in apis} == {
        "eodag/cop_dataspace_search.json": "is JSON but not STAC: expected an object with a type",
        "earth-search/search_10items_7eb24622.json": "no Sentinel-2 scenes found",
        # It states an offset of -0.7: that of the tile beside it, of the same datastrip, is -0.1.
        "stactools-sentinel2/S2A_OPER_MSI_L2A_TL_VGS1_20220401T110010_A035382_T34LBQ.expected_output.json": (
            "no Sentinel-2 scenes found"
        ),
    }


def test_scl_is_never_scaled(shared_data: Path) -> None:
    for folder in FOLDERS:
        for scene in _recorded(shared_data, folder).values():
            if isinstance(scene, Scene) and scene.level == "L2A":
                assert (scene.assets["scl"].scale, scene.assets["scl"].offset) == (1, 0)


def test_native_resolution_and_cog_before_jp2(shared_data: Path) -> None:
    for folder in FOLDERS:
        for scene in _recorded(shared_data, folder).values():
            if not isinstance(scene, Scene):
                continue
            for band, metres in {"red": 10, "nir": 10, "nir08": 20, "swir16": 20, "coastal": 60}.items():
                assert scene.assets[band].grid.transform[0] == metres, (scene.id, band)
            if scene.provider == "earth-search" and scene.level == "L2A":
                assert scene.assets["red"].href.endswith(".tif")


def test_antimeridian_tiles_are_found_on_both_sides(shared_data: Path) -> None:
    folder = shared_data / "stac" / "stactools-sentinel2"
    name = "S2A_MSIL2A_20230625T234621_N0509_R073_T01WCP_20230626T022157.SAFE.expected_output.json"
    for bbox in ((179, 66, 179.5, 66.2), (-179.5, 66, -179.2, 66.2), (179.8, 66, -179.8, 66.2)):
        assert [s.tile for s in search(folder / name, bbox=bbox)] == ["01WCP"]
    with pytest.raises(CatalogError, match="no scenes found"):
        search(folder / name, bbox=(0, 66, 1, 66.2))


def test_partial_swath_is_respected(shared_data: Path) -> None:
    """A box in the tile, and in the footprint's bounding box, but outside what the swath covers."""
    folder = shared_data / "stac" / "odc-stac"
    path = folder / "S2A_28QCH_20200714_0_L2A.json"
    assert search(path, bbox=(-16.9, 20.5, -16.85, 20.6))
    with pytest.raises(CatalogError, match="1 by bbox left out"):
        search(path, bbox=(-16.76, 20.06, -16.73, 20.1))


def test_orbit_from_absolute_orbit_agrees_where_both_are_stated(shared_data: Path) -> None:
    """The shift between absolute and relative orbits, against every recorded item that states both."""
    checked = 0
    for folder in FOLDERS:
        for item, base in _items(shared_data / "stac" / folder):
            properties = item["properties"]
            stated = properties.get("sat:relative_orbit")
            taken = properties.get("s2:datatake_id") or properties.get("eopf:datatake_id")
            if stated is None or taken is None:
                continue
            hidden = ("sat:relative_orbit", "s2:product_uri")
            bare = item | {
                "id": "x",
                "properties": {k: v for k, v in properties.items() if k not in hidden},
            }
            assert scene_from_item(bare, base=base).orbit == stated
            checked += 1
    assert checked > 30


@pytest.mark.parametrize(
    ("absolute", "relative"),
    [(44635, 22), (49800, 39), (49801, None), (50827, 36), (52286, 65), (54503, 137), (57594, 82), (58365, 138)],
)
def test_sentinel_2a_was_moved_to_another_place(shared_data: Path, absolute: int, relative: int | None) -> None:
    """As products state them, from A044635_T34VEL to A058365_T24MTS; nothing is guessed for the weeks of the move."""
    item = json.loads((shared_data / "stac" / "odc-stac" / "S2A_28QCH_20200714_0_L2A.json").read_text())
    item["properties"] = {k: v for k, v in item["properties"].items() if ":product" not in k and "orbit" not in k}
    item["properties"]["s2:datatake_id"] = f"GS2A_20250101T000000_{absolute:06d}_N05.11"
    assert scene_from_item(item).orbit == relative


@pytest.mark.parametrize(
    ("href", "key"),
    [
        ("https://sentinel-cogs.s3.us-west-2.amazonaws.com/a/B04.tif", "earth-search"),
        ("s3://sentinel-s2-l1c/tiles/a/B04.jp2", "earth-search"),
        ("s3://eodata/Sentinel-2/a.jp2", "cdse"),
        ("https://sentinel2l2a01.blob.core.windows.net/a.tif", "planetary-computer"),
        ("https://example.org/a.tif", "static"),
        ("../a.tif", "static"),
    ],
)
def test_provider_of_an_address(href: str, key: str) -> None:
    assert provider_of(href) == key
    assert infer_provider({"assets": {"red": {"href": href}}}) == key
    assert key == "static" or PROVIDERS[key].key == key


def test_what_is_made_of_a_band_does_not_take_its_place(shared_data: Path) -> None:
    """Such as its quality, which names the band that it describes, and may come first."""
    items = (item for item, _ in _items(shared_data / "stac" / "earth-search") if "red" in item.get("assets", {}))
    item = next(item for item in items if len(item["assets"]["red"].get("eo:bands", ())) == 1)
    expected = scene_from_item(item).assets["red"]
    quality = item["assets"]["red"] | {"href": "https://example.com/quality.tif"}
    item["assets"] = {"red_quality": quality, **item["assets"]}
    assert scene_from_item(item).assets["red"] == expected
