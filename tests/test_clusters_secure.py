"""Clusters that keep secrets: buckets with keys from the environment only, and schedulers that speak TLS."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import cloudpickle
import dask
import pytest
import requests
from distributed import Client, Scheduler, SchedulerPlugin
from places_support import (
    BIN,
    PAIRS,
    background,
    call,
    demo_catalogue,
    maps_of,
    refuses_strangers,
    run_in_small_parts,
)

import s2cd
from s2cd.catalog.static import iter_items, read_document
from s2cd.clusters import check_profile, show_profile
from s2cd.errors import ClusterError, S2cdWarning
from s2cd.outputs import validate
from s2cd.outputs.store import open_store
from s2cd.runner import run

KEY, SECRET = "AKIAS2CDACCESSKEYID0", "s2cd/secret+that-stays-where-it-is/0000"
WORKER = {"kind": "local", "processes": 1, "threads": 2, "memory": "2 GiB", "dashboard": 0}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> str:
    return demo_catalogue(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def expected(catalog: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected")
    with s2cd.cluster(WORKER) as client:
        assert run_in_small_parts(catalog, out, client).ok
    return maps_of(out)


@pytest.fixture(scope="module")
def buckets(catalog: str, s3_server: str) -> Iterator[str]:
    """A real S3 server with an empty bucket `maps`, and the scenes in `scenes`; its keys are in the environment."""
    boto3 = pytest.importorskip("boto3")
    settings = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_server,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=s3_server)
        folder = Path(catalog).parent
        for bucket in ("maps", "scenes"):
            client.create_bucket(Bucket=bucket)
        for path in folder.rglob("*.tif"):
            client.upload_file(str(path), "scenes", str(path.relative_to(folder)))
        yield s3_server


def in_bucket(catalog: str, folder: Path) -> str:
    """Write the catalogue's items as one file whose assets lie in the bucket `scenes`."""
    items = []
    for item, address in iter_items(read_document(catalog), catalog):
        for asset in item["assets"].values():
            asset["href"] = f"s3://scenes/{Path(address).parent.name}/{Path(asset['href']).name}"
        items.append(item)
    assert len(items) == PAIRS + 1
    target = folder / "items.json"
    target.write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    return str(target)


class Keep(SchedulerPlugin):
    """Keeps what the scheduler is given to compute."""

    def __init__(self) -> None:
        self.graphs: list[bytes] = []

    def update_graph(self, scheduler: Scheduler, *_: object, **__: object) -> None:
        self.graphs += [cloudpickle.dumps(task.run_spec) for task in scheduler.tasks.values()]


