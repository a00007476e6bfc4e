"""Batches of token windows as a pure function of one global sample index: a resume needs nothing but that number."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from llmfast.data.tokens import TokenSource
from llmfast.errors import UserError

# B batch, T block size.

_BLOCK = 4096  # positions whose windows are worked out at once: numpy's cost a call is spread over many batches
_ROUNDS = 6


class Batches:
    """Batches of inputs and next-token targets.

    sampling "sliding": the windows that start at 0, stride, 2 stride, ... (default stride: ``block_size``), each once
    an epoch, in an order that ``seed`` and the epoch number decide (in order with ``shuffle=False``). Tokens after the
    last whole window are not used, nor is any window dropped: a batch may begin in one epoch and end in the next.
    sampling "random": a window at a random place for every sample (``stride`` and ``shuffle`` do not matter).

    ``samples_per_epoch``: sliding, the number of windows; random, as many as cover the source's tokens once.

    Raises ``UserError`` if the source has no window, that is fewer than ``block_size + 1`` tokens.
    """

    def __init__(
        self,
        source: TokenSource,
        block_size: int,
        batch_size: int,
        *,
        stride: int | None = None,
        sampling: Literal["sliding", "random"] = "sliding",
        shuffle: bool = True,
        seed: int = 1337,
    ) -> None:
        stride = block_size if stride is None else stride
        for name, value in (("block_size", block_size), ("batch_size", batch_size), ("stride", stride)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if sampling not in ("sliding", "random"):
            raise UserError(f"sampling must be sliding or random, got {sampling!r}")
        if len(source) <= block_size:
            raise UserError(
                f"{source.name}: {len(source):,} tokens hold no window of block_size {block_size} and its targets "
                f"({block_size + 1} tokens); use a smaller block_size or more data"
            )
        self.source, self.block_size, self.batch_size, self.seed = source, block_size, batch_size, seed
        self._last_start = len(source) - block_size - 1
        self._stride, self._random, self._shuffle = stride, sampling == "random", shuffle
        if self._random:
            self.samples_per_epoch = max(1, (len(source) - 1) // block_size)
        else:
            self.samples_per_epoch = self._last_start // stride + 1
        self._block_of_starts = lru_cache(maxsize=2)(self._starts_of_block)

    def batch(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, y) of samples ``position`` to ``position + batch_size - 1``: (B, T) int64, y is x one token later.

        Both are views of one (B, T + 1) tensor that belongs to the caller.
        """
        block, inside = divmod(position, _BLOCK)
        starts = self._block_of_starts(block)[inside : inside + self.batch_size]
        while len(starts) < self.batch_size:
            block += 1
            starts = np.concatenate([starts, self._block_of_starts(block)[: self.batch_size - len(starts)]])
        tokens = torch.from_numpy(self.source.windows(starts, self.block_size + 1))
        return tokens[:, :-1], tokens[:, 1:]

    def _starts_of_block(self, block: int) -> np.ndarray:
        """The starts of samples block * _BLOCK to (block + 1) * _BLOCK - 1, (_BLOCK,) int64."""
        samples = np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.uint64)
        if self._random:
            return (_mix(_mix(samples) ^ _key(self.seed, 0)) % np.uint64(self._last_start + 1)).astype(np.int64)
        epochs, windows = np.divmod(samples, np.uint64(self.samples_per_epoch))
        if self._shuffle:
            windows = _permute(windows, self.samples_per_epoch, _key(self.seed, epochs))
        return windows.astype(np.int64) * self._stride


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea and Flood 2014): a bijection of uint64 in which every bit depends on every bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(seed: int, epochs: np.ndarray | int) -> np.ndarray:
    return _mix(_mix(np.array([seed % 2**64], np.uint64)) ^ np.asarray(epochs, np.uint64))


def _permute(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """A pseudo-random permutation of 0 .. size - 1, one for each key, applied to ``values``; memory O(len(values)).

    A Feistel network permutes the numbers of an even number of bits; walking along its cycle until a number falls
    below ``size`` makes it a permutation of these (Black and Rogaway 2002). At most four steps are expected.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    out = values.copy()
    todo = np.arange(len(values))
    while len(todo):
        left, right, key = out[todo] >> half, out[todo] & mask, keys[todo]
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (_mix(right ^ (key + np.uint64(round_))) & mask)
        out[todo] = left << half | right
        todo = todo[out[todo] >= size]
    return out
