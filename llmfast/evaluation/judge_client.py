"""Asking a model behind HTTP: Ollama's /api/chat, or the chat completions of any OpenAI-compatible endpoint.

Only the standard library. A question is asked again after a failure that may pass (no connection, a reset, half an
answer, status 408, 409, 425, 429 and 5xx), with growing pauses or the one that the server asks for.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import math
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from llmfast import __version__
from llmfast.errors import UserError

OLLAMA_URL = "http://localhost:11434"
OPENAI_URL = "https://api.openai.com/v1"
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before another try; the last one from there on
LONGEST_PAUSE = 120.0  # seconds that a server may ask for
LARGEST_ANSWER = 1 << 20  # bytes; a judge that writes more has lost its way
PASSING = {408, 409, 425, 429}
Message = dict[str, str]


class NoAnswer(Exception):
    """A question that stays without an answer, after all tries."""


class NoServer(NoAnswer):
    """Nothing listens there."""


class _Failure(Exception):
    """One failed try that may be repeated, after ``pause`` seconds if the server asks for a pause."""

    def __init__(self, reason: str, *, pause: float | None = None, connected: bool = True) -> None:
        super().__init__(reason)
        self.pause, self.connected = pause, connected


@dataclass(frozen=True)
class ChatClient:
    """A chat model behind an address.

    ``url`` is the server (Ollama) or the address before ``/chat/completions`` (OpenAI). ``timeout`` is how many
    seconds one answer may take, ``retries`` how often a failed question is asked again. ``api_key`` goes out as a
    bearer token and never into a message. ``sleep`` and ``say`` receive the pauses and what is said about them.
    """

    api: Literal["ollama", "openai"] = "ollama"
    url: str = OLLAMA_URL
    model: str = "llama3"
    temperature: float = 0.0
    seed: int = 123
    num_ctx: int = 2048  # Ollama's context length in tokens; OpenAI's servers decide themselves
    timeout: float = 120.0
    retries: int = 4
    api_key: str | None = None
    sleep: Callable[[float], Any] = time.sleep
    say: Callable[[str], Any] = lambda text: None

    def __post_init__(self) -> None:
        if not _is_address(self.url):
            raise UserError(f"{self.url!r} is no address of a judge: give one like {OLLAMA_URL}")
        if "@" in urllib.parse.urlsplit(self.url).netloc:
            raise UserError("the address of the judge holds a name or password: name a key with --api-key-env instead")

    @property
    def address(self) -> str:
        """Where questions go."""
        base = self.url.rstrip("/")
        if self.api == "ollama":
            return base.removesuffix("/api/chat") + "/api/chat"
        return base.removesuffix("/chat/completions") + "/chat/completions"

    def ask(self, messages: list[Message], *, first: bool = False) -> str:
        """The model's answer to a dialogue.

        Raises ``NoServer`` where nothing listens (``first``: at once, without another try), ``NoAnswer`` where
        every try failed otherwise, and ``UserError`` for what another try cannot mend, such as an unknown model.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._once(messages)
            except _Failure as failure:
                kind = NoAnswer if failure.connected else NoServer
                if attempt == self.retries or (first and kind is NoServer):
                    tries = f" ({attempt + 1} tries)" if attempt else ""
                    raise kind(f"{self._named(str(failure))}{tries}") from None
                pause = PAUSES[min(attempt, len(PAUSES) - 1)] if failure.pause is None else failure.pause
                self.say(f"{self._named(str(failure))}: another try in {pause:.0f} s")
                self.sleep(pause)
        raise AssertionError

    def _once(self, messages: list[Message]) -> str:
        ends = time.monotonic() + self.timeout
        try:
            with self._open(messages) as reply:
                body = bytearray()
                while piece := reply.read1(1 << 16):
                    body += piece
                    if len(body) > LARGEST_ANSWER:
                        raise _Failure(f"an answer of more than {LARGEST_ANSWER >> 20} MB")
                    if time.monotonic() > ends:
                        raise TimeoutError
                if reply.length:  # read1 does not complain about a body that ends before its announced length
                    raise _Failure("half an answer")
        except urllib.error.HTTPError as error:
            raise self._refused(error) from None
        except urllib.error.URLError as error:
            raise self._not_sent(error.reason) from None
        except TimeoutError:
            raise _Failure(f"no whole answer within {self.timeout:g} s") from None
        except (http.client.HTTPException, ConnectionError) as error:
            raise _Failure(f"the connection broke off ({type(error).__name__})") from None
        try:
            return self._content(body.decode("utf-8"))
        except (ValueError, KeyError, TypeError, IndexError):
            raise _Failure("half an answer, or one that is not in the protocol") from None

    def _open(self, messages: list[Message]) -> Any:
        request = urllib.request.Request(
            self.address,
            data=json.dumps(self._question(messages)).encode(),
            headers={"Content-Type": "application/json", "User-Agent": f"llmfast/{__version__}"},
        )
        if self.api_key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self.api_key}")
        handlers: list[Any] = [_NoRedirect]
        if (urllib.parse.urlsplit(self.url).hostname or "") in ("localhost", "127.0.0.1", "::1"):
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy would look on its own machine
        return urllib.request.build_opener(*handlers).open(request, timeout=self.timeout)

    def _question(self, messages: list[Message]) -> dict[str, Any]:
        if self.api == "ollama":
            options = {"temperature": self.temperature, "seed": self.seed, "num_ctx": self.num_ctx}
            return {"model": self.model, "messages": messages, "stream": False, "options": options}
        return {"model": self.model, "messages": messages, "temperature": self.temperature, "seed": self.seed}

    def _content(self, body: str) -> str:
        """The text of a reply; KeyError, TypeError, IndexError or ValueError where it is not whole."""
        if self.api == "openai":
            return _text(json.loads(body)["choices"][0]["message"]["content"])
        parts = list(_objects(body))  # one, or one a line from a server that streams whatever it is asked
        for part in parts:
            if "error" in part:
                raise _Failure(f"the server says: {part['error']}")
        if not parts[-1]["done"]:
            raise ValueError("the stream ends early")
        return "".join(_text(part["message"]["content"]) for part in parts if "message" in part)

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        """What an HTTP status that is no success means: a failure that may pass, or a mistake of the user."""
        with error:
            try:
                said = error.read(4000).decode("utf-8", "replace")
            except (OSError, http.client.HTTPException):
                said = ""
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            detail = json.loads(said)["error"]
            said = detail["message"] if isinstance(detail, dict) else detail
        said = f": {' '.join(said.split())[:300]}" if said and isinstance(said, str) else ""
        reason = f"status {error.code}{said}"
        if error.code in PASSING or error.code >= 500:
            return _Failure(reason, pause=_retry_after(error.headers.get("Retry-After")))
        if error.code == 404 and self.api == "ollama" and "model" in said:
            reason += f"; get it with: ollama pull {self.model}"
        elif error.code in (401, 403) and self.api_key is None:
            reason += "; name the environment variable that holds a key with --api-key-env"
        return UserError(self._named(reason))

    def _not_sent(self, reason: Any) -> Exception:
        if isinstance(reason, ssl.SSLCertVerificationError):
            return UserError(self._named(str(reason)))
        text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
        passing = isinstance(reason, ConnectionResetError | BrokenPipeError)
        return _Failure(text, connected=passing)

    def _named(self, reason: str) -> str:
        """``reason`` after the server's address, with the key blotted out where a server repeats it."""
        if self.api_key:
            reason = reason.replace(self.api_key, "***")
        return f"the judge at {self.url}: {reason}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected question would lose its body, and might carry its key elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False
    return sound and not parts.query and not parts.fragment and url.isascii() and url.isprintable() and " " not in url


def api_key_from(variable: str) -> str:
    """The key that an environment variable holds; ``UserError`` where it holds none that HTTP can carry."""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"the environment variable {variable} is not set: put the key into it")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"the environment variable {variable} does not hold a key: it has spaces or odd characters")
    return key


def _objects(body: str) -> Iterator[dict[str, Any]]:
    """The JSON objects that stand one after the other in ``body``."""
    decoder, at = json.JSONDecoder(), 0
    while rest := body[at:].lstrip():
        value, length = decoder.raw_decode(rest)
        if not isinstance(value, dict):
            raise ValueError("not an object")
        yield value
        at = len(body) - len(rest) + length


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not text")
    return value


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date; None where it has none."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), LONGEST_PAUSE) if math.isfinite(seconds) else None
