"""A pre-norm decoder layer as one call each way: csrc/cpu/block.cpp.

    s1 = x + dropout(branch)    a = attention(norm(s1) Wqkv^T + b)    s2 = s1 + dropout(a Wout^T + b)
    m  = act(norm(s2) Wfc^T + b) Wproj^T + b                          returns (s2, m)

What the ops compute one by one, for one trip through Python and autograd a layer; see ``llmfast.nn.Block``. The stream,
the parameters and their gradients are float32; under autocast to bfloat16 what lies between two products, and m, is
bfloat16. Each of the four products may have a low-rank adapter (ops/lora_linear.py).

B batch, T sequence, C width, F width of the MLP's hidden layer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmfast.ops import _checks, _library
from llmfast.ops._registry import Setting, current_setting
from llmfast.ops.matmul import route_of
from llmfast.ops.mlp import ACTIVATIONS

REPLACES = ("layer_norm", "add_layer_norm", "causal_attention", "mlp")
_PLAIN = (Tensor, torch.nn.Parameter)
# In the order of `Activation` in csrc/cpu/activation.h.
_ACTIVATION_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


# Where the native layer has the weights of qkv, out, fc and proj; behind each its bias, A and B.
_PRODUCTS = _QKV, _OUT, _FC, _PROJ = 2, 6, 12, 16


@dataclass(frozen=True)
class LayerOptions:
    """What a layer is besides its parameters; ``scale`` is that of the attention scores, ``eps`` the norms'."""

    heads: int
    activation: str
    scale: float
    eps: float


@dataclass(frozen=True)
class LayerAdapter:
    """The adapter of a product: A (r, in), B (out, r), and see ``ops.lora_linear``."""

    A: Tensor
    B: Tensor
    scaling: float
    dropout_p: float = 0.0


Adapters = tuple[LayerAdapter | None, ...]  # of qkv, out, fc and proj
NO_ADAPTERS: Adapters = (None,) * 4


def why_not(x: Tensor, parameters: tuple[Tensor | None, ...], adapters: Adapters = NO_ADAPTERS) -> str | None:
    """Why ``decoder_layer`` does not stand in for the single ops here; None where it does.

    It does on the CPU in float32 or under autocast to bfloat16, where the ops it replaces may run in C++ and, unless
    that is forced, the products are llmfast's own.
    """
    if not x.is_cpu or x.dtype is not torch.float32 or type(x) not in _PLAIN or x.dim() != 3 or not x.numel():
        return "takes float32 (B, T, C) on the CPU"
    for p in (*parameters, *(t for a in adapters if a is not None for t in (a.A, a.B))):
        if p is not None and (p.dtype is not torch.float32 or type(p) not in _PLAIN or not p.is_cpu):
            return "takes plain float32 parameters on the CPU"
    transforms = _library.transforms()
    if transforms:
        return transforms[0]
    return why_not_dtype(_checks.autocast_dtype(x) or torch.float32, adapted=any(adapters))


def why_not_dtype(dtype: torch.dtype, *, adapted: bool = False) -> str | None:
    """Why not in products of ``dtype``, whatever the tensors are."""
    if dtype is not torch.float32 and dtype is not torch.bfloat16:
        return f"no products in {dtype}"
    forced = _forced(current_setting(), adapted)
    if forced is None:
        return "the setting gives one of the ops it replaces to another backend"
    if not forced and route_of(dtype) != "ours":
        return "the matrix products go elsewhere"
    return _library.why_not_loaded()


@functools.lru_cache(maxsize=64)
def _forced(setting: Setting, adapted: bool) -> bool | None:
    """Whether all the ops it replaces are forced to C++; None where one of them may not be."""
    backends = {setting.backend(op) for op in (*REPLACES, *(("lora_linear",) if adapted else ()))}
    return backends == {"cpp"} if backends <= {"auto", "cpp"} else None


