"""The offline judge's figures, beside sacrebleu's and hand-made ones."""

from __future__ import annotations

import random

import pytest

from llmfast.evaluation.similarity import chrf, similarity, token_f1

# (response, reference, chrF2 as sacrebleu 2.6.0 gives it: CHRF().sentence_score(response, [reference]).score)
SACREBLEU = [
    ("the cat sat on the mat", "the cat is on the mat", 64.577942),
    ("Commence", "Begin", 7.142857),
    ("It's very easy.", "It is a piece of cake.", 8.298186),
    ("Привет", "Привет (Privet)", 33.624843),
    ("a", "a", 100.0),
    ("ab", "abcdefgh", 23.404255),
    ("", "x", 0.0),
    ("   ", " ", 0.0),
    ("colour  wheel\nspin", "color wheel spin", 76.013099),
    ("x", "y", 0.0),
    ("25, 16, 10, 7, 2.", "2, 7, 10, 16, 25", 43.067951),
]


@pytest.mark.parametrize(("response", "reference", "expected"), SACREBLEU)
def test_chrf_is_sacrebleus(response, reference, expected):
    assert chrf(response, reference) == pytest.approx(expected, abs=1e-5)


def test_chrf_is_sacrebleus_on_random_texts():
    metric = pytest.importorskip("sacrebleu.metrics").CHRF()
    rng = random.Random(0)
    for _ in range(500):
        a, b = ("".join(rng.choice("ab cä\n") for _ in range(rng.randrange(14))) for _ in range(2))
        assert chrf(a, b) == pytest.approx(metric.sentence_score(a, [b]).score, abs=1e-9), (a, b)


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("The cat sat.", "a cat sat", 100.0),  # case, punctuation and articles do not count
        ("cat sat", "cat sat mat mat", 200 * 2 / 6),
        ("mat mat mat", "mat mat", 200 * 2 / 5),  # a word counts as often as both have it
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("!", "!", 100.0),
        ("!", "?", 0.0),
    ],
)
def test_token_f1(response, reference, expected):
    assert token_f1(response, reference) == pytest.approx(expected)


def test_the_score_is_100_for_an_exact_match_and_a_mean_otherwise():
    assert similarity("Commence!", "commence").score == 100.0
    assert similarity("+", "-").score == 0.0
    found = similarity("cat sat", "cat sat mat mat")
    assert found.exact_match == 0.0
    assert found.score == pytest.approx((found.token_f1 + found.chrf) / 2)
    assert 0 < found.chrf < found.token_f1 < 100
