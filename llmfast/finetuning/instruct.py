"""Instruction tuning: the next-token loss on conversations, then answers to the test split."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmfast.config import InstructConfig
from llmfast.finetuning.base import Examples, choose_trained
from llmfast.finetuning.conversations import Split, begin, fit_and_answer, read_splits_of, with_sample_prompt
from llmfast.finetuning.prompts import Conversation, conversation_of, end_of_text
from llmfast.finetuning.rows import IGNORE_INDEX, Row, pack, pad, pad_packed
from llmfast.tokenizer import Tokenizer
from llmfast.training import Trainer, TrainResult


@dataclass(frozen=True)
class Example:
    """A row to learn from, and the conversation that it was made of."""

    row: Row
    conversation: Conversation


def finetune_instruct(config: InstructConfig, *, progress: bool = True) -> tuple[TrainResult, Path | None]:
    """Tune ``config.checkpoint`` on the conversations of ``config.data``; returns how it went and the response file.

    The run directory ``config.out`` is ``Trainer``'s, with the splits under ``data/`` and, unless interrupted, the
    best checkpoint's responses to the test split in ``instruction-data-with-response.json``. Raises ``UserError`` for
    what the user can mend.
    """
    config, base, rows = begin(config)

    def make(record: dict[str, Any]) -> Example:
        conversation = conversation_of(record)
        return Example(rows.row(conversation, mask_prompts=config.mask_instruction), conversation)

    splits, notes = read_splits_of(config, make)
    of_split = functools.partial(batches, config, base.tokenizer, rows.context)
    trainer = Trainer(
        choose_trained(base.model, config, base),
        with_sample_prompt(config, rows.style, [example.conversation for example in splits["validation"].examples]),
        of_split(splits["train"], training=True),
        of_split(splits["validation"], training=False) if len(splits["validation"]) else None,
        tokenizer=base.tokenizer,
        loss_fn=instruct_loss,
        progress=progress,
    )
    prompts = [example.conversation.prompt for example in splits["test"].examples]
    return fit_and_answer(trainer, rows, splits, prompts, notes)


def batches(
    config: InstructConfig, tokenizer: Tokenizer, context: int, split: Split[Example], *, training: bool
) -> Examples[Any]:
    """Batches of a split's rows for ``Trainer``: (inputs, targets), and doc_ids where they are packed."""
    rows = [example.row for example in split.examples]
    pad_id = end_of_text(tokenizer)
    micro, seed = config.micro_batch_size, config.seed if training else None
    if config.packing:
        groups = pack(rows, context)
        return Examples(
            groups, functools.partial(pad_packed, pad_id=pad_id), micro, batch_size=config.batch_size, seed=seed
        )
    return Examples(
        rows, functools.partial(pad, pad_id=pad_id), micro, batch_size=config.batch_size, seed=seed, length=len
    )


def instruct_loss(model: Any, batch: tuple[Tensor, ...]) -> tuple[Tensor, int]:
    """The next-token loss of (inputs, targets) or (inputs, targets, doc_ids): (mean loss, targets that count)."""
    inputs, targets, *doc_ids = batch
    count = int((targets != IGNORE_INDEX).sum())
    # Of no target the sum is 0, as are its gradients, which other ranks wait for.
    reduction = "mean" if count else "sum"
    return model(inputs, targets, doc_ids=doc_ids[0] if doc_ids else None, reduction=reduction)[1], count
