"""What a training learns from: labelled pairs or places without labels, and unlabelled series."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from s2cd.errors import CatalogError, ConfigError
from s2cd.training.data import City, Image, digest, ground, label_path, load_cities, load_series
from s2cd.training.sampling import LabelledSampler, Mixture, Sampler
from s2cd.training.simulated import BLOCK, URBAN_KINDS, Place, SimulatedSampler


def fold_places(data: Path, *, labels: bool) -> list[str]:
    """Return the places of a catalogue that folds hold out: those with a label, as a fold is scored by it.

    Without `labels`, all where none has one. Raises CatalogError and ReadError as `Material.load`.
    """
    if labels:
        return [city.name for city in load_cities(data)]
    places = list(load_series(data))
    return [place for place in places if label_path(data, place).is_file()] or places


@dataclass(frozen=True)
class Material:
    """`cities` are the labelled pairs, none in a training without labels; `places` the dates of all places; `quiet`
    those of series that are taken as unchanged."""

    cities: list[City]
    places: list[list[Image]]
    quiet: list[list[Image]]

    @classmethod
    def load(
        cls, data: Path, series: Iterable[Path], *, labels: bool, held_out: tuple[str, ...], size: int
    ) -> Material:
        """Read all but the ground of the places `held_out`, under any orbit, to be cut into crops of edge `size` [px].

        Raises CatalogError as `load_cities` and `load_series` do, and for places smaller than a crop, ReadError for a
        raster, ConfigError if nothing is left.
        """
        held = {ground(name) for name in held_out}
        if labels:
            cities = [city for city in load_cities(data) if ground(city.name) not in held]
            places = [[city.before, city.after] for city in cities]
        else:
            cities, places = [], [dates for name, dates in load_series(data).items() if ground(name) not in held]
        if not places:
            left_out = f"but those held out ({', '.join(held_out)})" if held_out else "with a date that shows it"
            raise ConfigError(f"{data}: found no place {left_out}, expected some to train on")
        unlabelled = [dates for root in series for name, dates in load_series(root).items() if ground(name) not in held]
        quiet = [dates for dates in unlabelled if len(dates) > 1]
        for dates, least in [*((dates, size) for dates in places), *((dates, BLOCK) for dates in quiet)]:
            _require_size(dates[0], least)
        return cls(cities, places, quiet)

    def sampler(self, size: int, simulated: float) -> Sampler:
        """Return what draws crops; of labelled pairs a share `simulated` has simulated changes.

        Raises CatalogError for labels without a changed pixel that both dates show, where none is simulated.
        """
        if not self.cities:
            return SimulatedSampler([Place.of(dates) for dates in self.places], self.quiet, size)
        labelled = LabelledSampler(self.cities, size)
        if not simulated:
            if not any(city.changed.any() for city in self.cities):
                names = ", ".join(city.name for city in self.cities)
                found = "found no changed pixel that both dates show"
                raise CatalogError(f"labels of {names}: {found}, expected some to learn from")
            return labelled
        nowhere = np.float32(np.nan)
        places = [Place.of([c.before, c.after], np.where(c.known, c.label, nowhere)) for c in self.cities]
        seasons = 1000  # dates of any season: crops come and go
        changes = SimulatedSampler(places, self.quiet, size, kinds=URBAN_KINDS, quiet=0.4, gap=seasons)
        return Mixture(labelled, changes, simulated)

    def digests(self) -> dict[str, str | None]:
        """Return the SHA-256 of the pixels with their labels, and of those of the series."""
        labels = [array for city in self.cities for array in (city.label, city.known)]
        return {
            "data_sha256": digest(*_parts(self.places), *labels),
            "series_sha256": digest(*_parts(self.quiet)) if self.quiet else None,
        }


def _parts(places: list[list[Image]]) -> list[str | np.ndarray]:
    return [part for dates in places for i in dates for part in (i.place, i.time, i.reflectance)]


def _require_size(image: Image, least: int) -> None:
    rows, cols = image.reflectance.shape[1:]
    if min(rows, cols) < least:
        raise CatalogError(f"{image.place}: found {rows} x {cols} pixels, expected at least {least} x {least}")
