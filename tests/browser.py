"""A headless Chromium, driven over a pipe by its DevTools protocol: no driver, no port, no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page. ``events``: everything that the browser has told, as (method, parameters)."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._rest = write, read, b""
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._count, self._session = 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            got = os.read(self._read, 1 << 16)
            if not got:
                raise RuntimeError("the browser is gone")
            self._rest += got
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **parameters: Any) -> Any:
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        text = json.dumps({"id": self._count, "method": method, "params": parameters, **session})
        os.write(self._write, text.encode() + b"\0")
        while (message := self._message()).get("id") != self._count:
            self.events.append((message["method"], message["params"]))
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def open(self, path: Path, scheme: str) -> None:
        """Show the page as one who prefers ``scheme`` ("light" or "dark") sees it."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            message = self._message()
            self.events.append((message["method"], message["params"]))

    def value(self, expression: str) -> Any:
        """What JavaScript makes of ``expression``."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"])
        return result["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and requests for anything but the page itself."""
        found = []
        for method, given in self.events:
            if method == "Network.requestWillBeSent" and not given["request"]["url"].startswith(("file:", "data:")):
                found.append(f"request: {given['request']['url']}")
            elif method == "Log.entryAdded" or method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                found.append(f"{method}: {json.dumps(given)[:2000]}")
        return found


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """``folder`` holds its profile."""
    assert CHROMIUM is not None
    (their_read, write), (read, their_write) = os.pipe(), os.pipe()
    command = [
        "bash", "-c", 'exec "$@" 3<&$IN 4>&$OUT', "bash", CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu",
        "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
    ]  # fmt: skip
    environment = {**os.environ, "IN": str(their_read), "OUT": str(their_write)}
    process = subprocess.Popen(
        command, env=environment, pass_fds=(their_read, their_write), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(their_read)
    os.close(their_write)
    try:
        yield Browser(write, read)
    finally:
        os.close(write)
        os.close(read)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
