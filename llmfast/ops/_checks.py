"""Argument checks of the public ops: one line that names the argument, what it got and what it wants.

They look at shapes, dtypes and devices only (never at a GPU's values) and cost well under a microsecond each.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def floating(op: str, name: str, value: Any, min_dim: int = 1) -> None:
    """``value`` is a floating-point tensor with at least ``min_dim`` dimensions."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= min_dim:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {value.dtype}")
    raise ValueError(f"{op}: {name} must have at least {min_dim} dimension(s), got shape {tuple(value.shape)}")


def parameter(op: str, name: str, value: Any, shape: tuple[int, ...], x: Tensor, mixed: bool = False) -> None:
    """``value`` is a tensor of ``shape`` on x's device and of x's dtype (``mixed``: or float32 beside a 16-bit x)."""
    if (
        isinstance(value, Tensor)
        and value.shape == shape
        and value.dtype is x.dtype
        and ((value.is_cpu and x.is_cpu) or value.device == x.device)
    ):
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(value.shape)}")
    if value.dtype is not x.dtype and not (mixed and _kept_float32(value, x)) and not _autocast(x):
        raise TypeError(f"{op}: {name} must be {x.dtype} as the input is, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device}, got {value.device}")


def _kept_float32(value: Tensor, x: Tensor) -> bool:
    return value.dtype is torch.float32 and x.dtype in (torch.bfloat16, torch.float16)


def _autocast(x: Tensor) -> bool:
    """Autocast will bring the dtypes together."""
    return autocast_dtype(x) is not None and x.dtype is not torch.float64


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants on x's device, or None where it is off or, on the meta device, unknown."""
    kind = x.device.type
    return None if x.is_meta or not torch.is_autocast_enabled(kind) else torch.get_autocast_dtype(kind)


def probability(op: str, name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{op}: {name} must lie in [0, 1), got {value!r}")


def once(op: str) -> None:
    """Call in a backward pass that is not differentiable itself; grad mode is on there under create_graph alone."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: this implementation can be differentiated once only (create_graph=True was asked for)"
        )


def positive(op: str, name: str, value: float) -> None:
    """``value`` is a number above zero."""
    if not value > 0:
        raise ValueError(f"{op}: {name} must be above 0, got {value!r}")


def bits(flags: Iterable[bool]) -> int:
    """Bit i is flag number i: how the raw ops are told which gradients are wanted."""
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def low_precision_only(x: Tensor, *parameters: Tensor | None) -> list[str]:
    """Reasons of a CPU kernel that computes in float32 or bfloat16, with parameters of either."""
    for dtype in (autocast_dtype(x), *(t.dtype for t in parameters if t is not None)):
        if dtype not in (None, torch.float32, torch.bfloat16):
            return [f"takes float32/bfloat16 on a CPU, not {dtype}"]
    return []
