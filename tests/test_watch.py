"""Following a catalogue: nothing is computed twice, nothing is missed, restarts lose nothing."""

from __future__ import annotations

import json
import os
import re
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import rasterio
from api_server import ApiServer
from distributed import Client
from services_support import load_items, service

import s2cd
from s2cd.catalog import freeze, scene_to_item
from s2cd.errors import BusyError, CatalogError, ConfigError, OutputError
from s2cd.outputs import only_one, validate
from s2cd.runner import run, run_status
from s2cd.simulate import simulate
from s2cd.watch import watch

COLLECTION = f"watch-{os.getpid()}"


@pytest.fixture(scope="module")
def client():
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        yield client


@pytest.fixture
def config(tmp_path):
    return s2cd.RunConfig(
        catalog=str(tmp_path / "scenes.parquet"), out=str(tmp_path / "out"), device="cpu", min_valid=0.0
    )


def look(config, scenes, client=None):
    """Publish `scenes` and take one look at them; return the map names by status."""
    freeze(scenes, config.catalog)
    (report,) = watch(config, once=True, client=client)
    return {
        status: sorted(r.name.split("_", 3)[3] for r in report.maps if r.status == status)
        for status in {r.status for r in report.maps}
    }


def pair(*numbers):
    return "_".join(f"202305{1 + 5 * n:02d}T105000" for n in numbers)


def maps(config):
    return {p: p.stat().st_mtime_ns for p in sorted(Path(config.out).rglob("S2CD_*"))}


def test_items_that_appear_one_by_one_become_maps_and_none_is_made_twice(make_series, config, client):
    scenes = make_series(shape=(101, 133), dates=5)
    assert look(config, scenes[:1], client) == {}
    assert look(config, scenes[:2], client) == {"written": [pair(0, 1)]}
    before = maps(config)
    assert look(config, scenes[:2], client) == {}
    assert look(config, scenes[:3], client) == {"written": [pair(1, 2)]}
    assert look(config, scenes, client) == {"written": [pair(2, 3), pair(3, 4)]}
    assert before.items() <= maps(config).items()
    assert run_status(config.out) == [{"field_of_view": "31UDS R051", "pairs": 4, "finished": 4}]


def test_a_watched_folder_equals_a_run_to_the_bit(make_series, config, client, tmp_path):
    scenes = make_series(shape=(101, 133), dates=4)
    for count in range(1, 5):
        look(config, scenes[:count], client)
    whole = config.model_copy(update={"out": str(tmp_path / "whole")})
    run(whole, client, scenes=scenes)
    watched = {p.name: p.read_bytes() for p in (tmp_path / "out").rglob("*.tif")}
    assert watched == {p.name: p.read_bytes() for p in (tmp_path / "whole").rglob("*.tif")}
    assert len(watched) == 3


def test_a_late_acquisition_is_paired_with_its_neighbours_in_time(make_series, config, client):
    scenes = make_series(shape=(101, 133), dates=5)
    look(config, [*scenes[:2], *scenes[3:]], client)
    assert look(config, scenes, client) == {"written": [pair(1, 2), pair(2, 3)]}


def test_a_late_acquisition_gets_both_pairs_however_old_the_date_before_it(make_series, config, client):
    """The date before lies further back than a late acquisition itself may."""
    scenes = make_series(shape=(101, 133), dates=3)
    scenes = [
        replace(s, time=s.time + days) for s, days in zip(scenes, (timedelta(0), *[timedelta(40)] * 2), strict=True)
    ]
    look(config, [scenes[0], scenes[2]], client)
    assert len(look(config, scenes, client)["written"]) == 2
    run(config, client)
    assert run_status(config.out) == [{"field_of_view": "31UDS R051", "pairs": 2, "finished": 2}]


def test_a_date_that_was_mapped_under_a_lower_limit_is_no_end_of_a_pair(make_series, config, client):
    scenes = make_series(shape=(101, 133), dates=4)
    hide(scenes[2], 0.7)
    run(config.model_copy(update={"min_valid": 0.1}), client, scenes=scenes[:3])
    strict = config.model_copy(update={"min_valid": 0.6})
    assert look(strict, scenes[:3], client) == {"kept": [pair(0, 1)]}
    assert look(strict, scenes, client) == {"written": [pair(1, 3)]}


