"""The loss of a language model on a micro batch, masked or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

IGNORE_INDEX = -100

Batch = tuple[Tensor, ...]
# (mean loss, count), or (mean loss, count, sums of what else is measured)
LossFunction = Callable[[Any, Batch], tuple[Any, ...]]


def language_model_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """Next-token loss of a ``GPT`` on (inputs, targets): (mean loss, number of targets that count)."""
    inputs, targets = batch
    count = int((targets != IGNORE_INDEX).sum())
    # Of no target the mean is not a number, the sum is 0, and so are its gradients, which other ranks wait for.
    return model(inputs, targets, reduction="mean" if count else "sum")[1], count


def unmasked_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """``language_model_loss`` where every target counts, which spares the host a look at the device."""
    inputs, targets = batch
    return model(inputs, targets)[1], targets.numel()
