"""Change detection on Sentinel-2 time series, Dask-native: the public verbs.

    scenes = s2cd.search("earth-search", bbox=(3.0, 50.7, 3.2, 50.9), datetime="2023-01-01/2023-12-31")
    pairs = s2cd.consecutive_pairs(scenes)
    cube = s2cd.open_cube(pairs.scenes)
    change = s2cd.detect_changes(cube, pairs, model="generic")
    s2cd.write_change_maps(change, "out/")

or all of it, over many tiles and resumable: `s2cd.run(s2cd.RunConfig(catalog=..., out=...))`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from s2cd import errors

if TYPE_CHECKING:
    from s2cd.catalog.scene import Scene
    from s2cd.catalog.search import search
    from s2cd.clusters import cluster
    from s2cd.config import RunConfig
    from s2cd.cube import open_cube
    from s2cd.errors import S2cdError
    from s2cd.inference import detect_changes
    from s2cd.maps import write_change_maps
    from s2cd.masks import Mask
    from s2cd.model import list_models, load_model
    from s2cd.pairs import Pair, consecutive_pairs
    from s2cd.plan import make_plan
    from s2cd.runner import Report, run

__version__ = "0.1.0"

# Imported on first use: `s2cd --help` must not wait for torch.
_HOMES = {
    "Mask": "masks",
    "Pair": "pairs",
    "Report": "runner",
    "RunConfig": "config",
    "S2cdError": "errors",
    "Scene": "catalog.scene",
    "cluster": "clusters",
    "consecutive_pairs": "pairs",
    "detect_changes": "inference",
    "list_models": "model",
    "load_model": "model",
    "make_plan": "plan",
    "open_cube": "cube",
    "run": "runner",
    "search": "catalog",
    "write_change_maps": "maps",
}
__all__ = [
    "Mask",
    "Pair",
    "Report",
    "RunConfig",
    "S2cdError",
    "Scene",
    "cluster",
    "consecutive_pairs",
    "detect_changes",
    "errors",
    "list_models",
    "load_model",
    "make_plan",
    "open_cube",
    "run",
    "search",
    "write_change_maps",
]


if not TYPE_CHECKING:  # which would take any name for one of ours

    def __getattr__(name: str) -> Any:
        """Import a public name on first use."""
        if name not in _HOMES:
            raise AttributeError(f"module 's2cd' has no attribute {name!r}")
        return getattr(import_module(f"s2cd.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
