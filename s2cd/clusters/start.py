"""Start what a profile describes, hand out a Dask client, and take everything down again."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster
from distributed.deploy.spec import SpecCluster
from distributed.security import Security

from s2cd.clusters.anywhere import Anywhere
from s2cd.clusters.environment import SetupWorker, environment, worker_environment
from s2cd.clusters.machine import available_cores, available_memory
from s2cd.clusters.profiles import (
    CudaProfile,
    ExistingProfile,
    LocalProfile,
    PbsProfile,
    Profile,
    SlurmProfile,
    Tls,
    load_profile,
)
from s2cd.errors import ClusterError
from s2cd.interrupts import deaf_processes, noted_interrupts

log = logging.getLogger(__name__)

# Tasks last from seconds to minutes and are few. An unknown one counts as ten seconds of work, so that scaling
# asks for a core for each instead of one for ten; a lost worker is replaced after seconds. The scheduler's logs for
# its developers hold whole tasks, a thousand messages of each worker: kept short, its memory does not grow in a run.
# Ticks and profile are taken less often: 50 and 100 times a second they cost two more per cent of a core.
SCHEDULING = {
    "distributed.scheduler.unknown-task-duration": "10s",
    "distributed.adaptive.target-duration": "10s",
    "distributed.adaptive.interval": "1s",
    "distributed.adaptive.wait-count": 3,
    "distributed.deploy.lost-worker-timeout": "5s",
    "distributed.admin.low-level-log-length": 20,
    "distributed.diagnostics.computations.max-history": 10,
    "distributed.admin.tick.interval": "500ms",
    "distributed.worker.profile.interval": "100ms",
}
_LIFETIME, _STAGGER = 0.85, 0.05  # of the walltime: workers hand over before the batch system kills them
THREADS_A_GPU = 16  # in one process; half of the time they wait for each other already
_WORKER_SHARE = 0.85  # of the memory; the rest is the client's, the scheduler's and the page cache's
_SILENT = logging.CRITICAL  # of Dask on this machine: a run's own report tells what failed, in words for its user
_HERE = "127.0.0.1"  # where dashboards listen: whoever reaches one sees the run, unasked
_CERTIFICATE, _KEY = "cluster.pem", "cluster.key"
_ROLES = ("client", "scheduler", "worker")


@contextlib.contextmanager
def cluster(profile: str | Path | Profile | dict[str, Any] = "local") -> Iterator[Client]:
    """A Dask client on the cluster of a profile; the cluster, where s2cd started it, ends with the context.

    `profile` is a YAML file, a bare name ("local", "cuda", "slurm", "slurm-gpu", "pbs", "existing"), a mapping,
    or a profile. On batch systems jobs are asked for when there is work: a fresh client has no workers yet.

    Raises ClusterError if the profile is wrong, something it needs is absent, or no scheduler answers.
    """
    settings = load_profile(profile)
    # A run loads the network here too; meanwhile workers start.
    threading.Thread(target=importlib.import_module, args=("s2cd.model",), daemon=True).start()
    with dask.config.set(SCHEDULING), contextlib.ExitStack() as stack:
        with _interrupts_later() if isinstance(settings, LocalProfile | CudaProfile) else contextlib.nullcontext():
            client = stack.enter_context(_client(settings))
            log.info("Dask dashboard: %s", client.dashboard_link)
            _prepare(client)
        yield client


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Raise a Ctrl-C when the block ends: a cluster that is half started can neither be used nor taken down.

    Also where the block fails: a SIGTERM to all processes of a job ends the workers that start.
    """
    interrupted = threading.Event()
    try:
        with noted_interrupts(interrupted):
            yield
    finally:
        if interrupted.is_set():
            raise KeyboardInterrupt from None


@contextlib.contextmanager
def _client(settings: Profile) -> Iterator[Client]:
    if isinstance(settings, ExistingProfile):
        with _connect(settings) as client:
            yield client
        return
    with contextlib.ExitStack() as stack:
        try:
            client = stack.enter_context(Client(stack.enter_context(_start(settings))))
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ClusterError(f"cluster of kind {settings.kind}: does not start ({reason})") from error
        yield client


def scheduler_address(client: Client) -> str:
    """Where the client's scheduler listens."""
    return str(client.scheduler_info(n_workers=0)["address"])


def prepare_scheduler(client: Client) -> None:
    """Let work whose workers are gone go to others.

    Raises ClusterError for a scheduler without s2cd, which could not read task graphs either.
    """
    try:
        client.register_plugin(Anywhere())
    except ImportError as error:
        raise ClusterError(
            f"{scheduler_address(client)}: the scheduler lacks s2cd ({error}), expected the version of this client"
        ) from None


