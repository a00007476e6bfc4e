"""``llmfast convert``: models of other programs in, and out again."""

from __future__ import annotations

import json as json_format
from dataclasses import dataclass, field
from typing import Any, Literal

from llmfast.cli.common import JSON_HELP, print_json, table
from llmfast.config import option
from llmfast.errors import UserError


@dataclass
class Options:
    """Options of ``llmfast convert``."""

    src: str = field(
        metadata={
            "positional": True,
            "help": "a run, a checkpoint, or another program's file or folder; adapters are merged",
        }
    )
    dst: str = field(metadata={"positional": True, "help": "the folder to write"})
    to: Literal["llmfast", "hf", "nanogpt", "llmc", "book", "tlfs", "gguf"] = option(
        "llmfast", "whose format: llmfast's, Hugging Face's, nanoGPT's, llm.c's, the book's, train-llm-from-scratch's"
    )
    shards: int = option(1, "files to cut llmfast's format into, as so many ranks of fsdp write them")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(None, "type of the weights (default: as they are)")
    set: list[str] = field(
        default_factory=list,
        metadata={
            "help": "what the source does not tell, as NAME=VALUE: n_head=12, attn_scale=n_embd, activation=gelu"
        },
    )
    tokenizer: str | None = option(None, "gpt2, byte or a saved tokenizer, where the source brings none")
    json: bool = option(False, JSON_HELP)


def run(options: Options) -> int:
    import torch

    from llmfast import interop
    from llmfast.checkpoint import find_checkpoint, is_adapter, load_model, load_tokenizer_of
    from llmfast.checkpoint.layout import files_in
    from llmfast.tokenizer import load_tokenizer

    overrides = dict(_setting(word) for word in options.set)
    source = find_checkpoint(options.src)
    tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
    model: Any = source
    if is_adapter(source):  # merged into its base
        model = load_model(source, **overrides)
        tokenizer, overrides = tokenizer or load_tokenizer_of(source), {}
    path = interop.convert(
        model,
        options.dst,
        options.to,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        tokenizer=tokenizer,
        shards=options.shards,
        **overrides,
    )
    files = {str(file.relative_to(path)): file.stat().st_size for file in files_in(path)}
    if options.json:
        print_json({"path": str(path), "format": options.to, "files": files})
    else:
        print(table([(f"{path}/{name}", f"{size / 1e6:12,.3f} MB") for name, size in files.items()]))
    return 0


def _setting(word: str) -> tuple[str, Any]:
    """("n_head", 12) of n_head=12; none stands for a default."""
    name, equals, value = word.partition("=")
    if not (name and equals and value):
        raise UserError(f"--set {word}: expected NAME=VALUE, such as n_head=12")
    if value == "none":
        return name, None
    try:
        return name, json_format.loads(value)
    except ValueError:
        return name, value
