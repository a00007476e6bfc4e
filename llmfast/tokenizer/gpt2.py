"""GPT-2's own encoding (r50k_base): from local files, tiktoken's cache, or the network."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from llmfast.errors import UserError
from llmfast.tokenizer.base import END_OF_TEXT
from llmfast.tokenizer.bpe import BPETokenizer

ENVIRONMENT = "LLMFAST_GPT2_VOCAB"
RANKS = 50_256
# SHA-256 of the ranks in tiktoken's format (one line of base64 and rank each): the hash that tiktoken pins.
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
_SITE = "https://openaipublic.blob.core.windows.net/"
_RANKS_URL = _SITE + "encodings/r50k_base.tiktoken"
_VOCAB_URL = _SITE + "gpt-2/encodings/main/vocab.bpe"
_NETWORK_SECONDS = 20.0


def load_gpt2(path: str | os.PathLike[str] | None = None, *, network: bool = True) -> BPETokenizer:
    """GPT-2's tokenizer from ``path`` (a vocab.bpe, encoder.json or .tiktoken file, or a folder with some of them).

    Without a path: from what LLMFAST_GPT2_VOCAB names, else tiktoken's cache, else the network where that is allowed.
    Raises ``UserError`` if a file is not whole or not GPT-2's, or if none of these ways leads to one.
    """
    named = path or os.environ.get(ENVIRONMENT)
    if named:
        return _from_path(Path(named), "" if path else f" (named by {ENVIRONMENT})")
    return BPETokenizer(_from_cache_or_network(network), kind="gpt2")


def is_gpt2_path(path: Path) -> bool:
    """Whether ``path`` is, by its name, one of GPT-2's vocabulary files or a folder holding one."""
    return bool(_vocabulary_files(path)) if path.is_dir() else _reader_of(path.name) is not None


def check_gpt2_tokens(tokens: list[bytes], where: str) -> list[bytes]:
    """``tokens`` (from ``where``) if they are GPT-2's, in order; else a ``UserError``."""
    if hashlib.sha256(_tiktoken_format(tokens)).hexdigest() != RANKS_SHA256:
        if len(tokens) != RANKS:
            problem = f"it holds {len(tokens):,} mergeable tokens of {RANKS:,}"
        else:
            problem = "its tokens or their order differ"
        raise UserError(f"{where} is not GPT-2's vocabulary: {problem}; fetch the file again")
    return tokens


def _from_path(path: Path, how: str) -> BPETokenizer:
    if not path.exists():
        raise UserError(f"no such file or folder: {path}{how}; it should hold GPT-2's vocab.bpe or r50k_base.tiktoken")
    files = _vocabulary_files(path) if path.is_dir() else [path]
    if not files:
        raise UserError(
            f"{path}{how} holds none of r50k_base.tiktoken, vocab.bpe, encoder.json, merges.txt, vocab.json"
        )
    # Each file alone tells all tokens and their order; all that are there must be right.
    checked = [_read(file) for file in files]
    return BPETokenizer(checked[0], kind="gpt2")


def _vocabulary_files(folder: Path) -> list[Path]:
    names = ("r50k_base.tiktoken", "gpt2.tiktoken", "vocab.bpe", "encoder.json", "merges.txt", "vocab.json")
    return [folder / name for name in names if (folder / name).is_file()]


def _reader_of(name: str) -> Callable[[str], list[bytes]] | None:
    if name.endswith(".tiktoken"):
        return _parse_tiktoken
    if name.endswith(".bpe") or name == "merges.txt":
        return _parse_merges
    if name in ("encoder.json", "vocab.json"):
        return _parse_encoder
    return None


def _read(path: Path) -> list[bytes]:
    parse = _reader_of(path.name)
    if parse is None:
        raise UserError(f"{path} is none of GPT-2's vocabulary files: vocab.bpe, encoder.json or *.tiktoken")
    try:
        text = path.read_bytes().decode("utf-8")
        tokens = parse(text)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or not GPT-2's vocabulary; fetch the file again") from error
    return check_gpt2_tokens(tokens, str(path))


def _parse_tiktoken(text: str) -> list[bytes]:
    ranks = {}
    for line in text.splitlines():
        token, rank = line.split()
        ranks[int(rank)] = base64.b64decode(token, validate=True)
    return [ranks[rank] for rank in range(len(ranks))]


@functools.cache
def _printable_bytes() -> dict[str, int]:
    """GPT-2's files write each byte as one printable character: itself where it is one, else U+0100 onwards.

    In the order of the ids that the single bytes have.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def written(token: bytes) -> str:
    """``token`` as GPT-2's vocabulary files write it: one printable character a byte."""
    return "".join(_characters()[byte] for byte in token)


@functools.cache
def _characters() -> dict[int, str]:
    return {byte: character for character, byte in _printable_bytes().items()}


def parse_written(written: str) -> bytes:
    """The token that ``written`` wrote; a ``KeyError`` for another character."""
    return bytes(_printable_bytes()[character] for character in written)


def _parse_merges(text: str) -> list[bytes]:
    tokens = [bytes([byte]) for byte in _printable_bytes().values()]
    # The first line is "#version: 0.2"; later ones may well begin with #.
    for line in text.split("\n")[1:]:
        if line:
            left, right = line.split()
            tokens.append(parse_written(left) + parse_written(right))
    return tokens


def _parse_encoder(text: str) -> list[bytes]:
    tokens = {i: parse_written(written) for written, i in json.loads(text).items()}
    if tokens.pop(RANKS, None) not in (END_OF_TEXT.encode(), None):
        raise ValueError("the last id is not <|endoftext|>")
    return [tokens[i] for i in range(len(tokens))]


def _tiktoken_format(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def _from_cache_or_network(network: bool) -> list[bytes]:
    for url, parse in ((_RANKS_URL, _parse_tiktoken), (_VOCAB_URL, _parse_merges)):
        try:
            return check_gpt2_tokens(parse(_cache_file(url).read_text(encoding="utf-8")), "tiktoken's cache")
        except (OSError, ValueError, KeyError):
            continue  # not there or not whole: the network is next
    if not network:
        raise UserError(f"name a folder with vocab.bpe or r50k_base.tiktoken in {ENVIRONMENT}")
    return check_gpt2_tokens(_parse_tiktoken(_download(_RANKS_URL)), _RANKS_URL)


def _cache_file(url: str) -> Path:
    """Where tiktoken keeps what it fetched from ``url``."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    name = hashlib.sha1(url.encode()).hexdigest()
    return Path(folder or Path(tempfile.gettempdir()) / "data-gym-cache") / name


def _download(url: str) -> str:
    """Fetch through tiktoken, which checks the hash and fills its cache; a ``UserError`` after _NETWORK_SECONDS."""
    import tiktoken.load

    result: list[str] = []
    reason = [f"no answer within {_NETWORK_SECONDS:.0f} seconds"]

    def fetch() -> None:
        try:
            result.append(tiktoken.load.read_file_cached(url, RANKS_SHA256).decode("utf-8"))
        except Exception as error:
            reason[0] = type(error).__name__

    # tiktoken sets no timeout; a daemon thread is left behind rather than waited for.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(_NETWORK_SECONDS)
    if not result:
        raise UserError(
            f"GPT-2's vocabulary is not on this machine and cannot be fetched ({reason[0]}): give a folder with "
            f"vocab.bpe or r50k_base.tiktoken as the tokenizer or in {ENVIRONMENT}, set TIKTOKEN_CACHE_DIR to a cache "
            "of tiktoken's, or use --tokenizer bpe, which trains one on your text"
        )
    return result[0]
