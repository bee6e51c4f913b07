"""Results are whole or absent: full disks, missing permissions, killed writers, buckets."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from outputs_support import INFO, make_grid, make_pair, random_codes

from s2cd.catalog.access import s3_options
from s2cd.catalog.ranges import s3_source
from s2cd.errors import BusyError, OutputError
from s2cd.outputs import check_writable, finished, is_done, lock, only_one, place_of, validate, write_catalog, write_map
from s2cd.outputs.lock import LOCK
from s2cd.outputs.page import write_page
from s2cd.outputs.store import STALE_SECONDS, Store, open_store

GRID = make_grid((300, 301))
MIB = 1024**2


def files_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_objects_are_written_read_listed_and_deleted(tmp_path):
    store = Store(str(tmp_path / "a b"))
    store.put("31UDS/x.tif", b"12345")
    assert store.get("31UDS/x.tif") == b"12345"
    assert list(store.list()) == [("31UDS/x.tif", 5)]
    assert store.size("31UDS/x.tif")
    store.delete("31UDS/x.tif")
    store.delete("31UDS/x.tif")
    assert store.size("31UDS/x.tif") is None
    with pytest.raises(OutputError, match=r"31UDS/x\.tif cannot be read"):
        store.get("31UDS/x.tif")


def test_a_file_url_is_a_folder(tmp_path):
    check_writable(f"file://{tmp_path}/new%20folder")
    with pytest.raises(OutputError, match="file://maps: found no path, expected one such as file:///maps"):
        check_writable("file://maps")  # a host without a path
    assert files_below(tmp_path) == []
    assert (tmp_path / "new folder").is_dir()


@pytest.mark.parametrize(("below", "why"), [("", ": is a file, expected a folder"), ("/deeper", " cannot be used: ")])
def test_a_file_in_the_way_is_named(tmp_path, below, why):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(OutputError, match=f"{file}{below}{why}"):
        check_writable(f"{file}{below}")


def test_a_folder_that_cannot_be_looked_at_is_named(tmp_path):
    """As one that a name of 300 letters stands for, or one in a folder that may not be entered."""
    out = str(tmp_path / ("x" * 300))
    for look in (check_writable, finished, validate):
        with pytest.raises(OutputError, match="x cannot be used: .*File name too long"):
            look(out)


class Proxy(BaseHTTPRequestHandler):
    """Answers for any server, and keeps what it was asked for."""

    seen: ClassVar[list[tuple[str, str]]] = []

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, b"")

    def do_GET(self):
        self.answer(206, b"{}")

    def answer(self, status, body):
        self.seen.append((self.command, self.path))
        self.send_response(status)
        for name, value in {"ETag": '"1"', "Content-Length": len(body), "Content-Range": "bytes 0-1/2"}.items():
            self.send_header(name, str(value))
        self.send_header("Last-Modified", "Thu, 26 Nov 2026 07:00:00 GMT")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_buckets_are_reached_as_the_environment_says(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = "http://store.example"
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            monkeypatch.setenv(f"AWS_{name}", "x")
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_PROXY_URL", f"http://127.0.0.1:{server.server_port}")
        open_store("s3://maps/x").put("a.json", b"{}")
        assert s3_source("maps", "x/a.json", {"endpoint": address, "region": "us-east-1"}).fetch(0, 2) == b"{}"
        server.shutdown()
    assert Proxy.seen == [("PUT", f"{address}/maps/x/a.json"), ("GET", f"{address}/maps/x/a.json")]


@pytest.fixture
def locked():
    """A folder that may be read but not written, for root too: it acts as another user meanwhile."""
    folder = Path(tempfile.mkdtemp())
    user = os.geteuid()
    folder.chmod(0o555)
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.rmdir()


@pytest.fixture
def locked_below():
    """Makes a folder with a subfolder that may not be read, for root too: it acts as another user meanwhile."""
    folder, user = Path(tempfile.mkdtemp()), os.geteuid()
    folder.chmod(0o777)

    def make(name: str) -> Path:
        (folder / name).mkdir(mode=0)
        if user == 0:
            os.seteuid(65534)
        return folder

    yield make
    os.seteuid(user)
    for path in folder.iterdir():
        path.chmod(0o700) if path.is_dir() and not path.is_symlink() else None
    shutil.rmtree(folder)


def test_a_folder_without_permission_is_named(locked):
    for folder in (locked, locked / "new"):
        with pytest.raises(OutputError, match=rf"{folder} cannot be .*[Pp]ermission denied"):
            check_writable(str(folder))


def test_a_read_only_disk_is_named(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError, match="disk cannot be written to: .*Read-only file system"):
        check_writable(str(small_disk))


def test_what_lies_beside_the_maps_does_not_matter(locked_below):
    """A disk's lost+found, links in a circle, names in another encoding, another output folder."""
    out = locked_below("lost+found")
    (out / "again").symlink_to(out)
    (out / "itself").symlink_to("itself")
    (out / os.fsdecode(b"caf\xe9")).mkdir()
    pair = make_pair(GRID)
    other = make_pair(GRID, tile="33UVP")
    write_map(random_codes(GRID.shape), pair, GRID, INFO, str(out))
    write_map(random_codes(GRID.shape), other, GRID, INFO, str(out / "another"))
    write_catalog(str(out))
    assert finished(str(out)) == {pair.name}
    assert validate(str(out)) == []


