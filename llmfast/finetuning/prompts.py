"""Conversations as text for a model, and the places in it that a model learns.

A prompt style turns a conversation into pieces of text, prompts and responses in turn. Each piece is tokenised on its
own, so that the border between prompt and response is a border between tokens, and every response is followed by the
end-of-text token. Where a response begins is therefore known by position: nothing is searched for in the text, which
may hold anything, other prompts included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmfast.checkpoint import layout, read_state
from llmfast.config import suggest
from llmfast.errors import UserError
from llmfast.tokenizer import Tokenizer

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Turn:
    """What a user says, and what is answered: None where the model is to answer."""

    instruction: str
    input: str = ""
    response: str | None = None


@dataclass(frozen=True)
class Conversation:
    """One or more turns, of which only the last may lack its response; with what the model is told beforehand."""

    turns: tuple[Turn, ...]
    system: str | None = None

    @property
    def prompt(self) -> Conversation:
        """The conversation with its last response still to come."""
        *before, last = self.turns
        return Conversation((*before, Turn(last.instruction, last.input)), self.system)


@dataclass(frozen=True)
class PromptStyle:
    """How a conversation is written.

    ``turn`` holds {instruction} and may hold {input}: an empty input takes its paragraph along, if that holds nothing
    else to fill in; without {input}, the input follows the instruction on a new line. ``system`` holds {system}, and
    stands at the beginning where there is a system message (default: ``default_system``). ``between`` separates a
    response from the next turn.
    """

    turn: str
    system: str = "{system}\n\n"
    default_system: str | None = None
    between: str = "\n\n"

    def pieces(self, conversation: Conversation) -> list[tuple[str, str | None]]:
        """(prompt, response) of each turn; the prompts hold all the text that is not response."""
        system = self.default_system if conversation.system is None else conversation.system
        lead = _fill(self.system, {"system": system}) if system else ""
        pieces: list[tuple[str, str | None]] = []
        for turn in conversation.turns:
            pieces.append((lead + self._prompt(turn), turn.response))
            lead = self.between
        return pieces

    def _prompt(self, turn: Turn) -> str:
        text, values = self.turn, {"instruction": turn.instruction, "input": turn.input}
        if "{input}" not in text and turn.input:
            values["instruction"] += "\n" + turn.input
        elif not turn.input:
            paragraphs = text.split("\n\n")
            text = "\n\n".join(p for p in paragraphs if "{input}" not in p or "{instruction}" in p)
        return _fill(text, values)


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Every placeholder at once: what a value holds is never taken for one."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


STYLES: dict[str, PromptStyle] = {
    # Taori et al. 2023, in the form of "Build a Large Language Model (From Scratch)", chapter 7.
    "alpaca": PromptStyle(
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
    ),
    # Abdin et al. 2024, without the end marks, as in the same book's exercises: the end-of-text token is the mark.
    "phi3": PromptStyle("<|user|>\n{instruction}\n<|assistant|>\n", system="<|system|>\n{system}\n", between="\n"),
    "chatml": PromptStyle(
        "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
        system="<|im_start|>system\n{system}<|im_end|>\n",
        between="\n",
    ),
    "plain": PromptStyle("{instruction}"),
}


def prompt_style(name: str) -> PromptStyle:
    """The style called ``name``, or the template that it is: text with {instruction}, or a UTF-8 file that holds it.

    Raises ``UserError`` for an unknown style and for a template without {instruction} or with unknown placeholders.
    """
    if name in STYLES:
        return STYLES[name]
    template, where = name, "--prompt-style"
    if "{" not in name:
        if not Path(name).is_file():
            known = ", ".join(STYLES)
            raise UserError(
                f"unknown prompt style {name!r}{suggest(name, STYLES)}: use {known}, a template with {{instruction}}, "
                "or a file that holds one"
            )
        try:
            template, where = Path(name).read_text(encoding="utf-8"), name
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not UTF-8 text: byte {error.start}") from None
    if "\n" not in template:
        template = template.replace("\\n", "\n")  # a shell's quotes leave it as it is
    places = _PLACEHOLDER.findall(template)
    for place in places:
        if place not in ("instruction", "input"):
            raise UserError(f"{where}: unknown placeholder {{{place}}}: a template holds {{instruction}} and {{input}}")
    if "instruction" not in places:
        raise UserError(f"{where}: the template has no {{instruction}}")
    return PromptStyle(template)


def style_name(style: PromptStyle) -> str:
    """What ``prompt_style`` makes ``style`` of, wherever it is asked: a known name, else the template itself."""
    return next((name for name, known in STYLES.items() if known == style), style.turn)


def style_of(checkpoint: Path) -> PromptStyle | None:
    """The style that the checkpoint directory was tuned with; None where it was not tuned on conversations."""
    if not (checkpoint / layout.STATE_FILE).is_file():
        return None
    name = read_state(checkpoint).get("config", {}).get("prompt_style")
    return None if name is None else prompt_style(name)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation, with which of them a model is to write: the responses and their end-of-text."""

    ids: list[int]
    is_response: list[bool]

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the last response."""
        last = len(self.ids)
        while last and self.is_response[last - 1]:
            last -= 1
        return last

    def last_response_only(self) -> Encoded:
        """The same tokens, of which only the last response counts as one."""
        before = self.prompt_length
        return Encoded(self.ids, [False] * before + self.is_response[before:])


def encode(tokenizer: Tokenizer, style: PromptStyle, conversation: Conversation) -> Encoded:
    """Tokens of a conversation. A prompt for the model to go on from ends where its response begins."""
    ids: list[int] = []
    is_response: list[bool] = []
    for prompt, response in style.pieces(conversation):
        _extend(ids, is_response, tokenizer.encode(prompt), False)
        if response is not None:
            _extend(ids, is_response, [*tokenizer.encode(response), end_of_text(tokenizer)], True)
    return Encoded(ids, is_response)


def _extend(ids: list[int], is_response: list[bool], new: list[int], flag: bool) -> None:
    ids += new
    is_response += [flag] * len(new)


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id that ends a response. ``UserError`` where the tokenizer has none."""
    if tokenizer.eot_id is None:
        raise UserError(f"this {tokenizer.kind} tokenizer has no end-of-text token, which ends a response")
    return tokenizer.eot_id


