"""Scores a run of ``finetune instruct`` with the offline judge, beside its base model and its own answers shuffled.

python examples/instruct/compare.py runs/instruct runs/instruct-base
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from llmfast.checkpoint import load_model, load_tokenizer_of
from llmfast.evaluation.similarity import similarity
from llmfast.finetuning.prompts import STYLES, conversation_of
from llmfast.finetuning.responding import respond


def average(responses: list[str], references: list[str]) -> float:
    """The offline judge's average: 0 to 100, an empty response scores 0."""
    scores = [similarity(*pair).score if pair[0] else 0.0 for pair in zip(responses, references, strict=True)]
    return sum(scores) / len(scores)


def main(run: str, base: str) -> None:
    entries = json.loads(Path(run, "instruction-data-with-response.json").read_text(encoding="utf-8"))
    references = [entry["output"] for entry in entries]
    tuned = [entry["model_response"] for entry in entries]
    shuffled = tuned.copy()
    random.Random(0).shuffle(shuffled)
    prompts = [conversation_of(entry, response=False) for entry in entries]
    model, tokenizer = load_model(base), load_tokenizer_of(base)
    assert tokenizer is not None
    untuned = respond(model, tokenizer, STYLES["alpaca"], prompts, max_new_tokens=100)
    print(f"{len(entries)} test entries, offline judge (similarity to the reference), average of 100")
    for name, responses in (("fine-tuned", tuned), ("its answers shuffled", shuffled), ("base model", untuned)):
        print(f"{name:<22}{average(responses, references):5.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
