"""An HTTP server of files with ranges that misbehaves on request: what real asset servers do now and then."""

from __future__ import annotations

import random
import socket
import threading
import time
import zlib
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, urlsplit

FAULTS = ("slow", "stall", "reset", "reset-midway", "truncated", "short", "404", "403", "429", "503", "html")


class FaultServer(ThreadingHTTPServer):
    """Serves files below `root` on 127.0.0.1; `rate` of all answers are faults drawn from `faults`.

    Files below /gone/ are never there. Below /signed/ a token is asked for, given out at /token/ACCOUNT/CONTAINER,
    and refused (403) `lifetime` seconds after that or once it was revoked. Where a `login` is set, "user:password", all
    is refused (401) without it; where `moved` is, all is redirected to that server. `logins` were stated by clients.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, root: Path, *, seed: int = 0, stall: float = 2.0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.rate = 0.0
        self.faults: tuple[str, ...] = FAULTS
        self.stall = stall
        self.lifetime = 3600.0
        self.login = self.moved = ""
        self.logins: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []  # path and range of each that was answered with pixels
        self.under_way = self.most_under_way = 0
        self.tokens: dict[str, float] = {}
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def draw(self) -> str | None:
        with self._lock:
            if self._random.random() >= self.rate:
                return None
            fault = self._random.choice(self.faults)
            self.counts[fault] += 1
            return fault

    @contextmanager
    def counted(self, path: str, span: str) -> Iterator[None]:
        with self._lock:
            self.requests.append((path, span))
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            yield
        finally:
            with self._lock:
                self.under_way -= 1

    def token(self) -> tuple[str, datetime]:
        with self._lock:
            name = f"t{len(self.tokens)}"
            self.tokens[name] = time.time() + self.lifetime
            return name, datetime.now(UTC) + timedelta(seconds=self.lifetime)

    def revoke(self) -> None:
        self.tokens = dict.fromkeys(self.tokens, 0.0)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that give up are expected here."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultServer

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        login = b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
        self.server.logins.add(login)
        if self.server.login not in {"", login}:
            self._send(401, b"who are you?")
            return
        if self.server.moved:
            self._send(302, b"", Location=self.server.moved + self.path)
            return
        if parts.path.startswith("/token/"):
            name, expiry = self.server.token()
            self._send(200, f'{{"token": "sig={name}", "msft:expiry": "{expiry.isoformat()}"}}'.encode())
            return
        path = parts.path
        if path.startswith("/signed/"):
            path = path.removeprefix("/signed")
            name = parse_qs(parts.query).get("sig", [""])[0]
            if self.server.tokens.get(name, 0) < time.time():
                self.server.counts["refused"] += 1
                self._send(403, b"signature expired")
                return
        file = self.server.root / path.lstrip("/")
        if path.startswith("/gone/") or not file.is_file():
            self._send(404, b"not found")
            return
        with self.server.counted(path, self.headers.get("Range", "")):
            self._serve(file.read_bytes(), self.server.draw())

    def _serve(self, data: bytes, fault: str | None) -> None:
        if fault in {"404", "403", "429", "503"}:
            self._send(int(fault), b"fault")
        elif fault == "html":
            self._send(200, b"<html>the portal is down for maintenance</html>")
        elif fault == "reset":
            self._hang_up()
        else:
            if fault == "slow":
                time.sleep(self.server.stall / 20)
            elif fault == "stall":
                time.sleep(self.server.stall)
            self._send_range(data, fault)

    def _send_range(self, data: bytes, fault: str | None) -> None:
        wanted = self.headers.get("Range")
        if wanted is None:
            start, stop, status = 0, len(data), 200
        else:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or len(data) - 1) + 1, len(data))
            status = 206
            if start >= len(data):
                self._send(416, b"")
                return
        body = data[start:stop]
        sent = body[: len(body) // 2] if fault in {"truncated", "short", "reset-midway"} else body
        self.send_response(status)
        self.send_header("Content-Length", str(len(sent) if fault == "short" else len(body)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{zlib.crc32(data):x}"')
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(sent)
        if fault in {"truncated", "reset-midway"}:
            self.wfile.flush()
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
