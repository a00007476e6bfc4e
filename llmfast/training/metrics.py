"""What a loss function measures beside its loss: sums over batches, and the metrics made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from llmfast.ranks import Ranks

Sums = dict[str, Tensor]
MetricsFunction = Callable[[Sums, int], dict[str, Any]]  # of sums and the count that they are over


def add_sums(sums: Sums, more: Sums | None = None) -> None:
    """Add ``more`` to ``sums``, in place; tensors stay on their device, so that the host need not wait for it."""
    for name, value in (more or {}).items():
        value = value.detach()
        sums[name] = sums[name] + value if name in sums else value


def over_ranks(ranks: Ranks, sums: Sums) -> Sums:
    """The sums over all ranks, each of which may have measured something else."""
    if ranks.size == 1:
        return sums
    total: Sums = {}
    for part in ranks.gather({name: value.cpu() for name, value in sums.items()}):
        add_sums(total, part)
    return total


def means(sums: Sums, count: int) -> dict[str, Any]:
    """Each sum divided by ``count``: a number, or lists of numbers."""
    return {name: (value.double() / count).tolist() for name, value in sums.items()}
