"""What the loop reads: training batches, fixed evaluation batches, and what tells one data set from another."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from llmfast.config import TrainConfig
from llmfast.data import Batches
from llmfast.errors import UserError
from llmfast.ranks import Ranks, share


class BatchSource(Protocol):
    """A fine-tuning's own data: ``batch(p)`` holds samples p .. p + micro_batch_size - 1, wrapping after an epoch.

    It may offer ``sha256``, by which a resume knows the data again.
    """

    samples_per_epoch: int

    def batch(self, position: int) -> tuple[Tensor, ...]: ...


def training_batches(data: Any, config: TrainConfig, block_size: int) -> BatchSource:
    """``data`` itself where it gives batches, else the windows of a ``TokenSource``."""
    if hasattr(data, "batch"):
        return data
    return Batches(
        data,
        block_size,
        config.micro_batch_size,
        stride=config.stride,
        sampling=config.sampling,
        shuffle=config.shuffle,
        seed=config.seed,
    )


class EvalBatches:
    """The same micro batches at every evaluation: ``count`` of them spread evenly over the split, or all (0)."""

    def __init__(self, data: Any, block_size: int, batch_size: int, count: int) -> None:
        own = hasattr(data, "batch")
        self._batches = data if own else Batches(data, block_size, batch_size, shuffle=False)
        total = self._batches.samples_per_epoch
        if total < 1:
            raise UserError(
                f"the validation data has no sequence of {block_size} tokens: give more, or a smaller block"
            )
        self.count = math.ceil(total / batch_size) if count == 0 else min(count, math.ceil(total / batch_size))
        # (first sample, samples); the last batch of a split is short rather than counted twice.
        starts = [i * batch_size if count == 0 else i * total // self.count for i in range(self.count)]
        self._places = [(start, min(batch_size, total - start)) for start in starts]

    def of(self, ranks: Ranks) -> Iterator[tuple[tuple[Tensor, ...], bool]]:
        """The batches that are this rank's, and whether they count: as many on every rank, the last may not."""
        for first in range(0, self.count, ranks.size):
            number = first + ranks.rank
            start, rows = self._places[min(number, self.count - 1)]
            yield rows_of(self._batches.batch(start), rows), number < self.count


class RankBatches:
    """The micro batches of an optimizer step that are this rank's: a share of its samples, cut into at most ``micro``.

    Every rank has ``count`` of them; where a rank has fewer samples, the last ones are repeated and do not count.
    """

    def __init__(self, batches: BatchSource, batch_size: int, micro: int, ranks: Ranks) -> None:
        self._batches = batches
        own = share(batch_size, ranks.rank, ranks.size)
        self.most = -(-batch_size // ranks.size)  # samples of a step that one rank has
        self.count = -(-self.most // micro)
        self._places = [(start, min(micro, own.stop - start)) for start in range(own.start, own.stop, micro)]
        self._places += [(own.start, 1)] * (self.count - len(self._places))
        self._counted = -(-len(own) // micro)

    def of_step(self, position: int) -> Iterator[tuple[tuple[Tensor, ...], bool]]:
        """Of the step whose samples begin at ``position``: (batch, whether it counts)."""
        for number, (start, rows) in enumerate(self._places):
            yield rows_of(self._batches.batch(position + start), rows), number < self._counted


def rows_of(batch: tuple[Tensor, ...], rows: int) -> tuple[Tensor, ...]:
    """The first ``rows`` samples of a batch."""
    return batch if len(batch[0]) == rows else tuple(tensor[:rows] for tensor in batch)


def fingerprint(data: Any) -> dict[str, Any]:
    """What a resume must find again: the number of tokens and a hash of 64 places (of own batches: their own hash)."""
    if hasattr(data, "batch"):
        return {"samples": data.samples_per_epoch, "sha256": getattr(data, "sha256", None)}
    tokens = len(data)
    length = min(tokens, 256)
    digest = hashlib.sha256()
    for start in np.linspace(0, tokens - length, 64).astype(np.int64):
        digest.update(np.ascontiguousarray(data.window(int(start), length), dtype=np.int64).tobytes())
    return {"tokens": tokens, "sha256": digest.hexdigest()}
