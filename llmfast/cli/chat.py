"""``llmfast chat``: a tuned model answers, a base model goes on from all that was said."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmfast.cli.common import SamplingOptions, chosen_style, note, open_model, utf8, write
from llmfast.errors import UserError

if TYPE_CHECKING:
    from llmfast.finetuning.prompts import PromptStyle, Turn
    from llmfast.tokenizer import Tokenizer

COMMANDS = "/reset forgets what was said, /quit ends"


@dataclass
class Options(SamplingOptions):
    """Options of ``llmfast chat``."""


class Text:
    """A dialogue with a base model: one text, of which it reads the newest ``room`` tokens."""

    def __init__(self, tokenizer: Tokenizer, room: int) -> None:
        self.tokenizer, self.room = tokenizer, room
        self.reset()

    def reset(self) -> None:
        self.text = ""

    def ask(self, line: str) -> list[int]:
        """The tokens that a reply to ``line`` goes on from."""
        text = f"{self.text}{line}\n"
        ids = self.tokenizer.encode(text)
        self.text = text if len(ids) <= self.room else self.tokenizer.decode(ids[-self.room :])
        return ids[-self.room :]

    def answer(self, reply: str) -> None:
        self.text += f"{reply}\n"


class Turns:
    """A dialogue with a tuned model: the newest whole turns of at most ``room`` tokens, written in its style."""

    def __init__(self, tokenizer: Tokenizer, room: int, style: PromptStyle) -> None:
        self.tokenizer, self.room, self.style = tokenizer, room, style
        self.reset()

    def reset(self) -> None:
        self.turns: tuple[Turn, ...] = ()

    def ask(self, line: str) -> list[int]:
        """The tokens that a reply to ``line`` goes on from."""
        from llmfast.finetuning.prompts import Conversation, Turn, encode

        turns = (*self.turns, Turn(line))
        while len(ids := encode(self.tokenizer, self.style, Conversation(turns)).ids) > self.room and len(turns) > 1:
            turns = turns[1:]
        self.turns = turns
        return ids

    def answer(self, reply: str) -> None:
        *before, last = self.turns
        self.turns = (*before, dataclasses.replace(last, response=reply))


def run(options: Options) -> int:
    from llmfast.generation import generate

    sampling = options.sampling()
    with open_model(options, cast=True) as opened:
        tokenizer, context = opened.need_tokenizer(), opened.model.config.block_size
        room = max(context - options.max_new_tokens, context // 2, 1)  # tokens; the rest is for the reply
        style = chosen_style(options.prompt_style, opened.path)
        dialogue = Text(tokenizer, room) if style is None else Turns(tokenizer, room, style)
        if sys.stdin.isatty():
            does = "goes on from what you write" if style is None else "answers"
            note(f"{opened.path}: it {does}. {COMMANDS}.")
        for line in _lines():
            command = line.strip()
            if command == "/quit":
                break
            if command == "/reset":
                dialogue.reset()
                continue
            if not command and style is not None:  # no instruction
                continue
            if command.startswith("/"):
                note(f"unknown command {command}: {COMMANDS}")
                continue
            try:
                prompt = dialogue.ask(line)
            except UserError as error:  # a character that the model does not know
                if not sys.stdin.isatty():
                    raise
                note(f"llmfast: {error}")
                continue
            reply = list[str]()

            def show(_: int, piece: str, reply: list[str] = reply) -> None:
                write(piece)
                reply.append(piece)

            with contextlib.suppress(KeyboardInterrupt):  # stops the reply, not the dialogue
                generate(opened.model, tokenizer, [prompt], stream=show, **sampling)
            dialogue.answer("".join(reply))
            print(flush=True)
    return 0


def _lines() -> Iterator[str]:
    """What is typed or piped in, line by line."""
    if not sys.stdin.isatty():
        for line in sys.stdin.buffer:
            yield utf8(line, "standard input").rstrip("\r\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() its line editing
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
