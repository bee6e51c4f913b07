"""`s2cd cluster show` and `check`: what a profile would start, and what one of its workers sees."""

from __future__ import annotations

import os
import resource
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client

from s2cd.addresses import public_href, without_secrets
from s2cd.clusters.environment import worker_environment
from s2cd.clusters.profiles import (
    CudaProfile,
    ExistingProfile,
    LocalProfile,
    PbsProfile,
    Profile,
    SlurmProfile,
    load_profile,
)
from s2cd.clusters.start import batch_job, cluster, cuda_threads, local_resources, scheduler_address
from s2cd.errors import ClusterError

Check = tuple[str, bool, str]
_PACKAGES = ("s2cd", "python", "dask", "distributed", "numpy", "torch", "xarray", "rasterio", "gdal")
_MAPPED = 96 << 20  # bytes: above the 64 MiB that a thread's own arena can hold


def show_profile(profile: str | Path | Profile | dict[str, Any]) -> str:
    """The job script or the worker command that `cluster(profile)` would use; nothing is started."""
    settings = load_profile(profile)
    if isinstance(settings, SlurmProfile | PbsProfile):
        job = batch_job(settings)
        jobs = settings.jobs
        number = f"# submitted as needed: {jobs.minimum} to {jobs.maximum} jobs"
        return f"{job.job_script().rstrip()}\n\n{number}\n"
    if isinstance(settings, LocalProfile):
        threads, memory = local_resources(settings)
        command = _worker_command(settings.processes, threads, memory)
    elif isinstance(settings, CudaProfile):
        threads = cuda_threads(settings)
        command = f"dask cuda worker <scheduler address> --nthreads {threads} --memory-limit {settings.memory}"
        command += f" --device-memory-limit {settings.device_memory}"
    else:
        threads = local_resources(LocalProfile())[0]
        address = shlex.quote(settings.address) if settings.address else "$DASK_SCHEDULER_ADDRESS"
        if settings.scheduler_file:
            address = f"--scheduler-file {shlex.quote(settings.scheduler_file)}"
        command = f"# connects to {address}; start its workers like this:\n"
        command += _worker_command(1, threads, "auto", address)
        if settings.tls is not None:
            files = {"ca-file": settings.tls.ca_file, "cert": settings.tls.cert, "key": settings.tls.key}
            command += "".join(f" --tls-{option} {shlex.quote(str(file))}" for option, file in files.items())
    variables = worker_environment(threads) | settings.environment
    exports = "\n".join(f"export {key}={shlex.quote(value)}" for key, value in variables.items())
    return f"{exports}\n{command}\n"


def _worker_command(processes: int, threads: int, memory: int | str, address: str = "<scheduler address>") -> str:
    return f"dask worker {address} --nworkers {processes} --nthreads {threads} --memory-limit {memory}"


def check_profile(
    profile: str | Path | Profile | dict[str, Any],
    out: str | None = None,
    source: str | None = None,
    timeout: float = 300,
) -> list[Check]:
    """Start one worker and report what it sees, as (what is checked, whether it is well, what was found).

    `out` is an output folder or URL, `source` an asset's path or URL: both are tried from the worker. Raises
    ClusterError if no worker arrives within `timeout` seconds.
    """
    from s2cd.outputs import absolute

    settings = _one_worker(load_profile(profile))
    out = None if out is None else absolute(out)  # as a run does
    with cluster(settings) as client:
        found = client.submit(probe, out, source, key=f"s2cd-check-{os.urandom(4).hex()}")
        try:
            seen = found.result(timeout=timeout)
        except TimeoutError:
            raise ClusterError(
                f"{scheduler_address(client)}: found no worker after {timeout:.0f} s, expected 1"
            ) from None
        return _report(settings, client, seen)


