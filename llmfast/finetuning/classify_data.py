"""From a file of texts and labels to encoded examples, each of which knows its line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmfast.config import ClassifyConfig, suggest
from llmfast.data.records import Record, Records, read_records
from llmfast.errors import UserError
from llmfast.finetuning.base import split
from llmfast.tokenizer import Tokenizer

TEXT_NAMES = "text message sms sentence content review body tweet comment v2".split()
LABEL_NAMES = "label class category target labels sentiment v1 y".split()

Columns = tuple[str | None, str | None]  # of text and label; None is to be guessed


@dataclass(frozen=True)
class Example:
    """A text, its token ids, its label, and the line of the file that it stands on."""

    text: str
    ids: list[int]
    label: str
    line: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Splits:
    """The examples of each split, and the labels, in the order of the classifier's outputs."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    labels: list[str]

    def items(self) -> list[tuple[str, list[Example]]]:
        return [("train", self.train), ("validation", self.validation), ("test", self.test)]


def read_splits_of(config: ClassifyConfig, tokenizer: Tokenizer, context: int, say: Callable[[str], None]) -> Splits:
    """Read ``config.data`` (and ``val_data``, ``test_data``), balance it if asked, and split it.

    ``say`` takes what the user should know: the columns, what was left out, the sizes. ``UserError`` names file and
    line of an example that cannot be used, unless ``config.skip_bad`` leaves it out.
    """
    limit = check_length(config, context)
    columns = config.text_column, config.label_column
    examples, columns = read_examples(config.data, columns, config, tokenizer, limit, say)
    counts = Counter(example.label for example in examples)
    if len(counts) < 2:
        raise UserError(
            f"{config.data}: all {len(examples):,} examples have the label {next(iter(counts))!r}, and a classifier "
            "needs two; is --label-column the right one?"
        )
    labels = sorted(counts)
    say(f"labels: {', '.join(f'{label} ({counts[label]:,})' for label in labels[:20])}")
    if config.balance:
        examples = balanced(examples, config.split_seed)
        say(f"balanced: {len(examples) // len(labels):,} examples of each label")
    parts = {name: [examples[i] for i in numbers] for name, numbers in split(len(examples), config).items()}
    for name, path in (("validation", config.val_data), ("test", config.test_data)):
        if path is not None:
            parts[name], _ = read_examples(path, columns, config, tokenizer, limit, say, known=labels)
    seen = {example.label for example in parts["train"]}
    if len(seen) < 2:
        raise UserError(
            f"{config.data}: {len(examples)} examples leave {len(seen)} labels for training, and a classifier needs "
            "two: give more"
        )
    for name in ("validation", "test"):
        unseen = [example for example in parts[name] if example.label not in seen]
        if not unseen:
            continue
        why = (
            f"{config.data}:{unseen[0].line}: the label {unseen[0].label!r} stands in the {name} split and never in "
            f"training ({counts[unseen[0].label]} in all)"
        )
        if not config.skip_bad:
            raise UserError(f"{why}: give more of it, or leave it out")
        say(f"left out {len(unseen):,} of {len(parts[name]):,} examples of the {name} split; the first: {why}")
        parts[name] = [example for example in parts[name] if example.label in seen]
    result = Splits(parts["train"], parts["validation"], parts["test"], sorted(seen))
    say("split: " + ", ".join(f"{len(part):,} {name}" for name, part in result.items()))
    return result


def check_length(config: ClassifyConfig, context: int) -> int:
    """The most tokens of a text."""
    for name in ("max_length", "pad_to"):
        value = getattr(config, name)
        if value is not None and not 1 <= value <= context:
            raise UserError(f"{name} must lie between 1 and the model's context of {context}, got {value}")
    limit = config.pad_to or context
    if config.max_length and config.max_length > limit:
        raise UserError(f"max_length {config.max_length} is more than pad_to, {limit}")
    return config.max_length or limit


def read_examples(
    path: str,
    columns: Columns,
    config: ClassifyConfig,
    tokenizer: Tokenizer,
    limit: int,
    say: Callable[[str], None],
    known: Sequence[str] = (),
) -> tuple[list[Example], Columns]:
    """The examples of one file, and its columns of text and label; with ``known``, any other label is a bad record."""
    names = [*(name for name in columns if name), *TEXT_NAMES, *LABEL_NAMES]
    records = read_records(path, names=names, skip_bad=config.skip_bad)
    text_column, label_column = choose_columns(records, *columns)
    say(f"{path}: {len(records):,} records; text is column {text_column!r}, label is column {label_column!r}")
    found = []
    for record in records:
        label = _label(records, record, label_column)
        if label is None:
            continue
        if known and label not in known:
            records.reject(record.line, f"the label {label!r} never stands in training ({', '.join(known[:20])})")
        elif (text := records.text(record, text_column)) is not None:
            found.append((record.line, label, text))
    examples = []
    for (line, label, text), ids in zip(found, _encode(tokenizer, found), strict=True):
        if isinstance(ids, str):
            records.reject(line, ids)
            continue
        if len(ids) > limit and config.max_length is None:
            wanted = "--pad-to" if config.pad_to else "the model's context"
            records.reject(line, f"{len(ids)} tokens are more than {wanted}, {limit}: --max-length {limit} cuts them")
            continue
        examples.append(Example(text, ids[: config.max_length], label, line))
    if summary := records.summary():
        say(summary)
    if not examples:
        raise UserError(f"{path} holds no example that can be used")
    return examples, (text_column, label_column)