def hide(scene, share):
    """Put a cloud over the upper rows of a scene."""
    with rasterio.open(scene.assets["scl"].href, "r+") as dataset:
        classes = dataset.read(1)
        classes[: int(share * len(classes))] = 9
        dataset.write(classes, 1)


@pytest.fixture(scope="module")
def split_series(tmp_path_factory):
    """Four dates, the second in two halves; the first half is the larger one, whose time the date bears."""
    folder = tmp_path_factory.mktemp("split")
    catalog = simulate(folder, size=128, dates=4, orbits=(51,), clouds=False, split=True)
    before, first, second, *after = sorted(s2cd.search(str(catalog)), key=lambda s: (s.time, s.id))
    assert second.time - first.time < timedelta(minutes=1)
    return [before], first, second, after


def inputs(config):
    """How many products each map was made of, in order of time."""
    items = [json.loads(path.read_text()) for path in sorted(Path(config.out).rglob("S2CD_*.json"))]
    return [sum(link["rel"] == "derived_from" for link in item["links"]) for item in items]


@pytest.mark.parametrize("main_first", [True, False])
def test_a_half_that_is_published_later_makes_the_maps_anew(split_series, config, client, tmp_path, main_first):
    before, *halves, after = split_series
    others = [*before, *after[:1]]
    assert len(look(config, [*others, halves[not main_first]], client)["written"]) == 2
    assert inputs(config) == [2, 2]
    assert len(look(config, [*others, *halves], client)["written"]) == 2
    assert inputs(config) == [3, 3]
    assert validate(config.out) == []
    assert run_status(config.out) == [{"field_of_view": "31UDS R051", "pairs": 2, "finished": 2}]
    whole = config.model_copy(update={"out": str(tmp_path / "whole")})
    run(whole, client)
    watched = {p.name: p.read_bytes() for p in (tmp_path / "out").rglob("*.tif")}
    assert watched == {p.name: p.read_bytes() for p in (tmp_path / "whole").rglob("*.tif")}
    assert look(config, [*others, *halves], client) == {}
    assert run(config, client).count("kept") == 2


def test_a_search_that_is_cut_at_a_split_date_finds_both_halves(split_series, config, client):
    """The smaller half was sensed before the time that the date bears, and that the search goes back to."""
    before, first, second, (late, last) = split_series
    first = replace(first, time=second.time + timedelta(seconds=14))
    late, last = (replace(s, time=first.time + timedelta(days=d)) for s, d in ((late, 60), (last, 80)))
    assert len(look(config, [*before, first, second, last], client)["written"]) == 2
    assert len(look(config, [*before, first, second, late, last], client)["written"]) == 2
    assert inputs(config) == [3, 3, 3, 2]


def test_a_date_whose_map_failed_is_tried_again(make_series, config, client):
    scenes = make_series(shape=(101, 133), dates=3)
    href = scenes[2].assets["red"].href
    os.rename(href, href + ".hidden")
    assert look(config, scenes, client) == {"written": [pair(0, 1)], "failed": [pair(1, 2)]}
    assert look(config, scenes, client) == {"kept": [pair(0, 1)], "failed": [pair(1, 2)]}
    os.rename(href + ".hidden", href)
    assert look(config, scenes, client)["written"] == [pair(1, 2)]
    assert look(config, scenes, client) == {}


def test_an_interrupted_look_keeps_the_record_of_earlier_ones(make_series, config, client):
    def interrupt(phase, _done, _total):
        if phase == "maps":
            raise KeyboardInterrupt

    scenes = make_series(shape=(101, 133), dates=5)
    look(config, scenes[:4], client)
    freeze(scenes, config.catalog)
    with pytest.raises(KeyboardInterrupt):
        next(watch(config, once=True, client=client, progress=interrupt))
    assert run_status(config.out)[0]["pairs"] == 4
    # a look that is killed has recorded its own pairs only
    (Path(config.out) / "views/31UDS_R051.json").write_text(json.dumps({"name": "31UDS R051", "pairs": []}))
    look(config, scenes, client)
    assert run_status(config.out) == [{"field_of_view": "31UDS R051", "pairs": 4, "finished": 4}]


