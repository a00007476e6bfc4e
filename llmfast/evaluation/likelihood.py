"""How likely a model finds given continuations. B batch, T sequence, N continuation tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from llmfast.errors import UserError

if TYPE_CHECKING:
    from llmfast.nn import GPT
    from llmfast.tokenizer import Tokenizer

HEAD_ROWS = 1024  # positions whose logits exist at a time


class Likelihood(NamedTuple):
    """Of one continuation: its log-likelihood in nats, and whether greedy decoding would have written it."""

    log_likelihood: float
    is_greedy: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of its continuation, as lm-evaluation-harness cuts them.

    The two are encoded together and cut after as many tokens as the context has alone; white space at the context's
    end goes to the continuation. An empty context is the end-of-text token.
    """
    bare = context.rstrip()
    if bare:
        context, continuation = bare, context[len(bare) :] + continuation
    if not context:
        if tokenizer.eot_id is None:
            raise UserError(
                f"an empty context takes an end-of-text token, and this {tokenizer.kind} tokenizer has none"
            )
        return [tokenizer.eot_id], tokenizer.encode(continuation)
    ids = tokenizer.encode(context)
    return ids, tokenizer.encode(context + continuation)[len(ids) :]


@torch.inference_mode()
def log_likelihoods(
    model: GPT,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int = 8,
    *,
    autocast: AbstractContextManager[Any] | None = None,
    progress: Callable[[int], Any] = lambda rows: None,
) -> list[Likelihood]:
    """The likelihood of each continuation after its context: ``pairs`` holds the token ids of both.

    ``batch_size`` pairs of similar length share a forward pass. A context that does not fit the model's block size
    with its continuation loses tokens from its beginning. ``progress(rows)`` is called after each batch. The model is
    left in the mode in which it came. Raises ``ValueError`` for a pair with an empty side and for a continuation that
    alone is longer than the block size.
    """
    block_size = model.config.block_size
    for number, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise ValueError(f"pair {number} has an empty {'continuation' if context else 'context'}")
        if len(continuation) > block_size:
            raise ValueError(f"continuation {number} has {len(continuation)} tokens, the model reads {block_size}")
    rows = [[*context, *continuation][-block_size - 1 :] for context, continuation in pairs]
    # The longest first: memory runs out at once or never.
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    found: list[Likelihood | None] = [None] * len(rows)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            with autocast or nullcontext():
                chosen, greedy = _score(
                    model, [rows[row] for row in batch], [len(pairs[row][1]) for row in batch], device
                )
            at = 0
            for row in batch:
                tokens = slice(at, at + len(pairs[row][1]))
                found[row] = Likelihood(float(chosen[tokens].sum()), bool(greedy[tokens].all()))
                at = tokens.stop
            progress(len(batch))
    finally:
        model.train(was_training)
    return [one for one in found if one is not None]


def _score(model: GPT, rows: list[list[int]], lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(N,) float64 log-probabilities of the last ``lengths[b]`` tokens of each row, and whether each is likeliest."""
    T = max(map(len, rows)) - 1
    # Padding stands on the right, where no causal query of the row itself sees it.
    inputs = torch.tensor([row[:-1] + [0] * (T - len(row) + 1) for row in rows], device=device)
    places = [(b, t) for b, row in enumerate(rows) for t in range(len(row) - 1 - lengths[b], len(row) - 1)]
    targets = torch.tensor([rows[b][t + 1] for b, t in places], device=device)
    b, t = torch.tensor(places, device=device).T
    hidden = model.hidden_states(inputs)[b, t]
    chosen, greedy = [], []
    for part, wanted in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        logits = model.lm_head(part).float()
        target = logits.gather(1, wanted[:, None])[:, 0]
        chosen.append(target - logits.logsumexp(1))
        greedy.append(logits.argmax(1) == wanted)
    return torch.cat(chosen).double().cpu(), torch.cat(greedy).cpu()
