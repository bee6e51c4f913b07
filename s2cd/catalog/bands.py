"""The bands of Sentinel-2/MSI under their two usual names (B04 and red)."""

from __future__ import annotations

from dataclasses import dataclass

from s2cd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Band:
    """One band: ESA name, STAC common name, ground sampling distance [m], centre wavelength [nm]."""

    name: str
    common_name: str
    gsd: int
    wavelength: float


# Centre wavelengths of S2A, from the Sentinel-2 Spectral Response Functions document
# (COPE-GSEG-EOPG-TN-15-0007).
BANDS = (
    Band("B01", "coastal", 60, 442.7),
    Band("B02", "blue", 10, 492.7),
    Band("B03", "green", 10, 559.8),
    Band("B04", "red", 10, 664.6),
    Band("B05", "rededge1", 20, 704.1),
    Band("B06", "rededge2", 20, 740.5),
    Band("B07", "rededge3", 20, 782.8),
    Band("B08", "nir", 10, 832.8),
    Band("B8A", "nir08", 20, 864.7),
    Band("B09", "nir09", 60, 945.1),
    Band("B10", "cirrus", 60, 1373.5),
    Band("B11", "swir16", 20, 1613.7),
    Band("B12", "swir22", 20, 2202.4),
)
SCL = "scl"
_BY_NAME = {alias.lower(): band for band in BANDS for alias in (band.name, band.common_name)}


def band_info(name: str) -> Band:
    """Return the band called `name`, by either of its names, in any case.

    Raises ConfigError for a name no Sentinel-2 band has.
    """
    try:
        return _BY_NAME[str(name).lower()]
    except KeyError:
        known = ", ".join(f"{b.name}/{b.common_name}" for b in BANDS)
        raise ConfigError(f"unknown band {name!r}, expected one of {known}") from None


def canonical_band(name: str) -> str:
    """Return the STAC common name of a band ("B04" -> "red"); "scl" stays "scl"."""
    return SCL if str(name).lower() == SCL else band_info(name).common_name
