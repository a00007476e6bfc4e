"""A server on loopback that speaks Ollama's and OpenAI's chat protocols, well or badly."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behave = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """``server.script`` holds what each question meets, one after the other; the last one stays."""

    server: ChatServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, question, dict(self.headers)))
        script = self.server.script
        (script.pop(0) if len(script) > 1 else script[0])(self, question)

    def reply(self, body: bytes, *, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class ChatServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, script: list[Behave]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.asked: list[tuple[str, dict[str, Any], dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        pass  # a client that gives up is part of the tests


@contextmanager
def serving(*script: Behave) -> Iterator[ChatServer]:
    server = ChatServer(list(script))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def free_port() -> int:
    """A port where nothing listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def says(text: str | Callable[[dict[str, Any]], str]) -> Behave:
    """A whole answer, in the protocol of the path."""

    def behave(handler: Handler, question: dict[str, Any]) -> None:
        content = text if isinstance(text, str) else text(question)
        handler.reply(json.dumps(_whole(handler, question, content)).encode())

    return behave


def _whole(handler: Handler, question: dict[str, Any], content: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    if handler.path == "/api/chat":
        return {"model": question["model"], "message": message, "done": True}
    assert handler.path == "/v1/chat/completions"
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


def streams(*pieces: str, ends: bool = True) -> Behave:
    """Ollama's lines, one a piece, in HTTP chunks."""

    def behave(handler: Handler, question: dict[str, Any]) -> None:
        lines = [{"message": {"role": "assistant", "content": piece}, "done": False} for piece in pieces]
        lines += [{"message": {"role": "assistant", "content": ""}, "done": True}] if ends else []
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for line in lines:
            data = json.dumps(line).encode() + b"\n"
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        handler.wfile.write(b"0\r\n\r\n")

    return behave


def refuses(status: int, error: Any = "try later", **headers: str) -> Behave:
    body = json.dumps({"error": error}).encode()
    return lambda handler, question: handler.reply(body, status=status, **headers)


def half(handler: Handler, question: dict[str, Any]) -> None:
    """Half of the announced body, then the end."""
    body = json.dumps(_whole(handler, question, "85")).encode()
    handler.reply(body[: len(body) // 2], length=len(body))
    handler.close_connection = True


def resets(handler: Handler, question: dict[str, Any]) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def drips(handler: Handler, question: dict[str, Any]) -> None:
    """A byte now and then, without end."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        time.sleep(0.02)


def sleeps(handler: Handler, question: dict[str, Any]) -> None:
    time.sleep(1.0)


def floods(handler: Handler, question: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.close_connection = True
    for _ in range(40):
        handler.wfile.write(b" " * (1 << 16))
