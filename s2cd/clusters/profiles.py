"""Cluster profiles: what a YAML file of `cluster/` may say, validated; a bare name means the defaults."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from dask.utils import parse_bytes, parse_timedelta
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from s2cd.errors import ClusterError

LEAST_MEMORY = 256 << 20  # bytes: less is a number whose unit was forgotten
LEAST_WALLTIME = 600  # seconds, of a bare number: less is one of minutes
_NUMBER = re.compile(r"\s*[-+]?[\d.]+\s*")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)")


def _to_bytes(value: Any) -> int:
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if not isinstance(value, bool) and (size := parse_bytes(value)) >= LEAST_MEMORY:
            return size
    raise ValueError("a size with its unit, such as '16 GiB', of 256 MiB or more")


def _to_seconds(value: Any) -> int:
    """Seconds of 'HH:MM:SS', 'D-HH:MM:SS', '90 minutes' or a number (YAML itself reads 12:00:00 as 43200)."""
    clock = _CLOCK.fullmatch(value) if isinstance(value, str) else None
    if clock:
        days, hours, minutes, seconds = (int(group or 0) for group in clock.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    with contextlib.suppress(KeyError, ValueError, TypeError):
        if not isinstance(value, bool):
            return int(parse_timedelta(value))
    raise ValueError("a duration such as '01:00:00' or '90 minutes'")


def _to_walltime(value: Any) -> int:
    """As `_to_seconds`; a small bare number was meant as minutes, as batch systems read it."""
    seconds = _to_seconds(value)
    if seconds < LEAST_WALLTIME and _NUMBER.fullmatch(str(value)):
        raise ValueError("a duration with its unit, such as '01:00:00' or '60 minutes'")
    return seconds


Bytes = Annotated[int, BeforeValidator(_to_bytes)]
Seconds = Annotated[int, BeforeValidator(_to_seconds), Field(gt=0)]
Walltime = Annotated[int, BeforeValidator(_to_walltime), Field(gt=0)]
Count = Annotated[int, Field(strict=True, ge=1)]
Auto = Literal["auto"]


class _Profile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    environment: dict[str, str] = {}
    """Environment variables of the workers, over those that s2cd sets."""


class LocalProfile(_Profile):
    """Worker processes on this machine."""

    kind: Literal["local"] = "local"
    processes: Count = 1
    threads: Count | Auto = "auto"
    memory: Bytes | Auto = "auto"
    dashboard: Annotated[int, Field(strict=True, ge=0)] = 8787


class CudaProfile(_Profile):
    """One worker process for each GPU of this machine, by dask-cuda."""

    kind: Literal["cuda"] = "cuda"
    gpus: list[Annotated[int, Field(strict=True, ge=0)]] | Literal["all"] = "all"
    threads: Count | Auto = "auto"
    memory: Bytes | Auto = "auto"
    device_memory: Bytes | Annotated[float, Field(gt=0, le=1)] = 0.8
    dashboard: Annotated[int, Field(strict=True, ge=0)] = 8787


class Jobs(BaseModel):
    """How many batch jobs are held: none is asked for before there is work, all are given back after it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    minimum: Annotated[int, Field(strict=True, ge=0)] = 0
    maximum: Count = 8

    @model_validator(mode="after")
    def _ordered(self) -> Jobs:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum ({self.minimum}) is above maximum ({self.maximum})")
        return self


class _BatchProfile(_Profile):
    queue: str | None = None
    account: str | None = None
    cores: Count = 8
    threads: Count | Auto = "auto"
    memory: Bytes = 32 << 30
    gpus: Annotated[int, Field(strict=True, ge=0, le=1)] = 0
    walltime: Walltime = 3600
    jobs: Jobs = Jobs()
    interface: str | None = None
    log_folder: str = "s2cd-logs"
    scratch_folder: str | None = None
    directives: list[str] = []
    prologue: list[str] = []
    python: str | None = None
    dashboard: Annotated[int, Field(strict=True, ge=0)] = 8787


