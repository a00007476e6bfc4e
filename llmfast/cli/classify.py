"""``llmfast classify``: the labels of texts, with probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmfast.cli.common import JSON_HELP, ModelOptions, note, open_model, print_json, read_text
from llmfast.config import option
from llmfast.errors import UserError


@dataclass
class Options(ModelOptions):
    """Options of ``llmfast classify``."""

    text: list[str] = field(
        default_factory=list,
        metadata={
            "positional": True,
            "help": "texts, or one file: .csv, .tsv, .json and .jsonl by their text column, others by line "
            "(default: the lines of standard input)",
        },
    )
    text_column: str | None = option(None, "column of the text in a file (default: guessed, and said)")
    max_length: int | None = option(None, "cut texts to so many tokens (default: the model's context)")
    batch_size: int = option(32, "texts in one forward pass")
    json: bool = option(False, JSON_HELP)


def run(options: Options) -> int:
    from llmfast.finetuning.classify import class_probabilities

    if options.batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {options.batch_size}")
    texts = read_texts(options)
    with open_model(options, cast=True, classifier=True) as opened:
        model, context = opened.model, opened.model.config.block_size
        limit = context if options.max_length is None else options.max_length
        if not 1 <= limit <= context:
            raise UserError(f"max_length must lie between 1 and the model's context of {context}, got {limit}")
        try:
            encoded = [ids.tolist() for ids in opened.need_tokenizer().encode_batch(texts)]
        except ValueError as error:  # a character that the tokenizer lacks
            raise UserError(str(error)) from None
        if empty := [number for number, ids in enumerate(encoded, 1) if not ids]:
            raise UserError(f"text {empty[0]} is empty")
        if cut := sum(len(ids) > limit for ids in encoded):
            note(f"{cut:,} of {len(texts):,} texts are longer than {limit} tokens: their beginnings were read")
        labels: list[str] = model.labels  # type: ignore[assignment]
        found = class_probabilities(model, [ids[:limit] for ids in encoded], batch_size=options.batch_size).tolist()  # type: ignore[arg-type]
    results: list[dict[str, Any]] = []
    for text, row in zip(texts, found, strict=True):
        probabilities = dict(sorted(zip(labels, row, strict=True), key=lambda pair: -pair[1]))
        results.append({"text": text, "label": next(iter(probabilities)), "probabilities": probabilities})
    if options.json:
        print_json({"results": results})
        return 0
    for result in results:
        shown = "  ".join(f"{label} {p:.3f}" for label, p in list(result["probabilities"].items())[:5])
        print(f"{shown}  {' '.join(result['text'].split())}" if len(results) > 1 else shown)
    return 0


def read_texts(options: Options) -> list[str]:
    """What is to be classified, as words of the command line, in a file or on standard input."""
    words = options.text
    if not words:
        return _lines(read_text("-"), "standard input")
    from llmfast.data.records import FORMATS, read_records
    from llmfast.finetuning.classify_data import TEXT_NAMES

    path = Path(words[0])
    if len(words) > 1 or len(words[0]) > 255:
        return words
    if not path.is_file():
        if path.suffix.lower() in (*FORMATS, ".txt") and not any(map(str.isspace, words[0])):
            raise UserError(f"there is no file {path}")
        return words
    if path.suffix.lower() not in FORMATS:
        return _lines(read_text(path), str(path))
    records = read_records(path, names=[options.text_column] if options.text_column else TEXT_NAMES)
    usual = {name.casefold(): name for name in reversed(records.columns)}
    column = options.text_column or next((usual[name] for name in TEXT_NAMES if name in usual), None)
    if column is None and len(records.columns) == 1:
        column = records.columns[0]
    if column not in records.columns:
        raise UserError(f"{path}: name the --text-column among {', '.join(records.columns)}")
    note(f"{path}: {len(records):,} records; text is column {column!r}")
    return [text for record in records if (text := records.text(record, column)) is not None]


def _lines(text: str, name: str) -> list[str]:
    lines = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{name} holds no text")
    return lines