def test_a_second_look_at_the_same_time_ends_and_leaves_the_first_alone(make_series, config, client):
    scenes = make_series(shape=(101, 133), dates=2)
    told = []

    def look_too(phase, _done, _total):
        if phase == "maps":
            with pytest.raises(BusyError) as caught:
                next(watch(config, once=True, client=client))
            told.append(str(caught.value))

    freeze(scenes, config.catalog)
    assert next(watch(config, once=True, client=client, progress=look_too)).count("written") == 1
    assert told[0].startswith(f"{config.out}: a watch works here")
    assert look(config, scenes, client) == {}


def test_a_watch_waits_for_its_turn_while_another_works_in_the_folder(make_series, config, client, caplog):
    freeze(make_series(shape=(101, 133), dates=2), config.catalog)
    other = only_one(config.out)
    other.__enter__()
    threading.Timer(0.5, other.__exit__, (None, None, None)).start()
    assert next(watch(config, interval=0.2, client=client)).count("written") == 1
    assert "a watch works here" in caplog.messages[0]


def test_maps_that_were_finished_before_the_state_was_saved_are_kept(make_series, config, client):
    scenes = make_series(shape=(101, 133), dates=3)
    look(config, scenes, client)
    (Path(config.out) / "watch.json").unlink()
    before = maps(config)
    assert look(config, scenes, client) == {"kept": [pair(0, 1), pair(1, 2)]}
    assert maps(config) == before


def test_a_reprocessed_date_is_new_but_keeps_its_maps(make_series, config, client):
    scenes = make_series(shape=(101, 133), dates=3)
    look(config, scenes, client)
    before = maps(config)
    again = replace(scenes[1], id="again", time=scenes[1].time - timedelta(milliseconds=1))
    assert look(config, [scenes[0], again, scenes[2]], client) == {"kept": [pair(0, 1), pair(1, 2)]}
    assert maps(config) == before
    assert run_status(config.out) == [{"field_of_view": "31UDS R051", "pairs": 2, "finished": 2}]


def test_a_watch_with_other_options_than_the_folder_ends_at_its_first_look(make_series, config, client):
    scenes = make_series(shape=(101, 133), dates=2)
    look(config, scenes, client)
    with pytest.raises(OutputError, match="mask_dilation 60, expected 0"):
        look(config.model_copy(update={"mask_dilation": 0.0}), scenes, client)


def test_another_area_in_the_same_folder_gets_its_history(make_series, config, client):
    scenes = make_series(shape=(101, 133), dates=3)
    others = [replace(s, id=f"{s.id}-b", tile="31UES", time=s.time - timedelta(days=100)) for s in scenes]
    here, there = (config.model_copy(update={"tiles": (tile,)}) for tile in ("31UDS", "31UES"))
    assert len(look(here, scenes + others, client)["written"]) == 2
    assert len(look(there, scenes + others, client)["written"]) == 2
    # each goes on where it stopped
    assert [look(area, scenes + others, client) for area in (here, there)] == [{}, {}]


@pytest.mark.parametrize("narrow", [{"datetime": "2023-06-01/.."}, {"max_gap_days": 9.0}], ids=lambda o: next(iter(o)))
def test_wider_options_in_the_same_folder_get_what_they_lack(make_series, config, client, narrow):
    scenes = make_series(shape=(101, 133), dates=4)
    scenes[2:] = [replace(s, time=s.time + timedelta(days=60)) for s in scenes[2:]]
    finished = len(look(config.model_copy(update=narrow), scenes, client)["written"])
    wide = look(config, scenes, client)
    assert (len(wide["kept"]), len(wide["written"])) == (finished, 3 - finished)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"looks": {"cat', '{"looks": null}', '{"looks": {"x": {"31UDS R051": {"x": "yesterday"}}}}', "\xff"],
)
def test_a_damaged_state_is_told_and_the_watch_goes_on_from_the_maps(make_series, config, client, caplog, text):
    scenes = make_series(shape=(101, 133), dates=2)
    look(config, scenes, client)
    (Path(config.out) / "watch.json").write_text(text, "latin-1")
    assert look(config, scenes, client) == {"kept": [pair(0, 1)]}
    (message,) = caplog.messages
    assert message.startswith(f"{config.out}: watch.json: ")
    assert look(config, scenes, client) == {}


