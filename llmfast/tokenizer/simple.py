"""The two tokenizers without merges: one id a byte, and one id a character."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from llmfast.errors import UserError
from llmfast.tokenizer.base import Tokenizer, replace_surrogates


class ByteTokenizer(Tokenizer):
    """Ids 0-255 are the bytes of the text's UTF-8; 256 is <|endoftext|>."""

    kind = "byte"
    vocab_size = 257
    eot_id = 256

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text), dtype=np.uint8).astype(self.dtype)

    def _decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(_BYTES[i] for i in ids)

    def _payload(self) -> dict[str, Any]:
        return {}


_BYTES = [*(bytes([byte]) for byte in range(256)), b"<|endoftext|>"]


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return replace_surrogates(text).encode("utf-8")


class CharTokenizer(Tokenizer):
    """One id per character, in the order of their code points, as in nanoGPT's character-level Shakespeare.

    There is no <|endoftext|>. A character that is not in ``characters`` is a ``UserError`` when it is encoded.
    """

    kind = "char"
    eot_id = None

    def __init__(self, characters: Iterable[str]):
        self.characters = "".join(sorted(set(characters)))
        self.vocab_size = len(self.characters)
        if not self.characters:
            raise UserError("a character tokenizer needs at least one character: the text is empty")
        self._codes = _code_points(self.characters)

    def _encode(self, text: str) -> np.ndarray:
        codes = _code_points(text)
        ids = np.minimum(np.searchsorted(self._codes, codes), self.vocab_size - 1)
        unknown = np.flatnonzero(self._codes[ids] != codes)
        if unknown.size:
            at, code = int(unknown[0]), int(codes[unknown[0]])
            raise UserError(
                f"character {chr(code)!r} (U+{code:04X}, at position {at} of the text) is not among the "
                f"{self.vocab_size} characters that this tokenizer was trained on; use byte or bpe for any text"
            )
        return ids.astype(self.dtype)

    def _decode_bytes(self, ids: list[int]) -> bytes:
        return "".join(self.characters[i] for i in ids).encode("utf-8")

    def _payload(self) -> dict[str, Any]:
        return {"characters": self.characters}


def _code_points(text: str) -> np.ndarray:
    """The code points of a text, uint32."""
    try:
        utf32 = text.encode("utf-32-le")
    except UnicodeEncodeError:
        utf32 = replace_surrogates(text).encode("utf-32-le")
    return np.frombuffer(utf32, dtype="<u4")


def train_char(texts: Iterable[str]) -> CharTokenizer:
    """A tokenizer with one id for each character in ``texts``."""
    if isinstance(texts, str):
        texts = [texts]
    seen: set[str] = set()
    for text in texts:
        seen.update(replace_surrogates(text))
    return CharTokenizer(seen)
