"""Tokenised conversations as rows of a batch: inputs, targets, padding and packing.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmfast.finetuning.prompts import Encoded

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Row:
    """Inputs and the target of each, one token later, -100 where nothing is learned."""

    inputs: list[int]
    targets: list[int]

    def __len__(self) -> int:
        return len(self.inputs)


def row_of(encoded: Encoded, *, mask_prompts: bool, max_length: int | None = None) -> Row:
    """The row of a conversation: every next token is a target, or, with ``mask_prompts``, only those of responses.

    With ``max_length``, what comes after so many inputs is cut off.
    """
    inputs, targets, learned = encoded.ids[:-1], encoded.ids[1:], encoded.is_response[1:]
    if mask_prompts:
        targets = [target if wanted else IGNORE_INDEX for target, wanted in zip(targets, learned, strict=True)]
    return Row(inputs[:max_length], targets[:max_length])


def pad(rows: Sequence[Row], pad_id: int) -> tuple[Tensor, Tensor]:
    """(inputs, targets), int64 (B, T), padded on the right to the longest; padding is no target."""
    length = max(map(len, rows))
    inputs = [row.inputs + [pad_id] * (length - len(row)) for row in rows]
    targets = [row.targets + [IGNORE_INDEX] * (length - len(row)) for row in rows]
    return torch.tensor(inputs), torch.tensor(targets)


def pack(rows: Sequence[Row], length: int) -> list[list[Row]]:
    """``rows`` in as few groups of at most ``length`` tokens as first-fit decreasing makes: a longer row is refused."""
    groups: list[list[Row]] = []
    room: list[int] = []
    for row in sorted(rows, key=len, reverse=True):
        if len(row) > length:
            raise ValueError(f"rows must have at most length {length} tokens, got {len(row)}")
        place = next((i for i, left in enumerate(room) if left >= len(row)), None)
        if place is None:
            groups.append([])
            room.append(length)
            place = len(groups) - 1
        groups[place].append(row)
        room[place] -= len(row)
    return groups


def pad_packed(groups: Sequence[Sequence[Row]], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """(inputs, targets, doc_ids), int64 (B, T), of packed rows; padding is a document of its own."""
    joined = [Row([t for row in g for t in row.inputs], [t for row in g for t in row.targets]) for g in groups]
    inputs, targets = pad(joined, pad_id)
    doc_ids = torch.full_like(inputs, -1)
    for place, group in enumerate(groups):
        numbers = torch.repeat_interleave(torch.arange(len(group)), torch.tensor([len(row) for row in group]))
        doc_ids[place, : len(numbers)] = numbers
    return inputs, targets, doc_ids
