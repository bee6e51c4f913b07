"""Reading assets over real connections that fail: every read ends in the right pixels or in an error that names it."""

from __future__ import annotations

import ctypes
import json
import pickle
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import rasterio
from fault_server import FAULTS, FaultServer
from hypothesis import given
from hypothesis import strategies as st
from rasterio.transform import Affine
from tblib import pickling_support

from s2cd import reader
from s2cd.buckets import SOURCE_KEYS
from s2cd.catalog import access, ranges
from s2cd.catalog.scene import Grid
from s2cd.errors import GridError, ReadError
from s2cd.reader import Source, Tiling, read_bands, read_window

SHAPE = (1023, 1025)
TRANSFORM = Affine(10, 0, 499980, 0, -10, 5700000)
GRID = Grid(32631, tuple(TRANSFORM)[:6], SHAPE)
FILES = 4
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


def pixels(index: int) -> np.ndarray:
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return ((y * 7 + x * 13 + index * 101) % 9973 + 1).astype(np.uint16)


def write(path: Path, data: np.ndarray, block: int) -> None:
    with rasterio.open(
        path, "w", driver="GTiff", height=data.shape[0], width=data.shape[1], count=1, dtype=data.dtype,
        crs="EPSG:32631", transform=TRANSFORM, tiled=True, blockxsize=block, blockysize=block, compress="deflate",
        nodata=0,
    ) as dataset:  # fmt: skip
        dataset.write(data, 1)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of big blocks, and of blocks so small that their index fills more than one request."""
    folder = tmp_path_factory.mktemp("assets")
    for index in range(FILES):
        write(folder / f"{index}.tif", pixels(index), 256 if index % 2 else 16)
    (folder / "gone").mkdir()
    (folder / "container").mkdir()
    write(folder / "container" / "red.tif", pixels(9), 256)
    return folder


@pytest.fixture
def server(assets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    """A server that behaves until told otherwise, and a reader that does not wait long."""
    monkeypatch.setattr(access, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(ranges, "READ_TIMEOUT", 3.0)
    monkeypatch.setattr(ranges, "BACKOFF", 0.01)
    monkeypatch.setattr(ranges, "_http", cache(ranges._http.__wrapped__))
    with FaultServer(assets, seed=1, stall=4.0) as running:
        yield running


def read(href: str, rows: slice, cols: slice, provider: str = "static") -> np.ndarray:
    return read_window(Source("red", (href,), provider), GRID, (rows, cols))


def one_read(server: FaultServer, number: int) -> str:
    draw = random.Random(number)
    index = draw.randrange(FILES)
    top, left = draw.randrange(SHAPE[0] - 1), draw.randrange(SHAPE[1] - 1)
    rows = slice(top, min(top + draw.randrange(1, 200), SHAPE[0]))
    cols = slice(left, min(left + draw.randrange(1, 200), SHAPE[1]))
    try:
        data = read(f"{server.url}/{index}.tif", rows, cols)
    except (ReadError, GridError) as error:
        return "named" if f"{index}.tif" in str(error) else f"unnamed: {error}"
    return "right" if np.array_equal(data, pixels(index)[rows, cols]) else "wrong"


@pytest.mark.parametrize(
    ("rate", "reads", "faults"), [(0.1, 800, FAULTS), (0.5, 200, tuple(f for f in FAULTS if f != "stall"))]
)
def test_a_thousand_reads_with_faults_recover_or_name_the_asset(
    server: FaultServer, rate: float, reads: int, faults: tuple[str, ...]
) -> None:
    server.rate, server.faults = rate, faults
    with ThreadPoolExecutor(8) as pool:
        ends = Counter(pool.map(lambda number: one_read(server, number), range(reads)))
    assert set(ends) <= {"right", "named"}, ends
    assert ends["right"] > reads / 2
    assert set(server.counts) == set(faults)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_only_fails_ends_in_a_named_error(
    server: FaultServer, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "READ_TIMEOUT", 0.3)
    if fault == "slow":
        pytest.skip("slow answers are right answers")
    server.rate, server.faults, server.stall = 1.0, (fault,), 0.4
    with pytest.raises(ReadError, match="cannot read http://127.0.0.1:.*/0.tif: ."):
        read(f"{server.url}/0.tif", slice(0, 9), slice(0, 9))


def test_a_missing_asset_is_not_asked_for_again_and_again(server: FaultServer) -> None:
    with pytest.raises(ReadError, match=r"gone/red\.tif: server answered 404"):
        read(f"{server.url}/gone/red.tif", slice(0, 9), slice(0, 9))


class WithoutRanges(SimpleHTTPRequestHandler):
    """Python's own server, which sends whole files; `ends` of those that it sent: whether the client read all."""

    ends: ClassVar[list[bool]] = []

    def log_message(self, *_: object) -> None:
        pass

    def copyfile(self, source: Any, outputfile: Any) -> None:
        try:
            super().copyfile(source, outputfile)
            self.ends.append(True)
        except OSError:
            self.ends.append(False)


