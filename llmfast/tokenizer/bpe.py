"""Byte-pair encodings: GPT-2's own, and those trained on a user's text. tiktoken does the encoding."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tiktoken

from llmfast.errors import UserError
from llmfast.tokenizer.base import END_OF_TEXT, Tokenizer, replace_surrogates

# GPT-2's pattern in tiktoken's faster wording; the original is in bpe_train.py.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

_SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # Unicode's White_Space, tiktoken's \s
_LONG_RUN = 100_000  # characters; tiktoken panics on runs of white space somewhere below a million
_STEP = 1_000
_LONG_RUN_SAMPLED = re.compile(f"{_SPACE}{{{_LONG_RUN // _STEP},}}")
_LONG_RUN_EXACT = re.compile(f"(?<!{_SPACE}){_SPACE}{{{_LONG_RUN},}}")


class BPETokenizer(Tokenizer):
    """A byte-pair encoding with GPT-2's split pattern.

    ``tokens``: the bytes of each token in order of rank (id = rank); all 256 single bytes are among them.
    <|endoftext|> is the id behind the last one.
    """

    def __init__(self, tokens: Sequence[bytes], *, kind: str = "bpe"):
        self.kind = kind
        self.tokens = list(tokens)
        self.vocab_size = len(self.tokens) + 1
        self.eot_id: int = len(self.tokens)
        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        if len(ranks) != len(self.tokens) or not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError("tokens must be distinct and hold all 256 single bytes")
        #: The same as a ``tiktoken.Encoding``.
        self.encoding = tiktoken.Encoding(
            name="gpt2" if kind == "gpt2" else f"llmfast_{self.vocab_size}",
            pat_str=_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.eot_id},
            explicit_n_vocab=self.vocab_size,
        )

    def merges(self) -> list[tuple[bytes, bytes]]:
        """The two tokens that each longer token is joined from, in order of rank, as GPT-2's merges.txt lists them.

        Merging by this list gives the same tokens as this encoding does. A ``UserError`` for an encoding that has no
        such list: one that holds a token that merging never reaches.
        """
        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        merges = []
        for rank, token in enumerate(self.tokens):
            if len(token) > 1:
                parts = _merge(token, ranks, rank)
                if len(parts) != 2:
                    raise UserError(f"token {rank} ({token!r}) is not two earlier tokens joined: there are no merges")
                merges.append((parts[0], parts[1]))
        return merges

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.tokens, self.kind)

    def _encode(self, text: str) -> np.ndarray:
        try:
            parts = [self.encoding.encode_to_numpy(part, disallowed_special=()) for part in split_long_space(text)]
        except UnicodeEncodeError:
            return self._encode(replace_surrogates(text))
        return np.concatenate(parts).astype(self.dtype)

    def _decode_bytes(self, ids: list[int]) -> bytes:
        return self.encoding.decode_bytes(ids)

    def _payload(self) -> dict[str, Any]:
        return pack_tokens(self.tokens)


def _merge(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """``token`` taken apart into the tokens that merges of a rank under ``below`` make of its bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, best = min((ranks.get(a + b, below), (a, b)) for a, b in itertools.pairwise(parts))
        if rank == below:
            break
        joined: list[bytes] = []
        for part in parts:  # all of that pair at once, from left to right
            if best == (joined[-1] if joined else b"", part):
                joined[-1] += part
            else:
                joined.append(part)
        parts = joined
    return parts


def _rebuild(tokens: list[bytes], kind: str) -> BPETokenizer:
    return BPETokenizer(tokens, kind=kind)


def pack_tokens(tokens: Sequence[bytes]) -> dict[str, Any]:
    """JSON values that hold the bytes of each token, in order: compressed uint32 lengths and the bytes end to end."""
    data = np.array([len(token) for token in tokens], dtype="<u4").tobytes() + b"".join(tokens)
    return {
        "sha256": hashlib.sha256(data).hexdigest(),
        "tokens": base64.b64encode(zlib.compress(data, 9)).decode("ascii"),
    }


def unpack_tokens(content: dict[str, Any]) -> list[bytes]:
    """What ``pack_tokens`` packed; a ``ValueError`` or ``zlib.error`` if it is not whole."""
    data = zlib.decompress(base64.b64decode(content["tokens"], validate=True))
    if hashlib.sha256(data).hexdigest() != content["sha256"]:
        raise ValueError("the hash of its tokens differs")
    count = content["vocab_size"] - 1
    lengths = np.frombuffer(data, dtype="<u4", count=count)
    ends = (4 * count + np.cumsum(lengths, dtype=np.int64)).tolist()
    return [data[start:end] for start, end in zip([4 * count, *ends], ends, strict=False)]


def split_long_space(text: str) -> Iterator[str]:
    """Cut ``text`` so that tiktoken's regex never backtracks over a huge run of white space, which it answers with a
    panic. Such a run is cut before its last character, where the pattern ends a piece anyway: the tokens stay the same.
    """
    begin = 0
    # A run that long shows in every _STEP-th character: the whole text need not be searched.
    for sampled in _LONG_RUN_SAMPLED.finditer(text[::_STEP]):
        first, last = max(0, sampled.start() - 1) * _STEP, sampled.end() * _STEP + 1
        for run in _LONG_RUN_EXACT.finditer(text, first, last):
            if run.end() < len(text):
                yield text[begin : run.end() - 1]
                begin = run.end() - 1
    yield text[begin:]
