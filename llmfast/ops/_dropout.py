"""Dropout from the default torch generator, without PyTorch's slow CPU Bernoulli.

On a CPU the kernel of csrc/cpu/philox.h makes the mask from one number of the generator, in the backward pass again;
without the compiled library, with another backend, and for dtypes it does not take, the mask comes from the
generator's own bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast.ops import _checks, _library
from llmfast.ops._registry import current_setting

_LEVELS = 1 << 16


def new_seed(device: torch.device | None = None) -> Tensor:
    """One int64 from the default generator of ``device`` (the CPU's), there: the seed of all masks of one call."""
    if torch.compiler.is_compiling():
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    return torch.empty((), dtype=torch.int64, device=device).random_()


class _Dropout(torch.autograd.Function):
    """csrc/cpu/dropout.cpp. Linear in x: its gradient is itself, with the same seed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p = p
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.llmfast.dropout.default(x, seed, p)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _Dropout.apply(dy, ctx.saved_tensors[0], ctx.p), None, None


@_library.on_load
def _register() -> None:
    @torch.library.register_fake("llmfast::dropout")
    def _fake(x: Tensor, seed: Tensor, p: float) -> Tensor:
        return x.new_empty(x.shape)


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
    if not x.is_cpu or torch.compiler.is_compiling() or _library.transforms():
        return F.dropout(x, p)
    if (
        x.dtype in (torch.float32, torch.bfloat16)
        and current_setting().default in ("auto", "cpp")
        and _library.why_not_loaded() is None
    ):
        return _Dropout.apply(x, new_seed(), p)
    mask, scale = keep_mask(x.shape, p)
    return x * mask.to(x.dtype).mul_(scale)
