"""The smoothed bigram model: what a language model must beat to have learnt more than which token follows which.

    P(w | v) = a(v) c(v, w) / c(v) + (1 - a(v)) P(w),      P(w) = (c(w) + k) / (N + k V)

Jelinek and Mercer, "Interpolated estimation of Markov source parameters from sparse data" (1980). The weight a(v)
depends on how often the context v was seen (one weight for each power of two), and weights and k maximise the
likelihood of the training tokens themselves, each left out of the counts that predict it, so that no validation token
is looked at. N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from llmfast.errors import UserError

if TYPE_CHECKING:
    from llmfast.data import TokenSource

CHUNK = 1 << 24  # tokens counted at a time
ADD_K = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
ROUNDS = 50


def bigram_loss(train_source: TokenSource, val_source: TokenSource, vocab_size: int) -> float:
    """Cross-entropy, in nats a token, of a bigram model of ``train_source`` on ``val_source``.

    Every validation token after the first is predicted from the one before it, as in ``evaluate_loss``.
    Raises ``UserError`` where either side has fewer than two tokens, or an id lies outside the vocabulary.
    """
    for name, source in (("training", train_source), ("validation", val_source)):
        if len(source) < 2:
            raise UserError(f"a bigram model takes two tokens, but the {name} data has {len(source)}")
    return Bigram(train_source, vocab_size).loss(val_source)


class Bigram:
    """Counts and smoothing parameters of the interpolated bigram model of ``source``."""

    def __init__(self, source: TokenSource, vocab_size: int):
        self.vocab_size = vocab_size
        keys, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        for pairs in _pairs(source, vocab_size):
            more, frequency = np.unique(pairs, return_counts=True)
            keys, inverse = np.unique(np.concatenate([keys, more]), return_inverse=True)
            counts = np.bincount(inverse, weights=np.concatenate([counts, frequency])).astype(np.int64)
        self.keys, self.counts = keys, counts  # (P,) each: v * V + w ascending, and c(v, w)
        previous, token = np.divmod(keys, vocab_size)
        self.context = np.bincount(previous, weights=counts, minlength=vocab_size)  # (V,) c(v)
        self.unigram = np.bincount(token, weights=counts, minlength=vocab_size)  # (V,) c(w)
        self.k = self._fit_k()
        self.weights = self._fit_weights(previous, token)  # (buckets,) a, by bucket of c(v)

    def probabilities(self, previous: np.ndarray, token: np.ndarray) -> np.ndarray:
        """(n,) float64: P(token | previous) for int64 ids (n,)."""
        keys = previous * self.vocab_size + token
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        pair = np.where(self.keys[place] == keys, self.counts[place], 0)
        seen = self.context[previous]
        weight = np.where(seen > 0, self.weights[_bucket(seen)], 0.0)
        total = self.unigram.sum() + self.k * self.vocab_size
        return weight * pair / np.maximum(seen, 1) + (1 - weight) * (self.unigram[token] + self.k) / total

    def loss(self, source: TokenSource) -> float:
        """Cross-entropy in nats a token over all tokens of ``source`` but the first."""
        nats = 0.0
        for pairs in _pairs(source, self.vocab_size):
            nats -= float(np.log(self.probabilities(*np.divmod(pairs, self.vocab_size))).sum())
        return nats / (len(source) - 1)

    def _unigram_left_out(self, k: float) -> np.ndarray:
        """(V,) P(w) with one occurrence of w taken out of the counts."""
        total = self.unigram.sum() - 1 + k * self.vocab_size
        return (np.maximum(self.unigram - 1, 0) + k) / total

    def _fit_k(self) -> float:
        return max(ADD_K, key=lambda k: float((self.unigram * np.log(self._unigram_left_out(k))).sum()))

    def _fit_weights(self, previous: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Expectation maximisation of the weights, each pair left out of the counts once."""
        seen = self.context[previous]
        pair = (self.counts - 1) / np.maximum(seen - 1, 1)
        single = self._unigram_left_out(self.k)[token]
        bucket = _bucket(seen)
        size = int(_bucket(self.context.max())) + 1
        mass = np.bincount(bucket, weights=self.counts, minlength=size)
        weights = np.full(size, 0.5)
        for _ in range(ROUNDS):
            share = weights[bucket] * pair
            share /= share + (1 - weights[bucket]) * single
            weights = np.bincount(bucket, weights=share * self.counts, minlength=size) / np.maximum(mass, 1)
            # A weight of exactly 1 would give an unseen pair probability 0.
            weights = np.minimum(weights, 1 - 1e-6)
        return weights


def _bucket(count: np.ndarray) -> np.ndarray:
    """floor(log2(count)), and 0 for counts below 2."""
    return np.log2(np.maximum(count, 1)).astype(np.int64)


def _pairs(source: TokenSource, vocab_size: int) -> Iterator[np.ndarray]:
    """int64 arrays of v * V + w for each token w and the token v before it."""
    for start in range(0, len(source) - 1, CHUNK):
        ids = source.window(start, min(CHUNK + 1, len(source) - start)).astype(np.int64)
        if ids.min() < 0 or ids.max() >= vocab_size:
            bad = ids.max() if ids.max() >= vocab_size else ids.min()
            raise UserError(f"token id {bad} lies outside the vocabulary of {vocab_size}")
        yield ids[:-1] * vocab_size + ids[1:]
