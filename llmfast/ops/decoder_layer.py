"""A pre-norm decoder layer as one call each way: csrc/cpu/block.cpp.

    s1 = x + dropout(branch)    a = attention(norm(s1) Wqkv^T + b)    s2 = s1 + dropout(a Wout^T + b)
    m  = act(norm(s2) Wfc^T + b) Wproj^T + b                          returns (s2, m)

What the ops compute one by one, for one trip through Python and autograd a layer; see ``llmfast.nn.Block``. The stream,
the parameters and their gradients are float32; under autocast to bfloat16 what lies between two products, and m, is
bfloat16.

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


@dataclass(frozen=True)
class LayerOptions:
    """What a layer is besides its parameters; ``scale`` is that of the attention scores, ``eps`` the norms'."""

    heads: int
    activation: str
    scale: float
    eps: float


def why_not(x: Tensor, parameters: tuple[Tensor | None, ...]) -> str | None:
    """Why ``decoder_layer`` does not stand in for the single ops here; None where it does.

    It does on the CPU in float32 or under autocast to bfloat16, where the ops it replaces may run in C++ and, unless
    that is forced, the products are llmfast's own.
    """
    if not x.is_cpu or x.dtype is not torch.float32 or type(x) not in _PLAIN or x.dim() != 3 or not x.numel():
        return "takes float32 (B, T, C) on the CPU"
    for p in parameters:
        if p is not None and (p.dtype is not torch.float32 or type(p) not in _PLAIN or not p.is_cpu):
            return "takes plain float32 parameters on the CPU"
    transforms = _library.transforms()
    return transforms[0] if transforms else why_not_dtype(_checks.autocast_dtype(x) or torch.float32)


def why_not_dtype(dtype: torch.dtype) -> str | None:
    """Why not in products of ``dtype``, whatever the tensors are."""
    if dtype is not torch.float32 and dtype is not torch.bfloat16:
        return f"no products in {dtype}"
    forced = _forced(current_setting())
    if forced is None:
        return "the setting gives one of the ops it replaces to another backend"
    if not forced and route_of(dtype) != "ours":
        return "the matrix products go elsewhere"
    return _library.why_not_loaded()


@functools.lru_cache(maxsize=64)
def _forced(setting: Setting) -> bool | None:
    """Whether all the ops it replaces are forced to C++; None where one of them may not be."""
    backends = {setting.backend(op) for op in REPLACES}
    return backends == {"cpp"} if backends <= {"auto", "cpp"} else None


def decoder_layer(
    x: Tensor,
    branch: Tensor | None,
    parameters: tuple[Tensor | None, ...],
    options: LayerOptions,
    dropout_p: float = 0.0,
    attention_dropout_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(s2, m) of the stream x and the open branch, both (B, T, C); the first layer has no branch.

    parameters: weight and bias of norm (C,), qkv (3 C, C), out (C, C), norm, fc (F, C) and proj (C, F), where every
    bias, and out as a whole, may be None; a weight may be the transposed view of an (in, out). dropout_p acts on the
    residual branches and, unless attention_dropout_p says otherwise, on the attention weights, from the default torch
    generator. Differentiable once. Only where ``why_not`` has no reason.
    """
    bf16 = torch.is_autocast_enabled("cpu")
    attention_p = dropout_p if attention_dropout_p is None else attention_dropout_p
    seeds = _seeds(branch is not None) if dropout_p > 0 or attention_p > 0 else None
    number = _ACTIVATION_NUMBERS[options.activation]
    settings = (options.heads, number, options.scale, options.eps, attention_p, dropout_p, seeds, bf16)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (branch is not None and branch.requires_grad)
        or any(p is not None and p.requires_grad for p in parameters)
    ):
        return _DecoderLayer.apply(settings, x, branch, *parameters)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.llmfast.decoder_layer_fwd.default(x, branch, parameters, *settings, False)[:2]


def _seeds(has_branch: bool) -> Tensor:
    """Of the branch, the attention weights and the attention's own branch, drawn as the single ops draw theirs."""
    seeds = torch.zeros(3, dtype=torch.int64)
    for i in range(0 if has_branch else 1, 3):
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
        eps: float, attention_p: float, residual_p: float, seeds: Tensor | None, bf16: bool, keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        kept = x.new_empty((_kept_bytes(x, branch, parameters, heads, bf16) if keep else 0,), dtype=torch.uint8)
        return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.bfloat16 if bf16 else None), kept

    @torch.library.register_fake("llmfast::decoder_layer_bwd")
    def _bwd(
        dstream: Tensor, dnew_branch: Tensor, x: Tensor, branch_dtype: torch.dtype | None, stream: Tensor, kept: Tensor,
        parameters: list[Tensor | None], heads: int, activation: int, scale: float, eps: float, attention_p: float,
        residual_p: float, seeds: Tensor | None, bf16: bool, wants: list[bool],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
        own = branch_dtype is not None and (branch_dtype is not torch.float32 or residual_p > 0)
        return (
            x.new_empty(x.shape if any(wants[:10]) else (0,)),
            x.new_empty(x.shape, dtype=branch_dtype) if own and any(wants[:4]) else x.new_empty((0,)),
            [
                x.new_empty((0,)) if p is None else _library.gradient_like(p, want)
                for p, want in zip(parameters, wants[2:], strict=True)
            ],
        )


def _kept_bytes(x: Tensor, branch: Tensor | None, parameters: list[Tensor | None], heads: int, bf16: bool) -> int:
    """The size of `Kept` in csrc/cpu/block.cpp."""
    B, T, C = x.shape
    fc, item = parameters[8], 2 if bf16 else 4
    hidden = 0 if fc is None else fc.shape[0]
    floats = 4 + heads + (C if branch is not None else 0)
    return int(B * T * (4 * floats + item * (4 * C + hidden)))