class SlurmProfile(_BatchProfile):
    """Workers as Slurm jobs, by dask-jobqueue."""

    kind: Literal["slurm"] = "slurm"
    gpu_type: str | None = None


class PbsProfile(_BatchProfile):
    """Workers as PBS jobs, by dask-jobqueue."""

    kind: Literal["pbs"] = "pbs"
    log_folder: Annotated[str, Field(pattern=r"^\S+$")] = "s2cd-logs"  # PBS takes no blanks in it


class Tls(BaseModel):
    """Files of a TLS-secured scheduler."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ca_file: str
    cert: str
    key: str


class ExistingProfile(_Profile):
    """A scheduler that already runs, found by address or scheduler file, else by DASK_SCHEDULER_ADDRESS."""

    kind: Literal["existing"] = "existing"
    address: str | None = None
    scheduler_file: str | None = None
    workers: Count = 1
    timeout: Seconds = 60
    tls: Tls | None = None


Profile = LocalProfile | CudaProfile | SlurmProfile | PbsProfile | ExistingProfile
_ADAPTER: TypeAdapter[Profile] = TypeAdapter(Annotated[Profile, Field(discriminator="kind")])

PROFILES: dict[str, Profile] = {
    "local": LocalProfile(),
    "cuda": CudaProfile(),
    "slurm": SlurmProfile(),
    "slurm-gpu": SlurmProfile(gpus=1, threads=4, memory=64 << 30, jobs=Jobs(maximum=4)),
    "pbs": PbsProfile(),
    "existing": ExistingProfile(),
}
"""The profiles that a bare name stands for; the files in `cluster/` say the same, with comments."""


def load_profile(profile: str | Path | Profile | dict[str, Any]) -> Profile:
    """A validated profile, from a YAML file, a bare name of `PROFILES`, a mapping, or a profile.

    Raises ClusterError, in one line that names the file, the key, what was found and what was expected.
    """
    if isinstance(profile, BaseModel):
        return profile
    if isinstance(profile, dict):
        return _validate(profile, "cluster profile")
    path = Path(profile)
    if str(profile) in PROFILES and not path.is_file():
        return PROFILES[str(profile)]
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        known = ", ".join(PROFILES)
        raise ClusterError(
            f"{path}: cannot be read ({error.strerror}); expected a YAML file or one of {known}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ClusterError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    return _validate(content, str(path))


def _validate(content: Any, name: str) -> Profile:
    if not isinstance(content, dict):
        raise ClusterError(f"{name}: found {type(content).__name__}, expected a mapping of keys to values")
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        raise ClusterError(f"{name}: {_first_complaint(error, content)}") from None


def _first_complaint(error: ValidationError, content: dict[str, Any]) -> str:
    """One line for the first of pydantic's complaints: the key, what was found and what was expected."""
    first = error.errors(include_url=False)[0]
    kinds = ", ".join(sorted({profile.kind for profile in PROFILES.values()}))
    if first["type"].startswith("union_tag"):
        return f"kind: found {content.get('kind', 'nothing')!r}, expected one of {kinds}"
    keys = [str(part) for part in first["loc"][1:]]
    model = type(next(p for p in PROFILES.values() if p.kind == content["kind"]))
    if first["type"] == "extra_forbidden":
        known = Jobs if keys[0] == "jobs" else Tls if keys[0] == "tls" else model
        expected = ", ".join(sorted({*known.model_fields} - ({"kind"} if len(keys) > 1 else set())))
        return f"{'.'.join(keys)}: unknown key, expected one of {expected}"
    # a union's alternatives are named in the location: keep the keys that the file itself has
    value: Any = content
    path: list[str] = []
    for key in keys:
        if isinstance(value, dict) and key in value:
            value, path = value[key], [*path, key]
    same = [e["msg"] for e in error.errors() if e["loc"][1] == first["loc"][1]]
    expected = " or ".join(dict.fromkeys(_expected(message) for message in same))
    return f"{'.'.join(path)}: found {value!r}, expected {expected}"


def _expected(message: str) -> str:
    return message.removeprefix("Value error, ").removeprefix("Input should be ")
