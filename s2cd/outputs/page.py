"""One HTML page of all maps in an output folder: quicklooks and figures, most changed first."""

from __future__ import annotations

import html
import json
from typing import Any

from s2cd.addresses import public_href
from s2cd.errors import OutputError
from s2cd.outputs.catalog import finished
from s2cd.outputs.layout import path_of, tile_of
from s2cd.outputs.store import Store, open_store, require_there, understood

PAGE = "index.html"
_HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Change maps</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }
figure { margin: 0 0 2.5rem } img { width: 100%; border: 1px solid #ccc } figcaption b { font-size: 1.1em }
.note { color: #a40 }
</style>
"""


def write_page(out: str) -> str:
    """Write `index.html` into an output folder and return its path or URL, without user and query.

    Raises OutputError if the folder holds no finished map, one whose item is damaged, or cannot be used.
    """
    require_there(out)
    names = finished(out)
    if not names:
        raise OutputError(f"{out} holds no finished map: nothing to view")
    store = open_store(out)
    figures = sorted(_ranked(store, name) for name in names)
    body = "\n".join(figure for _, _, figure in figures)
    store.put(PAGE, f"{_HEAD}<h1>{len(figures)} change maps</h1>\n{body}\n</html>\n".encode())
    return f"{public_href(out).rstrip('/')}/{PAGE}"


def _ranked(store: Store, name: str) -> tuple[float, str, str]:
    """Return minus the changed share and the name, to sort by, and the figure of a map."""
    path = path_of(name, ".json")
    with understood(store.out, path, "the item of a map"):
        item = json.loads(store.get(path))
        return -float(item["properties"]["s2cd:changed_fraction"] or 0), name, _figure(name, item)


def _figure(name: str, item: dict[str, Any]) -> str:
    properties = item["properties"]
    folder = path_of(name, "").rpartition("/")[0]
    start, end = (properties[f"{side}_datetime"][:10] for side in ("start", "end"))
    changed, valid = properties["s2cd:changed_fraction"], properties["s2cd:valid_fraction"]
    figures = f"{_percent(changed)} changed, {_percent(valid)} seen on both dates"
    files = " · ".join(
        f'<a href="{html.escape(f"{folder}/{name}{extension}")}">{label}</a>'
        for extension, label in ((".tif", "GeoTIFF"), (".json", "STAC item"))
    )
    notes = "".join(f'<br><span class="note">{html.escape(str(n))}</span>' for n in properties.get("s2cd:notes", ()))
    picture = item["assets"].get("thumbnail")
    image = (
        f'<img loading="lazy" src="{html.escape(f"{folder}/{name}.png")}" alt="{html.escape(name)}">' if picture else ""
    )
    tile = html.escape(tile_of(name))
    caption = f"<b>{tile}: {start} to {end}</b><br>{figures} · {files}{notes}"
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _percent(fraction: float | None) -> str:
    return "nothing" if fraction is None else f"{fraction:.1%}"
