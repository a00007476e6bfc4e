"""A server on the loopback address that misbehaves as it is told."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Range")))
        self.close_connection = True
        self.server.pages[self.path](self)

    def do_HEAD(self) -> None:
        self.do_GET()

    def end_headers(self) -> None:
        self.send_header("Connection", "close")
        super().end_headers()

    def log_message(self, *words: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Web(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, Answer] = {}
        self.requests: list[tuple[str, str | None]] = []

    def handle_error(self, request: object, address: object) -> None:
        """A client that hangs up is what these tests are about."""

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


@contextmanager
def web() -> Iterator[Web]:
    server = Web()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def page(body: bytes, *, ranges: bool = True, cut: list[int] | None = None, etag: str | None = None) -> Answer:
    """``body``; each request takes the next of ``cut``, after so many bytes of which the connection ends."""
    cuts = iter(cut or [])
    tag = etag or f'"{hashlib.sha256(body).hexdigest()}"'

    def answer(handler: Handler) -> None:
        start, wanted = 0, handler.headers.get("Range")
        if ranges and wanted and handler.headers.get("If-Range") in (None, tag):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        rest = body[start:]
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(rest)))
        handler.send_header("ETag", tag)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        handler.end_headers()
        handler.wfile.write(rest[: next(cuts, len(rest))])

    return answer


def hang(after: bytes = b"", *, step: float = 0.0, seconds: float = 5.0) -> Answer:
    """Headers, ``after``, and then nothing, or one byte every ``step`` seconds."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        handler.wfile.write(after)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(step or 0.05)
            if step:
                handler.wfile.write(b"x")

    return answer


def status(code: int, **headers: str) -> Answer:
    return lambda handler: handler.answer(code, b"no", **headers)
