"""Where the servers that `make services` started are to be found."""

from __future__ import annotations

from pathlib import Path

import pytest

ENV = Path(__file__).parents[1] / ".services" / "env"


def service(name: str) -> str:
    """Value of `name` in .services/env; skips the test where there is none."""
    lines = ENV.read_text().splitlines() if ENV.is_file() else []
    found = dict(line.split("=", 1) for line in lines if "=" in line).get(name)
    if not found:
        pytest.skip(f"{name} is not in .services/env: run `make services`")
    return found
