"""What ``--data`` names: tokens are opened as they are, text is prepared on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfast.cli.common import note, refuse_addresses
from llmfast.errors import UserError

if TYPE_CHECKING:
    from llmfast.data import TokenSource
    from llmfast.tokenizer import Tokenizer


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and to validate with."""

    train: TokenSource
    val: TokenSource | None
    tokenizer: Tokenizer | None


def resolve_tokenizer(spec: str | None) -> Tokenizer | str | None:
    """The tokenizer called ``spec``; None, "bpe" and "char" stay, for ``prepare`` trains them."""
    from llmfast.tokenizer import load_tokenizer

    return spec if spec in (None, "bpe", "char") else load_tokenizer(spec)


def check_data(data: list[str], val_data: list[str]) -> None:
    """Complain of what is not there, and of text beside tokens, before any work."""
    from llmfast.data import find_sources, open_tokens
    from llmfast.data.tokens import is_token_data

    paths = [*data, *val_data]
    refuse_addresses(paths)
    tokens = [path for path in paths if is_token_data(path)]
    if not tokens:
        for group in (data, val_data):
            if group:
                find_sources(group)
        return
    for path in paths:
        if path not in tokens:
            raise UserError(f"{tokens[0]} holds tokens and {path} text: give one kind of data")
    for name, group in (("--data", data), ("--val-data", val_data)):
        if len(group) > 1:
            raise UserError(f"{name} takes one folder or file of tokens, got {len(group)}: {' '.join(group)}")
    if val_data and not data:
        raise UserError("--val-data holds tokens: name the training tokens with --data")
    for path in paths:
        open_tokens(path)


def open_corpus(
    data: list[str], out: Path, *, tokenizer: Tokenizer | str | None, val_data: list[str], **preparing: Any
) -> Corpus:
    """The tokens of ``data`` (default: the Python standard library); text is prepared into ``out``.

    ``tokenizer`` and ``preparing`` go to ``prepare``. Tokens come with their own tokenizer where they have one, which
    must be ``tokenizer`` if that is a ``Tokenizer``.
    """
    from llmfast.data import open_tokens, prepare, stdlib_sources
    from llmfast.data.tokens import is_token_data

    if data and is_token_data(data[0]):
        train = open_tokens(data[0])
        val = open_tokens(val_data[0], "val") if val_data else _validation_beside(data[0])
        given = tokenizer if not isinstance(tokenizer, str) else None
        for source in (train, val):
            if source is not None and source.tokenizer is not None and given is not None:
                check_same(source.tokenizer, given, str(data[0]))
        return Corpus(train, val, train.tokenizer or given)
    if not data:
        note("no --data given: the text is the Python standard library's")
    prepared = prepare(data or stdlib_sources(), out, tokenizer=tokenizer, val_sources=val_data, **preparing)
    return open_prepared(prepared.path)


def open_prepared(path: Path) -> Corpus:
    """The tokens of a folder that ``prepare`` wrote."""
    from llmfast.data import open_tokens

    train = open_tokens(path)
    return Corpus(train, _validation_beside(path), train.tokenizer)


def check_same(tokenizer: Tokenizer, wanted: Tokenizer, where: str) -> None:
    """``UserError`` unless both tokenizers mean the same by every id."""
    if tokenizer.token_bytes() != wanted.token_bytes():
        raise UserError(
            f"{where}: the tokenizer ({tokenizer.kind}, {tokenizer.vocab_size:,} tokens) is not the model's "
            f"({wanted.kind}, {wanted.vocab_size:,} tokens): encode the text with the model's"
        )


def check_ids(source: TokenSource, vocab_size: int) -> None:
    """``UserError`` if the tokens cannot be the model's; files that do not tell are read once."""
    if source.vocab_size is None:
        source.check_ids(vocab_size)
    elif source.vocab_size > vocab_size:
        raise UserError(f"{source.name} has {source.vocab_size:,} token ids, the model only {vocab_size:,}")


def _validation_beside(path: str | Path) -> TokenSource | None:
    """The validation tokens of a folder, where it has any."""
    from llmfast.data import open_tokens
    from llmfast.data.shards import META_FILE

    path = Path(path)
    if not path.is_dir() or not ((path / META_FILE).exists() or any(path.glob("*val*.bin"))):
        return None
    source = open_tokens(path, "val")
    return source if len(source) else None