def test_sources_and_maps_in_buckets_and_no_key_in_graph_log_or_item(
    catalog: str, expected: dict[str, bytes], buckets: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker process of its own reads and writes with the keys of its environment; one asset is missing."""
    keep = Keep()
    config = s2cd.RunConfig(catalog=in_bucket(catalog, tmp_path), out="s3://maps/a", min_valid=0.0, dates_per_task=2)
    document = json.loads(Path(config.catalog).read_text())
    document["features"][0]["assets"]["nir08"]["href"] = "s3://scenes/gone.tif"
    (tmp_path / "lost.json").write_text(json.dumps(document))
    lost = config.model_copy(update={"catalog": str(tmp_path / "lost.json"), "out": "s3://maps/lost"})
    with (
        caplog.at_level(logging.DEBUG),
        warnings.catch_warnings(action="ignore", category=S2cdWarning),
        s2cd.cluster(WORKER) as client,
    ):
        client.cluster.scheduler.add_plugin(keep)
        assert run(config, client).ok
        failed = run(lost, client)
        logs = [client.get_worker_logs(), client.get_scheduler_logs(), client.cluster.get_logs()]
    store = open_store("s3://maps/a")
    objects = {name: store.get(name) for name, _ in store.list()}
    assert {Path(name).name: data for name, data in objects.items() if name.endswith(".tif")} == expected
    assert validate("s3://maps/a") == []
    assert [r.status for r in failed.maps].count("failed") == 1
    assert any("gone.tif" in (r.error or "") for r in failed.maps)
    assert b"s3://scenes/" in b"".join(keep.graphs)
    left = open_store("s3://maps/lost")
    places = {
        "graph": keep.graphs,
        "log": [repr(logs).encode(), caplog.text.encode()],
        "item": [*objects.values(), *(left.get(name) for name, _ in left.list()), repr(failed).encode()],
    }
    for place, texts in places.items():
        for secret in (KEY, SECRET):
            assert not any(secret.encode() in text for text in texts), place


def test_check_tries_buckets_with_the_keys_of_the_worker(buckets: str) -> None:
    source = next(f"s3://scenes/{name}" for name, _ in open_store("s3://scenes").list() if name.endswith(".tif"))
    out = "s3://user:HIDDEN@maps/check?token=HIDDEN"
    report = {name: (ok, detail) for name, ok, detail in check_profile(WORKER, out=out, source=source)}
    assert report["out"] == (True, "s3://maps/check: writable")
    assert report["source"][0], report["source"]
    report = {name: (ok, detail) for name, ok, detail in check_profile(WORKER, out="s3://nowhere/check")}
    assert not report["out"][0]
    assert SECRET not in repr(report)
    assert KEY not in repr(report)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A certificate of our own for 127.0.0.1 that vouches for itself, and another that nobody knows."""
    folder = tmp_path_factory.mktemp("certificates")
    write_certificate(folder, "cluster")
    write_certificate(folder, "stranger")
    return {path.name: str(path) for path in folder.iterdir()}


def write_certificate(folder: Path, name: str) -> None:
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def scheduler(certificates: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a scheduler that talks TLS only, with one worker."""
    folder = tmp_path_factory.mktemp("tls")
    address = f"tls://127.0.0.1:{free_port()}"
    pem, key = certificates["cluster.pem"], certificates["cluster.key"]
    files = ["--tls-ca-file", pem, "--tls-cert", pem, "--tls-key", key]
    listen = ["--protocol", "tls", "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--no-dashboard"]
    worker = [address, "--nthreads", "2", "--memory-limit", "2GiB", "--no-dashboard"]
    with (
        background([str(BIN / "dask"), "scheduler", *listen, *files], folder / "scheduler.log"),
        background([str(BIN / "dask"), "worker", *worker, *files], folder / "worker.log"),
    ):
        yield address


def profile_of(address: str, certificates: dict[str, str], name: str) -> dict[str, object]:
    pem, key = certificates[f"{name}.pem"], certificates[f"{name}.key"]
    return {"kind": "existing", "address": address, "tls": {"ca_file": pem, "cert": pem, "key": key}}


def test_a_scheduler_that_speaks_tls_gives_the_same_maps(
    catalog: str, expected: dict[str, bytes], scheduler: str, certificates: dict[str, str], tmp_path: Path
) -> None:
    profile = profile_of(scheduler, certificates, "cluster")
    assert f"--tls-key {certificates['cluster.key']}" in show_profile(profile)
    with s2cd.cluster(profile) as client:
        assert run_in_small_parts(catalog, tmp_path, client).ok
        info = client.scheduler_info(n_workers=-1)
        assert all(worker.startswith("tls://") for worker in info["workers"])
    assert maps_of(tmp_path) == expected


def test_tls_of_dasks_own_configuration_is_used(scheduler: str, certificates: dict[str, str]) -> None:
    pem, key = certificates["cluster.pem"], certificates["cluster.key"]
    own = {"ca-file": pem, "client.cert": pem, "client.key": key}
    with (
        dask.config.set({f"distributed.comm.tls.{name}": value for name, value in own.items()}),
        s2cd.cluster({"kind": "existing", "address": scheduler}) as client,
    ):
        assert client.submit(sum, [1, 2]).result() == 3


def test_a_stranger_is_refused_in_one_line(scheduler: str, certificates: dict[str, str]) -> None:
    refused = profile_of(scheduler, certificates, "stranger") | {"timeout": 3}
    for profile in (refused, {"kind": "existing", "address": scheduler, "timeout": 3}):
        with pytest.raises(ClusterError, match=f"{scheduler}: no scheduler answers") as caught:
            s2cd.cluster(profile).__enter__()
        assert "\n" not in str(caught.value)


def test_a_certificate_that_is_not_there_is_named(certificates: dict[str, str]) -> None:
    absent = profile_of("tls://127.0.0.1:9", certificates, "cluster")
    absent["tls"] = {"ca_file": certificates["cluster.pem"], "cert": "none.pem", "key": "none.pem"}
    with pytest.raises(ClusterError, match=r"tls\.cert: found no file none\.pem"):
        s2cd.cluster(absent).__enter__()


QSUB = """#!/bin/sh
export PBS_O_WORKDIR="$PWD"
cd /
setsid bash -c "$(cat "$1")" >"$PBS_O_WORKDIR/job.log" 2>&1 </dev/null &
echo $!
"""


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A cluster of kind pbs. Its jobs run at once on this machine, in another folder than the client, as PBS has it."""
    pytest.importorskip("dask_jobqueue")
    folder = tmp_path_factory.mktemp("pbs")
    (folder / "bin").mkdir()
    for name, script in (("qsub", QSUB), ("qdel", '#!/bin/sh\nkill -- "-$1"\n')):
        (folder / "bin" / name).write_text(script)
        (folder / "bin" / name).chmod(0o755)
    (folder / "mine.py").write_text("def answer(): return 42\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        profile = {"kind": "pbs", "cores": 1, "memory": "1 GiB", "dashboard": 0, "jobs": {"minimum": 1, "maximum": 1}}
        link = {"distributed.dashboard.link": "/proxy/{host}:{port}/status"}  # as a site's JupyterHub has it
        with dask.config.set(link), s2cd.cluster(profile) as client:
            client.wait_for_workers(1, timeout=60)
            yield client
        assert list((folder / "s2cd-logs").iterdir()) == []


def test_a_batch_cluster_refuses_strangers(batch: Client) -> None:
    """Every user of a site reaches its hosts, and a scheduler runs what it is sent."""
    (worker,) = batch.scheduler_info(n_workers=-1)["workers"]
    for address in (batch.scheduler.address, worker):
        call(address, batch.security)
        refuses_strangers(address)
    assert batch.submit(sum, [1, 2]).result() == 3


def test_dashboards_of_a_batch_cluster_are_for_their_hosts_alone(batch: Client) -> None:
    server = batch.cluster.scheduler.http_server
    assert server.address == "127.0.0.1"
    assert batch.dashboard_link == f"/proxy/127.0.0.1:{server.port}/status"
    assert requests.get(f"http://127.0.0.1:{server.port}/status", timeout=30).ok
    assert set(batch.run(lambda dask_worker: dask_worker.http_server.address).values()) == {"127.0.0.1"}


def test_jobs_of_pbs_find_what_lies_in_the_clients_folder(batch: Client) -> None:
    assert batch.submit(eval, "__import__('mine').answer()").result() == 42


def test_no_other_user_reads_the_certificate_of_a_batch_cluster(batch: Client) -> None:
    (folder,) = Path("s2cd-logs").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600, 0o600]


def test_a_batch_cluster_without_cryptography_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ClusterError, match=r"^profile of kind slurm: cryptography cannot be imported .*\[hpc\]"):
        s2cd.cluster("slurm").__enter__()
