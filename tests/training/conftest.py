"""Small real runs: a GPT of 13,000 parameters on Python's own text, one byte a token."""

from __future__ import annotations

import inspect
import json
import textwrap

import numpy as np
import pytest
import torch
from small_runs import SHAPE

from llmfast.config import GPTConfig, TrainConfig
from llmfast.data import open_tokens
from llmfast.nn import GPT
from llmfast.tokenizer import load_tokenizer
from llmfast.training import Trainer


@pytest.fixture(scope="session")
def text():
    return inspect.getsource(textwrap) + inspect.getsource(json)


@pytest.fixture(scope="session")
def tokens(text, tmp_path_factory):
    """(train, val): the text's bytes as token sources, 90/10."""
    folder = tmp_path_factory.mktemp("tokens")
    ids = np.frombuffer(text.encode("ascii", "replace"), dtype=np.uint8).astype(np.uint16)
    cut = len(ids) * 9 // 10
    ids[:cut].tofile(folder / "train.bin")
    ids[cut:].tofile(folder / "val.bin")
    return open_tokens(folder / "train.bin"), open_tokens(folder / "val.bin")


@pytest.fixture
def train(tokens, tmp_path):
    """train(max_steps=..., ...) -> (result, model): a run in ``tmp_path / "run"``."""

    def run(*, shape=None, data=None, val=True, tokenizer=None, loss_fn=None, model=None, progress=False, **options):
        config = TrainConfig(
            **{
                **dict(out=str(tmp_path / "run"), device="cpu", max_steps=20, micro_batch_size=4, warmup_steps=4),
                **dict(log_every=5, eval_every=10, eval_batches=2, threads=1),
                **options,
            }
        )
        torch.manual_seed(config.seed)
        model = model or GPT(GPTConfig(**{**SHAPE, **(shape or {})}))
        trainer = Trainer(
            model, config, data or tokens[0], tokens[1] if val else None,
            tokenizer=tokenizer, loss_fn=loss_fn, progress=progress,
        )  # fmt: skip
        return trainer.fit(), model

    return run


@pytest.fixture(scope="session")
def byte_tokenizer():
    return load_tokenizer("byte")
