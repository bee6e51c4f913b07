"""A local folder served as an archive far away: ranges over HTTP, every answer later by the time a request travels.

python -m benchmarks.archive FOLDER SECONDS     serves until it is ended; prints its address first
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder: Path, latency: float):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.latency = folder, latency


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        time.sleep(self.server.latency)
        path = self.server.folder / self.path.lstrip("/")
        wanted = _RANGE.fullmatch(self.headers.get("Range", ""))
        if wanted is None or not path.is_file():
            self.send_error(404)
            return
        status = path.stat()
        start, stop = int(wanted[1]), min(int(wanted[2]) + 1, status.st_size)
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{status.st_size}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{status.st_mtime_ns:x}"')
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def archive(folder: Path, latency: float) -> Iterator[str]:
    """Serve `folder` from a process of its own, each answer `latency` seconds late; yields its address."""
    command = [sys.executable, "-m", "benchmarks.archive", str(folder), str(latency)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    running = _Server(Path(sys.argv[1]), float(sys.argv[2]))
    print(f"http://127.0.0.1:{running.server_address[1]}", flush=True)
    running.serve_forever()
