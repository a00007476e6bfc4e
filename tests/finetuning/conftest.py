"""A tiny base model over bytes, and examples that it can learn something from."""

from __future__ import annotations

import json

import pytest
import torch

from llmfast.config import GPTConfig
from llmfast.nn import GPT
from llmfast.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The directory of an untrained model of 96 tokens of context."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    GPT(GPTConfig(vocab_size=257, block_size=96, n_layer=1, n_head=2, n_embd=24)).save_pretrained(path)
    load_tokenizer("byte").save(path)
    return path


@pytest.fixture
def no_plots(monkeypatch):
    """Half of a tiny run's time; tests/training has them."""
    monkeypatch.setattr("llmfast.training.report.Report.plot", lambda self, now=False: None)


@pytest.fixture
def write(tmp_path):
    """write(records, name="data.json") -> path of a JSON list, a JSONL file, or text as it is."""

    def to_file(records, name="data.json"):
        path = tmp_path / name
        if isinstance(records, bytes):
            path.write_bytes(records)
        elif name.endswith("jsonl"):
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        else:
            path.write_text(json.dumps(records, indent=1))
        return str(path)

    return to_file


@pytest.fixture
def entries():
    """40 entries in Alpaca's form."""
    return [
        {
            "instruction": f"Say {'ab'[i % 2] * (i % 5 + 1)}",
            "input": "twice" if i % 3 == 0 else "",
            "output": "ab"[i % 2],
        }
        for i in range(40)
    ]
