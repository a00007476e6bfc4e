"""``llmfast tokenizer``: text to token ids and back, and tokenizers of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmfast.cli.common import FIELD_HELP, JSON_HELP, print_json, read_text, refuse_addresses, table
from llmfast.config import option
from llmfast.errors import UserError

if TYPE_CHECKING:
    from llmfast.data.sources import Source
    from llmfast.tokenizer import Tokenizer

TOKENIZER_HELP = "gpt2, r50k_base, byte, a saved tokenizer, a vocabulary file, or a run"


@dataclass
class Shared:
    """Options of every action."""

    tokenizer: str = option("gpt2", TOKENIZER_HELP)
    json: bool = option(False, JSON_HELP)


@dataclass
class EncodeOptions(Shared):
    text: str | None = field(default=None, metadata={"positional": True, "help": "the text (default: --file)"})
    file: str = option("-", "a UTF-8 file (default: standard input)")
    allow_special: bool = option(False, "read <|endoftext|> as the special token, not as text")


@dataclass
class DecodeOptions(Shared):
    ids: list[int] = field(
        default_factory=list, metadata={"positional": True, "help": "token ids (default: standard input)"}
    )


@dataclass
class ShowOptions(Shared):
    pass


@dataclass
class TrainOptions:
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "text: files, folders or globs (default: the Python standard library)"},
    )
    out: str = field(kw_only=True, metadata={"help": "folder for the tokenizer"})
    kind: Literal["bpe", "char"] = option("bpe", "byte-pair encoding, or one id a character")
    size: int = option(4096, "most tokens of a bpe")
    json: bool = option(False, JSON_HELP)
    field: str = option("text", FIELD_HELP)


def encode(options: EncodeOptions) -> int:
    tokenizer = open_tokenizer(options.tokenizer)
    text = read_text(options.file) if options.text is None else options.text
    ids = tokenizer.encode(text, allow_special=options.allow_special)
    if options.json:
        print_json({"tokens": len(ids), "ids": ids})
    else:
        print(*ids)
    return 0


def decode(options: DecodeOptions) -> int:
    tokenizer = open_tokenizer(options.tokenizer)
    ids = options.ids or [_id(word) for word in read_text("-").split()]
    for i in ids:
        if not 0 <= i < tokenizer.vocab_size:
            raise UserError(f"token id {i} lies outside the tokenizer's 0 to {tokenizer.vocab_size - 1}")
    text = tokenizer.decode(ids)
    if options.json:
        print_json({"tokens": len(ids), "text": text})
    else:
        print(text)
    return 0


def show(options: ShowOptions) -> int:
    tokenizer = open_tokenizer(options.tokenizer)
    facts = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eot_id}
    if options.json:
        print_json(facts)
        return 0
    print(table([*facts.items()]))
    tokens = tokenizer.token_bytes()
    longest = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))[:10]
    print("longest tokens: " + " ".join(f"{i}={tokens[i].decode('utf-8', 'replace')!r}" for i in longest))
    return 0


def train(options: TrainOptions) -> int:
    from llmfast.data import find_sources, stdlib_sources
    from llmfast.tokenizer import TOKENIZER_FILE, train_bpe, train_char

    if options.size < 257:
        raise UserError(f"size must be at least 257 (256 bytes and end-of-text), got {options.size}")
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file is in the way of the output folder")
    if (out / TOKENIZER_FILE).exists():
        raise UserError(f"{out} already holds a tokenizer: choose another --out")
    refuse_addresses(options.data)
    sources = find_sources(options.data or stdlib_sources())
    texts = _texts(sources, options.field)
    tokenizer = train_bpe(texts, options.size) if options.kind == "bpe" else train_char(texts)
    path = tokenizer.save(out)
    if options.json:
        print_json({"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "path": str(path)})
    else:
        print(f"{tokenizer.kind} tokenizer of {tokenizer.vocab_size:,} tokens: {path}")
    return 0


def _texts(sources: list[Source], field: str) -> Iterator[str]:
    """The texts of a corpus, one document (or piece of a long one) at a time."""
    from llmfast.data.encode import Settings, chunk_texts
    from llmfast.data.readers import Span, read_chunks

    for source in sources:
        for chunk in read_chunks(Span(source, field=field)):
            for text, _ in chunk_texts(chunk, Settings(field=field)):
                yield text


def open_tokenizer(spec: str) -> Tokenizer:
    """What ``load_tokenizer`` opens, or the tokenizer of a run or checkpoint."""
    from llmfast.tokenizer import TOKENIZER_FILE, load_tokenizer

    if Path(spec, "checkpoints").is_dir() and not Path(spec, TOKENIZER_FILE).exists():
        from llmfast.checkpoint import find_checkpoint

        spec = str(find_checkpoint(spec))
    return load_tokenizer(spec)


def _id(word: str) -> int:
    if not word.isdigit():
        raise UserError(f"{word!r} on standard input is not a token id")
    return int(word)


ACTIONS = {
    "encode": ("turn text into token ids", EncodeOptions, encode),
    "decode": ("turn token ids into text", DecodeOptions, decode),
    "train": ("train a tokenizer on text", TrainOptions, train),
    "show": ("say what a tokenizer is", ShowOptions, show),
}