def _prepare(client: Client) -> None:
    prepare_scheduler(client)
    try:
        client.register_plugin(SetupWorker(str(client.scheduler_info(n_workers=0)["id"])))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ClusterError(
            f"{scheduler_address(client)}: its workers cannot be prepared ({reason}); expected s2cd installed"
            " on every worker"
        ) from error


def _start(profile: LocalProfile | CudaProfile | SlurmProfile | PbsProfile) -> Any:
    if isinstance(profile, LocalProfile):
        return _local(profile)
    if isinstance(profile, CudaProfile):
        return _cuda(profile)
    return _batch(profile)


def local_resources(profile: LocalProfile) -> tuple[int, int]:
    """Threads and bytes of memory of each worker process of a local cluster.

    The default is one process with a thread for each core: reading, the network and encoding release the
    interpreter's lock, and one process reads a block that two neighbouring tasks need only once.
    """
    threads = max(1, available_cores() // profile.processes) if profile.threads == "auto" else profile.threads
    share = int(available_memory() * _WORKER_SHARE / profile.processes)
    return threads, share if profile.memory == "auto" else profile.memory


def cuda_threads(profile: CudaProfile) -> int:
    """Threads of the worker of each GPU: by default its share of the cores, at most THREADS_A_GPU."""
    from s2cd.model.device import device_count

    if profile.threads != "auto":
        return profile.threads
    share = available_cores() // max(1, device_count() if profile.gpus == "all" else len(profile.gpus))
    return min(max(1, share), THREADS_A_GPU)


@contextlib.contextmanager
def _local(profile: LocalProfile) -> Iterator[SpecCluster]:
    threads, memory = local_resources(profile)
    variables = worker_environment(threads) | profile.environment
    with deaf_processes(), _nanny_environment(variables), _quiet_ports(), _script_unseen():
        started = LocalCluster(
            n_workers=profile.processes,
            threads_per_worker=threads,
            memory_limit=memory,
            dashboard_address=f"{_HERE}:{profile.dashboard}",
            silence_logs=_SILENT,
        )
    with started:
        yield started


@contextlib.contextmanager
def _nanny_environment(variables: dict[str, str]) -> Iterator[None]:
    """Let Dask's nannies start their workers with these variables; this process has them only meanwhile.

    Nannies prefer the process's own value to the configured one, so both are set; each keeps a copy for the
    workers that it restarts later.
    """
    with environment(variables), dask.config.set({"distributed.nanny.pre-spawn-environ": variables}):
        yield


@contextlib.contextmanager
def _script_unseen() -> Iterator[None]:
    """Keep new worker processes from importing the script that starts them: without a guard it would run in each.

    They do not need it: what is defined there travels by value (cloudpickle).
    """
    main: dict[str, Any] = vars(sys.modules["__main__"])
    seen: dict[str, Any] = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main.update(dict.fromkeys(seen))
    try:
        yield
    finally:
        main.update(seen)


@contextlib.contextmanager
def _quiet_ports() -> Iterator[None]:
    """A second cluster on the machine gets another dashboard port; that needs no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        yield


@contextlib.contextmanager
def _cuda(profile: CudaProfile) -> Iterator[SpecCluster]:
    """One worker a GPU."""
    local_cuda_cluster = _import_dask_cuda()
    threads = cuda_threads(profile)
    variables = worker_environment(threads) | profile.environment
    options: dict[str, Any] = {} if profile.memory == "auto" else {"memory_limit": profile.memory}
    if profile.gpus != "all":
        options["CUDA_VISIBLE_DEVICES"] = profile.gpus
    with deaf_processes(), _nanny_environment(variables), _quiet_ports(), _script_unseen():
        started = local_cuda_cluster(
            threads_per_worker=threads,
            device_memory_limit=profile.device_memory,
            dashboard_address=f"{_HERE}:{profile.dashboard}",
            silence_logs=_SILENT,
            **options,
        )
    with started:
        yield started


def _import_dask_cuda() -> Any:
    import torch

    if not torch.cuda.is_available():
        raise ClusterError(
            "profile of kind cuda: found no CUDA device that torch can use, expected at least one;"
            " use the profile 'local' on a machine without a GPU"
        )
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise ClusterError(
            f"profile of kind cuda: dask-cuda cannot be imported ({error});"
            " pip install -e '.[cuda]' in the checkout of s2cd"
        ) from None
    return LocalCUDACluster


def batch_threads(profile: SlurmProfile | PbsProfile) -> int:
    """Dask threads of one job."""
    return profile.cores if profile.threads == "auto" else profile.threads


def job_options(profile: SlurmProfile | PbsProfile) -> dict[str, Any]:
    """The profile in dask-jobqueue's words."""
    threads = batch_threads(profile)
    variables = worker_environment(threads, profile.cores) | profile.environment
    exports = [f"export {key}={shlex.quote(value)}" for key, value in variables.items()]
    options: dict[str, Any] = {
        "cores": threads,
        "processes": 1,
        "memory": str(profile.memory),
        "walltime": _clock(profile.walltime),
        "queue": profile.queue,
        "account": profile.account,
        "job_name": "s2cd-worker",
        "interface": profile.interface,
        # dask-jobqueue puts both into a line of the shell; variables such as $SLURM_TMPDIR are to be expanded there
        "local_directory": f'"{profile.scratch_folder}"' if profile.scratch_folder else None,
        "job_script_prologue": [*profile.prologue, *exports],
        "worker_extra_args": [
            *("--lifetime", f"{int(profile.walltime * _LIFETIME)}s"),
            *("--lifetime-stagger", f"{int(profile.walltime * _STAGGER)}s"),
            *("--no-dashboard", "--dashboard-address", f"{_HERE}:0"),
        ],
        "death_timeout": 60,
        "python": shlex.quote(profile.python or sys.executable),
    }
    if isinstance(profile, SlurmProfile):
        return options | _slurm_options(profile)
    return options | _pbs_options(profile, options["job_script_prologue"])


def _slurm_options(profile: SlurmProfile) -> dict[str, Any]:
    directives = [f'-o "{profile.log_folder}/%x-%j.log"']
    if profile.gpus:
        kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
        directives.append(f"--gres=gpu:{kind}{profile.gpus}")
    return {"job_cpu": profile.cores, "job_extra_directives": [*directives, *profile.directives]}


def _pbs_options(profile: PbsProfile, prologue: list[str]) -> dict[str, Any]:
    select = f"select=1:ncpus={profile.cores}:mem={-(-profile.memory // 2**20)}MB"
    if profile.gpus:
        select += f":ngpus={profile.gpus}"
    # -V: the workers get the client's environment, so credentials need no file and stand in no script
    directives = ["-V", "-j oe", f"-o {profile.log_folder}/"]
    return {
        "resource_spec": select,
        "job_extra_directives": [*directives, *profile.directives],
        "job_script_prologue": ['cd "$PBS_O_WORKDIR"', *prologue],  # jobs start at home: a mask function lies here
    }


def _clock(seconds: int) -> str:
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def batch_cluster_class(profile: SlurmProfile | PbsProfile) -> Any:
    """dask-jobqueue's cluster class for the profile."""
    try:
        dask_jobqueue = importlib.import_module("dask_jobqueue")
        importlib.import_module("cryptography")  # Dask misses it only when it makes certificates, after the search
    except ImportError as error:
        raise ClusterError(
            f"profile of kind {profile.kind}: {error.name} cannot be imported ({error});"
            " pip install -e '.[hpc]' in the checkout of s2cd"
        ) from None
    return dask_jobqueue.SLURMCluster if isinstance(profile, SlurmProfile) else dask_jobqueue.PBSCluster


def batch_job(profile: SlurmProfile | PbsProfile, scheduler: str = "<scheduler address>") -> Any:
    """dask-jobqueue's job of the profile: one worker."""
    job_class = batch_cluster_class(profile).job_cls
    security = job_security(Path("<certificates>"))
    return job_class(scheduler, name="<worker name>", protocol="tls://", security=security, **job_options(profile))


def try_submission(profile: Profile) -> None:
    """Find out now whether a batch system would take a job: later, Dask only logs a refusal and asks again.

    Slurm judges the whole script without queueing it; of PBS only the command's presence can be known. Raises
    ClusterError for a refusal.
    """
    if not isinstance(profile, SlurmProfile | PbsProfile):
        return
    job = batch_job(profile)
    if shutil.which(job.submit_command.split()[0]) is None:
        raise ClusterError(
            f"profile of kind {profile.kind}: found no command {job.submit_command!r} on this machine;"
            " expected a host that can submit jobs"
        )
    if isinstance(profile, SlurmProfile):
        with job.job_file() as script:
            tried = subprocess.run(["sbatch", "--test-only", script], capture_output=True, text=True, check=False)
        if tried.returncode:
            reason = "; ".join(line.removeprefix("sbatch: error: ") for line in tried.stderr.splitlines())
            raise ClusterError(f"profile of kind slurm: Slurm refuses the job ({reason})")


@contextlib.contextmanager
def _batch(profile: SlurmProfile | PbsProfile) -> Iterator[SpecCluster]:
    cluster_class = batch_cluster_class(profile)
    Path(profile.log_folder).mkdir(parents=True, exist_ok=True)
    try_submission(profile)
    link = dask.config.get("distributed.dashboard.link").replace("{host}", _HERE)  # not the scheduler's address
    with _certificates(Path(profile.log_folder)) as security, dask.config.set({"distributed.dashboard.link": link}):
        with _quiet_ports():
            started = cluster_class(
                scheduler_options={"dashboard_address": f"{_HERE}:{profile.dashboard}"},
                security=security,
                **job_options(profile),
            )
        with started:
            # adaptive even where minimum equals maximum: a fixed scale does not replace a job that ended
            started.adapt(minimum=profile.jobs.minimum, maximum=profile.jobs.maximum)
            yield started


class JobSecurity(Security):
    """Certificates in files, whose paths dask-jobqueue puts into the shell's line that starts a worker."""

    def get_tls_config_for_role(self, role: str) -> dict[str, str | None]:
        """As Dask's, with a worker's paths quoted: no worker reads them from here."""
        files: dict[str, str | None] = super().get_tls_config_for_role(role)
        return {key: file and shlex.quote(file) for key, file in files.items()} if role == "worker" else files


def job_security(folder: Path) -> JobSecurity:
    """Encryption for those alone who can read the certificate and its key in `folder`."""
    certificate, key = str(folder / _CERTIFICATE), str(folder / _KEY)
    files = {f"tls_{role}_cert": certificate for role in _ROLES} | {f"tls_{role}_key": key for role in _ROLES}
    return JobSecurity(require_encryption=True, tls_ca_file=certificate, **files)


@contextlib.contextmanager
def _certificates(folder: Path) -> Iterator[JobSecurity]:
    """A certificate of the cluster's own, for as long as it lives, where no other user can read it.

    A scheduler runs whatever it is sent, as the user, and every user of a batch system can reach it.
    """
    made = Security.temporary()
    # errors: on NFS a folder stays while some host has one of its files open
    with tempfile.TemporaryDirectory(prefix="tls-", dir=folder.absolute(), ignore_cleanup_errors=True) as private:
        for name, text in ((_CERTIFICATE, made.tls_scheduler_cert), (_KEY, made.tls_scheduler_key)):
            file = Path(private, name)
            file.touch(mode=0o600)
            file.write_text(text)
        yield job_security(Path(private))


@contextlib.contextmanager
def _connect(profile: ExistingProfile) -> Iterator[Client]:
    where = profile.address or profile.scheduler_file or dask.config.get("scheduler-address", None)
    if where is None:
        raise ClusterError(
            "profile of kind existing: found neither address nor scheduler_file, expected one of them or"
            " DASK_SCHEDULER_ADDRESS in the environment"
        )
    security = None if profile.tls is None else _security(profile.tls)
    if profile.scheduler_file and not profile.address:
        where = _address_in(profile.scheduler_file, profile.timeout)
    try:
        client = Client(where, security=security, timeout=profile.timeout)
    except (OSError, TimeoutError, ValueError, TypeError) as error:  # TypeError: a tls:// address without certificates
        reason = " ".join(str(error).split())
        raise ClusterError(f"{where}: no scheduler answers within {profile.timeout} s ({reason})") from None
    with client:
        _await_workers(client, profile, where)
        yield client


def _address_in(file: str, timeout: int) -> str:
    """Wait for a scheduler's file, for which Dask would wait for ever; it may be there before it is whole."""
    until = time.monotonic() + timeout
    while True:
        try:
            return str(json.loads(Path(file).read_text())["address"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            if time.monotonic() > until:
                found = type(error).__name__ if Path(file).exists() else "none"
                raise ClusterError(
                    f"scheduler_file {file}: found {found} after {timeout} s, expected one that a scheduler wrote"
                ) from None
        time.sleep(0.1)


def _security(tls: Tls) -> Security:
    for key, path in tls.model_dump().items():
        if not Path(path).is_file():
            raise ClusterError(f"tls.{key}: found no file {path}, expected a PEM file")
    return Security(tls_ca_file=tls.ca_file, tls_client_cert=tls.cert, tls_client_key=tls.key, require_encryption=True)


def _await_workers(client: Client, profile: ExistingProfile, where: str) -> None:
    try:
        client.wait_for_workers(profile.workers, timeout=profile.timeout)
    except TimeoutError:
        found = len(client.scheduler_info(n_workers=-1)["workers"])
        raise ClusterError(
            f"{where}: found {found} workers after {profile.timeout} s, expected {profile.workers}"
        ) from None
