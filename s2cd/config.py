"""All that a run needs to know, validated once and saved beside its outputs."""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import chain
from numbers import Integral
from os import PathLike, fspath
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from s2cd.addresses import public_href
from s2cd.errors import ConfigError


def _path(value: Any) -> Any:
    text = fspath(value) if isinstance(value, PathLike) else value
    return expanduser(text) if isinstance(text, str) else text


Place = Annotated[str, BeforeValidator(_path)]
Longitude = Annotated[float, Field(ge=-180, le=180)]
Latitude = Annotated[float, Field(ge=-90, le=90)]


def class_values(given: Any) -> tuple[int, ...]:
    """Return values of a mask band, given one by one or as a text such as "3,8-10". Raises ValueError for others."""
    values = _spelled_out(given) if isinstance(given, str) else given
    integers = isinstance(values, Collection) and all(isinstance(v, Integral) and 0 <= int(v) <= 255 for v in values)
    if not integers or not len(values):
        raise ValueError("expected values from 0 to 255, and ranges such as 3,8-10")
    return tuple(map(int, values))


def _spelled_out(text: str) -> tuple[int, ...]:
    """Return the values of a text, none if any part of it is no value or range."""
    found = [_RANGE.fullmatch(part.strip()) for part in text.split(",")]
    ranges = [range(int(r[1]), int(r[2] or r[1]) + 1) if r else () for r in found]
    return tuple(chain.from_iterable(ranges)) if all(ranges) else ()


_RANGE = re.compile(r"(\d{1,3})(?:-(\d{1,3}))?")
Classes = Annotated[tuple[int, ...], BeforeValidator(class_values)]


class RunConfig(BaseModel):
    """The options of a run; the same on every cluster.

    catalog       provider ("earth-search", ...), STAC API, static catalogue, frozen scenes: path or URL
    out           folder or URL (s3://bucket/prefix) for the maps
    bbox          west, south, east, north in degrees: tiles that intersect it are mapped whole
    datetime      "2023-01-01/2023-12-31", open at either end with ".."
    tiles         MGRS tiles
    collection    STAC collection, where the provider has several
    orbit         "same": pairs within a relative orbit; a number: only that orbit; "any": across orbits too
    max_cloud     percent, by metadata: cloudier scenes are left out
    min_valid     fraction of the tile, by pixels, before clouds grow: scenes with less valid are left out
    max_gap_days  pairs further apart are left out
    mask          "scl" (L1C has none and gets a spectral test), the key of another asset of the items that holds a
                  mask, or "package.module:function"
    mask_classes  values of the mask that count as no observation: integers, or a text such as "3,8-10"; None for the
                  usual classes of SCL
    mask_dilation metres by which masked clouds and shadows grow
    model         name of a shipped model, or path of an exported or trained one
    device        where the network runs
    cluster       cluster profile: kind or YAML file
    chunk         edge of a spatial chunk in pixels; "auto": as the workers' memory allows
    dates_per_task   how many dates a task takes, so that their shared reads and features are used twice; "auto": as
                  many as memory allows that leave work for every thread
    cog_profile   encoding of the maps
    quicklook     write a PNG beside each map
    validity      write a layer beside each map that tells why a pixel has no value
    strict        warnings about the input (offsets, baselines, levels, orbits, shifts, items left out) are errors
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    catalog: Place
    out: Annotated[str, Field(min_length=1), BeforeValidator(_path)]
    bbox: tuple[Longitude, Latitude, Longitude, Latitude] | None = None
    datetime: str | None = None
    tiles: tuple[str, ...] | None = None
    collection: str | None = None
    orbit: Literal["same", "any"] | Annotated[int, Field(ge=1, le=143)] = "same"
    max_cloud: Annotated[float, Field(ge=0, le=100)] | None = 60.0
    min_valid: Annotated[float, Field(ge=0, le=1)] = 0.1
    max_gap_days: Annotated[float, Field(gt=0)] | None = None
    mask: Annotated[str, Field(min_length=1)] = "scl"
    mask_classes: Classes | None = None
    mask_dilation: Annotated[float, Field(ge=0, le=600)] = 60.0
    model: Place = "generic"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cluster: Place = "local"
    chunk: Literal["auto"] | Annotated[int, Field(ge=64, le=16384)] = "auto"
    dates_per_task: Literal["auto"] | Annotated[int, Field(ge=2, le=64)] = "auto"
    cog_profile: Literal["default", "zstd", "lerc", "uint8"] = "default"
    quicklook: bool = True
    validity: bool = False
    strict: bool = False

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from None
        if self.bbox is not None and self.bbox[1] >= self.bbox[3]:
            raise ConfigError(
                f"bbox {self.bbox}: south {self.bbox[1]:g} is not below north {self.bbox[3]:g}, "
                "expected west, south, east, north"
            )

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read a configuration from a YAML (or JSON) file. Raises ConfigError naming the file."""
        try:
            values = yaml.safe_load(Path(path).read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read configuration {path}: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"configuration {path} holds {type(values).__name__}, expected names and values")
        strange = [name for name in values if not isinstance(name, str)]
        if strange:
            raise ConfigError(f"configuration {path} has the name {strange[0]!r}, expected those of options")
        return cls(**values)

    def dump(self) -> str:
        """Return the configuration as YAML, every option stated; of addresses what is not secret, to lie with maps."""
        shown = {"catalog": public_href(self.catalog), "out": public_href(self.out)}
        return yaml.safe_dump(self.model_dump(mode="json") | shown, sort_keys=False)


def _one_line(error: ValidationError) -> str:
    """Name each option once a value, with all that it could be."""
    told: dict[tuple[str, str], list[str]] = {}
    for problem in error.errors():
        where = ".".join(str(p) for p in problem["loc"][:1]) or "configuration"
        message, start = problem["msg"].lower(), "input should be "
        known = told.setdefault((where, repr(problem["input"])), [])
        known.append(message.removeprefix(start) if known and known[0].startswith(start) else message)
    return "; ".join(f"{where}: {' or '.join(dict.fromkeys(m))}, found {found}" for (where, found), m in told.items())
