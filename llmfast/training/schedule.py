"""The learning rate of every step."""

from __future__ import annotations

import math

from llmfast.config import TrainConfig


def learning_rate_at(step: int, config: TrainConfig, max_steps: int) -> float:
    """The learning rate of the update after ``step`` updates, 0 <= step < max_steps.

    Warm-up: peak * (step + 1) / (warmup + 1). After it, with r = (step - warmup) / (max_steps - warmup) in [0, 1):
    cosine min + (peak - min) (1 + cos(pi r)) / 2 (Loshchilov and Hutter 2017), linear peak + (min - peak) r, or the
    peak throughout.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return peak
    low = peak / 10 if config.min_learning_rate is None else config.min_learning_rate
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    if config.schedule == "linear":
        return peak + (low - peak) * progress
    return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