def _one_worker(profile: Profile) -> Profile:
    if isinstance(profile, LocalProfile):
        return profile.model_copy(update={"processes": 1})
    if isinstance(profile, CudaProfile):
        return profile
    if isinstance(profile, ExistingProfile):
        return profile.model_copy(update={"workers": 1})
    return profile.model_copy(update={"jobs": profile.jobs.model_copy(update={"minimum": 0, "maximum": 1})})


def probe(out: str | None = None, source: str | None = None) -> dict[str, Any]:
    """What this process sees: run it on a worker."""
    import torch
    from distributed import get_worker

    try:
        worker = get_worker()
        threads, memory = worker.state.nthreads, worker.memory_manager.memory_limit
    except ValueError:
        threads, memory = 1, None
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "threads": threads,
        "memory": memory,
        "gpus": [(gpu.name, gpu.total_memory) for gpu in gpus],
        "torch_threads": torch.get_num_threads(),
        "environment": {key: os.environ.get(key) for key in worker_environment()},
        "returned": returned_pages(),
        "out": None if out is None else _try(_write, out),
        "source": None if source is None else _try(_read, source),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that client and workers must share."""
    from importlib.metadata import PackageNotFoundError, version

    import rasterio

    found = {"python": "{}.{}.{}".format(*sys.version_info[:3]), "gdal": rasterio.__gdal_version__}
    for name in _PACKAGES:
        if name not in found:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "absent"
    return found


def returned_pages() -> float:
    """Share of a large buffer's pages that the allocator returns to the kernel between two uses, 0 to 1."""

    def use() -> None:
        np.empty(_MAPPED, np.uint8)[:: resource.getpagesize()] = 1

    use()
    who = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
    before = resource.getrusage(who).ru_minflt
    use()
    return (resource.getrusage(who).ru_minflt - before) / (_MAPPED / resource.getpagesize())


def _try(action: Any, target: str) -> tuple[bool, str]:
    try:
        return True, f"{public_href(target)}: {action(target)}"
    except Exception as error:
        why = without_secrets(" ".join(str(error).split()))
        return False, f"{public_href(target)}: {type(error).__name__}: {why}"


def _write(out: str) -> str:
    from s2cd.outputs import check_writable

    check_writable(out)
    return "writable"


def _read(source: str) -> str:
    from s2cd.catalog.access import open_dataset
    from s2cd.catalog.providers import provider_of

    with open_dataset(provider_of(source), source) as dataset:
        return f"{dataset.width} x {dataset.height} px, {dataset.dtypes[0]}"


def _report(profile: Profile, client: Client, seen: Mapping[str, Any]) -> list[Check]:
    checks = [("worker", True, f"{seen['host']}: {seen['threads']} threads, {_gib(seen['memory'])}")]
    here = versions()
    differ = [f"{k} {seen['versions'][k]} (client {v})" for k, v in here.items() if seen["versions"][k] != v]
    same = ", ".join(f"{name} {version}" for name, version in here.items())
    checks.append(("packages", not differ, "; ".join(differ) or same))
    wanted = isinstance(profile, CudaProfile) or bool(getattr(profile, "gpus", 0))
    gpus = ", ".join(f"{name} {_gib(memory)}" for name, memory in seen["gpus"])
    checks.append(("gpu", bool(gpus) or not wanted, gpus or "none"))
    pool = seen["torch_threads"]
    checks.append(("torch threads", pool == 1, f"{pool} for each Dask thread"))
    missing = [key for key, value in seen["environment"].items() if value is None]
    checks.append(("environment", not missing, f"not set: {', '.join(missing)}" if missing else "set"))
    kept = seen["returned"] < 0.001
    slow = "returns large buffers to the kernel, which halves the network's speed"
    checks.append(("allocator", kept, "keeps large buffers" if kept else slow))
    checks += [(key, *seen[key]) for key in ("out", "source") if seen[key] is not None]
    return checks


def _gib(size: int | None) -> str:
    return "no memory limit" if size is None else f"{size / 2**30:.1f} GiB"
