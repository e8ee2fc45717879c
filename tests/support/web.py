"""A small web server over a folder, that honours ranges or does not, fails on demand, and notes its requests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit


class Request(NamedTuple):
    path: str
    start: int
    """Of the range that was asked for; -1 where none was."""
    sent: int
    """Bytes."""


class Web(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.ranges = root, True
        self.key = ""
        """What every query must say, if anything."""
        self.failures: list[int] = []
        """Statuses of the next answers."""
        self.requests: list[Request] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is none."""


class _Handler(BaseHTTPRequestHandler):
    server: Web
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        parts = urlsplit(self.path)
        path = self.server.root / unquote(parts.path).lstrip("/")
        asked = self.headers.get("Range")
        first, last = map(int, asked.removeprefix("bytes=").split("-")) if asked else (-1, -1)
        if self.server.failures:
            self._send(self.server.failures.pop(0), b"", body)
        elif parts.query != self.server.key:
            self._send(403, b"", body)
        elif not path.is_file():
            self._send(404, b"", body)
        elif not (asked and self.server.ranges):
            self._send(200, path.read_bytes(), body, first)
        elif first >= path.stat().st_size:
            self._send(416, b"", body)
        else:
            self._send(206, path.read_bytes()[first : last + 1], body, first)

    def _send(self, status: int, data: bytes, body: bool, start: int = -1) -> None:
        self.server.requests.append(Request(urlsplit(self.path).path, start, len(data) if body else 0))
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@contextmanager
def serve(root: Path) -> Iterator[Web]:
    with Web(root) as web:
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield web
        finally:
            web.shutdown()
            thread.join()
