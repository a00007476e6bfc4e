"""The two-layer perceptron of a transformer block.

    y = act(x W1^T + b1) W2^T + b2        act: gelu_tanh (GPT-2), gelu (exact) or relu

Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016. N rows, C width, M hidden width.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast.config import suggest
from llmfast.ops import _checks, _library, _triton
from llmfast.ops._registry import Cost, Implementation, Op
from llmfast.ops._samples import Randn, pick, tensor_bytes
from llmfast.ops.matmul import MIN_OWN_MACS, linear, mm_nn, mm_nt, mm_tn, products_go_elsewhere, uses_onednn

ACTIVATIONS = ("gelu_tanh", "gelu", "relu")


def activate(h: Tensor, activation: str) -> Tensor:
    """The activation called ``activation``."""
    if activation == "relu":
        return F.relu(h)
    return F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")


def _reference(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    activation: str = "gelu_tanh",
) -> Tensor:
    h = x @ fc_weight.T if fc_bias is None else x @ fc_weight.T + fc_bias
    if activation == "gelu_tanh":
        a = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    elif activation == "gelu":
        a = 0.5 * h * (1 + torch.erf(h / 2**0.5))
    else:
        a = h.clamp(min=0)
    y = a @ proj_weight.T
    return y if proj_bias is None else y + proj_bias


def _eager(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    activation: str = "gelu_tanh",
) -> Tensor:
    return F.linear(activate(F.linear(x, fc_weight, fc_bias), activation), proj_weight, proj_bias)


def _torch(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None, activation: str
) -> Tensor:
    if torch.is_grad_enabled() and activation != "gelu_tanh" and uses_onednn(x, fc_weight):
        return _Mlp.apply(x, fc_weight, fc_bias, proj_weight, proj_bias, activation)
    return linear(activate(linear(x, fc_weight, fc_bias), activation), proj_weight, proj_bias)


class _Mlp(torch.autograd.Function):
    """Keeps one hidden tensor instead of two: relu's output, or gelu's input, whose activation is computed again.

    For the tanh form PyTorch's activation takes as long as a tenth of a product, so it stays with two linears.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None,
        activation: str,
    ) -> Tensor:  # fmt: skip
        h = mm_nt(x, fc_weight, True, fc_bias)
        a = h.relu_() if activation == "relu" else F.gelu(h)
        ctx.activation = activation
        ctx.save_for_backward(x, h, fc_weight, proj_weight, fc_bias, proj_bias)
        return mm_nt(a, proj_weight, True, proj_bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _checks.once("mlp")
        x, h, fc_weight, proj_weight, fc_bias, proj_bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dy, h, rows = (t.reshape(-1, t.shape[-1]) for t in (dy, h, x))
        dproj = None
        if needs[3]:
            dproj = mm_tn(dy, h if ctx.activation == "relu" else F.gelu(h), True)
        dproj_bias = dy.sum(0) if proj_bias is not None and needs[4] else None
        dh = mm_nn(dy, proj_weight, True)
        if ctx.activation == "relu":
            dh = torch.ops.aten.threshold_backward.grad_input(dh, h, 0, grad_input=dh)
        else:
            dh = torch.ops.aten.gelu_backward.grad_input(dh, h, grad_input=dh)
        dfc = mm_tn(dh, rows, True) if needs[1] else None
        dfc_bias = dh.sum(0) if fc_bias is not None and needs[2] else None
        dx = mm_nn(dh, fc_weight, True).view(x.shape) if needs[0] else None
        return dx, dfc, dfc_bias, dproj, dproj_bias, None


# ---- Native kernel ---------------------------------------------------------------------------------------------------


def _kernel(
    raw: Any, x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None,
    activation: str,
) -> Tensor:  # fmt: skip
    """Keeps the input of the activation alone."""
    inputs = (x, fc_weight, fc_bias, proj_weight, proj_bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    dtype = _checks.autocast_dtype(x) or x.dtype
    if torch.compiler.is_compiling():
        return raw.mlp_fwd(*inputs, activation, dtype, keep)[0]
    if keep:
        return _NativeMlp.apply(raw, *inputs, activation, dtype, keep)
    with torch._C._AutoDispatchBelowAutograd():
        return raw.mlp_fwd.default(*inputs, activation, dtype, keep)[0]


# csrc/cpu/mlp.cpp and csrc/cuda/mlp.cpp; kernels/mlp.py
_native = functools.partial(_kernel, torch.ops.llmfast)
_triton_kernel = functools.partial(_kernel, torch.ops.llmfast_triton)


class _NativeMlp(torch.autograd.Function):
    """Cheaper a call than ``register_autograd`` (below), which torch.compile and opcheck take."""

    @staticmethod
    def forward(ctx: Any, raw: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = raw.mlp_fwd.default(*inputs)
        _setup(ctx, inputs, output)
        ctx.raw = raw
        return output[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _checks.once("mlp")
        return None, *_backward(ctx, ctx.raw, ctx.needs_input_grad[1:6], dy)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, fc_weight, _, proj_weight, _, ctx.activation, *_ = inputs
    ctx.save_for_backward(x, output[1], fc_weight, proj_weight)


def _backward(ctx: Any, raw: Any, needs: tuple[bool, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
    x, h, fc_weight, proj_weight = ctx.saved_tensors
    gradients = raw.mlp_bwd.default(dy, x, h, fc_weight, proj_weight, ctx.activation, _checks.bits(needs))
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None


@_triton.on_load
@_library.on_load
def _register(namespace: str = "llmfast") -> None:
    raw = getattr(torch.ops, namespace)

    @torch.library.register_fake(f"{namespace}::mlp_fwd")
    def _fwd(
        x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None,
        activation: str, dtype: torch.dtype, keep: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        h = (x.shape[:-1].numel(), fc_weight.shape[0]) if keep else (0,)
        return x.new_empty((*x.shape[:-1], proj_weight.shape[0]), dtype=dtype), x.new_empty(h, dtype=dtype)

    @torch.library.register_fake(f"{namespace}::mlp_bwd")
    def _bwd(
        dy: Tensor, x: Tensor, h: Tensor, fc_weight: Tensor, proj_weight: Tensor, activation: str, wanted: int
    ) -> tuple[Tensor, ...]:
        likes = (x, fc_weight, fc_weight.sum(1), proj_weight, proj_weight.sum(1))
        return tuple(_library.gradient_like(t, bool(wanted >> i & 1)) for i, t in enumerate(likes))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _setup(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])

    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, raw, ctx.needs_input_grad[:5], dy)

    torch.library.register_autograd(f"{namespace}::mlp_fwd", backward, setup_context=setup)


def _declines(x: Tensor, *parameters: Any) -> list[str]:
    return _library.transforms() or _checks.low_precision_only(x, *parameters[:-1])


def _not_worth(x: Tensor, fc_weight: Tensor, *_: Any) -> bool:
    """Measured: float32 below MIN_OWN_MACS is PyTorch's, by 1.2x, bfloat16 nowhere."""
    dtype = _checks.autocast_dtype(x) or x.dtype
    return dtype is torch.float32 and x.numel() * fc_weight.shape[0] < MIN_OWN_MACS


# ---- Op --------------------------------------------------------------------------------------------------------------


def _inputs(shape: dict[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, Any]:
    randn, C, M = Randn(dtype, device), shape["C"], shape["M"]
    bias = shape.get("bias", True)
    return {
        "x": randn(*shape["rows"], C),
        "fc_weight": randn(M, C, scale=C**-0.5),
        "fc_bias": randn(M) if bias else None,
        "proj_weight": randn(C, M, scale=M**-0.5),
        "proj_bias": randn(C) if bias else None,
        "activation": shape.get("activation", "gelu_tanh"),
    }


def _random_shape(rng: random.Random) -> dict[str, Any]:
    rows = tuple(pick(rng) for _ in range(rng.randint(0, 2)))
    sizes = {"C": rng.choice((1, 7, 32, 97)), "M": rng.choice((1, 13, 128, 257))}
    return {"rows": rows, **sizes, "bias": rng.random() < 0.6, "activation": rng.choice(ACTIVATIONS)}


def _cost(x: Tensor, fc_weight: Tensor, fc_bias: Any, proj_weight: Tensor, proj_bias: Any, **_: Any) -> Cost:
    flops = 4 * x.shape[:-1].numel() * fc_weight.numel()
    return Cost(bytes=2 * tensor_bytes(x) + tensor_bytes(fc_weight, fc_bias, proj_weight, proj_bias), flops=flops)


_op = Op(
    name="mlp",
    reference=_reference,
    eager=_eager,
    samples=[
        {"rows": (2, 37), "C": 48, "M": 192},
        {"rows": (9,), "C": 31, "M": 97, "bias": False, "activation": "gelu"},
        {"rows": (129,), "C": 130, "M": 257, "activation": "relu"},
        {"rows": (129,), "C": 130, "M": 257, "activation": "gelu"},
        {"rows": (1, 1), "C": 1, "M": 1, "activation": "relu"},
        {"rows": (0, 3), "C": 5, "M": 7},
    ],
    gpu_samples=[{"rows": (16, 1024), "C": C, "M": 4 * C} for C in (768, 1024, 1600)],
    cpu_samples=[{"rows": (4, 256), "C": 384, "M": 1536}],
    random_shape=_random_shape,
    inputs=_inputs,
    cost=_cost,
    implementations=[
        Implementation("cuda", _native, "ours", ("cuda",), _triton.DTYPES, _library.unavailable, _triton.declines),
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
        _triton.implementation(_triton_kernel, _triton.declines),
        Implementation("torch", _torch, "PyTorch"),
    ],
)


@_op.public
def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    activation: str = "gelu_tanh",
) -> Tensor:
    """Linear, activation, linear.

    x: (..., C); fc_weight: (M, C); fc_bias: (M,) or None; proj_weight: (C_out, M); proj_bias: (C_out,) or None; one
    dtype (under autocast: any). activation: "gelu_tanh", "gelu" or "relu". Returns (..., C_out). The kernels of
    backends "cpp" and "cuda", and with oneDNN "gelu" and "relu" of backend "torch", are differentiable once.
    Raises ``ValueError``/``TypeError`` for arguments that do not fit.
    """
    _checks.floating("mlp", "x", x)
    _checks.floating("mlp", "fc_weight", fc_weight, 2)
    _checks.floating("mlp", "proj_weight", proj_weight, 2)
    M = fc_weight.shape[0]
    _checks.parameter("mlp", "fc_weight", fc_weight, (M, x.shape[-1]), x)
    _checks.parameter("mlp", "proj_weight", proj_weight, (proj_weight.shape[0], M), x)
    if fc_bias is not None:
        _checks.parameter("mlp", "fc_bias", fc_bias, (M,), x)
    if proj_bias is not None:
        _checks.parameter("mlp", "proj_bias", proj_bias, (proj_weight.shape[0],), x)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"mlp: activation must be {', '.join(ACTIVATIONS)}, "
            f"got {activation!r}{suggest(str(activation), ACTIVATIONS)}"
        )
    return _op(x, fc_weight, fc_bias, proj_weight, proj_bias, activation)