def decoder_layer(
    x: Tensor,
    branch: Tensor | None,
    parameters: tuple[Tensor | None, ...],
    options: LayerOptions,
    dropout_p: float = 0.0,
    attention_dropout_p: float | None = None,
    adapters: Adapters = NO_ADAPTERS,
) -> tuple[Tensor, Tensor]:
    """(s2, m) of the stream x and the open branch, both (B, T, C); the first layer has no branch.

    parameters: weight and bias of norm (C,), qkv (3 C, C), out (C, C), norm, fc (F, C) and proj (C, F), where every
    bias, and out as a whole, may be None; a weight may be the transposed view of an (in, out). dropout_p acts on the
    residual branches and, unless attention_dropout_p says otherwise, on the attention weights, from the default torch
    generator. adapters: of the four products, each may be None. Differentiable once. Only where ``why_not`` has no
    reason.
    """
    bf16 = torch.is_autocast_enabled("cpu")
    attention_p = dropout_p if attention_dropout_p is None else attention_dropout_p
    adapter_ps = [0.0 if a is None else a.dropout_p for a in adapters]
    seeds = _seeds(branch is not None, dropout_p > 0 or attention_p > 0, adapter_ps)
    number = _ACTIVATION_NUMBERS[options.activation]
    scalings = [0.0 if a is None else a.scaling for a in adapters]
    settings = (
        options.heads, number, options.scale, options.eps, attention_p, dropout_p, scalings, adapter_ps, seeds, bf16
    )  # fmt: skip
    tensors = arranged(parameters, adapters)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (branch is not None and branch.requires_grad)
        or any(p is not None and p.requires_grad for p in tensors)
    ):
        return _DecoderLayer.apply(settings, x, branch, *tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.llmfast.decoder_layer_fwd.default(x, branch, tensors, *settings, False)[:2]


def arranged(parameters: tuple[Tensor | None, ...], adapters: Adapters = NO_ADAPTERS) -> tuple[Tensor | None, ...]:
    """Parameters and adapters in the order of the native layer: every product's A and B behind its weight and bias."""
    qkv, out, fc, proj = ((None, None) if a is None else (a.A, a.B) for a in adapters)
    p = parameters
    return *p[:4], *qkv, *p[4:6], *out, *p[6:10], *fc, *p[10:], *proj


def _seeds(has_branch: bool, layer: bool, adapter_ps: list[float]) -> Tensor | None:
    """Of the branch, the attention weights and the attention's own branch, where the ``layer`` drops anything, and of
    the four adapters; drawn as the single ops draw theirs, in the order in which they run."""
    qkv, out, fc, proj = (p > 0 for p in adapter_ps)
    if not (layer or qkv or out or fc or proj):
        return None
    seeds = torch.zeros(7, dtype=torch.int64)
    draws = ((0, layer and has_branch), (3, qkv), (1, layer), (4, out), (2, layer), (5, fc), (6, proj))
    for i, drawn in draws:
        if drawn:
            seeds[i].random_()
    return seeds


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: tuple[Any, ...], x: Tensor, branch: Tensor | None, *parameters: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            stream, new_branch, kept = torch.ops.llmfast.decoder_layer_fwd.default(
                x, branch, parameters, *settings, True
            )
        ctx.save_for_backward(x, stream, kept, *parameters)
        ctx.settings, ctx.branch_dtype = settings, None if branch is None else branch.dtype
        return stream, new_branch

    @staticmethod
    def backward(ctx: Any, dstream: Tensor, dnew_branch: Tensor) -> tuple[Tensor | None, ...]:
        _checks.once("decoder_layer")
        x, stream, kept, *parameters = ctx.saved_tensors
        wants = ctx.needs_input_grad[1:]
        dx, dbranch, dparameters = torch.ops.llmfast.decoder_layer_bwd.default(
            dstream, dnew_branch, x, ctx.branch_dtype, stream, kept, parameters, *ctx.settings, wants
        )
        if wants[1] and not dbranch.numel():
            dbranch = dx
        gradients = [g if want else None for g, want in zip((dx, dbranch, *dparameters), wants, strict=True)]
        return None, *gradients


@_library.on_load
def _register() -> None:
    @torch.library.register_fake("llmfast::decoder_layer_fwd")
    def _fwd(
        x: Tensor, branch: Tensor | None, parameters: list[Tensor | None], heads: int, activation: int, scale: float,
        eps: float, attention_p: float, residual_p: float, scalings: list[float], adapter_ps: list[float],
        seeds: Tensor | None, bf16: bool, keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        kept = x.new_empty((_kept_bytes(x, branch, parameters, heads, bf16) if keep else 0,), dtype=torch.uint8)
        return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.bfloat16 if bf16 else None), kept

    @torch.library.register_fake("llmfast::decoder_layer_bwd")
    def _bwd(
        dstream: Tensor, dnew_branch: Tensor, x: Tensor, branch_dtype: torch.dtype | None, stream: Tensor, kept: Tensor,
        parameters: list[Tensor | None], heads: int, activation: int, scale: float, eps: float, attention_p: float,
        residual_p: float, scalings: list[float], adapter_ps: list[float], seeds: Tensor | None, bf16: bool,
        wants: list[bool],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
        own = branch_dtype is not None and (branch_dtype is not torch.float32 or residual_p > 0)
        return (
            x.new_empty(x.shape if any(wants[: 2 + _FC]) else (0,)),
            x.new_empty(x.shape, dtype=branch_dtype) if own and any(wants[: 2 + _QKV]) else x.new_empty((0,)),
            [
                x.new_empty((0,)) if p is None else _library.gradient_like(p, want)
                for p, want in zip(parameters, wants[2:], strict=True)
            ],
        )


def _kept_bytes(x: Tensor, branch: Tensor | None, parameters: list[Tensor | None], heads: int, bf16: bool) -> int:
    """The size of `Kept` in csrc/cpu/block.cpp."""
    B, T, C = x.shape
    fc, item = parameters[_FC], 2 if bf16 else 4
    hidden = 0 if fc is None else fc.shape[0]
    ranks = sum(A.shape[0] for w in _PRODUCTS if (A := parameters[w + 2]) is not None)
    floats = 4 + heads + (C if branch is not None else 0) + ranks
    return int(B * T * (4 * floats + item * (4 * C + hidden)))
