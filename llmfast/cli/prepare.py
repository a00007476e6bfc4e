"""``llmfast prepare``: text into token shards."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmfast.cli.common import FIELD_HELP, JSON_HELP, print_json, refuse_addresses, table
from llmfast.config import option
from llmfast.errors import UserError

Cleaning = Literal["whitespace", "punctuation", "lowercase", "duplicates"]


@dataclass
class Options:
    """Options of ``llmfast prepare``."""

    data: list[str] = field(
        default_factory=list,
        metadata={
            "positional": True,
            "help": "text, jsonl, json or parquet (also .zst, .gz): files, folders or globs "
            "(default: the Python standard library)",
        },
    )
    out: str = field(kw_only=True, metadata={"help": "folder for the shards"})
    tokenizer: str | None = option(
        None, "gpt2, byte, char, bpe, or a saved tokenizer (default: bpe trained on the training part)"
    )
    tokenizer_size: int = option(4096, "most tokens of a trained bpe")
    val_data: list[str] = field(
        default_factory=list, metadata={"help": "validation data (default: a part of the data)"}
    )
    val_fraction: float = option(0.1, "part of the data kept for validation")
    split: Literal["auto", "documents", "characters"] = option(
        "auto", "what is split: whole documents, or the characters of one text (auto: documents if there are several)"
    )
    clean: list[Cleaning] = field(
        default_factory=list,
        metadata={
            "help": "make runs of white space one space, drop punctuation, make lower case, drop equal documents"
        },
    )
    on_error: Literal["raise", "skip"] = option("raise", "skip leaves out records that cannot be read, and counts them")
    workers: int | None = option(None, "processes that encode (default: one a core)")
    shard_tokens: int = option(100_000_000, "tokens in one shard")
    seed: int = option(1337, "of the split by documents")
    hdf5: str | None = option(
        None, "folder for train.h5 and val.h5 with the same tokens, as train-llm-from-scratch reads"
    )
    json: bool = option(False, JSON_HELP)
    field: str = option("text", FIELD_HELP)


def run(options: Options) -> int:
    from llmfast.data import export_hdf5, open_tokens, prepare, stdlib_sources

    hdf5 = None if options.hdf5 is None else Path(options.hdf5)
    if hdf5 is not None and hdf5.exists() and not hdf5.is_dir():
        raise UserError(f"{hdf5}: a file is in the way of the folder for HDF5")
    refuse_addresses([*options.data, *options.val_data])
    prepared = prepare(
        options.data or stdlib_sources(),
        options.out,
        tokenizer=options.tokenizer,
        tokenizer_size=options.tokenizer_size,
        val_sources=options.val_data,
        val_fraction=options.val_fraction,
        split=options.split,
        field=options.field,
        clean=options.clean,
        on_error=options.on_error,
        workers=options.workers,
        shard_tokens=options.shard_tokens,
        seed=options.seed,
        progress=sys.stderr.isatty(),
    )
    if hdf5 is not None:
        hdf5.mkdir(parents=True, exist_ok=True)
        for split, tokens in prepared.tokens.items():
            if tokens:
                export_hdf5(open_tokens(prepared.path, split), hdf5 / f"{split}.h5")
    if options.json:
        facts = ("tokens", "documents", "skipped", "duplicates")
        print_json({"path": str(prepared.path), **{name: getattr(prepared, name) for name in facts}})
        return 0
    rows: list[tuple[str, object]] = [
        (split, f"{tokens:,} tokens, {_count(prepared.documents[split], 'document')}")
        for split, tokens in prepared.tokens.items()
    ]
    if prepared.duplicates:
        rows.append(("duplicates", f"{_count(prepared.duplicates, 'document')} left out"))
    if prepared.skipped:
        rows.append(("skipped", f"{_count(prepared.skipped, 'record')} that could not be read"))
    print(table([*rows, ("written to", prepared.path)]))
    return 0


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
