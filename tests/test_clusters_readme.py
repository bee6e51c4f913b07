"""The commands of cluster/README.md, run as they stand there."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from places_support import BIN, background, maps_of

from s2cd.simulate import simulate

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"<!-- runs in the tests: (\w+) -->\n```bash\n(.*?)```", re.DOTALL)
COMMANDS = dict(BLOCK.findall((ROOT / "cluster" / "README.md").read_text()))


@pytest.fixture
def folder(tmp_path):
    simulate(tmp_path / "demo" / "scenes", size=128, dates=2, orbits=(51,), clouds=False)
    return tmp_path


@pytest.mark.parametrize("place", ["local", "existing"])
def test_the_readme_commands_run(place, folder):
    script = f"set -euo pipefail; trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{COMMANDS[place]}"
    log = folder / "log"
    with background(["bash", "-c", script], log, {"PATH": f"{BIN}:{os.environ['PATH']}"}, cwd=folder) as commands:
        code = commands.wait(300)
    assert code == 0, log.read_text()
    assert "allocator" in log.read_text()
    assert len(maps_of(folder / "demo" / "maps")) == 1
