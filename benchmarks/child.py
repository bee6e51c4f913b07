"""What `benchmarks.measure` starts: one workload, its answer as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks import workloads

if __name__ == "__main__":
    name, settings, answer = sys.argv[1:]
    result = getattr(workloads, name)(**json.loads(settings))
    Path(answer).write_text(json.dumps(result))
