"""Causal scaled-dot-product attention (Vaswani et al., "Attention Is All You Need", 2017).

    y[i] = sum_j dropout(softmax_j(scale * q[i] . k[j])) v[j]      over the keys j that query i may see

Query i may see key j where j <= i + Tk - Tq, and j < kv_lens[b], and doc_ids[b, j] == doc_ids[b, i + Tk - Tq] (each
where given). A query that sees no key gives zeros. B batch, H heads, Tq queries, Tk keys, D head size.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast.ops import _checks, _library, _triton
from llmfast.ops._dropout import keep_mask, new_seed
from llmfast.ops._registry import Cost, Implementation, Op
from llmfast.ops._samples import Randn, pick, tensor_bytes
from llmfast.ops.matmul import route_of, with_onednn


def visible(Tq: int, Tk: int, kv_lens: Tensor | None, doc_ids: Tensor | None, device: torch.device) -> Tensor:
    """Bool mask of the keys that each query may see: (Tq, Tk), or (B, 1, Tq, Tk) with kv_lens or doc_ids."""
    keys = torch.arange(Tk, device=device)
    mask = keys <= torch.arange(Tk - Tq, Tk, device=device)[:, None]
    if kv_lens is not None:
        mask = mask & (keys < kv_lens[:, None, None, None])
    if doc_ids is not None:
        mask = mask & (doc_ids[:, None, Tk - Tq :, None] == doc_ids[:, None, None, :])
    return mask


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    kv_lens: Tensor | None = None,
    doc_ids: Tensor | None = None,
) -> Tensor:
    Tq, Tk = q.shape[-2], k.shape[-2]
    keys = torch.arange(Tk, device=q.device)
    position = torch.arange(Tq, device=q.device)[:, None] + Tk - Tq
    hidden = (keys > position).expand(q.shape[0], 1, Tq, Tk)
    if kv_lens is not None:
        hidden = hidden | (keys >= kv_lens[:, None, None, None])
    if doc_ids is not None:
        own = doc_ids.gather(1, position.clamp(min=0).T.expand(q.shape[0], Tq))
        hidden = hidden | (doc_ids[:, None, None, :] != own[:, None, :, None])
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(hidden, -1e30).softmax(-1).masked_fill(hidden, 0.0) @ v


def _eager(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **lens: Tensor | None) -> Tensor:
    """What a PyTorch user writes: SDPA with a mask."""
    mask = visible(q.shape[-2], k.shape[-2], lens.get("kv_lens"), lens.get("doc_ids"), q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).masked_fill(~mask.any(-1, True), 0.0)


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    dropout_p: float,
    kv_lens: Tensor | None,
    doc_ids: Tensor | None,
) -> Tensor:
    Tq, Tk = q.shape[-2], k.shape[-2]
    if Tq > Tk:  # the first queries lie before the first key
        rest = _torch(q[:, :, Tq - Tk :], k, v, scale, dropout_p, kv_lens, doc_ids)
        return torch.cat([rest.new_zeros(*rest.shape[:2], Tq - Tk, rest.shape[-1]), rest], dim=2)
    if Tk == 0:
        return q.new_zeros(q.shape) + 0.0 * (q.sum() + k.sum() + v.sum())
    mask = empty = None
    if kv_lens is not None or doc_ids is not None or 1 < Tq < Tk:
        mask = visible(Tq, Tk, kv_lens, doc_ids, q.device)
    if kv_lens is not None and mask is not None:
        empty = ~mask.any(-1, keepdim=True)
        mask = mask | empty  # a row without keys would be 0 / 0 in some kernels
    causal = False
    if mask is None and Tq > 1:  # a branch: with dynamic shapes the condition itself is no bool, and SDPA wants one
        causal = True
    if dropout_p and q.is_cpu and not _needs_plain_torch(q):
        if causal:
            mask = visible(Tq, Tk, None, None, q.device)
        y = _DropoutAttention.apply(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale, dropout_p)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal, scale=scale)
    return y if empty is None else y.masked_fill(empty, 0.0)


def _needs_plain_torch(q: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.is_autocast_enabled("cpu")
        or q.numel() == 0
    )


class _DropoutAttention(torch.autograd.Function):
    """Attention with dropout on a CPU, where PyTorch has no fused kernel for it.

    PyTorch's fallback spends half of its time drawing the mask and multiplies by way of MKL; this draws it four
    elements at a time and takes the routed product. mask is a bool mask that leaves every query a key, or None.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout_p: float
    ) -> Tensor:
        ctx.shapes = q.shape, k.shape
        ctx.onednn = q.dtype is torch.float32 and route_of(q.dtype) == "onednn"
        q3, k3, v3 = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))
        weights = _bmm(q3, k3.transpose(1, 2), ctx.onednn).mul_(scale).view(*q.shape[:3], k.shape[2])
        if mask is not None:
            weights.masked_fill_(~mask, float("-inf"))
        weights = torch.softmax(weights, -1, out=weights).view(-1, *weights.shape[2:])
        keep, ctx.gain = keep_mask(weights.shape, dropout_p)
        ctx.scale = scale
        ctx.save_for_backward(q3, k3, v3, weights, keep)
        return _bmm(weights * keep, v3, ctx.onednn).mul_(ctx.gain).view(q.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _checks.once("causal_attention")
        q, k, v, weights, keep = ctx.saved_tensors
        q_shape, k_shape = ctx.shapes
        dy = dy.reshape(q.shape) * ctx.gain
        dv = _bmm((weights * keep).transpose(1, 2), dy, ctx.onednn)
        dweights = _bmm(dy, v.transpose(1, 2), ctx.onednn).mul_(keep)
        dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype).mul_(ctx.scale)
        dq = _bmm(dscores, k, ctx.onednn).view(q_shape)
        dk = _bmm(dscores.transpose(1, 2), q, ctx.onednn).view(k_shape)
        return dq, dk, dv.view(k_shape), None, None, None


