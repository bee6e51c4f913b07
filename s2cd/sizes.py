"""How large a piece of work is, from what the workers offer: `chunk="auto"` and `dates_per_task="auto"`."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2cd.model.device import first_device
from s2cd.outputs.parts import STEP
from s2cd.outputs.profiles import BLOCK

if TYPE_CHECKING:
    from distributed import Client

    from s2cd.clusters.profiles import Profile
    from s2cd.config import RunConfig
    from s2cd.model import Model

LARGEST_CHUNK = 2048  # a sixth of a tile: larger chunks save halo and cost memory
LARGEST_ON_GPU = 3072  # a quarter of a tile: fewer calls, each of more work
LARGEST_SERIES = 6  # dates: more save the second reading of a unit's last date, and keep more maps in memory
SMALLEST_CHUNK = 256
THREADS_A_UNIT = 8  # at most: more would wait at a unit's last chunks
THREADS_A_UNIT_ON_GPU = 4  # chunks are soon done there, and most threads write the maps of the units before
EXCESS = 1.25  # at most, of chunks of whole blocks over the image: the last are smaller
TASK_SHARE = 0.5  # of a thread's memory for its task; the rest is for decoded blocks and unwritten maps
CODES_SHARE = 0.2  # of all memory for maps that are not written yet
FEATURE_COPIES = 7  # two dates, what the network holds meanwhile, and room: docs/decisions.md has what was measured
PIXEL_BYTES = 45  # of a task beside the features: pixels of two dates, the network's input, probabilities, codes
DEVICE_DATES = 3  # whose features a task holds on a GPU; what the network holds meanwhile is there once for all tasks
SENT_BYTES = 24  # of two dates on their way to a GPU, on either side


@dataclass(frozen=True)
class Workers:
    """What a cluster offers: `count` processes, `threads` in all, and bytes for each thread, None where unknown.

    memory  of the host, on the worker that has least
    device  of the GPU that the threads of a worker, or of several, share; infinite for one of unknown size, None
            without one
    """

    count: int = 1
    threads: int = 1
    memory: float | None = None
    device: float | None = None

    @property
    def units(self) -> int:
        """How many units of work these workers do at a time; beside them stand the maps of one that ends."""
        return self.count * -(-self.threads // (self.threads_a_unit * self.count))

    @property
    def threads_a_unit(self) -> int:
        """How many threads a unit of work keeps busy."""
        return THREADS_A_UNIT_ON_GPU if self.device else THREADS_A_UNIT

    @classmethod
    def of_client(cls, client: Client, device: str) -> Workers | None:
        """Ask the workers that are there; None if there are none yet."""
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        if not workers:
            return None
        limits = [w["memory_limit"] / w["nthreads"] for w in workers if w["memory_limit"]]
        cards = [] if device == "cpu" else [card for card in client.run(first_device).values() if card]
        sharing = Counter(name for name, _ in cards)
        threads = [w["nthreads"] for w in workers]
        return cls(
            count=len(threads),
            threads=sum(threads),
            memory=min(limits, default=None),
            device=min(size / sharing[name] for name, size in cards) / max(threads) if cards else None,
        )

    @classmethod
    def of_profile(cls, profile: Profile, device: str) -> Workers:
        """Tell what a profile will start; nothing is known of a cluster that is only connected to."""
        from s2cd.clusters.profiles import CudaProfile, LocalProfile, PbsProfile, SlurmProfile
        from s2cd.clusters.start import batch_threads, cuda_threads, local_resources

        wanted = device != "cpu"
        card = first_device() if wanted else None
        here = card[1] if card else 0
        if isinstance(profile, LocalProfile):
            threads, memory = local_resources(profile)
            share = here / (profile.processes * threads) or None
            return cls(profile.processes, profile.processes * threads, memory / threads, share)
        if isinstance(profile, SlurmProfile | PbsProfile):
            threads, jobs = batch_threads(profile), profile.jobs.maximum
            return cls(jobs, jobs * threads, profile.memory / threads, math.inf if profile.gpus and wanted else None)
        if isinstance(profile, CudaProfile):
            threads = cuda_threads(profile)
            limit = None if profile.memory == "auto" else profile.memory / threads
            return cls(1, threads, limit, here / threads or None)
        return cls()


@dataclass(frozen=True)
class Sizes:
    """`chunk` [pixels, the edge] and `dates` of a task, and the bytes that a thread is taken to need for it.

    `need` is on the host, `device_need` on the GPU, 0 without one.
    """

    chunk: int
    dates: int
    need: float
    device_need: float = 0.0


def task_sizes(config: RunConfig, shape: tuple[int, int], pairs: int, model: Model, workers: Workers) -> Sizes:
    """Choose what `config` leaves open, for fields of view of `shape` pixels that have `pairs` pairs in all.

    A chunk is a multiple of the network's stride and of a map's STEP, no larger than half a thread's memory holds, on
    the host or on the device; a series has no more dates than a fifth of all memory holds maps, and few enough to keep
    all threads busy.
    """
    chunk = _chunk(config, shape, model, workers)
    edge = min(chunk, max(shape)) + 2 * model.halo
    blocks = -(-shape[0] // chunk) * -(-shape[1] // chunk)
    host, device = _bytes_per_pixel(model, workers)
    return Sizes(chunk, _dates(config, shape, pairs, blocks, workers), edge**2 * host, edge**2 * device)


def auto_chunk(shape: tuple[int, int], stride: int, largest: float = LARGEST_CHUNK) -> int:
    """Return the edge of a chunk: up to `largest` pixels, equal parts, two or more along a side of 512 or more.

    A multiple of a map's blocks, which a chunk then fills, where parts that are equal but for the last are no more.
    """
    longest = max(shape)
    parts = max(2 if longest >= 512 else 1, math.ceil(longest / largest))
    chunk = -(-longest // (parts * stride)) * stride
    whole = -(-chunk // BLOCK) * BLOCK
    fits = whole % stride == 0 and whole <= largest and whole * parts <= EXCESS * longest
    return whole if fits else chunk


def _chunk(config: RunConfig, shape: tuple[int, int], model: Model, workers: Workers) -> int:
    stride = math.lcm(model.stride, STEP)
    if config.chunk != "auto":
        return -(-config.chunk // stride) * stride
    host, device = _bytes_per_pixel(model, workers)
    room = [(m * TASK_SHARE / need) ** 0.5 for m, need in ((workers.memory, host), (workers.device, device)) if m]
    most = LARGEST_ON_GPU if workers.device else LARGEST_CHUNK
    largest = min(room, default=float("inf")) - 2 * model.halo
    return auto_chunk(shape, stride, min(max(largest, SMALLEST_CHUNK), most))


def _dates(config: RunConfig, shape: tuple[int, int], pairs: int, blocks: int, workers: Workers) -> int:
    if config.dates_per_task != "auto":
        return config.dates_per_task
    most = LARGEST_SERIES - 1
    if workers.memory is not None:
        maps = CODES_SHARE * workers.memory * workers.threads / (2 * shape[0] * shape[1])
        most = min(most, int(maps / (workers.units + 1)))
    while most > 1 and -(-pairs // most) * blocks < workers.threads:
        most -= 1
    return max(most, 1) + 1


def _bytes_per_pixel(model: Model, workers: Workers) -> tuple[float, float]:
    """Bytes that a task needs for each pixel on the host, and on the GPU if there is one."""
    if workers.device is None:
        return FEATURE_COPIES * model.feature_bytes + PIXEL_BYTES, 0
    return PIXEL_BYTES + SENT_BYTES, DEVICE_DATES * model.feature_bytes + SENT_BYTES
