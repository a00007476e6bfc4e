"""Dropout from the default torch generator, without PyTorch's slow CPU Bernoulli."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast.ops import _checks

_LEVELS = 1 << 16


def keep_mask(shape: tuple[int, ...] | torch.Size, p: float) -> tuple[Tensor, float]:
    """A CPU bool mask, True where an element stays, and the factor 1 / (probability to stay).

    Sixteen random bits per element, four elements from one 64-bit draw: four times as fast as ``bernoulli_``, whose one
    draw per element runs on one thread. p is rounded to a multiple of 2^-16, and the factor fits the rounded p.
    """
    n = torch.Size(shape).numel()
    drop = min(round(p * _LEVELS), _LEVELS - 1)
    bits = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    mask = bits.view(torch.int16)[:n].view(shape) >= drop - _LEVELS // 2
    return mask, _LEVELS / (_LEVELS - drop)


def dropout(x: Tensor, p: float) -> Tensor:
    """x with each element zeroed with probability p and the others scaled by 1 / (1 - p).

    x: any shape, floating point; p in [0, 1), whatever a module's mode is. Under torch.compile, functorch and off the
    CPU it is ``F.dropout``. Raises ``ValueError`` for another p.
    """
    _checks.probability("dropout", "p", p)
    if p == 0.0:
        return x
    if not x.is_cpu or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return F.dropout(x, p)
    mask, scale = keep_mask(x.shape, p)
    return x * mask.to(x.dtype).mul_(scale)
