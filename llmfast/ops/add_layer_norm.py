"""Residual sum and layer normalisation in one op: the seam between two branches of a transformer.

new_residual = residual + dropout(x)
y            = layer_norm(new_residual, weight, bias, eps)
"""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
from torch import Tensor

from llmfast.ops import _checks, _library, _triton
from llmfast.ops._dropout import dropout, new_seed
from llmfast.ops._registry import Cost, Implementation, Op
from llmfast.ops._samples import Randn, pick, tensor_bytes
from llmfast.ops.layer_norm import (
    check_parameters,
    layer_norm_eager,
    layer_norm_reference,
    native_declines,
    native_implementations,
    triton_declines,
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


def _kernel(
    raw: Any, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """One pass over memory, and the dropout mask made again in backward."""
    seed = new_seed(x.device) if dropout_p > 0 else None
    if torch.compiler.is_compiling():
        return raw.add_layer_norm_fwd(x, residual, weight, bias, eps, dropout_p, seed)[:2]
    if torch.is_grad_enabled() and (
        x.requires_grad
        or residual.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return _AddLayerNorm.apply(raw, x, residual, weight, bias, eps, dropout_p, seed)
    with torch._C._AutoDispatchBelowAutograd():
        return raw.add_layer_norm_fwd.default(x, residual, weight, bias, eps, dropout_p, seed)[:2]


# csrc/cpu/layer_norm.cpp and csrc/cuda/layer_norm.cu; kernels/layer_norm.py
_native = functools.partial(_kernel, torch.ops.llmfast)
_triton_kernel = functools.partial(_kernel, torch.ops.llmfast_triton)


class _AddLayerNorm(torch.autograd.Function):
    """Cheaper a call than ``register_autograd`` (below), which torch.compile and opcheck take."""

    @staticmethod
    def forward(ctx: Any, raw: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            output = raw.add_layer_norm_fwd.default(*inputs)
        _setup(ctx, inputs, output)
        ctx.raw = raw
        return output[:2]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        _checks.once("add_layer_norm")
        return None, *_backward(ctx, ctx.raw, dy, ds)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weight, bias, _, ctx.dropout_p, seed = inputs
    _, s, mean, rstd = output
    ctx.save_for_backward(s, weight, mean, rstd, seed)
    ctx.has_bias, ctx.x_dtype = bias is not None, x.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, raw: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
    s, weight, mean, rstd, seed = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(s)
    dx, dresidual, dw, db = raw.add_layer_norm_bwd.default(
        dy, ds, s, weight, mean, rstd, ctx.has_bias, ctx.x_dtype, ctx.dropout_p, seed
    )
    if not (ctx.dropout_p > 0 or ctx.x_dtype is not s.dtype):
        dx = dresidual
    return dx, dresidual, (None if weight is None else dw), (db if ctx.has_bias else None), None, None, None


@_triton.on_load
@_library.on_load
def _register(namespace: str = "llmfast") -> None:
    raw = getattr(torch.ops, namespace)

    @torch.library.register_fake(f"{namespace}::add_layer_norm_fwd")
    def _fwd(
        x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dropout_p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
        s, stats = residual.new_empty(x.shape), x.new_empty((rows,), dtype=torch.float32)
        return torch.empty_like(s), s, stats, torch.empty_like(stats)

    @torch.library.register_fake(f"{namespace}::add_layer_norm_bwd")
    def _bwd(
        dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool,
        x_dtype: torch.dtype, dropout_p: float, seed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        like, own = (s if weight is None else weight), dropout_p > 0 or x_dtype is not s.dtype
        return (
            s.new_empty(s.shape, dtype=x_dtype) if own else s.new_empty((0,)),
            s.new_empty(s.shape),
            like.new_empty((s.shape[-1] if weight is not None else 0,)),
            like.new_empty((s.shape[-1] if has_bias else 0,)),
        )

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _setup(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[2:])

    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, raw, dy, ds)

    torch.library.register_autograd(f"{namespace}::add_layer_norm_fwd", backward, setup_context=setup)


def _declines(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dropout_p: float
) -> list[str]:
    if residual.dtype is not x.dtype and not (
        x.is_cpu and x.dtype is torch.bfloat16 and residual.dtype is torch.float32
    ):
        return [f"residual is {residual.dtype} beside a {x.dtype} x"]
    return native_declines(x, weight, bias, eps)


def _triton_declines(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dropout_p: float
) -> list[str]:
    return triton_declines(x, weight, bias, eps)


def _inputs(shape: dict[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, Any]:
    randn, width = Randn(dtype, device), shape["width"]
    dropout = {"dropout_p": shape["dropout_p"]} if "dropout_p" in shape else {}
    return {
        "x": randn(*shape["rows"], width),
        "residual": randn(*shape["rows"], width, shift=0.5),
        "weight": randn(width, shift=1.0),
        "bias": randn(width) if shape.get("bias", True) else None,
        "eps": shape.get("eps", 1e-5),
        **dropout,
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
    gpu_samples=[
        {"rows": (16, 1024), "width": 768, "dropout_p": 0.1},
        *({"rows": (16, 1024), "width": width} for width in (768, 1024, 1280, 1600)),
    ],
    cpu_samples=[{"rows": (4, 256), "width": 768}],
    random_shape=_random_shape,
    inputs=_inputs,
    cost=_cost,
    implementations=[
        *native_implementations(_native, _declines),
        _triton.implementation(_triton_kernel, _triton_declines),
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
