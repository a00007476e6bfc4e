"""``load_tokenizer``: a tokenizer from its name, its saved file, or GPT-2's vocabulary files."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any, NoReturn

from llmfast.config import suggest
from llmfast.errors import UserError
from llmfast.tokenizer.base import FORMAT_VERSION, TOKENIZER_FILE, Tokenizer
from llmfast.tokenizer.bpe import BPETokenizer, unpack_tokens
from llmfast.tokenizer.gpt2 import check_gpt2_tokens, is_gpt2_path, load_gpt2
from llmfast.tokenizer.simple import ByteTokenizer, CharTokenizer

NAMES = ("gpt2", "r50k_base", "byte")


def load_tokenizer(spec: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that ``spec`` names.

    "gpt2" or "r50k_base" (from LLMFAST_GPT2_VOCAB, tiktoken's cache or the network), "byte"; or a path: a saved
    ``llmfast_tokenizer.json`` or a folder holding one (a checkpoint, a prepared data set), or GPT-2's vocab.bpe,
    encoder.json or .tiktoken file or a folder holding one. Raises ``UserError`` for anything else.
    """
    name = os.fspath(spec)
    if name in ("gpt2", "r50k_base"):
        return load_gpt2()
    if name == "byte":
        return ByteTokenizer()
    try:
        return _from_path(Path(name)) if name and Path(name).exists() else _unknown(name)
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {name}: {error.strerror or error}") from error


def _from_path(path: Path) -> Tokenizer:
    if (path / TOKENIZER_FILE).is_file():
        return _read(path / TOKENIZER_FILE)
    if is_gpt2_path(path):
        return load_gpt2(path)
    if path.is_dir():
        raise UserError(f"{path} holds neither {TOKENIZER_FILE} nor GPT-2's vocab.bpe, encoder.json or .tiktoken file")
    return _read(path)


def _unknown(name: str) -> NoReturn:
    if name in ("char", "bpe"):
        raise UserError(
            f"a {name} tokenizer is made from text: train it first (llmfast tokenizer, or "
            f"llmfast.tokenizer.train_{name}) and name its {TOKENIZER_FILE}"
        )
    raise UserError(
        f"unknown tokenizer {name!r}{suggest(name, NAMES)}: neither one of {', '.join(NAMES)} nor a file or folder"
    )


def _read(path: Path) -> Tokenizer:
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != "llmfast tokenizer":
            raise ValueError("another format")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is no tokenizer: it should be a {TOKENIZER_FILE} or GPT-2's vocab.bpe, encoder.json or .tiktoken"
        ) from error
    if content.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {content.get('version')!r}; this llmfast reads {FORMAT_VERSION}: upgrade it"
        )
    try:
        tokenizer = _build(content, path)
        if tokenizer.vocab_size != content["vocab_size"]:
            raise ValueError(f"{tokenizer.vocab_size} ids instead of {content['vocab_size']}")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError, zlib.error) as error:
        raise UserError(
            f"{path} is damaged ({error}); save the tokenizer again or take it from another copy"
        ) from error
    return tokenizer


def _build(content: dict[str, Any], path: Path) -> Tokenizer:
    kind = content["kind"]
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        tokenizer = CharTokenizer(content["characters"])
        if tokenizer.characters != content["characters"]:
            raise ValueError("its characters are not in order")
        return tokenizer
    if kind == "gpt2":
        return BPETokenizer(check_gpt2_tokens(unpack_tokens(content), str(path)), kind="gpt2")
    if kind == "bpe":
        return BPETokenizer(unpack_tokens(content))
    raise ValueError(f"unknown kind {kind!r}")
