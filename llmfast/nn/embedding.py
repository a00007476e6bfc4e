"""Token plus position embeddings, and the output head's weight where it is the token table itself.

Tied, the table's gradient has two parts: the head's, which is dense, and the embedding's, a few of its rows. Left to
autograd, the second fills a table of zeros and a third table takes the sum. Here the rows are added to the first.

Shapes: B batch, T sequence, C width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast.ops import _library

_PLAIN = (Tensor, torch.nn.Parameter)


def embed(idx: Tensor, wte: Tensor, wpe: Tensor, head_weight: Tensor) -> tuple[Tensor, Tensor]:
    """(x, head): x (B, T, C) = wte[idx] + wpe, and ``head_weight`` as the output head of the loss has to use it.

    idx (B, T) int64 or int32; wpe (T or more, C), of which the first T count; wte, head_weight (V, C), one or two.
    ``head`` is for ops that return a gradient of their own making, which is written to. Raises ``ValueError`` for ids
    outside of the vocabulary on a CPU.
    """
    if head_weight is wte and _adds_rows(wte, wpe):
        return _TiedEmbedding.apply(idx, wte, wpe)
    T = idx.shape[1]
    # A whole wpe needs no slice, whose gradient would be one more copy.
    return token_rows(idx, wte) + (wpe if len(wpe) == T else wpe[:T]), head_weight


def token_rows(idx: Tensor, wte: Tensor) -> Tensor:
    """wte[idx] (B, T, C). Raises ``ValueError`` for ids outside of the vocabulary on a CPU."""
    if torch.compiler.is_compiling():
        return F.embedding(idx, wte)
    try:
        return F.embedding(idx, wte)
    except IndexError:  # PyTorch's own check on the CPU, which costs nothing here
        low, high = (int(v) for v in torch.aminmax(idx))
        raise ValueError(f"token ids must lie in [0, {len(wte)}), got ids from {low} to {high}") from None


def document_positions(doc_ids: Tensor) -> Tensor:
    """Each token's position in its document, (B, T) int64, where documents are the runs of equal ids in a row."""
    places = torch.arange(doc_ids.shape[1], device=doc_ids.device).expand(doc_ids.shape)
    begins = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True)
    return places - places.where(begins, 0).cummax(1).values


def _adds_rows(wte: Tensor, wpe: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and wte.requires_grad
        and wte.is_cpu  # a GPU's index_add_ has no fixed order
        and wte.dtype is wpe.dtype
        and type(wte) in _PLAIN
        and not _library.transforms()
    )


class _TiedEmbedding(torch.autograd.Function):
    """(wte[idx] + wpe[:T], wte itself under another name)."""

    @staticmethod
    def forward(ctx: Any, idx: Tensor, wte: Tensor, wpe: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(idx)
        ctx.shapes = wte.shape, wpe.shape
        ctx.set_materialize_grads(False)
        return token_rows(idx, wte).add_(wpe[: idx.shape[1]]), wte.detach()

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dhead: Tensor | None) -> tuple[None, Tensor | None, Tensor | None]:
        if dx is None:
            return None, dhead, None
        (idx,) = ctx.saved_tensors
        table, positions = ctx.shapes
        dwte = dx.new_zeros(table) if dhead is None else dhead
        rows = (0, idx.reshape(-1), dx.reshape(-1, dx.shape[-1]))
        # Out of place under create_graph, where the gradient is part of a graph itself.
        dwte = dwte.index_add(*rows) if torch.is_grad_enabled() else dwte.index_add_(*rows)
        dwpe = None
        if ctx.needs_input_grad[2]:
            dwpe = F.pad(dx.sum(0), (0, 0, 0, positions[0] - dx.shape[1]))
        return None, dwte, dwpe
