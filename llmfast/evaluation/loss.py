"""Loss, perplexity and bits per byte of a model on held-out tokens. B batch, T sequence, N tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmfast.errors import UserError

if TYPE_CHECKING:
    from llmfast.data import TokenSource
    from llmfast.nn import GPT
    from llmfast.tokenizer import Tokenizer


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation: cross-entropy in nats a token, over ``tokens`` predicted tokens."""

    loss: float
    tokens: int
    bits_per_byte: float | None  # None where no tokenizer tells how many bytes the tokens stand for

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf  # what a float64 holds

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity": self.perplexity}


@torch.no_grad()
def evaluate_loss(
    model: GPT,
    source: TokenSource,
    block_size: int | None = None,
    batch_size: int = 8,
    *,
    max_batches: int | None = None,
    tokenizer: Tokenizer | None = None,
    autocast: AbstractContextManager[Any] | None = None,
) -> Evaluation:
    """The model's loss on ``source``: every token after the first is predicted once, in windows without overlap.

    ``block_size`` (default: the model's) tokens are read at a time, the last window being shorter. ``max_batches``
    takes so many batches of ``batch_size`` full windows, spread evenly over the source, instead of all. ``tokenizer``
    gives the bytes of each token for ``bits_per_byte``; special tokens stand for no bytes. ``autocast`` is entered
    around each forward pass. The model is left in the mode in which it came.

    Raises ``UserError`` where the source is too short, or the block size is above the model's.
    """
    T = model.config.block_size if block_size is None else block_size
    if not 1 <= T <= model.config.block_size:
        raise UserError(f"block size {T} must lie between 1 and the model's {model.config.block_size}")
    if len(source) < 2:
        raise UserError(f"nothing to evaluate: the data has {len(source)} token(s), and a prediction takes two")
    device = next(model.parameters()).device
    sizes = None if tokenizer is None else byte_lengths(tokenizer)
    nats, tokens, size = 0.0, 0, 0
    was_training = model.training
    model.eval()
    try:
        for windows in _batches(source, T, batch_size, max_batches):
            ids = torch.from_numpy(windows).to(device)
            with autocast or nullcontext():
                _, loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            targets = windows[:, 1:]
            nats += float(loss) * targets.size
            tokens += targets.size
            if sizes is not None:
                size += int(sizes[targets].sum())
    finally:
        model.train(was_training)
    bits = nats / math.log(2) / size if size else None
    return Evaluation(nats / tokens, tokens, bits)


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """(vocab_size,) int64: how many bytes of text each token stands for; 0 for end-of-text."""
    lengths = np.array([len(token) for token in tokenizer.token_bytes()], dtype=np.int64)
    if tokenizer.eot_id is not None:
        lengths[tokenizer.eot_id] = 0
    return lengths


def _batches(source: TokenSource, T: int, B: int, max_batches: int | None) -> Iterator[np.ndarray]:
    """(b, t + 1) int64 arrays: windows whose first t tokens predict their last t."""
    full, rest = divmod(len(source) - 1, T)
    if max_batches is not None and full > max_batches * B:
        chosen = np.linspace(0, full - 1, max_batches * B).astype(np.int64)
        rest = 0
    else:
        chosen = np.arange(full, dtype=np.int64)
    for first in range(0, len(chosen), B):
        yield source.windows(chosen[first : first + B] * T, T + 1)
    if rest:
        yield source.windows(np.array([full * T], dtype=np.int64), rest + 1)
