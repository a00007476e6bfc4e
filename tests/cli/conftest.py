"""A tiny trained run and its data, made once with the commands themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmfast.cli.main import main

WORDS = "the cat sat on the mat and the dog ran to the red barn while a small bird sang in an old tree".split()


def some_text(sentences: int = 400) -> str:
    """English-looking text, always the same."""
    lines = []
    for i in range(sentences):
        line = " ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(5 + i % 7))
        lines.append(line.capitalize() + ".")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """text.txt, shards/ and run/: a text, its tokens, and a model of 2 layers trained on them for four steps."""
    home = tmp_path_factory.mktemp("home")
    (home / "text.txt").write_text(some_text(), encoding="utf-8")
    text, shards, run = (str(home / name) for name in ("text.txt", "shards", "run"))
    assert main(["prepare", text, "--out", shards, "--tokenizer-size", "300"]) == 0
    shape = "--n-layer 2 --n-head 2 --n-embd 16 --block-size 16 --micro-batch-size 2".split()
    few = "--max-steps 4 --eval-every 2 --eval-batches 2 --sample-tokens 4 --log-every 1".split()
    assert main(["pretrain", "--data", shards, "--out", run, *shape, *few]) == 0
    return home