def test_cloudy_dates_start_nothing(make_series, config):
    scenes = make_series(shape=(101, 133), dates=2)
    cloudy = [scenes[0], replace(scenes[1], cloud_cover=99.0)]
    assert look(config.model_copy(update={"cluster": "nowhere.yaml"}), cloudy) == {}


def test_the_watch_goes_on_when_a_catalogue_is_away_for_a_while(make_series, config, client):
    freeze(make_series(shape=(101, 133), dates=2), config.catalog)
    reports = watch(config, interval=0.2, client=client)
    assert [record.status for record in next(reports).maps] == ["written"]
    os.rename(config.catalog, config.catalog + ".away")
    threading.Timer(1.0, os.rename, (config.catalog + ".away", config.catalog)).start()
    assert next(reports).maps == []
    os.rename(config.catalog, config.catalog + ".away")
    with pytest.raises(CatalogError):
        next(watch(config, interval=0.2, client=client))


def test_the_watch_goes_on_when_a_catalogue_answers_nonsense_for_a_while(make_series, config, client):
    items = [scene_to_item(s) for s in make_series(shape=(101, 133), dates=3)]
    with ApiServer(items[:2]) as server:
        reports = watch(config.model_copy(update={"catalog": server.url}), interval=0.2, client=client)
        assert [record.status for record in next(reports).maps] == ["written"]
        server.items, server.answers = items, {1: b"<html>maintenance</html>"}
        threading.Timer(1.0, server.answers.clear).start()
        assert [record.name[-15:] for record in next(reports).maps if record.status == "written"] == [pair(1, 2)[-15:]]


def test_workers_come_for_the_work_and_go_after_it(make_series, config):
    scenes = make_series(shape=(101, 133), dates=2)
    local = config.model_copy(update={"cluster": "local"})
    assert look(local, scenes) == {"written": [pair(0, 1)]}
    # nothing is new: no cluster is started, so a profile that does not exist is not even read
    assert look(config.model_copy(update={"cluster": "nowhere.yaml"}), scenes) == {}


@pytest.mark.services
def test_items_that_appear_in_an_api_become_maps(tmp_path, client):
    url = service("S2CD_TEST_STAC_API")
    root = simulate(tmp_path / "scenes", size=128, dates=4, orbits=(51,), clouds=False).parent
    documents = [(path, json.loads(path.read_text())) for path in root.rglob("*.json")]
    items = [_in_collection(item, path.parent) for path, item in documents if item.get("type") == "Feature"]
    items.sort(key=lambda item: item["properties"]["datetime"])
    config = s2cd.RunConfig(catalog=url, collection=COLLECTION, out=str(tmp_path / "out"), min_valid=0.0)
    written = []
    for item in items:
        load_items([item], tmp_path)
        (report,) = watch(config, once=True, client=client)
        written.append(report.count("written"))
        assert report.count("failed") == report.count("kept") == 0
    assert written == [0, 1, 1, 1]


def _in_collection(item, folder):
    """The item as an API of its own would give it: absolute addresses, no links."""
    assets = {
        name: asset | {"href": (folder / asset["href"]).resolve().as_uri()} for name, asset in item["assets"].items()
    }
    return item | {"collection": COLLECTION, "links": [], "assets": assets}


@pytest.mark.parametrize("interval", [0, float("nan"), float("inf"), 1e9])
def test_an_interval_must_be_one(config, interval):
    with pytest.raises(
        ConfigError, match=f"interval: found {re.escape(f'{interval:g}')} s, expected more than 0 and at"
    ):
        next(watch(config, interval=interval))