def test_of_a_server_without_ranges_no_file_is_fetched(tmp_path: Path) -> None:
    with (tmp_path / "red.tif").open("wb") as file:
        file.truncate(1 << 26)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(WithoutRanges, directory=tmp_path)) as server:
        server.daemon_threads = False  # so that all have ended when it is closed
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ReadError, match=r"red\.tif: server answered 200 OK, expected 206 Partial"):
            read(f"http://127.0.0.1:{server.server_port}/red.tif", slice(0, 9), slice(0, 9))
        server.shutdown()
    assert WithoutRanges.ends == [False]


def test_a_missing_or_damaged_local_asset_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"none\.tif"):
        read(str(tmp_path / "none.tif"), slice(0, 9), slice(0, 9))
    write(tmp_path / "cut.tif", pixels(0), 256)
    whole = (tmp_path / "cut.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ReadError, match=r"cut\.tif"):
        read(str(tmp_path / "cut.tif"), slice(0, 1000), slice(0, 1000))


def test_a_file_that_changes_while_it_is_read_is_noticed(server: FaultServer, tmp_path: Path) -> None:
    write(server.root / "moving.tif", pixels(0), 16)
    source = ranges.HttpSource(f"{server.url}/moving.tif")
    source.fetch(0, 100)
    write(server.root / "moving.tif", pixels(1), 256)
    with pytest.raises(OSError, match="file changed while it was read"):
        source.fetch(100, 200)


def test_a_file_is_asked_for_its_head_once_until_it_is_replaced(server: FaultServer) -> None:
    path, href = server.root / "replaced.tif", f"{server.url}/replaced.tif"
    write(path, pixels(2), 256)
    for top in (0, 300, 600):
        window = slice(top, top + 40), slice(0, 40)
        assert np.array_equal(read(href, *window), pixels(2)[window])
    assert [span for _, span in server.requests].count("bytes=0-65535") == 1
    write(path, pixels(3), 16)
    window = slice(900, 940), slice(0, 40)
    assert np.array_equal(read(href, *window), pixels(3)[window])


def file_systems() -> list[str]:
    """The prefixes of GDAL's virtual file systems, from the library that rasterio has loaded."""
    loaded = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgdal" in line]
    gdal = ctypes.CDLL(loaded[0])
    gdal.VSIGetFileSystemsPrefixes.restype = ctypes.POINTER(ctypes.c_char_p)
    return [prefix.decode() for prefix in takewhile(bool, gdal.VSIGetFileSystemsPrefixes())]


def test_no_file_system_comes_or_goes_while_threads_read(server: FaultServer) -> None:
    """GDAL's threads walk through their list without a lock, so that a change of it crashes the process."""
    before = file_systems()
    assert "/vsicurl/" in before
    with access.open_dataset("static", f"{server.url}/0.tif") as dataset:
        assert file_systems() == before
        assert dataset.name.startswith(tuple(before))
    assert file_systems() == before


def test_whatever_goes_wrong_while_gdal_reads_is_raised(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_broken() -> None:
        with access.open_dataset("static", f"{server.url}/1.tif") as dataset:
            monkeypatch.setattr(ranges.RangeFile, "_cached", broken)
            dataset.read(1, window=((0, 9), (0, 9)))

    with pytest.raises(RuntimeError, match="not of the transport"):
        read_broken()


def broken(*_: object) -> bytes:
    raise RuntimeError("not of the transport")


@pytest.mark.parametrize("threads", ["1", "2", "ALL_CPUS"])
def test_remote_jpeg_2000_whatever_threads_gdal_has(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: str
) -> None:
    monkeypatch.setenv("GDAL_NUM_THREADS", threads)
    data = pixels(5)
    with rasterio.open(
        tmp_path / "red.jp2", "w", driver="JP2OpenJPEG", height=SHAPE[0], width=SHAPE[1], count=1, dtype=data.dtype,
        crs="EPSG:32631", transform=TRANSFORM, blockxsize=256, blockysize=256, QUALITY="100", REVERSIBLE="YES",
    ) as dataset:  # fmt: skip
        dataset.write(data, 1)
    server.root = tmp_path
    window = slice(100, 900), slice(30, 700)
    assert np.array_equal(read(f"{server.url}/red.jp2", *window), data[window])


def stopped(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stop the clock by which heads grow old: `now` of the result sets it, however slow this machine is."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(ranges, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_small_file_that_is_replaced_is_noticed(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head is the whole file, so that nothing else would ever be asked for."""
    clock = stopped(monkeypatch)
    path, href = server.root / "small.tif", f"{server.url}/small.tif"
    for value, asked in ((5, ["bytes=0-65535"]), (6, ["bytes=0-0", "bytes=0-65535"]), (6, ["bytes=0-0"])):
        write(path, np.full(SHAPE, value, np.uint16), 256)
        assert path.stat().st_size < ranges.HEAD_BYTES
        server.requests.clear()
        for _ in range(3):
            assert (read(href, slice(0, 40), slice(0, 40)) == value).all()
        assert [span for _, span in server.requests] == asked
        clock.now += ranges.FRESH + 1


def test_a_file_that_is_read_all_the_time_is_not_asked_for_its_edition(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = stopped(monkeypatch)
    for top in (0, 300, 600):
        read(f"{server.url}/0.tif", slice(top, top + 40), slice(0, 40))
        clock.now += 0.7 * ranges.FRESH
    assert [span for _, span in server.requests].count("bytes=0-65535") == 1
    assert len(server.requests) == 4


def test_a_local_file_that_is_replaced_is_opened_anew(tmp_path: Path) -> None:
    path, window = tmp_path / "red.tif", (slice(900, 940), slice(0, 40))
    for index, block in ((0, 256), (1, 256), (2, 16)):
        write(path, pixels(index), block)
        for _ in range(2):
            assert np.array_equal(read(str(path), *window), pixels(index)[window])


def test_few_local_files_stay_open(assets: Path) -> None:
    files = access.OpenFiles(most=2)
    datasets = []
    for index in range(FILES):
        with files.dataset(str(assets / f"{index}.tif")) as dataset, files.dataset(dataset.name) as another:
            assert another is not dataset  # which one thread has no other gets
            datasets += [dataset, another]
    assert [dataset.closed for dataset in datasets] == [True] * 6 + [False] * 2
    with files.dataset(datasets[-1].name) as dataset:
        assert dataset in datasets[-2:]
    with pytest.raises(RuntimeError, match="mid-way"), files.dataset(datasets[-1].name) as dataset:
        raise RuntimeError("mid-way")
    assert dataset.closed
    files.close(idle=60)
    assert not datasets[-2].closed or not datasets[-1].closed
    files.close()
    assert all(dataset.closed for dataset in datasets)


def bands_of(server: FaultServer, names: list[str]) -> tuple[list[Source], Tiling]:
    return [Source("red", (f"{server.url}/{name}",), "static") for name in names], Tiling(SHAPE, 512, 16)


def test_the_bands_of_a_remote_scene_are_fetched_side_by_side(server: FaultServer) -> None:
    server.rate, server.faults = 1.0, ("slow",)
    sources, tiling = bands_of(server, [f"{index}.tif" for index in range(FILES)])
    window = tiling.read(0, 0)
    for index, data in enumerate(read_bands(sources, GRID, window, tiling, fine=FILES)):
        assert np.array_equal(data, pixels(index)[window])
    assert server.most_under_way >= FILES


def test_a_remote_band_that_is_missing_leaves_no_block_of_the_others(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "BLOCKS", reader.BlockCache())
    sources, tiling = bands_of(server, ["0.tif", "gone/red.tif", "1.tif"])
    with pytest.raises(ReadError, match=r"gone/red\.tif"):
        read_bands(sources, GRID, tiling.read(0, 0), tiling, fine=FILES)
    for row, col in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)):
        read_bands([sources[0], sources[2]], GRID, tiling.read(row, col), tiling, fine=FILES)
    assert reader.BLOCKS._bytes == sum(len(e.pixels.result().tobytes()) for e in reader.BLOCKS._entries.values())


def test_signatures_are_fetched_once_and_again_when_they_expire(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S2CD_SAS_URL", f"{server.url}/token")
    monkeypatch.setattr(access, "SIGNER", access.SasSigner())
    monkeypatch.setattr(access, "SIGNED_DOMAIN", "127.0.0.1")
    href = f"{server.url}/signed/container/red.tif"
    rows, cols = slice(100, 300), slice(7, 900)
    for _ in range(3):
        assert np.array_equal(read(href, rows, cols, "planetary-computer"), pixels(9)[rows, cols])
    assert len(server.tokens) == 1
    monkeypatch.setattr(access, "SIGNER", access.SasSigner())
    server.lifetime = 1.0
    for _ in range(2):
        assert np.array_equal(read(href, rows, cols, "planetary-computer"), pixels(9)[rows, cols])
        time.sleep(server.lifetime)
    assert len(server.tokens) >= 3  # one more where this machine was away for a second
    assert server.counts["refused"] == 0


def test_only_the_hosts_of_planetary_computer_are_signed(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive of one's own, with a query string of its own, may hold items of Planetary Computer."""
    monkeypatch.setenv("S2CD_SAS_URL", f"{server.url}/token")
    monkeypatch.setattr(access, "SIGNER", access.SasSigner())
    server.tokens["own"] = time.time() + 60
    data = read(f"{server.url}/signed/container/red.tif?sig=own", slice(0, 9), slice(0, 9), "planetary-computer")
    assert np.array_equal(data, pixels(9)[:9, :9])
    assert list(server.tokens) == ["own"]
    monkeypatch.setenv("S2CD_SAS_URL", f"{server.url}/none")
    href = "https://sentinel2l2a01.blob.core.windows.net/container/red.tif"
    with pytest.raises(ReadError, match="cannot be signed: .*/none/sentinel2l2a01/container answered 404"):
        read(href, slice(0, 9), slice(0, 9), "planetary-computer")


def test_a_signature_refused_before_its_time_is_replaced(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S2CD_SAS_URL", f"{server.url}/token")
    monkeypatch.setattr(access, "SIGNER", access.SasSigner())
    monkeypatch.setattr(access, "SIGNED_DOMAIN", "127.0.0.1")
    monkeypatch.setattr(access, "FRESH_TOKEN", 0.0)
    href = f"{server.url}/signed/container/red.tif"
    read(href, slice(0, 9), slice(0, 9), "planetary-computer")
    server.revoke()
    data = read(href, slice(900, 909), slice(900, 909), "planetary-computer")
    assert np.array_equal(data, pixels(9)[900:909, 900:909])
    assert server.counts["refused"] == 1


def test_a_signature_that_cannot_be_had_is_named_and_no_secret_is_told(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S2CD_SAS_URL", f"{server.url}/nowhere")
    monkeypatch.setattr(access, "SIGNER", access.SasSigner())
    monkeypatch.setattr(access, "SIGNED_DOMAIN", "127.0.0.1")
    with pytest.raises(ReadError, match="cannot be signed.*answered 404"):
        read(f"{server.url}/signed/c/red.tif?sig=secret", slice(0, 9), slice(0, 9), "planetary-computer")
    href = server.url.replace("//", "//user:secret@") + "/{}?sig=secret"
    write(server.root / "moved.tif", pixels(0)[1:], 256)
    for kind, name in ((ReadError, "gone/red.tif"), (GridError, "moved.tif")):
        with pytest.raises(kind, match=f"{server.url}/{name}: ") as error:
            read(href.format(name), slice(0, 9), slice(0, 9))
        assert error.value.href == href.format(name)
        assert "secret" not in repr(error.value)
        pickling_support.install(error.value)  # as Dask does
        again = pickle.loads(pickle.dumps(error.value))
        assert (repr(again), again.href) == (repr(error.value), error.value.href)


@pytest.mark.parametrize(
    ("provider", "href", "why"),
    [
        ("cdse", "s3://eodata/a.jp2", "cdse asks for keys: set AWS_ACCESS_KEY_ID"),
        ("earth-search", "s3://sentinel-s2-l1c/a.jp2", "its readers pay: set AWS_ACCESS_KEY_ID"),
        ("static", "gs://bucket/a.tif", "found an address of another kind"),
    ],
)
def test_missing_keys_are_named(provider: str, href: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in access.KEYS:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ReadError, match=why):
        read(href, slice(0, 9), slice(0, 9), provider)


@pytest.fixture(scope="module")
def s3(assets: Path, s3_server: str) -> str:
    """A real S3 server with the assets in the bucket `pixels`."""
    boto3 = pytest.importorskip("boto3")
    client = boto3.client(
        "s3", endpoint_url=s3_server, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
    )
    for bucket in ("pixels", "sentinel-s2-l1c"):
        client.create_bucket(Bucket=bucket)
        client.upload_file(str(assets / "1.tif"), bucket, "folder/red.tif", ExtraArgs={"ACL": "public-read"})
    return s3_server


@pytest.mark.parametrize("name", ENDPOINTS)
def test_s3_with_keys_from_the_environment(s3: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, s3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    rows, cols = slice(17, 936), slice(0, 1025)
    for provider, bucket in (("static", "pixels"), ("cdse", "pixels"), ("earth-search", "sentinel-s2-l1c")):
        data = read(f"s3://{bucket}/folder/red.tif", rows, cols, provider)
        assert np.array_equal(data, pixels(1)[rows, cols])


def test_an_s3_object_that_is_replaced_is_read_anew(s3: str, assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boto3 = pytest.importorskip("boto3")
    monkeypatch.setattr(access, "FIRST_DELAY", 0.01)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    client = boto3.client("s3", endpoint_url=s3, region_name="us-east-1")
    window = slice(900, 940), slice(0, 40)
    for index in (1, 3):
        client.upload_file(str(assets / f"{index}.tif"), "pixels", "replaced.tif")
        assert np.array_equal(read("s3://pixels/replaced.tif", *window), pixels(index)[window])


def test_s3_without_keys_reads_public_buckets(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in access.KEYS:
        monkeypatch.delenv(name, raising=False)
    host = s3.removeprefix("http://")
    monkeypatch.setenv("AWS_S3_ENDPOINT", host)
    monkeypatch.setenv("AWS_HTTPS", "NO")
    assert np.array_equal(read("s3://pixels/folder/red.tif", slice(0, 64), slice(0, 64)), pixels(1)[:64, :64])
    with pytest.raises(ReadError, match=r"s3://pixels/folder/none\.tif"):
        read("s3://pixels/folder/none.tif", slice(0, 9), slice(0, 9))


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that names no server and no keys."""
    endpoints = (*ENDPOINTS, "AWS_S3_ENDPOINT", "S2CD_SOURCE_ENDPOINT_URL")
    for name in (*endpoints, *access.KEYS, *SOURCE_KEYS):
        monkeypatch.delenv(name, raising=False)


def set_keys(monkeypatch: pytest.MonkeyPatch, prefix: str, key: str) -> None:
    monkeypatch.setenv(f"{prefix}_ACCESS_KEY_ID", key)
    monkeypatch.setenv(f"{prefix}_SECRET_ACCESS_KEY", "secret")


@pytest.mark.usefixtures("bare")
def test_scenes_have_keys_and_a_server_of_their_own(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of Copernicus Data Space, while maps go to a bucket of one's own."""
    from moto.moto_api import recorder

    def fetch() -> bytes:
        options = access.s3_options("static", "s3://pixels/folder/red.tif")
        return ranges.s3_source("pixels", "folder/red.tif", options).fetch(0, 2)

    monkeypatch.chdir(tmp_path)  # where the server keeps what it was asked
    recorder.start_recording()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-maps")
    set_keys(monkeypatch, "AWS", "MAPS")
    assert fetch() == b"II"
    for key in ("SCENES", "RENEWED"):
        set_keys(monkeypatch, "S2CD_SOURCE", key)
        assert fetch() == b"II"
    for name in ENDPOINTS:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("S2CD_SOURCE_ENDPOINT_URL", s3)
    assert fetch() == b"II"
    recorder.stop_recording()
    asked = [json.loads(line)["headers"] for line in recorder.download_recording().splitlines()]
    signed = [re.findall(r"Credential=(\w+)/", headers["Authorization"])[0] for headers in asked]
    assert signed == ["MAPS", "SCENES", "RENEWED", "RENEWED"]
    assert ["X-Amz-Security-Token" in headers for headers in asked] == [True, False, False, False]


EODATA, FRANKFURT = "https://eodata.dataspace.copernicus.eu", "https://s3.eu-central-1.amazonaws.com"


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("provider", "bucket", "own"),
    [
        ("cdse", "eodata", EODATA),
        ("earth-search", "sentinel-s2-l1c", FRANKFURT),
        ("static", "mine", "http://maps:9000"),
    ],
)
def test_the_server_of_maps_is_not_asked_for_scenes_with_keys_of_their_own(
    monkeypatch: pytest.MonkeyPatch, provider: str, bucket: str, own: str
) -> None:
    def endpoint() -> str:
        return access.s3_options(provider, f"s3://{bucket}/a.jp2")["endpoint"]

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://maps:9000")
    set_keys(monkeypatch, "AWS", "key")
    assert endpoint() == "http://maps:9000"
    set_keys(monkeypatch, "S2CD_SOURCE", "key")
    assert endpoint() == own
    monkeypatch.setenv("S2CD_SOURCE_ENDPOINT_URL", "scenes:9000")
    assert endpoint() == "https://scenes:9000"


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("name", SOURCE_KEYS)
def test_one_key_of_two_is_not_half_used(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    set_keys(monkeypatch, "AWS", "key")
    monkeypatch.setenv(name, "x")
    with pytest.raises(ReadError, match=f"found {name} alone, expected {SOURCE_KEYS[0]} and {SOURCE_KEYS[1]}"):
        read("s3://eodata/a.jp2", slice(0, 9), slice(0, 9), "cdse")


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("bucket", "region"),
    [
        ("deafrica-sentinel-2", "af-south-1"),
        ("sentinel-cogs", "us-west-2"),
        ("e84-earth-search-sentinel-data", "us-west-2"),
    ],
)
def test_open_buckets_are_read_in_their_region_without_signature(
    monkeypatch: pytest.MonkeyPatch, bucket: str, region: str
) -> None:
    """Keys of the bucket that maps go to mean nothing there."""
    href = f"s3://{bucket}/a.tif"
    place = {"region": region, "endpoint": f"https://s3.{region}.amazonaws.com"}
    set_keys(monkeypatch, "AWS", "key")
    assert access.s3_options("static", href) == place | {"skip_signature": "true"}
    set_keys(monkeypatch, "S2CD_SOURCE", "key")
    assert access.s3_options("static", href) == place
    monkeypatch.setenv("S2CD_SOURCE_ENDPOINT_URL", "http://mirror")
    assert access.s3_options("static", href) == {"endpoint": "http://mirror"}


@pytest.mark.usefixtures("bare")
def test_requester_pays_is_said_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    options = access.s3_options("earth-search", "s3://sentinel-s2-l1c/a.jp2")
    assert (options["request_payer"], options["region"]) == ("true", "eu-central-1")
    assert "request_payer" not in access.s3_options("cdse", "s3://eodata/a.jp2")


@pytest.mark.usefixtures("bare")
def test_a_copy_of_an_archive_is_read_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint and the keys of Copernicus Data Space are those of its own bucket."""
    assert access.s3_options("cdse", "s3://my-mirror/a.jp2") == {"skip_signature": "true"}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    assert access.s3_options("cdse", "s3://my-mirror/a.jp2") == {}
    assert access.s3_options("cdse", "s3://eodata/a.jp2")["endpoint"] == "https://eodata.dataspace.copernicus.eu"


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 60)), max_size=20), st.integers(0, 40))
def test_merged_ranges_cover_the_same_bytes(drawn: list[tuple[int, int]], gap: int) -> None:
    wanted = [(start, start + length) for start, length in drawn]
    merged = ranges.merge_ranges(wanted, gap)
    assert all(any(a <= start and stop <= b for a, b in merged) for start, stop in wanted)
    assert all(later[0] - earlier[1] > gap for earlier, later in pairwise(merged))
