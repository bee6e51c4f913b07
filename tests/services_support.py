"""Where the servers that `make services` started are to be found, and what they are given."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

ENV = Path(__file__).parents[1] / ".services" / "env"


def service(name: str) -> str:
    """Value of `name` in .services/env; skips the test where there is none."""
    lines = ENV.read_text().splitlines() if ENV.is_file() else []
    found = dict(line.split("=", 1) for line in lines if "=" in line).get(name)
    if not found:
        pytest.skip(f"{name} is not in .services/env: run `make services`")
    return found


def load_items(items: list[dict[str, Any]], folder: Path) -> None:
    """Load items and their collections into pgstac, replacing what is there."""
    program, dsn = service("S2CD_TEST_PYPGSTAC"), service("S2CD_TEST_PGSTAC_DSN")
    collections = [
        {
            "type": "Collection", "stac_version": "1.0.0", "id": name, "description": name, "license": "proprietary",
            "links": [],
            "extent": {"spatial": {"bbox": [[-180, -90, 180, 90]]}, "temporal": {"interval": [[None, None]]}},
        }
        for name in sorted({item["collection"] for item in items})
    ]  # fmt: skip
    for kind, rows in (("collections", collections), ("items", items)):
        path = folder / f"{kind}.ndjson"
        path.write_text("\n".join(map(json.dumps, rows)))
        command = [program, "load", kind, str(path), "--dsn", dsn, "--method", "upsert"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
