"""Keys and values of the tokens a model has already read.

Shapes: L layers, B batch, T new tokens, S slots of a row, H heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmfast.config import GPTConfig


@dataclass
class LayerCache:
    """What one attention layer sees of a ``KVCache`` during one forward pass."""

    keys: Tensor  # (B, H, S, D), as far as any row reaches after this pass
    values: Tensor
    slots: Tensor  # (2, B, H, S, D): where this pass writes, or the whole layer where rows differ in length
    kv_lens: Tensor | None  # (B,) lengths after this pass, where rows differ
    at: tuple[Tensor, Tensor] | None  # (B,) rows and the slot that each writes, where rows differ

    def append(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of ``qkv`` (B, T, 3, H, D); returns all keys and values so far, (B, H, S, D) each."""
        if self.at is None:
            self.slots.copy_(qkv[:, :, 1:].permute(2, 0, 3, 1, 4))
        else:  # one token a row, each at its own position
            rows, positions = self.at
            self.slots[:, rows, :, positions] = qkv[:, 0, 1:].to(self.slots.dtype)
        return self.keys.to(qkv.dtype), self.values.to(qkv.dtype)


class KVCache:
    """Preallocated keys and values for a batch whose rows may differ in length.

    ``GPT.forward(idx, cache=cache)`` appends the T tokens of ``idx`` to every row. Prompts of different length are
    read right-padded and then cut back with ``set_lengths``: padding stands behind a row's last token, where no causal
    query sees it, and the next tokens overwrite it. While lengths differ, a forward takes one token a row.

    Memory: 2 L B H S D elements of ``dtype``.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 1 <= max_length <= config.block_size:
            raise ValueError(f"max_length must lie in 1 .. block_size {config.block_size}, got {max_length}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        # Zeros: a slot that was never written must not be NaN, for attention weighs it with 0.
        shape = (config.n_layer, 2, batch_size, config.n_head, max_length, config.head_size)
        self._storage = torch.zeros(shape, device=device, dtype=dtype)
        self._lengths = [0] * batch_size
        self._kv_lens: Tensor | None = None  # (B,), kept only while lengths differ

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row."""
        return list(self._lengths)

    @property
    def storage(self) -> Tensor:
        """(L, 2, B, H, S, D): keys and values of each layer; the slots of a head lie one behind the other."""
        return self._storage

    @property
    def batch_size(self) -> int:
        return self._storage.shape[2]

    @property
    def max_length(self) -> int:
        return self._storage.shape[4]

    def row(self, index: int) -> KVCache:
        """An empty cache of one row whose slots are those of row ``index``; ``set_lengths`` makes them known here."""
        view = object.__new__(KVCache)
        view._storage = self._storage[:, :, index : index + 1]
        view._lengths, view._kv_lens = [0], None
        return view

    def set_lengths(self, lengths: list[int]) -> None:
        """Declare that the first ``lengths[b]`` slots of row b hold its tokens."""
        if len(lengths) != self.batch_size or not all(0 <= n <= self.max_length for n in lengths):
            raise ValueError(f"lengths must be {self.batch_size} numbers in 0 .. {self.max_length}, got {lengths}")
        if lengths != self._lengths:
            self._lengths = list(lengths)
            ragged = len(set(lengths)) > 1
            self._kv_lens = torch.tensor(lengths, device=self._storage.device) if ragged else None

    def drop(self, index: int) -> None:
        """Remove row ``index``; the last row takes its place."""
        lengths = self.lengths
        last = lengths.pop()
        if index < len(lengths):
            self._storage[:, :, index, :, :last] = self._storage[:, :, -1, :, :last]
            lengths[index] = last
        self._storage = self._storage[:, :, :-1]
        self.set_lengths(lengths)

    def positions(self, B: int, T: int) -> slice | Tensor:
        """Positions of the next (B, T) tokens: one slice for all rows, or (B, 1) where lengths differ."""
        self._check_room(B, T)
        if self._kv_lens is None:
            return slice(self._lengths[0], self._lengths[0] + T)
        return self._kv_lens[:, None]

    def layers(self, T: int) -> list[LayerCache]:
        """Each layer's view for a forward of T tokens. The views are cut here at once, not layer by layer."""
        end = max(self._lengths) + T
        seen = self._storage[..., :end, :].flatten(0, 1).unbind(0)
        slots, kv_lens, at = self._storage, None, None
        if self._kv_lens is None:
            slots = slots[..., end - T : end, :]
        else:
            kv_lens = self._kv_lens + 1
            at = torch.arange(self.batch_size, device=kv_lens.device), self._kv_lens
        return [
            LayerCache(k, v, s, kv_lens, at) for k, v, s in zip(seen[::2], seen[1::2], slots.unbind(0), strict=True)
        ]

    def advance(self, T: int) -> None:
        """Count T more tokens in every row."""
        self._lengths = [n + T for n in self._lengths]
        if self._kv_lens is not None:
            self._kv_lens = self._kv_lens + T

    def _check_room(self, B: int, T: int) -> None:
        if self.batch_size != B:
            raise ValueError(f"idx has {B} rows, the cache {self.batch_size}")
        if max(self._lengths) + T > self.max_length:
            raise ValueError(f"the cache holds {max(self._lengths)} of {self.max_length} tokens, {T} more do not fit")
        if self._kv_lens is not None and T != 1:
            raise ValueError(f"rows of different length take one token at a time, got {T}")