def _bmm(a: Tensor, b: Tensor, onednn: bool) -> Tensor:
    return with_onednn(torch.bmm, a, b) if onednn else torch.bmm(a, b)


# ---- Native kernel ---------------------------------------------------------------------------------------------------


def _kernel(
    raw: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    dropout_p: float,
    kv_lens: Tensor | None,
    doc_ids: Tensor | None,
) -> Tensor:
    cast = _checks.autocast_dtype(q)
    if cast is not None:
        q, k, v = q.to(cast), k.to(cast), v.to(cast)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seed = new_seed(q.device) if dropout_p else None
    if torch.compiler.is_compiling():
        return raw.causal_attention_fwd(q, k, v, scale, dropout_p, seed, kv_lens, doc_ids)[0]
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(raw, q, k, v, scale, dropout_p, seed, kv_lens, doc_ids)
    with torch._C._AutoDispatchBelowAutograd():
        return raw.causal_attention_fwd.default(q, k, v, scale, dropout_p, seed, kv_lens, doc_ids)[0]


# csrc/cpu/attention.cpp and csrc/cuda/attention_*.cu; kernels/causal_attention.py
_native = functools.partial(_kernel, torch.ops.llmfast)
_triton_kernel = functools.partial(_kernel, torch.ops.llmfast_triton)


