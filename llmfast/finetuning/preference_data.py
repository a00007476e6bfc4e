"""Records of preferences: pairs of a chosen and a rejected response to a prompt, and single responses with a label."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmfast.finetuning.conversations import Rows
from llmfast.finetuning.prompts import Conversation, conversation_of, conversation_of_messages, encode, text_of
from llmfast.finetuning.rows import Row, row_of

_LABELS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True)
class Example:
    """Two responses to one prompt, as rows; the targets are those of the responses.

    Of a pair, the chosen and the rejected one. Of a labelled response (``desirable`` or not), this one and the response
    to another prompt. ``reference`` has the reference's log-probabilities of both, where they are computed ahead.
    """

    prompt: Conversation
    rows: tuple[Row, Row]
    desirable: bool | None = None
    reference: tuple[float, ...] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return max(map(len, self.rows))


def pair_of(record: Mapping[str, Any], rows: Rows, *, allow_equal: bool = True) -> list[Example]:
    """The pair of a record; raises ``ValueError`` that says what is wrong with it."""
    chosen, rejected = conversations_of_pair(record)
    if chosen == rejected and not allow_equal:
        raise ValueError("chosen and rejected are the same")
    return [Example(chosen.prompt, (_row(chosen, rows), _row(rejected, rows)))]


def conversations_of_pair(record: Mapping[str, Any]) -> tuple[Conversation, Conversation]:
    """The conversations that end with the chosen and with the rejected response.

    Of {instruction, input, chosen, rejected}, {prompt, chosen, rejected}, or chat messages: the prompt, the responses
    or all of them may be lists of messages; without a prompt, chosen and rejected are whole conversations.
    """
    chosen, rejected = (_answered(record, key) for key in ("chosen", "rejected"))
    if chosen.prompt != rejected.prompt:
        raise ValueError("chosen and rejected answer different prompts")
    return chosen, rejected


def _answered(record: Mapping[str, Any], key: str) -> Conversation:
    """The conversation that ends with the response under ``key``: a text or a list of messages."""
    if key not in record:
        raise ValueError(f"no {key!r} (it has {', '.join(record) or 'nothing'})")
    response, prompt = record[key], record.get("prompt")
    if isinstance(response, list):
        before: list[Any] = []
        if isinstance(prompt, list):
            before = prompt
        elif "prompt" in record or "instruction" in record:
            turn = conversation_of(record, response=False).turns[0]
            said = f"{turn.instruction}\n{turn.input}" if turn.input else turn.instruction
            before = [{"role": "user", "content": said}]
        return conversation_of_messages([*before, *response], key, response=True)
    if isinstance(prompt, list):
        asked = conversation_of_messages(prompt, "prompt", response=False)
    else:
        asked = conversation_of(record, response=False)
    *turns, last = asked.turns
    return Conversation((*turns, dataclasses.replace(last, response=text_of(record, key))), asked.system)


@dataclass(frozen=True)
class Judged:
    """A conversation whose last response is desirable or not, and its row."""

    conversation: Conversation
    row: Row
    desirable: bool

    @property
    def prompt(self) -> Conversation:
        return self.conversation.prompt


def judged_of(record: Mapping[str, Any], rows: Rows) -> list[Judged]:
    """The one judged response of a record with a label, or the two of a pair."""
    if "label" not in record:
        if "chosen" not in record:
            raise ValueError(f"no 'label', and no 'chosen' (it has {', '.join(record) or 'nothing'})")
        chosen, rejected = conversations_of_pair(record)
        return [Judged(chosen, _row(chosen, rows), True), Judged(rejected, _row(rejected, rows), False)]
    desirable = _LABELS.get(str(record["label"]).strip().lower())
    if desirable is None:
        raise ValueError(f"'label' is {record['label']!r}, not true or false")
    if isinstance(record.get("prompt"), list) or isinstance(record.get("completion"), list):
        conversation = _answered(record, "completion")
    else:
        conversation = conversation_of(record)
    return [Judged(conversation, _row(conversation, rows), desirable)]


def with_mismatches(judged: Sequence[Judged], rows: Rows) -> list[Example]:
    """Each response beside a mismatched one: the same prompt with the next response to another prompt.

    Desirable ones first, so that the two responses of a pair are no neighbours. By these pairings KTO estimates how
    far the model is from the reference; they are fixed, so that the reference's part can be computed once.
    """
    ordered = sorted(judged, key=lambda one: not one.desirable)
    examples = []
    for place, one in enumerate(ordered):
        others = (ordered[(place + step) % len(ordered)] for step in range(1, len(ordered) + 1))
        other = next((o for o in others if o.prompt != one.prompt), one)
        *turns, last = one.conversation.turns
        response = other.conversation.turns[-1].response
        mixed = Conversation((*turns, dataclasses.replace(last, response=response)), one.conversation.system)
        encoded = encode(rows.tokenizer, rows.style, mixed).last_response_only()
        mismatched = row_of(encoded, mask_prompts=True, max_length=rows.context)
        examples.append(Example(one.prompt, (one.row, mismatched), one.desirable))
    return examples


def _row(conversation: Conversation, rows: Rows) -> Row:
    return rows.row(conversation, mask_prompts=True, last_only=True)
