"""Chunks of a corpus to tokens: decode, clean, hash, encode. Worker processes run this, so it imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from llmfast.data.readers import Chunk
from llmfast.errors import UserError
from llmfast.tokenizer import Tokenizer

CLEANINGS = ("whitespace", "punctuation", "lowercase", "duplicates")
HASH_BYTES = 16


@dataclass(frozen=True)
class Settings:
    """What decides the tokens of a document, beside the tokenizer."""

    field: str = "text"
    clean: tuple[str, ...] = ()
    seed: int = 1337
    end_of_text: bool = True  # append the tokenizer's eot_id to every document
    characters: float | None = None  # split every document: this part of its characters is for training


@dataclass
class Encoded:
    """The tokens of some chunks. An entry is a document, a piece of one, or (split by characters) a part of one."""

    tokens: np.ndarray  # uint16 or uint32, the entries one after the other
    lengths: np.ndarray  # (entries,) int64
    sides: (
        np.ndarray
    )  # (entries,) int8: 0 training, 1 validation, -1 by hash or, for a later piece, as the piece before
    hashes: np.ndarray  # (entries, 2) uint64: keyed 16-byte hash of the text
    starts: np.ndarray  # (entries,) bool: begins a document
    ends: np.ndarray  # (entries,) bool: ends a document
    problems: list[str]


def encode_chunks(chunks: list[Chunk], tokenizer: Tokenizer, settings: Settings) -> Encoded:
    """Encode ``chunks`` in order. Records that cannot be read are left out and told of in ``problems``."""
    problems: list[str] = []
    entries = []
    for chunk in chunks:
        for text in _documents(chunk, settings.field, problems):
            text = clean_text(text, settings.clean, chunk.starts, chunk.ends)
            if settings.characters is None:
                entries.append((text, chunk.side, chunk.starts, chunk.ends))
            elif text:
                cut = int(len(text) * settings.characters)
                entries += [(text[:cut], 0, True, True), (text[cut:], 1, True, True)]
    texts = [entry[0] for entry in entries]
    dtype = tokenizer.dtype
    arrays = tokenizer.encode_batch(texts)
    lengths = np.array([len(array) for array in arrays], np.int64)
    ends = np.array([entry[3] for entry in entries], bool)
    if settings.end_of_text and tokenizer.eot_id is not None:
        eot, none = np.array([tokenizer.eot_id], dtype), np.empty(0, dtype)
        arrays = [part for array, end in zip(arrays, ends, strict=True) for part in (array, eot if end else none)]
        lengths += ends
    digests = b"".join(_hash(text, settings.seed) for text in texts)
    return Encoded(
        tokens=np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype),
        lengths=lengths,
        sides=np.array([entry[1] for entry in entries], np.int8),
        hashes=np.frombuffer(digests, "<u8").reshape(-1, 2),
        starts=np.array([entry[2] for entry in entries], bool),
        ends=ends,
        problems=problems,
    )


def chunk_texts(chunk: Chunk, settings: Settings, skip: bool = False) -> Iterator[tuple[str, int]]:
    """(text, first half of its hash) of every document: what ``encode_chunks`` encodes, to train a tokenizer on.

    ``UserError`` for what cannot be read, unless ``skip``.
    """
    problems: list[str] = []
    for text in _documents(chunk, settings.field, problems):
        if problems and not skip:
            break
        text = clean_text(text, settings.clean, chunk.starts, chunk.ends)
        yield text, int.from_bytes(_hash(text, settings.seed)[:8], "little")
    if problems and not skip:
        raise UserError(problems[0])


def _hash(text: str, seed: int) -> bytes:
    key = seed.to_bytes(8, "little", signed=True)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES, key=key).digest()


def clean_text(text: str, clean: tuple[str, ...], starts: bool = True, ends: bool = True) -> str:
    """Lower case; ASCII punctuation removed; runs of white space made one space, none where the text starts or ends."""
    if "lowercase" in clean:
        text = text.lower()
    if "punctuation" in clean:
        text = re.sub(r"[!-/:-@\[-`{-~]", "", text)
    if "whitespace" in clean:
        text = re.sub(r"\s+", " ", text)
        text = text.lstrip() if starts else text
        text = text.rstrip() if ends else text
    return text


# ---- chunks to texts


def _documents(chunk: Chunk, field: str, problems: list[str]) -> Iterator[str]:
    """The texts of ``chunk``, leaving out empty records; what cannot be read is told of in ``problems``."""
    if chunk.kind == "text":
        yield from _text(chunk, problems)
    else:
        read = _json_lines if chunk.kind == "lines" else _records
        yield from filter(None, read(chunk, field, problems))


def _text(chunk: Chunk, problems: list[str]) -> Iterator[str]:
    data: bytes = chunk.data
    if (nul := data.find(b"\0")) >= 0:
        line = chunk.first + data.count(b"\n", 0, nul)
        problems.append(f"{chunk.path}, line {line}: a binary file, not text")
        return
    try:
        yield data.decode("utf-8")
    except UnicodeDecodeError as error:
        problems.append(_not_utf8(chunk.path, chunk.first + data.count(b"\n", 0, error.start), data, error))


def _not_utf8(path: str, line: int, data: bytes, error: UnicodeDecodeError) -> str:
    return f"{path}, line {line}: not UTF-8 text (byte 0x{data[error.start]:02x}); convert it, for instance with iconv"


def _json_lines(chunk: Chunk, field: str, problems: list[str]) -> Iterator[str]:
    for number, line in enumerate(chunk.data.split(b"\n"), chunk.first):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line or line.isspace():
            continue
        where = f"{chunk.path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            problems.append(_not_utf8(chunk.path, number, line, error))
        except (ValueError, RecursionError) as error:
            problems.append(f"{where}: not JSON ({getattr(error, 'msg', error)}); one record a line")
        else:
            yield from _record(record, field, where, problems)


def _records(chunk: Chunk, field: str, problems: list[str]) -> Iterator[str]:
    for number, record in enumerate(chunk.data, chunk.first):
        yield from _record(record, field, f"{chunk.path}, record {number}", problems)


def _record(record: Any, field: str, where: str, problems: list[str]) -> Iterator[str]:
    if isinstance(record, str):
        yield record
    elif not isinstance(record, dict):
        problems.append(f"{where}: expected an object or a string, got {type(record).__name__}")
    elif field not in record:
        known = ", ".join(map(str, record)) or "none"
        problems.append(f"{where}: no field {field!r} (fields: {known}); name the one that holds the text: --field")
    elif not isinstance(record[field], str):
        problems.append(f"{where}: field {field!r} holds {type(record[field]).__name__}, not text")
    else:
        yield record[field]
