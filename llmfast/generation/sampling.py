"""The choice of the next token from logits (N, V)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmfast.errors import UserError

FEW = 256  # tokens that hold the top_p of most distributions; finding them is as fast as finding the likeliest 50


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Temperature 0 is greedy. Otherwise logits are divided by the temperature, then only the ``top_k`` most likely
    tokens stay, then of these the fewest whose probabilities sum to ``top_p`` (Holtzman et al. 2020).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature!r}")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise UserError(f"top_k must be a positive integer, got {self.top_k!r}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p must lie in (0, 1], got {self.top_p!r}")

    def choose(self, logits: Tensor, noise: Sequence[torch.Generator]) -> list[int]:
        """One token for each row of ``logits`` (N, V). Row n draws one number from its own generator ``noise[n]``."""
        best, greedy = logits.max(-1)
        if not torch.isfinite(best).all():
            raise UserError("the model's logits are not finite: its weights are damaged, or its dtype is too narrow")
        if self.temperature == 0.0:
            return greedy.tolist()
        # The largest becomes 0 before the division, so that no temperature overflows; none is 0 in float32.
        scores = (logits.float() - best.float()[:, None]) / max(self.temperature, torch.finfo(torch.float32).tiny)
        ids = None
        if self.top_k is not None and self.top_k < scores.shape[1]:
            scores, ids = scores.topk(self.top_k)
        probabilities = scores.softmax(-1)
        if self.top_p is not None and self.top_p < 1.0:
            if ids is None:
                if len(noise) > 1:  # row by row, so that a text does not depend on its neighbours
                    return [self.choose(row[None], [own])[0] for row, own in zip(logits, noise, strict=True)]
                probabilities, ids = _likeliest(probabilities, self.top_p)
            before = probabilities.cumsum(-1) - probabilities
            before[:, 0] = 0.0  # the most likely token always stays
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        # Inverse of the cumulative distribution: the first token whose cumulative weight exceeds u times the sum. A
        # token of weight 0 adds nothing and is never the first.
        cumulative = probabilities.cumsum(-1)
        u = torch.cat([torch.rand(1, generator=g) for g in noise]).to(logits.device)
        chosen = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)
        return (chosen if ids is None else ids.gather(1, chosen))[:, 0].tolist()


def _likeliest(probabilities: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Of one row (1, V): descending probabilities whose sum reaches ``mass``, and their ids."""
    if probabilities.shape[1] > FEW:  # a sort of the vocabulary takes longer than a step of a small model
        likely, ids = probabilities.topk(FEW)
        if likely.cumsum(-1)[0, -1] >= mass:
            return likely, ids
    likely, ids = probabilities.sort(descending=True)
    return likely, ids


def noise_generators(prompts: Sequence[Sequence[int]], seed: int | None) -> list[torch.Generator]:
    """One generator a prompt, on the CPU.

    Its numbers depend on the seed and on how often the same prompt stood before it in the batch, not on its place:
    a prompt gives the same text alone and in any batch, and n copies of it give n samples. Without a seed they follow
    torch's default generator.
    """
    base = int(torch.randint(2**62, ())) if seed is None else seed
    seen: Counter[tuple[int, ...]] = Counter()
    generators = []
    for prompt in prompts:
        key = tuple(prompt)
        generators.append(torch.Generator().manual_seed((base + seen[key] * 0x9E3779B97F4A7C15) % 2**64))
        seen[key] += 1
    return generators
