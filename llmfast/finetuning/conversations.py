"""What instruction and preference tuning share: examples of a file, checked, tokenised and split."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from llmfast import ops
from llmfast.checkpoint import load_model
from llmfast.config import ConversationConfig, TrainConfig
from llmfast.data.records import read_records
from llmfast.errors import UserError
from llmfast.finetuning.base import SPLITS, Base, check_before, open_base, write_splits
from llmfast.finetuning.prompts import (
    STYLES,
    Conversation,
    PromptStyle,
    encode,
    end_of_text,
    prompt_style,
    style_name,
    style_of,
)
from llmfast.finetuning.responding import respond, write_responses
from llmfast.finetuning.rows import Row, row_of
from llmfast.ranks import share
from llmfast.tokenizer import Tokenizer
from llmfast.tokenizer.base import replace_surrogates
from llmfast.training import Trainer, TrainResult

T = TypeVar("T")
C = TypeVar("C", bound=ConversationConfig)
RESPONSES_FILE = "instruction-data-with-response.json"


@dataclass
class Rows:
    """Turns conversations into rows that the model holds, and counts those that it had to cut."""

    tokenizer: Tokenizer
    style: PromptStyle
    context: int  # most inputs of a row
    cut_longer: bool  # where a longer one is not refused
    cut: int = 0

    def row(self, conversation: Conversation, *, mask_prompts: bool, last_only: bool = False) -> Row:
        """The row of a conversation; ``last_only`` masks the responses before the last one, too.

        ``ValueError`` where it does not fit, or nothing of a response does, or the tokenizer lacks a character.
        """
        encoded = encode(self.tokenizer, self.style, conversation)
        if last_only:
            encoded = encoded.last_response_only()
        length = len(encoded.ids) - 1
        if length > self.context:
            if not self.cut_longer:
                raise ValueError(
                    f"{length} tokens, and the model's context has {self.context} "
                    f"(--max-length {self.context} cuts longer ones)"
                )
            if not any(encoded.is_response[: self.context + 1]):
                raise ValueError(f"its prompt alone has more than {self.context} tokens")
            self.cut += 1
        return row_of(encoded, mask_prompts=mask_prompts, max_length=self.context)


def begin(config: C) -> tuple[C, Base, Rows]:
    """The base model, and how its rows are made; ``config`` comes back with the prompt style that it left open.

    Nothing is written yet. Raises ``UserError`` for options that make no sense, or none with this model.
    """
    check_before(config)
    if config.response_tokens < 0:
        raise UserError(f"response_tokens must be 0 or more, got {config.response_tokens}")
    style = None if config.prompt_style is None else prompt_style(config.prompt_style)
    base = open_base(config)
    end_of_text(base.tokenizer)
    context = base.model.config.block_size
    if (config.max_length or 0) > context:
        raise UserError(f"max_length {config.max_length} is above the model's context of {context} tokens")
    style = style or style_of(base.path) or STYLES["alpaca"]
    rows = Rows(base.tokenizer, style, config.max_length or context, config.max_length is not None)
    return dataclasses.replace(config, prompt_style=style_name(style)), base, rows


@dataclass
class Split(Generic[T]):
    """The records of a split, as the file has them, and what was made of each."""

    records: list[dict[str, Any]] = field(default_factory=list)
    examples: list[T] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.examples)

    def add(self, record: dict[str, Any], example: T) -> None:
        self.records.append(record)
        self.examples.append(example)


def read_splits_of(
    config: ConversationConfig, make: Callable[[dict[str, Any]], T]
) -> tuple[dict[str, Split[T]], list[str]]:
    """Train, validation and test examples of ``config.data`` (or of files of their own), and notes for the user.

    ``make`` turns a record into an example, or raises ``ValueError`` that says what is wrong with it: ``UserError``
    with file and line, unless ``config.skip_bad``.
    """
    notes: list[str] = []

    def usable(path: str) -> Split[T]:
        records = read_records(path, names=("instruction", "prompt"), skip_bad=config.skip_bad)
        split = Split[T]()
        for record in records:
            try:
                split.add(record.values, make(record.values))
            except ValueError as error:
                records.reject(record.line, str(error))
        if left_out := records.summary():
            notes.append(left_out)
        if not split.examples:
            raise UserError(f"{path} holds no record that can be used: {records.problems[0]}")
        return split

    whole = usable(config.data)
    parts = cut(len(whole), config)
    splits = {
        name: Split([whole.records[i] for i in numbers], [whole.examples[i] for i in numbers])
        for name, numbers in parts.items()
    }
    for name, path in (("validation", config.val_data), ("test", config.test_data)):
        if path is not None:
            splits[name] = usable(path)
    if not len(splits["train"]):
        raise UserError(f"{config.data}: {len(whole)} records leave none for training: lower --val-fraction")
    notes.append(", ".join(f"{len(splits[name]):,} {name}" for name in SPLITS) + " examples")
    return splits, notes


def cut(count: int, config: ConversationConfig) -> dict[str, list[int]]:
    """Numbers 0 .. count - 1, in order (``split`` "book") or shuffled by ``split_seed``, cut into the three splits.

    In this order: training, test, validation, as in Raschka's book; training and test sizes are rounded down. A split
    whose examples come from a file of its own takes none.
    """
    order = list(range(count))
    if config.split == "random":
        order = np.random.RandomState(config.split_seed).permutation(count).tolist()
    val = config.val_fraction if config.val_data is None else 0.0
    test = int(count * (config.test_fraction if config.test_data is None else 0.0) + 1e-9)
    train = count - test
    if val:
        train = int(count * (1 - val - (test and config.test_fraction)) + 1e-9)
    return {"train": order[:train], "validation": order[train + test :], "test": order[train : train + test]}


def with_sample_prompt(config: C, style: PromptStyle, conversations: Sequence[Conversation]) -> C:
    """``config``, whose samples answer the first of ``conversations`` where they would begin with nothing."""
    if config.sample_prompt != TrainConfig.sample_prompt or not conversations:
        return config
    (*before, (prompt, _)) = style.pieces(conversations[0].prompt)
    text = "".join(asked + (answer or "") for asked, answer in before) + prompt
    return dataclasses.replace(config, sample_prompt=replace_surrogates(text))


def fit_and_answer(
    trainer: Trainer, rows: Rows, splits: dict[str, Split[Any]], prompts: Sequence[Conversation], notes: list[str]
) -> tuple[TrainResult, Path | None]:
    """Write the splits into the run, train, and have the best checkpoint answer ``prompts``, the test split's.

    Returns how it went and the file of the answers: None where none are wanted, or after an interruption.
    """
    config: Any = trainer.config
    if rows.cut:
        notes.append(f"cut {rows.cut:,} conversations to {rows.context} tokens")
    if trainer.progress:
        print(*notes, sep="\n", file=sys.stderr, flush=True)
    write_splits(
        Path(config.out, "data"), {name: split.records for name, split in splits.items()}, resume=config.resume
    )
    result = trainer.fit()
    if result.interrupted or not prompts or not config.response_tokens:
        return result, None
    model = load_model(config.out, device=trainer.device, dtype=trainer.dtype)
    with ops.use_backend(config.backend):
        own = share(len(prompts), trainer.ranks.rank, trainer.ranks.size)
        responses = respond(
            model, rows.tokenizer, rows.style, [prompts[i] for i in own],
            max_new_tokens=config.response_tokens, progress=trainer.progress,
        )  # fmt: skip
    file = Path(config.out, RESPONSES_FILE)
    everyones = [response for part in trainer.ranks.gather(responses) for response in part]
    if trainer.ranks.first:
        write_responses(file, splits["test"].records, everyones)
    return result, file
