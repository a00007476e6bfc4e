"""``llmfast generate``: what a model writes after a prompt."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmfast.cli.common import JSON_HELP, SamplingOptions, chosen_style, note, open_model, print_json, read_text, write
from llmfast.config import option
from llmfast.errors import UserError

if TYPE_CHECKING:
    from llmfast.finetuning.prompts import PromptStyle
    from llmfast.tokenizer import Tokenizer


@dataclass
class Options(SamplingOptions):
    """Options of ``llmfast generate``."""

    prompt: list[str] = field(
        default_factory=list,
        metadata={
            "positional": True,
            "help": "texts to go on from (default: standard input; at a terminal: a new text)",
        },
    )
    prompt_file: str | None = option(None, "a UTF-8 file to go on from, - being standard input")
    samples: int = option(1, "texts to write for each prompt")
    json: bool = option(False, JSON_HELP)


def run(options: Options) -> int:
    from llmfast.generation import generate

    sampling = options.sampling()
    if options.samples < 1:
        raise UserError(f"samples must be positive, got {options.samples}")
    prompts = [prompt for prompt in _prompts(options) for _ in range(options.samples)]
    with open_model(options, cast=True) as opened:
        tokenizer = opened.need_tokenizer()
        style = chosen_style(options.prompt_style, opened.path)
        if style is not None and options.prompt_style is None:
            note("the prompt is an instruction, as this model was tuned (--prompt-style none: a text to go on from)")
        read = prompts if style is None else [_instruction(tokenizer, style, prompt) for prompt in prompts]
        shown = prompts if style is None else [""] * len(prompts)  # before each completion
        if len(prompts) == 1 and not options.json:
            tokenizer.encode(prompts[0])  # complains, of a character that it lacks, before anything is written
            write(shown[0])
            generate(opened.model, tokenizer, read, stream=lambda _, piece: write(piece), **sampling)
            print()
            return 0
        completions = generate(opened.model, tokenizer, read, **sampling)
    if options.json:
        pairs = zip(prompts, completions, strict=True)
        print_json({"completions": [{"prompt": prompt, "completion": text} for prompt, text in pairs]})
    else:
        print("\n\n---\n\n".join(before + text for before, text in zip(shown, completions, strict=True)))
    return 0


def _instruction(tokenizer: Tokenizer, style: PromptStyle, text: str) -> list[int]:
    """The tokens that a response to ``text`` goes on from."""
    from llmfast.finetuning.prompts import Conversation, Turn, encode

    if not text.strip():
        raise UserError("an instruction is missing: name one (--prompt-style none goes on from nothing)")
    return encode(tokenizer, style, Conversation((Turn(text.strip()),))).ids


def _prompts(options: Options) -> list[str]:
    if options.prompt and options.prompt_file is not None:
        raise UserError("give prompts either as words or with --prompt-file, not both")
    if options.prompt:
        return options.prompt
    if options.prompt_file is not None:
        return [read_text(options.prompt_file)]
    return [""] if sys.stdin.isatty() else [read_text("-")]
