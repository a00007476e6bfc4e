"""``evaluate_loss`` predicts every token once and weighs each the same."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from llmfast.errors import UserError
from llmfast.evaluation import evaluate_loss


class Source:
    def __init__(self, ids):
        self.ids = np.asarray(ids, dtype=np.int64)

    def __len__(self):
        return len(self.ids)

    def windows(self, starts, length):
        assert all(start >= 0 and start + length <= len(self.ids) for start in starts)
        return np.stack([self.ids[start : start + length] for start in starts])


class Table(nn.Module):
    """A model that looks only at the last token, so that windows do not change its predictions."""

    def __init__(self, V, block_size):
        super().__init__()
        self.config = SimpleNamespace(block_size=block_size, vocab_size=V)
        self.logits = nn.Parameter(torch.randn(V, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        self.seen: list[int] = []

    def forward(self, idx, targets=None):
        assert not self.training
        self.seen.append(targets.numel())
        return None, nn.functional.cross_entropy(self.logits[idx].flatten(0, 1), targets.flatten())


class Bytes:
    """One byte a token, but two for token 1; token 4 is end-of-text."""

    vocab_size, eot_id = 5, 4

    def token_bytes(self):
        return [b"a", b"bb", b"c", b"d", b"<|endoftext|>"]


@pytest.mark.parametrize("length", [2, 5, 8, 9, 10, 41])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_token_after_the_first_counts_once(length, batch_size):
    ids = np.random.default_rng(length).integers(0, 5, length)
    model = Table(5, 8).train()
    result = evaluate_loss(model, Source(ids), 4, batch_size, tokenizer=Bytes())
    expected = nn.functional.cross_entropy(model.logits[ids[:-1]], torch.from_numpy(ids[1:])).item()
    assert result.loss == pytest.approx(expected, rel=1e-12)
    assert result.tokens == sum(model.seen) == length - 1
    assert result.perplexity == pytest.approx(math.exp(expected))
    size = sum({0: 1, 1: 2, 2: 1, 3: 1, 4: 0}[i] for i in ids[1:].tolist())
    assert result.bits_per_byte == pytest.approx(expected * (length - 1) / math.log(2) / size)
    assert model.training


def test_max_batches_takes_full_windows_from_the_whole_source():
    ids = np.repeat(np.arange(5), 20)
    model = Table(5, 4)
    result = evaluate_loss(model, Source(ids), None, 2, max_batches=3)
    assert model.seen == [8, 8, 8]
    assert result.tokens == 24
    assert result.bits_per_byte is None
    windows = [ids[i * 4 : i * 4 + 5] for i in np.linspace(0, 23, 6).astype(int)]
    x, y = np.stack(windows)[:, :-1].ravel(), np.stack(windows)[:, 1:].ravel()
    assert result.loss == pytest.approx(nn.functional.cross_entropy(model.logits[x], torch.from_numpy(y)).item())


def test_max_batches_above_the_source_takes_it_whole():
    assert evaluate_loss(Table(5, 4), Source([0, 1, 2, 3, 4, 0]), 4, 2, max_batches=9).tokens == 5


def test_too_little_data_and_too_long_a_block_are_told():
    with pytest.raises(UserError, match=r"1 token\(s\)"):
        evaluate_loss(Table(5, 4), Source([0]))
    with pytest.raises(UserError, match="block size 5 must lie between 1 and the model's 4"):
        evaluate_loss(Table(5, 4), Source([0, 1]), 5)


def test_a_failure_leaves_the_model_in_its_mode():
    model = Table(5, 4).train()
    with pytest.raises(IndexError):
        evaluate_loss(model, Source([0, 99, 1]), 4)
    assert model.training
