"""``llmfast generate``: what a model writes after a prompt."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from llmfast.cli.common import JSON_HELP, SamplingOptions, open_model, print_json, read_text, write
from llmfast.config import option
from llmfast.errors import UserError


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
        if len(prompts) == 1 and not options.json:
            tokenizer.encode(prompts[0])  # complains, of a character that it lacks, before anything is written
            write(prompts[0])
            generate(opened.model, tokenizer, prompts[0], stream=write, **sampling)
            print()
            return 0
        completions = generate(opened.model, tokenizer, prompts, **sampling)
    if options.json:
        pairs = zip(prompts, completions, strict=True)
        print_json({"completions": [{"prompt": prompt, "completion": text} for prompt, text in pairs]})
    else:
        print("\n\n---\n\n".join(prompt + text for prompt, text in zip(prompts, completions, strict=True)))
    return 0


def _prompts(options: Options) -> list[str]:
    if options.prompt and options.prompt_file is not None:
        raise UserError("give prompts either as words or with --prompt-file, not both")
    if options.prompt:
        return options.prompt
    if options.prompt_file is not None:
        return [read_text(options.prompt_file)]
    return [""] if sys.stdin.isatty() else [read_text("-")]