def _encode(tokenizer: Tokenizer, found: list[tuple[int, str, str]]) -> list[list[int] | str]:
    """Token ids of every text, or why it has none."""
    try:
        return [ids.tolist() for ids in tokenizer.encode_batch([text for _, _, text in found])]
    except ValueError:  # of a character that the tokenizer lacks; which text holds it?
        encoded: list[list[int] | str] = []
        for _, _, text in found:
            try:
                encoded.append(tokenizer.encode(text))
            except ValueError as error:
                encoded.append(str(error))
        return encoded


def _label(records: Records, record: Record, column: str) -> str | None:
    value = record.values.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        records.reject(record.line, f"no label in column {column!r}" if value is None else "the label is empty")
        return None
    if isinstance(value, dict | list | float):
        records.reject(record.line, f"the label in column {column!r} is {type(value).__name__}, not a name")
        return None
    return str(value).strip()


def choose_columns(records: Records, text: str | None, label: str | None) -> tuple[str, str]:
    """The columns of text and label: named, called by a usual name, or guessed by what stands in them."""
    columns = records.columns
    for name in (text, label):
        if name is not None and name not in columns:
            raise UserError(
                f"{records.path} has no column {name!r}{suggest(name, columns)}; it has {', '.join(columns)}"
            )
    if len(columns) < 2:
        raise UserError(f"{records.path} has one column, {columns[0]!r}: a text and a label are needed")
    usual = {name.casefold(): name for name in reversed(columns)}
    text = text or next((usual[n] for n in TEXT_NAMES if n in usual and usual[n] != label), None)
    label = label or next((usual[n] for n in LABEL_NAMES if n in usual and usual[n] != text), None)
    sample = records.rows[:1000]
    values = {name: [str(record.values.get(name, "")) for record in sample] for name in columns}
    rest = [name for name in columns if name not in (text, label)]
    if text is None and rest:
        text = max(rest, key=lambda name: sum(map(len, values[name])))
        rest.remove(text)
    if label is None and rest:
        kinds = {name: len(set(values[name])) for name in rest}
        label = min(rest, key=lambda name: (kinds[name] < 2, kinds[name]))
    if text is None or label is None or text == label:
        raise UserError(f"{records.path}: name --text-column and --label-column among {', '.join(columns)}")
    return text, label


def balanced(examples: list[Example], seed: int) -> list[Example]:
    """As many examples of each label as the rarest has, drawn by ``seed`` (Raschka's draw: the rarest stays whole)."""
    by_label: dict[str, list[Example]] = {}
    for example in examples:
        by_label.setdefault(example.label, []).append(example)
    least = min(map(len, by_label.values()))
    chosen = []
    for group in by_label.values():
        order = range(least) if len(group) == least else np.random.RandomState(seed).permutation(len(group))[:least]
        chosen += [group[i] for i in order]
    return chosen


def class_weights(config: ClassifyConfig, splits: Splits) -> list[float] | None:
    """The weight of each label in the loss, of mean 1 over the training examples; None where all count alike."""
    if not config.class_weights:
        return None
    counts = Counter(example.label for example in splits.train)
    if config.class_weights == ["balanced"]:
        weights = {label: 1 / counts[label] for label in splits.labels if counts[label]}
    else:
        weights = {label: 1.0 for label in splits.labels}
        for word in config.class_weights:
            label, _, number = word.rpartition("=")
            if label not in weights:
                raise UserError(
                    f"class_weights {word!r}: expected balanced, or LABEL=NUMBER with a label of "
                    f"{', '.join(splits.labels[:20])}"
                )
            try:
                weights[label] = float(number)
            except ValueError:
                raise UserError(f"class_weights {word!r}: {number!r} is no number") from None
            if not 0 < weights[label] < float("inf"):
                raise UserError(f"class_weights {word!r}: the weight must be above 0")
    mean = sum(weights[example.label] for example in splits.train) / len(splits.train)
    return [weights.get(label, mean) / mean for label in splits.labels]


def stored(examples: list[Example]) -> list[dict[str, Any]]:
    """What of the examples goes into the run directory."""
    return [{"text": example.text, "label": example.label, "line": example.line} for example in examples]


def restored(parts: dict[str, list[dict[str, Any]]], tokenizer: Tokenizer, config: ClassifyConfig) -> Splits:
    """The splits of a run that is resumed."""

    def examples(rows: list[dict[str, Any]]) -> list[Example]:
        encoded = tokenizer.encode_batch([row["text"] for row in rows])
        return [
            Example(row["text"], ids.tolist()[: config.max_length], row["label"], row["line"])
            for row, ids in zip(rows, encoded, strict=True)
        ]

    split_of = {name: examples(rows) for name, rows in parts.items()}
    labels = sorted({example.label for example in split_of["train"]})
    return Splits(split_of["train"], split_of["validation"], split_of["test"], labels)
