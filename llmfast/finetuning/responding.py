"""A model's answers to the instructions of a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llmfast.errors import UserError
from llmfast.files import write_whole
from llmfast.finetuning.prompts import Conversation, PromptStyle, encode
from llmfast.generation import generate
from llmfast.nn import GPT
from llmfast.tokenizer import Tokenizer
from llmfast.tokenizer.base import replace_surrogates

CPU_ROWS, GPU_ROWS = 8, 64  # responses written side by side


def respond(
    model: GPT,
    tokenizer: Tokenizer,
    style: PromptStyle,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int = 256,
    progress: bool = True,
) -> list[str]:
    """The model's response to each conversation that ends with an instruction, without white space around it.

    A response is the text of the tokens that follow the prompt, up to the end-of-text token or ``max_new_tokens``:
    it may hold anything, also what looks like a prompt. Each is the likeliest.
    """
    prompts = [encode(tokenizer, style, conversation).ids for conversation in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # prompts of a batch read little padding
    rows = CPU_ROWS if model.transformer.wpe.weight.device.type == "cpu" else GPU_ROWS
    responses = [""] * len(prompts)
    with tqdm(total=len(prompts), unit="response", disable=None if progress else True, leave=False) as bar:
        for start in range(0, len(order), rows):
            numbers = order[start : start + rows]
            written = generate(
                model,
                tokenizer,
                [prompts[i] for i in numbers],
                max_new_tokens=max_new_tokens,
                temperature=0.0,
            )
            for i, response in zip(numbers, written, strict=True):
                responses[i] = response.strip()
            bar.update(len(numbers))
    return responses


def write_responses(path: Path, records: Sequence[dict[str, Any]], responses: Sequence[str]) -> None:
    """Write each record with its "model_response" as a JSON list; the file appears whole or not at all."""
    # A JSON escape may name half a character, which no file holds.
    entries = [{**record, "model_response": text} for record, text in zip(records, responses, strict=True)]
    text = replace_surrogates(json.dumps(entries, indent=4, ensure_ascii=False))
    try:
        write_whole(path, text + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
