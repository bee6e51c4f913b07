"""What can go wrong, by name. Messages are one line and state what was found and what was expected."""

from __future__ import annotations

from s2cd.addresses import public_href, without_secrets


class S2cdError(Exception):
    """Base of every error s2cd raises on purpose; the command line prints it without a traceback.

    Messages end in logs and reports: user, password and query of the addresses in them are left out.
    """

    def __init__(self, message: str = ""):
        super().__init__(without_secrets(message))


class ConfigError(S2cdError):
    """An option or configuration value that cannot be used."""


class CatalogError(S2cdError):
    """A catalogue that cannot be reached, is not STAC, or holds an item that cannot be understood."""


class NoScenesError(CatalogError):
    """A search that left nothing to work on."""


class GridError(S2cdError):
    """Grids that disagree: an asset with its item, a scene with its tile, a result with its input.

    `href` names the asset, where it is one that disagrees; it stays as it is, with all its secrets.
    """

    def __init__(self, message: str, href: str | None = None):
        super().__init__(message.replace(href, public_href(href)) if href else message)
        self.href = href

    def __reduce__(self) -> tuple[type[GridError], tuple[str, str | None]]:
        """Pickle with the asset: the error crosses from worker to client."""
        return type(self), (str(self), self.href)


class ReadError(S2cdError):
    """An asset that could not be read; it never becomes nodata. `href` stays as it is, with all its secrets."""

    def __init__(self, href: str, why: str):
        self.href = href
        self.why = without_secrets(why)
        super().__init__(f"cannot read {public_href(href)}: {self.why}")

    def __reduce__(self) -> tuple[type[ReadError], tuple[str, str]]:
        """Pickle with both arguments: the error crosses from worker to client."""
        return type(self), (self.href, self.why)


class ModelError(S2cdError):
    """A model that is unknown, damaged, or does not fit its input."""


class OutputError(S2cdError):
    """An output that cannot be written."""


class BusyError(OutputError):
    """An output folder that another watch works in."""


class ClusterError(S2cdError):
    """A cluster profile that cannot be used, a cluster that does not start, or a scheduler that is gone."""


class OffsetError(S2cdError):
    """The pixels contradict the radiometric offset that the metadata states (strict mode)."""


class ShiftError(S2cdError):
    """The two images of a pair are displaced against each other (strict mode)."""


class S2cdWarning(UserWarning):
    """Base of every warning s2cd gives; `warnings.simplefilter("error", S2cdWarning)` is the strict mode."""


class OffsetWarning(S2cdWarning):
    """The pixels contradict the radiometric offset that the metadata states."""


class BaselineWarning(S2cdWarning):
    """A pair mixes two processing baselines."""


class LevelWarning(S2cdWarning):
    """A pair mixes processing levels: L1C, top of the atmosphere, and L2A, the surface."""


class OrbitWarning(S2cdWarning):
    """A pair mixes two relative orbits, so two viewing geometries, or these are unknown."""


class ShiftWarning(S2cdWarning):
    """The two images of a pair are displaced against each other."""