class _Attention(torch.autograd.Function):
    """What ``register_autograd`` (below) does, cheaper a call."""

    @staticmethod
    def forward(ctx: Any, raw: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = raw.causal_attention_fwd.default(q, k, v, *rest)
        scale, dropout_p, seed, kv_lens, doc_ids = rest
        ctx.save_for_backward(q, k, v, out, lse, seed, kv_lens, doc_ids)
        ctx.raw, ctx.options = raw, (scale, dropout_p)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        _checks.once("causal_attention")
        q, k, v, out, lse, *masks = ctx.saved_tensors
        gradients = ctx.raw.causal_attention_bwd.default(dout, q, k, v, out, lse, *ctx.options, *masks)
        return None, *gradients, None, None, None, None, None


@_triton.on_load
@_library.on_load
def _register(namespace: str = "llmfast") -> None:
    raw = getattr(torch.ops, namespace)

    def heads(q: Tensor, T: int) -> Tensor:
        B, H, _, D = q.shape
        return q.new_empty((B, T, H, D)).transpose(1, 2)

    @torch.library.register_fake(f"{namespace}::causal_attention_fwd")
    def _fwd(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return heads(q, q.shape[2]), q.new_empty(q.shape[:3], dtype=torch.float32)

    @torch.library.register_fake(f"{namespace}::causal_attention_bwd")
    def _bwd(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return heads(q, q.shape[2]), heads(q, k.shape[2]), heads(q, k.shape[2])

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, scale, dropout_p, *masks = inputs
        out, lse = output
        ctx.save_for_backward(q, k, v, out, lse, *masks)
        ctx.options = scale, dropout_p
        ctx.mark_non_differentiable(lse)

    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *masks = ctx.saved_tensors
        gradients = raw.causal_attention_bwd(dout, q, k, v, out, lse, *ctx.options, *masks)
        return *gradients, None, None, None, None, None

    torch.library.register_autograd(f"{namespace}::causal_attention_fwd", backward, setup_context=setup)


def _native_declines(q: Tensor, *_: Any) -> list[str]:
    reasons = _library.transforms()
    if q.shape[-1] == 0:
        reasons = [*reasons, "heads of no elements"]
    if _checks.autocast_dtype(q) not in (None, torch.bfloat16):
        reasons = [*reasons, f"takes no {torch.get_autocast_dtype('cpu')} of autocast"]
    return reasons


GPU_MAX_HEAD_SIZE = 128  # MAX_HEAD_SIZE of kernels/causal_attention.py, kAttentionMaxHeadSize of csrc/cuda/attention.h


def _gpu_declines(q: Tensor, *_: Any) -> list[str]:
    reasons = _library.transforms()
    if not 0 < q.shape[-1] <= GPU_MAX_HEAD_SIZE:
        reasons = [*reasons, f"heads of {q.shape[-1]} elements, not 1 to {GPU_MAX_HEAD_SIZE}"]
    return reasons


def _faster_elsewhere(q: Tensor, k: Tensor, *rest: Any) -> bool:
    """Measured: PyTorch's is ahead below 64 queries in float32, and in tiny calls in bfloat16."""
    bfloat16 = (_checks.autocast_dtype(q) or q.dtype) is torch.bfloat16
    return k.numel() < 2048 if bfloat16 else q.shape[2] < 64


# ---- Op --------------------------------------------------------------------------------------------------------------


def _inputs(shape: dict[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, Any]:
    randn = Randn(dtype, device)
    B, H, Tq, Tk, D = (shape[size] for size in ("B", "H", "Tq", "Tk", "D"))
    inputs: dict[str, Any] = {"q": randn(B, H, Tq, D), "k": randn(B, H, Tk, D), "v": randn(B, H, Tk, D)}
    if shape.get("packed"):  # the views that a fused QKV projection gives
        qkv = randn(B, Tk, 3, H, D)
        inputs = {name: qkv[:, :, i].transpose(1, 2) for i, name in enumerate("qkv")}
        inputs["q"] = inputs["q"][:, :, Tk - Tq :]
    if shape.get("scale"):
        inputs["scale"] = shape["scale"]
    if shape.get("kv_lens"):
        inputs["kv_lens"] = randn.ids(Tk + 1, B)
    if shape.get("doc_ids"):
        inputs["doc_ids"] = randn.ids(3, B, Tk).sort(1).values
    return inputs


def _random_shape(rng: random.Random) -> dict[str, Any]:
    Tk = pick(rng)
    Tq = Tk if rng.random() < 0.6 else rng.choice((1, max(1, Tk // 2), Tk + 3))
    shape = {
        "B": rng.choice((1, 2, 3)),
        "H": rng.choice((1, 2, 5)),
        "Tq": Tq,
        "Tk": Tk,
        "D": rng.choice((1, 8, 24, 64, 80)),
    }
    options = {
        "kv_lens": rng.random() < 0.3,
        "doc_ids": rng.random() < 0.3 and Tq <= Tk,
        "scale": rng.choice((None, 0.3)),
    }
    return {**shape, **options, "packed": rng.random() < 0.3 and Tq <= Tk}


def _cost(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Cost:
    B, H, Tq, D = q.shape
    seen = sum(max(0, i + k.shape[2] - Tq + 1) for i in range(Tq))
    return Cost(bytes=2 * tensor_bytes(q) + tensor_bytes(k, v), flops=4 * B * H * D * seen)


_op = Op(
    name="causal_attention",
    reference=_reference,
    eager=_eager,
    samples=[
        {"B": 2, "H": 3, "Tq": 37, "Tk": 37, "D": 24},
        {"B": 1, "H": 2, "Tq": 65, "Tk": 65, "D": 64, "packed": True, "scale": 0.2},
        {"B": 3, "H": 2, "Tq": 1, "Tk": 19, "D": 16, "kv_lens": True},
        {"B": 2, "H": 1, "Tq": 5, "Tk": 19, "D": 16},
        {"B": 2, "H": 2, "Tq": 9, "Tk": 5, "D": 8},
        {"B": 3, "H": 2, "Tq": 17, "Tk": 33, "D": 8, "kv_lens": True, "doc_ids": True},
        {"B": 1, "H": 1, "Tq": 1, "Tk": 1, "D": 1},
        {"B": 0, "H": 2, "Tq": 3, "Tk": 3, "D": 4},
        {"B": 2, "H": 1, "Tq": 2, "Tk": 0, "D": 4},
    ],
    gpu_samples=[
        {"B": B, "H": H, "Tq": T, "Tk": T, "D": D, "packed": True}
        for B, H, T, D in ((16, 12, 1024, 64), (4, 16, 4096, 64), (8, 16, 1024, 128), (1, 25, 16384, 64))
    ],
    cpu_samples=[
        {"B": B, "H": H, "Tq": T, "Tk": T, "D": 64, "packed": True} for B, H, T in ((4, 6, 256), (1, 12, 512))
    ],
    backward_flops=2.5,  # five products against two
    random_shape=_random_shape,
    inputs=_inputs,
    cost=_cost,
    implementations=[
        Implementation(
            "cuda",
            _native,
            "ours",
            ("cuda",),
            (torch.float32, torch.bfloat16, torch.float16),
            _library.unavailable,
            _gpu_declines,
        ),
        Implementation(
            "cpp",
            _native,
            "ours",
            ("cpu",),
            (torch.float32, torch.bfloat16),
            _library.unavailable,
            _native_declines,
            not_worth=_faster_elsewhere,
        ),
        _triton.implementation(_triton_kernel, _gpu_declines),
        Implementation("torch", _torch, "PyTorch (SDPA)"),
    ],
)


@_op.public
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    kv_lens: Tensor | None = None,
    doc_ids: Tensor | None = None,
) -> Tensor:
    """Attention in which a query sees the keys up to its own position.

    q: (B, H, Tq, D); k, v: (B, H, Tk, D), of one dtype, any strides with last stride 1. Tq < Tk aligns the queries to
    the end (decoding with a cache). scale: factor on the scores (default 1/sqrt(D)). dropout_p in [0, 1): dropout on
    the attention weights, from the default torch generator. kv_lens: (B,) int, valid keys of each row. doc_ids: (B, Tk)
    int, the document of each key; documents do not see each other. Returns (B, H, Tq, D); a query that sees no key
    gives zeros. With dropout on a CPU it is differentiable once. Raises ``ValueError``/``TypeError`` for arguments that
    do not fit.
    """
    _checks.floating("causal_attention", "q", q)
    if q.dim() != 4:
        raise ValueError(f"causal_attention: q must be (B, H, Tq, D), got {tuple(q.shape)}")
    _checks.floating("causal_attention", "k", k)
    (B, H, _, D), shape = q.shape, k.shape
    if shape != q.shape and (len(shape) != 4 or (shape[0], shape[1], shape[3]) != (B, H, D)):
        raise ValueError(f"causal_attention: k must be ({B}, {H}, Tk, {D}) for q {tuple(q.shape)}, got {tuple(shape)}")
    _checks.parameter("causal_attention", "k", k, shape, q)
    _checks.parameter("causal_attention", "v", v, shape, q)
    _checks.probability("causal_attention", "dropout_p", dropout_p)
    if kv_lens is not None:
        _integers("kv_lens", kv_lens, (B,), q)
    if doc_ids is not None:
        _integers("doc_ids", doc_ids, (B, shape[2]), q)
    return _op(q, k, v, scale, dropout_p, kv_lens, doc_ids)


def _integers(name: str, value: Any, shape: tuple[int, ...], q: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"causal_attention: {name} must be an int64 or int32 tensor, got {got}")
    if value.shape != shape or value.device != q.device:
        raise ValueError(
            f"causal_attention: {name} must be {shape} on {q.device}, got {tuple(value.shape)} on {value.device}"
        )
