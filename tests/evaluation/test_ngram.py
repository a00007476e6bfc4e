"""The bigram baseline against sums done by hand, and against what probability theory says of it."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from llmfast.errors import UserError
from llmfast.evaluation import bigram_loss, ngram


class Ids:
    """The part of a TokenSource that counting needs."""

    def __init__(self, ids):
        self.ids = np.asarray(ids, dtype=np.uint16)

    def __len__(self):
        return len(self.ids)

    def window(self, start, length):
        return self.ids[start : start + length]


def random_chain(length, V, seed):
    """A Markov chain over V ids: (ids, its entropy rate in nats)."""
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.full(V, 0.3), size=V)
    ids = [0]
    for draw in rng.random(length - 1):
        ids.append(min(int(np.searchsorted(np.cumsum(transition[ids[-1]]), draw)), V - 1))
    stationary = np.linalg.matrix_power(transition, 200)[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = -np.where(transition > 0, transition * np.log(transition), 0).sum(1)
    return ids, float(stationary @ rows)


def test_loss_is_the_formula_computed_with_dictionaries():
    V = 7
    train, val = random_chain(211, V - 1, 1)[0], [*random_chain(53, V - 1, 2)[0], V - 1, 3, V - 1, 2]
    model = ngram.Bigram(Ids(train), V)
    pairs, context, single = Counter(itertools.pairwise(train)), Counter(train[:-1]), Counter(train[1:])
    N = len(train) - 1
    total = 0.0
    for v, w in itertools.pairwise(val):
        a = model.weights[int(math.log2(context[v]))] if context[v] else 0.0
        p = (1 - a) * (single[w] + model.k) / (N + model.k * V)
        if context[v]:
            p += a * pairs[v, w] / context[v]
        total -= math.log(p)
    assert bigram_loss(Ids(train), Ids(val), V) == pytest.approx(total / (len(val) - 1), rel=1e-12)


def test_probabilities_sum_to_one_after_every_token_seen_or_not():
    V = 11
    model = ngram.Bigram(Ids(random_chain(97, V - 2, 3)[0]), V)
    for v in range(V):
        p = model.probabilities(np.full(V, v), np.arange(V))
        assert p.min() > 0
        assert p.sum() == pytest.approx(1, abs=1e-12)


def test_weights_maximise_the_likelihood_of_the_training_tokens_left_out():
    """Against a brute-force search over one weight, on data where every context falls in one bucket."""
    train = [0, 1, 0, 1, 0, 1, 1, 0, 0, 1, 0, 0]
    model = ngram.Bigram(Ids(train), 2)
    pairs, context, single = Counter(itertools.pairwise(train)), Counter(train[:-1]), Counter(train[1:])
    assert {int(math.log2(c)) for c in context.values()} == {2}

    def likelihood(a):
        total = 0.0
        for (v, w), n in pairs.items():
            p = (single[w] - 1 + model.k) / (len(train) - 2 + 2 * model.k)
            total += n * math.log(a * (n - 1) / (context[v] - 1) + (1 - a) * p)
        return total

    best = max(np.linspace(0, 0.999, 1000), key=likelihood)
    assert model.weights[2] == pytest.approx(best, abs=5e-3)


def test_loss_on_a_markov_chain_comes_close_to_its_entropy_rate_and_not_below():
    V = 13
    ids, entropy = random_chain(40_000, V, 4)
    loss = bigram_loss(Ids(ids[:30_000]), Ids(ids[30_000:]), V)
    assert entropy - 0.03 < loss < entropy + 0.03


def test_counting_in_chunks_gives_the_same_loss(monkeypatch):
    train, val = random_chain(1009, 17, 5)[0], random_chain(211, 17, 6)[0]
    whole = bigram_loss(Ids(train), Ids(val), 17)
    monkeypatch.setattr(ngram, "CHUNK", 100)
    assert bigram_loss(Ids(train), Ids(val), 17) == pytest.approx(whole, rel=1e-12)


def test_one_token_and_foreign_ids_are_told():
    with pytest.raises(UserError, match="validation data has 1"):
        bigram_loss(Ids([0, 1]), Ids([0]), 2)
    with pytest.raises(UserError, match="token id 9 lies outside the vocabulary of 5"):
        bigram_loss(Ids([0, 9, 1]), Ids([0, 1]), 5)