# ---- Records ---------------------------------------------------------------------------------------------------------

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


def conversation_of(record: Mapping[str, Any], *, response: bool = True) -> Conversation:
    """The conversation of a record with its last response, or, without ``response``, up to where that belongs.

    Alpaca's {instruction, input, output}, {prompt, completion}, or a list of chat messages under "messages" (role and
    content) or "conversations" (from and value). Raises ``ValueError`` that says what the record lacks.
    """
    for key in ("messages", "conversations"):
        if key in record:
            return conversation_of_messages(record[key], key, response=response)
    if "instruction" in record:
        turn = Turn(text_of(record, "instruction"), text_of(record, "input", optional=True))
        answer = "output"
    elif "prompt" in record:
        turn, answer = Turn(text_of(record, "prompt")), "completion"
    else:
        raise ValueError(f"no instruction, prompt or messages (it has {', '.join(record) or 'nothing'})")
    if not response:
        return Conversation((turn,))
    return Conversation((Turn(turn.instruction, turn.input, text_of(record, answer)),))


def conversation_of_messages(messages: Any, key: str, *, response: bool) -> Conversation:
    """Chat messages in turns: an optional system message, then user and assistant by turns."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key} is no list of messages")
    system, turns, said = None, list[Turn](), None
    for number, message in enumerate(messages):
        role, content = _message(message, f"{key}[{number}]")
        if role == "system" and number == 0:
            system = content
        elif role == "user" and said is None:
            said = content
        elif role == "assistant" and said is not None:
            turns.append(Turn(said, response=content))
            said = None
        else:
            raise ValueError(
                f"{key}[{number}]: a message of the {role} does not belong here, user and assistant take turns"
            )
    if not response:
        if said is None:
            raise ValueError(f"{key} does not end with a message of the user")
        return Conversation((*turns, Turn(said)), system)
    if said is not None or not turns:
        raise ValueError(f"{key} does not end with a message of the assistant")
    return Conversation(tuple(turns), system)


def _message(message: Any, where: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"{where} is no message with role and content")
    role_key, text_key = ("from", "value") if "from" in message else ("role", "content")
    role = message.get(role_key)
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"{where}: {role_key} is {role!r}, not user, assistant or system")
    if not isinstance(message.get(text_key), str) or not message[text_key].strip():
        raise ValueError(f"{where}: {text_key} is empty or no text")
    return _ROLES[role], message[text_key]


def text_of(record: Mapping[str, Any], key: str, *, optional: bool = False) -> str:
    """A text of a record, which must not be empty unless it is ``optional``."""
    value = record.get(key)
    if value is None and optional:
        return ""
    if value is None:
        raise ValueError(f"no {key!r} (it has {', '.join(record) or 'nothing'})")
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is no text, but {type(value).__name__}")
    if not optional and not value.strip():
        raise ValueError(f"{key!r} is empty")
    return value
