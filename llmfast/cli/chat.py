"""``llmfast chat``: a dialogue with a base model, which goes on from all that was said."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from llmfast.cli.common import OpenModel, SamplingOptions, note, open_model, utf8, write
from llmfast.errors import UserError

COMMANDS = "/reset forgets what was said, /quit ends"


@dataclass
class Options(SamplingOptions):
    """Options of ``llmfast chat``."""


class Dialogue:
    """All that was said, as far as the model's context goes."""

    def __init__(self, opened: OpenModel, max_new_tokens: int):
        self.tokenizer = opened.need_tokenizer()
        context = opened.model.config.block_size
        self.room = max(context - max_new_tokens, context // 2, 1)  # tokens; the rest is for the reply
        self.text = ""

    def add(self, text: str) -> str:
        """Append ``text``; returns the newest part of the dialogue that fits the context."""
        self.text += text
        ids = self.tokenizer.encode(self.text)
        if len(ids) > self.room:
            self.text = self.tokenizer.decode(ids[-self.room :])
        return self.text


def run(options: Options) -> int:
    from llmfast.generation import generate

    sampling = options.sampling()
    with open_model(options, cast=True) as opened:
        dialogue = Dialogue(opened, options.max_new_tokens)
        if sys.stdin.isatty():
            note(f"{opened.path}: it goes on from what you write. {COMMANDS}.")
        for line in _lines():
            command = line.strip()
            if command == "/quit":
                break
            if command == "/reset":
                dialogue.text = ""
                continue
            if command.startswith("/"):
                note(f"unknown command {command}: {COMMANDS}")
                continue
            before = dialogue.text
            try:
                prompt = dialogue.add(line + "\n")
                reply = generate(opened.model, dialogue.tokenizer, prompt, stream=write, **sampling)
                dialogue.text += reply + "\n"
            except KeyboardInterrupt:  # stops the reply, not the dialogue
                pass
            except UserError as error:  # a character that the model does not know
                if not sys.stdin.isatty():
                    raise
                note(f"llmfast: {error}")
                dialogue.text = before
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
