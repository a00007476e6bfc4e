"""The shape of the small runs, and how their tests look at them."""

from __future__ import annotations

import json

import torch

SHAPE = dict(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=16)


def metrics_of(result):
    return [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
