"""Layer normalisation (Ba, Kiros, Hinton, "Layer Normalization", 2016), over the last dimension.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias         var is the biased variance

N rows, C width. Statistics are kept in float32 (float64 for float64).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast.ops import _checks, _library, _triton
from llmfast.ops._registry import Cost, Implementation, Op
from llmfast.ops._samples import Randn, pick, tensor_bytes


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """The formula."""
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def layer_norm_eager(x: Tensor, weight: Tensor | None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """PyTorch's own; also the ``torch`` implementation."""
    if weight is not None and weight.dtype is not x.dtype and not x.is_cpu:  # PyTorch mixes dtypes on the CPU alone
        return F.layer_norm(x.to(weight.dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)
    return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)  # what F.layer_norm calls


# ---- Native kernels --------------------------------------------------------------------------------------------------


def _kernel(raw: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if torch.compiler.is_compiling():
        return raw.layer_norm_fwd(x, weight, bias, eps)[0]
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        return _LayerNorm.apply(raw, x, weight, bias, eps)
    with torch._C._AutoDispatchBelowAutograd():
        return raw.layer_norm_fwd.default(x, weight, bias, eps)[0]


# csrc/cpu/layer_norm.cpp and csrc/cuda/layer_norm.cu; kernels/layer_norm.py
layer_norm_native = functools.partial(_kernel, torch.ops.llmfast)
layer_norm_triton = functools.partial(_kernel, torch.ops.llmfast_triton)


class _LayerNorm(torch.autograd.Function):
    """Five microseconds less than ``register_autograd`` (below), which torch.compile and opcheck take."""

    @staticmethod
    def forward(ctx: Any, raw: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, mean, rstd = raw.layer_norm_fwd.default(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.raw, ctx.has_bias = raw, bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _checks.once("layer_norm")
        x, weight, mean, rstd = ctx.saved_tensors
        dx, dw, db = ctx.raw.layer_norm_bwd.default(dy, x, weight, mean, rstd, ctx.has_bias)
        return None, dx, (dw if weight is not None else None), (db if ctx.has_bias else None), None


@_triton.on_load
@_library.on_load
def _register(namespace: str = "llmfast") -> None:
    raw = getattr(torch.ops, namespace)

    @torch.library.register_fake(f"{namespace}::layer_norm_fwd")
    def _fwd(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
        stats = x.new_empty((rows,), dtype=torch.float32)
        return x.new_empty(x.shape), stats, torch.empty_like(stats)

    @torch.library.register_fake(f"{namespace}::layer_norm_bwd")
    def _bwd(
        dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        like = x if weight is None else weight
        return (
            x.new_empty(x.shape),
            like.new_empty((x.shape[-1] if weight is not None else 0,)),
            like.new_empty((x.shape[-1] if has_bias else 0,)),
        )

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, bias, _ = inputs
        _, mean, rstd = output
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(mean, rstd)

    def backward(ctx: Any, dy: Tensor, _dmean: Tensor, _drstd: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        dx, dw, db = raw.layer_norm_bwd(dy, x, weight, mean, rstd, ctx.has_bias)
        return dx, (dw if weight is not None else None), (db if ctx.has_bias else None), None

    torch.library.register_autograd(f"{namespace}::layer_norm_fwd", backward, setup_context=setup)


def check_parameters(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    """weight and bias (C,) of x's dtype or both float32, or None; eps above 0."""
    if weight is not None:
        _checks.parameter(op, "weight", weight, x.shape[-1:], x, True)
    if bias is not None:
        _checks.parameter(op, "bias", bias, x.shape[-1:], x, True)
        if weight is not None and bias.dtype is not weight.dtype:
            raise TypeError(f"{op}: bias must be {weight.dtype} as weight is, got {bias.dtype}")
    _checks.positive(op, "eps", eps)


CUDA_MAX_WIDTH = 8192  # kLayerNormMaxWidth in csrc/cuda/layer_norm.h


def native_declines(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> list[str]:
    """Reasons of the native kernels against these arguments."""
    reasons = _library.transforms()
    if weight is None and bias is not None:
        reasons = [*reasons, "a bias without a weight is not supported"]
    if x.is_cuda and x.shape[-1] > CUDA_MAX_WIDTH:
        reasons = [*reasons, f"rows of {x.shape[-1]} elements, more than {CUDA_MAX_WIDTH}"]
    return reasons


def small_on_cpu(x: Tensor, *_: Any) -> bool:
    """Measured: below this PyTorch's own, which costs 5 us less a call, is ahead."""
    return x.numel() < 32768


def native_implementations(run: Callable[..., Any], declines: Callable[..., list[str]]) -> list[Implementation]:
    """The kernels of csrc/ behind ``run``."""
    low, loaded = (torch.float32, torch.bfloat16), _library.unavailable
    return [
        Implementation("cuda", run, "ours", ("cuda",), (*low, torch.float16), loaded, declines),
        Implementation("cpp", run, "ours", ("cpu",), low, loaded, declines, not_worth=small_on_cpu),
    ]


TRITON_MAX_WIDTH = 8192  # MAX_WIDTH of kernels/layer_norm.py


def triton_declines(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> list[str]:
    """Reasons of the Triton kernels against these arguments."""
    if not 0 < x.shape[-1] <= TRITON_MAX_WIDTH:
        return [f"rows of {x.shape[-1]} elements, not 1 to {TRITON_MAX_WIDTH}"]
    return _library.transforms()


# ---- Op --------------------------------------------------------------------------------------------------------------


def _inputs(shape: dict[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, Any]:
    randn, width = Randn(dtype, device), shape["width"]
    return {
        "x": randn(*shape["rows"], width, shift=0.5),
        "weight": randn(width, shift=1.0) if shape.get("weight", True) else None,
        "bias": randn(width) if shape.get("bias", True) else None,
        "eps": shape.get("eps", 1e-5),
    }


def _random_shape(rng: random.Random) -> dict[str, Any]:
    weight, width = rng.random() < 0.9, rng.choice((1, 2, 5, 63, 96, 129, 768, 1025))
    rows = tuple(pick(rng) for _ in range(rng.randint(0, 2)))
    eps = 0.1 if width < 5 else 1e-5
    return {"rows": rows, "width": width, "eps": eps, "weight": weight, "bias": weight and rng.random() < 0.7}


def _cost(x: Tensor, weight: Tensor | None, bias: Tensor | None = None, **_: Any) -> Cost:
    return Cost(bytes=2 * tensor_bytes(x) + tensor_bytes(weight, bias), flops=8 * x.numel())


layer_norm_op = Op(
    name="layer_norm",
    reference=layer_norm_reference,
    eager=layer_norm_eager,
    samples=[
        {"rows": (2, 37), "width": 96},
        {"rows": (5,), "width": 1025, "bias": False},
        {"rows": (33,), "width": 7, "weight": False, "bias": False},
        {"rows": (), "width": 64},
        {"rows": (3, 1), "width": 1, "eps": 0.1},  # dx is a difference of equal terms over sqrt(eps)
        {"rows": (0, 4), "width": 5},
    ],
    gpu_samples=[{"rows": (16, 1024), "width": width} for width in (768, 1024, 1280, 1600)],
    cpu_samples=[{"rows": (4, 256), "width": 768}],
    random_shape=_random_shape,
    inputs=_inputs,
    cost=_cost,
    implementations=[
        *native_implementations(layer_norm_native, native_declines),
        _triton.implementation(layer_norm_triton, triton_declines),
        Implementation("torch", layer_norm_eager, "PyTorch"),
    ],
)


@layer_norm_op.public
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension of x, then scale and shift.

    x: (..., C), any strides; weight, bias: (C,) or None, of x's dtype or both float32. Returns (..., C) of x's dtype.
    The kernels of backends "cpp" and "cuda" are differentiable once, "torch" as often as one likes.
    Raises ``ValueError``/``TypeError`` for shapes, dtypes, devices or an eps that do not fit.
    """
    _checks.floating("layer_norm", "x", x)
    check_parameters("layer_norm", x, weight, bias, eps)
    return layer_norm_op(x, weight, bias, eps)
