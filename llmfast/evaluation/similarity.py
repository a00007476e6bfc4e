"""How near a response comes to its reference, without any model: exact match, token F1 and chrF.

Token F1 and exact match are SQuAD's (Rajpurkar et al. 2016): words in lower case, without punctuation and articles.
chrF is Popovic's (2015) as sacrebleu computes it: the F score, recall twice as weighty as precision, of character
n-grams (n = 1 .. 6) without white space, precision and recall averaged over the lengths that both texts have.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from dataclasses import dataclass

ORDER = 6
BETA = 2.0
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Similarity:
    """Each figure from 0 to 100."""

    exact_match: float  # 100 or 0
    token_f1: float
    chrf: float

    @property
    def score(self) -> float:
        """One figure: 100 for an exact match, else the mean of token F1 and chrF."""
        return 100.0 if self.exact_match else (self.token_f1 + self.chrf) / 2


def similarity(response: str, reference: str) -> Similarity:
    """Compare a response with its reference."""
    exact = words(response) == words(reference)
    if exact and not words(reference):  # nothing but punctuation: compared as it stands
        exact = response.split() == reference.split()
    return Similarity(100.0 if exact else 0.0, token_f1(response, reference), chrf(response, reference))


def words(text: str) -> list[str]:
    """The words that exact match and token F1 compare."""
    return [word for word in text.lower().translate(_PUNCTUATION).split() if word not in _ARTICLES]


def token_f1(response: str, reference: str) -> float:
    """Harmonic mean, 0 to 100, of the shares of words that the two texts have in common."""
    ours, theirs = words(response), words(reference)
    if not ours or not theirs:
        return 100.0 if response.split() == reference.split() else 0.0
    common = (Counter(ours) & Counter(theirs)).total()
    return 200.0 * common / (len(ours) + len(theirs))


def chrf(response: str, reference: str) -> float:
    """chrF2 of one pair, 0 to 100; 0 where either has no character."""
    ours, theirs = (re.sub(r"\s+", "", text) for text in (response, reference))
    orders = min(ORDER, len(ours), len(theirs))
    if not orders:
        return 0.0
    precision = recall = 0.0
    for n in range(1, orders + 1):
        mine = Counter(ours[i : i + n] for i in range(len(ours) - n + 1))
        wanted = Counter(theirs[i : i + n] for i in range(len(theirs) - n + 1))
        matches = (mine & wanted).total()
        precision += matches / mine.total() / orders
        recall += matches / wanted.total() / orders
    if not precision:
        return 0.0
    return 100.0 * (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)