def test_a_folder_of_maps_that_cannot_be_read_is_named(locked_below):
    out = locked_below("31UDS")
    with pytest.raises(OutputError, match=f"{out} cannot be listed: .*Permission denied: '{out}/31UDS'"):
        finished(str(out))


def test_an_unknown_kind_of_url_is_named():
    with pytest.raises(OutputError, match="foo://bucket/x cannot be used"):
        check_writable("foo://bucket/x")


def test_a_full_disk_is_found_before_anything_is_computed(small_disk):
    (small_disk / "filler").write_bytes(bytes(MIB))
    with pytest.raises(OutputError, match="disk cannot be written to: .*No space left on device"):
        check_writable(str(small_disk))
    assert files_below(small_disk) == ["filler"]


def test_a_disk_that_fills_up_names_the_map_and_leaves_nothing(small_disk):
    grid = make_grid((1023, 1025))
    pair = make_pair(grid)
    with pytest.raises(OutputError, match=rf"{pair.name}\.tif cannot be written: .*No space left on device"):
        write_map(random_codes(grid.shape), pair, grid, INFO, str(small_disk))
    assert files_below(small_disk) == []
    write_map(random_codes((17, 19)), pair, make_grid((17, 19)), INFO, str(small_disk))
    assert is_done(str(small_disk), pair.name)


def test_a_map_made_anew_is_not_finished_until_it_is(small_disk):
    pair = make_pair(make_grid((17, 19)))
    out = str(small_disk)
    write_map(random_codes((17, 19)), pair, make_grid((17, 19)), INFO, out)
    with pytest.raises(OutputError):
        write_map(random_codes((1023, 1025)), pair, make_grid((1023, 1025)), INFO, out)
    assert not is_done(out, pair.name)
    assert finished(out) == set()


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from outputs_support import INFO, make_grid, make_pair, random_codes
from s2cd.outputs import write_map
from datetime import timedelta
from outputs_support import AFTER
grid = make_grid((1023, 1025))
codes = random_codes(grid.shape)
print("ready", flush=True)
for day in range(100000):
    write_map(codes, make_pair(grid, after=AFTER + timedelta(days=day)), grid, INFO, sys.argv[1])
