"""Cluster profiles -> a Dask client: one machine, its GPUs, a batch system, a scheduler that already runs."""

from s2cd.clusters.check import check_profile, show_profile
from s2cd.clusters.environment import SetupWorker, worker_environment
from s2cd.clusters.profiles import PROFILES, Profile, load_profile
from s2cd.clusters.start import cluster, try_submission

__all__ = [
    "PROFILES",
    "Profile",
    "SetupWorker",
    "check_profile",
    "cluster",
    "load_profile",
    "show_profile",
    "try_submission",
    "worker_environment",
]
