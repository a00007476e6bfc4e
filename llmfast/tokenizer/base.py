"""What every tokenizer does: the interface, special tokens, id checks, batches and the saved file."""

from __future__ import annotations

import contextlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.errors import UserError

TOKENIZER_FILE = "llmfast_tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
FORMAT_VERSION = 1


def replace_surrogates(text: str) -> str:
    """``text`` with surrogate pairs joined to their character and lone surrogates as U+FFFD, as tiktoken has it."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class Tokenizer(ABC):
    """Text to token ids and back.

    Ids are dense: 0 .. vocab_size - 1. Tokenizers hold no open files or threads: they can be pickled, and used after a
    fork and from several threads at once. A lone surrogate in the text counts as U+FFFD, as in tiktoken.
    """

    kind: str  # "gpt2", "byte", "char" or "bpe"
    vocab_size: int
    eot_id: int | None  # id of <|endoftext|>

    @property
    def special_tokens(self) -> dict[str, int]:
        return {} if self.eot_id is None else {END_OF_TEXT: self.eot_id}

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smaller of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray:
        """Ids of ordinary text, 1-D, of ``self.dtype``."""

    @abstractmethod
    def _decode_bytes(self, ids: list[int]) -> bytes:
        """Bytes of ids that are in range."""

    @abstractmethod
    def _payload(self) -> dict[str, Any]:
        """What the saved file holds beside the common keys, as JSON values."""

    def encode(self, text: str, *, allow_special: bool | Collection[str] = False) -> list[int]:
        """Ids of ``text``.

        Text such as "<|endoftext|>" is ordinary text, unless ``allow_special`` is True (every special token of this
        tokenizer) or names it. A ``UserError`` for a name that is no special token of this tokenizer.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        specials = self._allowed(allow_special)
        if not specials:
            return self._encode(text).tolist()
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, specials)) + ")", text):
            ids.extend([specials[part]] if part in specials else self._encode(part).tolist())
        return ids

    def _allowed(self, allow_special: bool | Collection[str]) -> dict[str, int]:
        if isinstance(allow_special, bool):
            return self.special_tokens if allow_special else {}
        names = [allow_special] if isinstance(allow_special, str) else allow_special
        for name in names:
            if name not in self.special_tokens:
                known = ", ".join(self.special_tokens) or "none"
                raise UserError(f"{name!r} is no special token of this {self.kind} tokenizer (it has: {known})")
        return {name: self.special_tokens[name] for name in names}

    def encode_batch(self, texts: Iterable[str], *, threads: int = 1) -> list[np.ndarray]:
        """Ids of each text as ordinary text: 1-D arrays of ``self.dtype``, the same for any number of threads."""
        if threads <= 1:
            return [self._encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._encode, texts))

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that ``ids`` (a 1-D sequence, array or tensor of integers) stand for.

        A ``UserError`` for an id outside 0 .. vocab_size - 1.
        """
        array = np.asarray(ids)
        if array.size == 0:
            return b""
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise TypeError(f"ids must be a flat sequence of integers, got shape {array.shape} of {array.dtype}")
        outside = (array < 0) | (array >= self.vocab_size)
        if outside.any():
            raise UserError(
                f"token id {array[outside][0]} is out of range: this {self.kind} tokenizer has ids 0 to "
                f"{self.vocab_size - 1}; was the text encoded with another tokenizer?"
            )
        return self._decode_bytes(array.tolist())

    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for, from id 0 on: what makes two tokenizers the same."""
        return [self._decode_bytes([i]) for i in range(self.vocab_size)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text that ``ids`` stand for; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``llmfast_tokenizer.json``, which holds all that ``load_tokenizer`` needs, into ``directory``."""
        path = Path(directory) / TOKENIZER_FILE
        content = {
            "format": "llmfast tokenizer",
            "version": FORMAT_VERSION,
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            **self._payload(),
        }
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")
            os.replace(unfinished, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise UserError(f"cannot write the tokenizer to {path}: {error.strerror or error}") from error
        return path