"""


@pytest.mark.parametrize("delay", [0.11, 0.26, 0.43])
def test_a_killed_writer_leaves_only_whole_files(tmp_path, delay):
    """Whatever stands under a final name after kill -9 is whole, and every item has its map."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", WRITER, str(out), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 30
        while not list(out.rglob("*.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    done = finished(str(out))
    assert done
    assert {p.stem for p in out.rglob("*.json")} == done
    write_catalog(str(out))
    unfinished = [p for p in validate(str(out)) if "no item" not in p]
    assert unfinished == []


def test_what_a_killed_writer_left_is_swept_away_later(tmp_path):
    pair = make_pair(GRID)
    write_map(random_codes(GRID.shape), pair, GRID, INFO, str(tmp_path))
    old = ["collection.json#1", "watch.lock#2", "31UDS/catalog.json#12", "views/31UDS_R051.json#1"]
    old += [f"31UDS/{pair.name}{extension}#2" for extension in (".tif", ".json", ".png", "_validity.tif")]
    others = ["issue #12", "notes#1", "31UDS/plot.tif#1", f"{pair.name}.tif#1", f"33UVP/{pair.name}.tif#1"]
    others += ["project/issue #12", "project/maps/collection.json#1", f"project/31UDS/{pair.name}.tif#1"]
    for name in [*old, *others]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        os.utime(path, (time.time() - STALE_SECONDS - 5,) * 2)
    young = f"31UDS/{pair.name}.tif#3"
    (tmp_path / young).write_text("x")
    (tmp_path / "run.yaml#1").symlink_to("nowhere")
    before = files_below(tmp_path)
    check_writable(str(tmp_path))
    assert files_below(tmp_path) == sorted({*before} - {*old})
    assert {*others, young} < {*before} - {*old}
    assert (tmp_path / "run.yaml#1").is_symlink()


def test_a_bucket_holds_the_same_folder(bucket, tmp_path):
    pair = make_pair(GRID)
    codes = random_codes(GRID.shape)
    for out in (bucket.url, str(tmp_path)):
        check_writable(out)
        write_map(codes, pair, GRID, INFO, out)
        write_catalog(out)
        assert finished(out) == {pair.name}
        assert is_done(out, pair.name)
        assert validate(out) == []
    stored = bucket.client.list_objects_v2(Bucket="maps")["Contents"]
    assert sorted(o["Key"].removeprefix("europe/2023/") for o in stored) == files_below(tmp_path)


def test_objects_of_a_bucket_say_what_they_are(bucket):
    """A browser shows the page of `view` and its pictures; what it is not told of it downloads."""
    out = "s3://maps/typed"
    pair = make_pair(GRID)
    item = write_map(random_codes(GRID.shape), pair, GRID, INFO, out)
    write_catalog(out)
    write_page(out)
    types = {}
    for stored in bucket.client.list_objects_v2(Bucket="maps", Prefix="typed/")["Contents"]:
        found = bucket.client.head_object(Bucket="maps", Key=stored["Key"])
        types[stored["Key"].removeprefix("typed/")] = found["ContentType"]
    assert types["index.html"] == "text/html; charset=utf-8"
    assert types[f"31UDS/{pair.name}.tif"] == item["assets"]["change"]["type"]
    assert types[f"31UDS/{pair.name}.json"] == "application/geo+json"
    assert types["collection.json"] == types["31UDS/catalog.json"] == "application/json"
    assert not [name for name, kind in types.items() if "octet-stream" in kind]


@pytest.mark.parametrize("place", ["bucket", "folder"])
def test_only_one_watch_works_in_a_folder(bucket, tmp_path, place):
    out = bucket.url if place == "bucket" else str(tmp_path)
    for _ in range(2):
        with only_one(out):
            there = rf"^{out}: a watch works here \(\S+, process {os.getpid()}, since "
            with pytest.raises(BusyError, match=there), only_one(out):
                pass
            assert Store(out).size(LOCK)
        assert Store(out).size(LOCK) is None


def test_a_lock_is_renewed_while_its_owner_works_and_taken_over_after_it_was_killed(tmp_path, monkeypatch):
    path = tmp_path / LOCK
    path.write_text("host, process 1")
    os.utime(path, (time.time() - STALE_SECONDS - 5,) * 2)
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.02)
    with only_one(str(tmp_path)):
        first = path.stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while path.stat().st_mtime_ns == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime_ns > first
        path.write_text("another, that took it over while this machine slept")
        time.sleep(0.1)
    assert path.read_text().startswith("another")


def test_the_place_of_a_lost_map_is_told_without_secrets():
    assert place_of("s3://user:HIDDEN@maps/k?token=HIDDEN") == "s3://maps/k"


def test_a_bucket_that_does_not_exist_is_named(bucket):
    with pytest.raises(OutputError, match="s3://nowhere/x cannot be written to: .*NoSuchBucket"):
        check_writable("s3://nowhere/x")


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_the_words_of_gdal_name_the_server_of_maps_too(bucket, monkeypatch, scheme):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_S3_ENDPOINT", scheme + bucket.address.removeprefix("http://"))
    monkeypatch.setenv("AWS_HTTPS", "NO")
    Store("s3://maps/gdal").put("a.json", b"{}")
    assert bucket.client.get_object(Bucket="maps", Key="gdal/a.json")["Body"].read() == b"{}"


def test_renewed_keys_sign_what_follows(bucket, tmp_path, monkeypatch):
    """Whether maps are written or scenes are read: a notebook goes on after its keys expired."""
    from moto.moto_api import recorder

    bucket.client.put_object(Bucket="maps", Key="a.tif", Body=b"12345")
    monkeypatch.chdir(tmp_path)  # where the server keeps what it was asked
    recorder.start_recording()
    for key in ("EXPIRED", "RENEWED"):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        open_store(bucket.url).put("keys.json", b"{}")
        assert s3_source("maps", "a.tif", s3_options("static", "s3://maps/a.tif")).fetch(0, 5) == b"12345"
    recorder.stop_recording()
    asked = [json.loads(line) for line in recorder.download_recording().splitlines()]
    signed = [re.search(r"Credential=(\w+)/", request["headers"]["Authorization"])[1] for request in asked]
    assert signed == ["EXPIRED", "EXPIRED", "RENEWED", "RENEWED"]
