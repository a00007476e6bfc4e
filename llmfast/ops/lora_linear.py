"""A linear layer with a low-rank update (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021).

y = x W^T + bias + scaling * (dropout(x) A^T) B^T          A (r, in), B (out, r), named and laid out as PEFT does
"""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast.ops import _checks, _library, _triton
from llmfast.ops._dropout import dropout, new_seed
from llmfast.ops._registry import Cost, Implementation, Op
from llmfast.ops._samples import Randn, pick, tensor_bytes
from llmfast.ops.matmul import MIN_OWN_MACS, linear, products_go_elsewhere


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, *, scaling: float
) -> Tensor:
    y = x @ (weight + scaling * (lora_B @ lora_A)).T
    return y if bias is None else y + bias


def _eager(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, *, scaling: float) -> Tensor:
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, lora_A), lora_B)


def _torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    base = linear(rows, weight, bias)
    low = linear(dropout(rows, dropout_p), lora_A)
    # The update is added by the product itself: no tensor of the output's size comes and goes.
    y = torch.addmm(base, low.to(base.dtype), lora_B.to(base.dtype).t(), alpha=scaling)
    return y.view(*x.shape[:-1], weight.shape[0])


# ---- Native kernel ---------------------------------------------------------------------------------------------------


def _kernel(
    raw: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float,
    dropout_p: float,
) -> Tensor:  # fmt: skip
    """The low-rank term is a part of the large product; dropout's mask is made again in backward."""
    seed = new_seed(x.device) if dropout_p > 0 else None
    inputs = (x, weight, bias, lora_A, lora_B)
    options = (scaling, dropout_p, seed, _checks.autocast_dtype(x) or x.dtype)
    if torch.compiler.is_compiling():
        return raw.lora_linear_fwd(*inputs, *options)[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _LoraLinear.apply(raw, *inputs, *options)
    with torch._C._AutoDispatchBelowAutograd():
        return raw.lora_linear_fwd.default(*inputs, *options)[0]


# csrc/cpu/lora.cpp and csrc/cuda/lora_linear.cpp; kernels/lora_linear.py
_native = functools.partial(_kernel, torch.ops.llmfast)
_triton_kernel = functools.partial(_kernel, torch.ops.llmfast_triton)


class _LoraLinear(torch.autograd.Function):
    """Cheaper a call than ``register_autograd`` (below), which torch.compile and opcheck take."""

    @staticmethod
    def forward(ctx: Any, raw: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = raw.lora_linear_fwd.default(*inputs)
        _setup(ctx, inputs, output)
        ctx.raw = raw
        return output[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _checks.once("lora_linear")
        return None, *_backward(ctx, ctx.raw, ctx.needs_input_grad[1:6], dy)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed, ctx.dtype = inputs
    ctx.save_for_backward(x, output[1], weight, lora_A, lora_B, seed)


def _backward(ctx: Any, raw: Any, needs: tuple[bool, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
    *saved, seed = ctx.saved_tensors
    gradients = raw.lora_linear_bwd.default(
        dy, *saved, ctx.scaling, ctx.dropout_p, seed, ctx.dtype, _checks.bits(needs)
    )
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None, None


@_triton.on_load
@_library.on_load
def _register(namespace: str = "llmfast") -> None:
    raw = getattr(torch.ops, namespace)

    @torch.library.register_fake(f"{namespace}::lora_linear_fwd")
    def _fwd(
        x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float,
        dropout_p: float, seed: Tensor | None, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        low = x.new_empty((x.shape[:-1].numel(), lora_A.shape[0]), dtype=torch.float32)
        return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype), low

    @torch.library.register_fake(f"{namespace}::lora_linear_bwd")
    def _bwd(
        dy: Tensor, x: Tensor, low: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float,
        dropout_p: float, seed: Tensor | None, dtype: torch.dtype, wanted: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        likes = (x, weight, weight.sum(1), lora_A, lora_B)
        return tuple(_library.gradient_like(t, bool(wanted >> i & 1)) for i, t in enumerate(likes))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _setup(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])

    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, raw, ctx.needs_input_grad[:5], dy)

    torch.library.register_autograd(f"{namespace}::lora_linear_fwd", backward, setup_context=setup)


def _declines(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float
) -> list[str]:
    return _library.transforms() or _checks.low_precision_only(x, weight, bias, lora_A, lora_B)


def _cuda_declines(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, *_: Any) -> list[str]:
    if (_checks.autocast_dtype(x) or x.dtype) is torch.float32:
        return ["takes float16/bfloat16, whose products the tensor cores make, not float32"]
    return _triton.declines(x, weight, lora_A)


TRITON_MAX_RANK = 128  # MAX_RANK of kernels/lora_linear.py


def _triton_declines(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, *_: Any) -> list[str]:
    if lora_A.shape[0] > TRITON_MAX_RANK:
        return [f"rank {lora_A.shape[0]}, above {TRITON_MAX_RANK}"]
    return _triton.declines(x, weight, lora_A)


def _not_worth(x: Tensor, weight: Tensor, *_: Any) -> bool:
    """Measured: float32 below MIN_OWN_MACS is PyTorch's, by 1.2x, bfloat16 nowhere."""
    dtype = _checks.autocast_dtype(x) or x.dtype
    return dtype is torch.float32 and x.numel() * weight.shape[0] < MIN_OWN_MACS


# ---- Op --------------------------------------------------------------------------------------------------------------


def _inputs(shape: dict[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, Any]:
    randn, K, N, r = Randn(dtype, device), shape["K"], shape["N"], shape["r"]
    return {
        "x": randn(*shape["rows"], K),
        "weight": randn(N, K, scale=K**-0.5),
        "bias": randn(N) if shape.get("bias", True) else None,
        "lora_A": randn(r, K, scale=K**-0.5),
        "lora_B": randn(N, r, scale=0.5),
        "scaling": shape.get("scaling", 2.0),
    }


def _random_shape(rng: random.Random) -> dict[str, Any]:
    rows = tuple(pick(rng) for _ in range(rng.randint(0, 2)))
    sizes = {"K": rng.choice((1, 7, 32, 97)), "N": rng.choice((1, 13, 128, 257)), "r": rng.choice((1, 3, 8, 16))}
    return {"rows": rows, **sizes, "bias": rng.random() < 0.6, "scaling": rng.choice((0.25, 1.0, 2.0))}


def _cost(x: Tensor, weight: Tensor, bias: Any, lora_A: Tensor, lora_B: Tensor, **_: Any) -> Cost:
    rows = x.shape[:-1].numel()
    flops = 2 * rows * (weight.numel() + lora_A.numel() + lora_B.numel())
    out = rows * weight.shape[0] * x.element_size()
    return Cost(bytes=tensor_bytes(x, weight, bias, lora_A, lora_B) + out, flops=flops)


_op = Op(
    name="lora_linear",
    reference=_reference,
    eager=_eager,
    samples=[
        {"rows": (2, 37), "K": 48, "N": 96, "r": 8},
        {"rows": (65,), "K": 257, "N": 131, "r": 3, "bias": False, "scaling": 0.5},
        {"rows": (), "K": 5, "N": 3, "r": 1},
        {"rows": (0, 3), "K": 5, "N": 7, "r": 2},
    ],
    gpu_samples=[{"rows": (16, 1024), "K": C, "N": 3 * C, "r": r} for C in (768, 1600) for r in (8, 64)],
    cpu_samples=[{"rows": (4, 256), "K": 384, "N": 1152, "r": 8}],
    frozen=("weight", "bias"),
    backward_flops=1.0,  # no gradient of the weight
    random_shape=_random_shape,
    inputs=_inputs,
    cost=_cost,
    implementations=[
        Implementation("cuda", _native, "ours", ("cuda",), _triton.DTYPES, _library.unavailable, _cuda_declines),
        Implementation(
            "cpp",
            _native,
            "ours",
            ("cpu",),
            (torch.float32, torch.bfloat16),
            _library.unavailable,
            _declines,
            products_go_elsewhere,
            _not_worth,
        ),
        _triton.implementation(_triton_kernel, _triton_declines),
        Implementation("torch", _torch, "PyTorch"),
    ],
)


@_op.public
def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """A linear layer plus its scaled low-rank update.

    x: (..., in); weight: (out, in); bias: (out,) or None; lora_A: (r, in); lora_B: (out, r); one dtype (under autocast:
    any). scaling: alpha / r. dropout_p in [0, 1): dropout on x in front of lora_A, from the default torch generator.
    Returns (..., out). The kernels of backends "cpp" and "cuda" are differentiable once.
    Raises ``ValueError``/``TypeError`` for arguments that do not fit.
    """
    _checks.floating("lora_linear", "x", x)
    _checks.floating("lora_linear", "weight", weight, 2)
    _checks.floating("lora_linear", "lora_A", lora_A, 2)
    K, N, r = x.shape[-1], weight.shape[0], lora_A.shape[0]
    _checks.parameter("lora_linear", "weight", weight, (N, K), x)
    _checks.parameter("lora_linear", "lora_A", lora_A, (r, K), x)
    _checks.parameter("lora_linear", "lora_B", lora_B, (N, r), x)
    if bias is not None:
        _checks.parameter("lora_linear", "bias", bias, (N,), x)
    _checks.probability("lora_linear", "dropout_p", dropout_p)
    return _op(x, weight, bias, lora_A, lora_B, scaling, dropout_p)
