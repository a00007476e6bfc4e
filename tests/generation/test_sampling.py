"""Sampling: what may be chosen, and how often."""

from __future__ import annotations

import math

import pytest
import torch

from llmfast.generation.sampling import Sampling

V = 23


def logits(rows: int = 1) -> torch.Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(11))


def draw(sampling: Sampling, row: torch.Tensor, count: int) -> torch.Tensor:
    """How often each id comes out of ``count`` draws."""
    generator = torch.Generator().manual_seed(0)
    chosen = sampling.choose(row.expand(count, -1), [generator] * count)
    return torch.bincount(torch.tensor(chosen), minlength=len(row))


def filtered(row: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """The distribution by hand, in Python's own floats."""
    ranked = sorted(range(len(row)), key=lambda i: -row[i].item())[: top_k or len(row)]
    weights = {i: math.exp((row[i].item() - row.max().item()) / temperature) for i in ranked}
    total, kept, mass = sum(weights.values()), [], 0.0
    for i in ranked:
        if top_p is not None and mass >= top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(row))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, V, 1000])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.6, 0.95, 1.0])
def test_draws_follow_the_distribution_filtered_by_hand(temperature, top_k, top_p):
    row, count = logits()[0], 4000
    expected = torch.tensor(filtered(row, temperature, top_k, top_p))
    counts = draw(Sampling(temperature, top_k, top_p), row, count)
    assert not counts[expected == 0].any()
    assert counts[expected > 0.01].all()
    deviation = (counts - count * expected).abs()
    assert (deviation <= 5 * (count * expected * (1 - expected)).sqrt() + 1e-3).all()


@pytest.mark.parametrize("spread", [0.5, 4.0])  # the nucleus is most of the vocabulary, or a few tokens
def test_the_nucleus_of_a_large_vocabulary_is_the_one_of_a_full_sort(spread):
    row = spread * torch.randn(5000, generator=torch.Generator().manual_seed(2))
    ranked, ids = row.softmax(-1).sort(descending=True)
    nucleus = set(ids[ranked.cumsum(-1) - ranked < 0.7].tolist())
    chosen = set(draw(Sampling(top_p=0.7), row, 1000).nonzero()[:, 0].tolist())
    assert chosen <= nucleus
    assert len(chosen) > min(len(nucleus) // 2, 500)


def test_temperature_0_takes_the_largest():
    assert Sampling(0.0).choose(logits(7), [None] * 7) == logits(7).argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e30])
def test_extreme_temperatures_stay_finite(temperature):
    row = logits()[0]
    counts = draw(Sampling(temperature), row, 500)
    assert (counts > 0).tolist() == ([True] * V if temperature > 1 else (row == row.max()).tolist())


def test_large_logits_and_masked_ids_stay_exact():
    row = torch.full((V,), -math.inf)
    row[3] = row[8] = 1e30
    counts = draw(Sampling(), row, 400)
    assert counts[3] + counts[8] == 400
    assert abs(counts[3] - 200) < 60


def test_the_extremes_of_the_noise_choose_ids_of_positive_weight(monkeypatch):
    row = torch.full((1, V), -math.inf)
    row[0, 2:5] = 0.0
    for u, expected in [(0.0, 2), (1 - 2**-24, 4)]:
        monkeypatch.setattr(torch, "rand", lambda *_, value=u, **__: torch.tensor([value]))
        for sampling in (Sampling(), Sampling(top_k=10), Sampling(top_p=0.999)):
            assert sampling.choose(row, [torch.Generator()])[0] in ({expected} if sampling == Sampling() else {2, 3, 4})
