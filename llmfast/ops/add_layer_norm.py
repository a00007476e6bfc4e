"""Residual sum and layer normalisation in one op: the seam between two branches of a transformer.

new_residual = residual + dropout(x)
y            = layer_norm(new_residual, weight, bias, eps)
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from llmfast.ops import _checks
from llmfast.ops._dropout import dropout
from llmfast.ops._registry import Cost, Implementation, Op
from llmfast.ops._samples import Randn, pick, tensor_bytes
from llmfast.ops.layer_norm import (
    check_parameters,
    layer_norm_eager,
    layer_norm_native,
    layer_norm_reference,
    native_declines,
    native_implementations,
)


def _reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    total = residual + x
    return layer_norm_reference(total, weight, bias, eps), total


def _eager(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None = None, eps: float = 1e-5,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total = residual + dropout(x, dropout_p)
    return layer_norm_eager(total, weight, bias, eps), total


def _native(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    total = residual + dropout(x, dropout_p)
    return layer_norm_native(total, weight, bias, eps), total


def _declines(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dropout_p: float
) -> list[str]:
    if residual.dtype is not x.dtype:
        return [f"residual is {residual.dtype} beside a {x.dtype} x"]
    return native_declines(x, weight, bias, eps)


def _inputs(shape: dict[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, Any]:
    randn, width = Randn(dtype, device), shape["width"]
    return {
        "x": randn(*shape["rows"], width),
        "residual": randn(*shape["rows"], width, shift=0.5),
        "weight": randn(width, shift=1.0),
        "bias": randn(width) if shape.get("bias", True) else None,
        "eps": shape.get("eps", 1e-5),
    }


def _random_shape(rng: random.Random) -> dict[str, Any]:
    rows = tuple(pick(rng) for _ in range(rng.randint(0, 2)))
    width = rng.choice((1, 2, 5, 63, 96, 129, 768))
    return {"rows": rows, "width": width, "eps": 0.1 if width < 5 else 1e-5, "bias": rng.random() < 0.7}


def _cost(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Cost:
    return Cost(bytes=2 * tensor_bytes(x, residual) + tensor_bytes(weight, bias), flops=9 * x.numel())


_op = Op(
    name="add_layer_norm",
    reference=_reference,
    eager=_eager,
    samples=[
        {"rows": (2, 37), "width": 96},
        {"rows": (5,), "width": 769, "bias": False},
        {"rows": (1,), "width": 1, "eps": 0.1},
        {"rows": (0, 4), "width": 5},
    ],
    gpu_samples=[{"rows": (16, 1024), "width": width} for width in (768, 1024, 1280, 1600)],
    random_shape=_random_shape,
    inputs=_inputs,
    cost=_cost,
    implementations=[
        *native_implementations(_native, _declines),
        Implementation("torch", _eager, "PyTorch"),
    ],
)


@_op.public
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Add a branch's output to the residual stream and normalise the sum.

    x, residual: (..., C), same shape; weight, bias: (C,) or None, of x's dtype or float32. dropout_p in [0, 1) acts on
    x, whatever the module's mode is (pass 0 in evaluation), from the default torch generator. Returns (y,
    new_residual), both (..., C). Raises ``ValueError``/``TypeError`` for arguments that do not fit.
    """
    _checks.floating("add_layer_norm", "x", x)
    _checks.floating("add_layer_norm", "residual", residual)
    if residual.shape != x.shape or residual.device != x.device:
        raise ValueError(
            f"add_layer_norm: residual must be {tuple(x.shape)} on {x.device} as x is, "
            f"got {tuple(residual.shape)} on {residual.device}"
        )
    check_parameters("add_layer_norm", x, weight, bias, eps)
    _checks.probability("add_layer_norm", "dropout_p", dropout_p)
    return _op(x, residual, weight, bias, eps, dropout_p)
