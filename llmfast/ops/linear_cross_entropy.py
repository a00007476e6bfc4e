"""The output head and its loss in one op: the (N, V) logits never exist as a whole.

    loss[n] = -(1 - s) log p[n, t[n]] - s / V sum_v log p[n, v]          p = softmax(x W^T + bias), s label smoothing

N rows, C width, V vocabulary. The same loss as ``F.cross_entropy(F.linear(x, weight, bias), target, ...)``, with two
differences: 16-bit inputs give a float32 loss, and the mean over no rows (every target ignored) is 0 with zero
gradients, where PyTorch's is NaN: a batch whose labels are all masked must not end a training run.
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
from llmfast.ops._chunked_loss import ChunkedRows, ChunkedSum, chunked, chunked_rows, chunked_sum
from llmfast.ops._registry import Cost, Implementation, Op
from llmfast.ops._samples import Randn, pick, tensor_bytes
from llmfast.ops.matmul import products_go_elsewhere

REDUCTIONS = ("none", "mean", "sum")


def _reference(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    z = x @ weight.T if bias is None else x @ weight.T + bias
    log_p = z - z.logsumexp(-1, keepdim=True)
    valid = target != ignore_index
    nll = -log_p.gather(-1, target.where(valid, 0)[..., None])[..., 0]
    losses = ((1 - label_smoothing) * nll - label_smoothing * log_p.mean(-1)) * valid
    if reduction == "none":
        return losses
    return losses.sum() / valid.sum().clamp(min=1) if reduction == "mean" else losses.sum()


def _eager(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    logits = F.linear(x, weight, bias).flatten(0, -2) if x.dim() > 1 else F.linear(x, weight, bias)[None]
    losses = F.cross_entropy(
        logits, target.flatten(), ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    if reduction == "none":
        return losses.view(target.shape)
    return losses.sum() / (target != ignore_index).sum().clamp(min=1) if reduction == "mean" else losses.sum()


def _in_chunks(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    kernel: str = "",
) -> Tensor:
    tracing = torch.compiler.is_compiling()
    if not tracing and (x.is_meta or _library.transforms()):
        return _eager(
            x,
            weight,
            target,
            bias=bias,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    dtype = x.dtype if x.dtype is torch.float64 else _checks.autocast_dtype(x) or x.dtype
    rows, ids = x.reshape(-1, x.shape[-1]), target.reshape(-1).long()
    ids, counts = _rows_that_count(ids, ignore_index, weight.shape[0], tracing)
    counts = counts.to(torch.float64 if x.dtype is torch.float64 else torch.float32)
    row_weight = counts / counts.sum().clamp(min=1) if reduction == "mean" else counts
    wants = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    args = (rows, weight, bias, ids, counts)
    if tracing:
        if reduction == "none":
            return chunked_rows(*args, label_smoothing, dtype, kernel).view(target.shape)
        return chunked_sum(*args, row_weight, label_smoothing, dtype, kernel, wants)[0]
    with torch.autocast(x.device.type, enabled=False):
        if any(wants):
            function = ChunkedRows if reduction == "none" else ChunkedSum
            loss = function.apply(*args, row_weight, label_smoothing, dtype, kernel)
        else:
            loss = chunked(*args, row_weight, label_smoothing, dtype=dtype, kernel=kernel).losses
            loss = loss if reduction == "none" else (loss * row_weight).sum()
    return loss.view(target.shape) if reduction == "none" else loss


# csrc/cpu/linear_cross_entropy.cpp; csrc/cuda/cross_entropy.cu around cuBLAS; kernels/linear_cross_entropy.py
_native = functools.partial(_in_chunks, kernel="llmfast.linear_cross_entropy")
_cuda = functools.partial(_in_chunks, kernel="llmfast.softmax_gradient_")
_triton_kernel = functools.partial(_in_chunks, kernel=f"{_triton.NAMESPACE}.linear_cross_entropy")


_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def _native_declines(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *_: Any) -> list[str]:
    reasons = _library.transforms()
    if _checks.autocast_dtype(x) not in (None, *_NATIVE_DTYPES):
        reasons = [*reasons, "autocast to float16"]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype not in _NATIVE_DTYPES:
            reasons = [*reasons, f"{name} is {parameter.dtype}"]
    return reasons


def _rows_that_count(ids: Tensor, ignore_index: int, V: int, tracing: bool) -> tuple[Tensor, Tensor]:
    """(ids in [0, V), counts): bool, or 1.0 for a row that counts and 0.0 for an ignored one.

    On a CPU an id out of range is a ``ValueError``. On a GPU, where looking would wait for the device, and in compiled
    code, it makes the loss NaN.
    """
    counted = ids != ignore_index
    if ids.is_cpu and not tracing:
        inside = ids.where(counted, 0) if not bool(counted.all()) else ids
        if ids.numel():
            low, high = (int(end) for end in torch.aminmax(inside))
            if low < 0 or high >= V:
                raise ValueError(
                    f"linear_cross_entropy: target must lie in [0, {V}) or be ignore_index {ignore_index}, "
                    f"got {low if low < 0 else high}"
                )
        return inside, counted
    wrong = counted & ((ids < 0) | (ids >= V))
    return ids.where(counted & ~wrong, 0), counted.float().masked_fill(wrong, float("nan"))


# ---- Op --------------------------------------------------------------------------------------------------------------


def _inputs(shape: dict[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, Any]:
    randn, C, V = Randn(dtype, device), shape["C"], shape["V"]
    inputs: dict[str, Any] = {
        "x": randn(*shape["rows"], C),
        "weight": randn(V, C, scale=shape.get("spread", 1.0) * C**-0.5),
        "target": randn.ids(V, *shape["rows"]),
        "reduction": shape.get("reduction", "mean"),
        "label_smoothing": shape.get("label_smoothing", 0.0),
    }
    if shape.get("bias"):
        inputs["bias"] = randn(V)
    ignored = shape.get("ignored", 0.0)
    if ignored:
        inputs["ignore_index"] = shape.get("ignore_index", -100)
        dropped = randn.ids(1000, *shape["rows"]) < 1000 * ignored
        inputs["target"] = inputs["target"].masked_fill(dropped, inputs["ignore_index"])
    return inputs


def _random_shape(rng: random.Random) -> dict[str, Any]:
    rows = (rng.choice((1, 3, 600)),) if rng.random() < 0.3 else tuple(pick(rng) for _ in range(rng.randint(0, 2)))
    whole_vocabulary = rng.random() < 0.02
    return {
        "rows": (rng.choice((1, 3)),) if whole_vocabulary else rows,
        "C": rng.choice((1, 7, 32, 97)),
        "V": 50257 if whole_vocabulary else rng.choice((1, 2, 65, 257, 1009)),
        "bias": rng.random() < 0.4,
        "ignored": rng.choice((0.0, 0.0, 0.3, 1.0)),
        "ignore_index": rng.choice((-100, 0)),
        "reduction": rng.choice(REDUCTIONS),
        "label_smoothing": rng.choice((0.0, 0.0, 0.1)),
        "spread": rng.choice((0.1, 1.0, 10.0)),
    }


def _cost(x: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, **_: Any) -> Cost:
    return Cost(bytes=tensor_bytes(x, weight, target, bias), flops=2 * target.numel() * weight.numel())


_op = Op(
    name="linear_cross_entropy",
    reference=_reference,
    eager=_eager,
    samples=[
        {"rows": (2, 37), "C": 48, "V": 257},
        {"rows": (600,), "C": 33, "V": 131, "bias": True, "label_smoothing": 0.1, "ignored": 0.3},
        {"rows": (7, 3), "C": 32, "V": 1009, "reduction": "none", "ignored": 0.3, "ignore_index": 5},
        {"rows": (65,), "C": 31, "V": 97, "reduction": "sum", "bias": True, "spread": 30.0},
        {"rows": (9,), "C": 8, "V": 11, "ignored": 1.0},
        {"rows": (), "C": 5, "V": 3},
        {"rows": (1, 1), "C": 1, "V": 1},
        {"rows": (0, 4), "C": 5, "V": 7, "reduction": "none"},
    ],
    gpu_samples=[{"rows": (8, 1024), "C": C, "V": V} for C, V in ((768, 50257), (768, 50304), (1600, 50304))],
    cpu_samples=[{"rows": (2, 64), "C": 384, "V": 50257}],
    random_shape=_random_shape,
    inputs=_inputs,
    cost=_cost,
    implementations=[
        Implementation("cuda", _cuda, "ours", ("cuda",), _triton.DTYPES, _library.unavailable, _triton.declines),
        Implementation(
            "cpp",
            _native,
            "ours",
            ("cpu",),
            _NATIVE_DTYPES,
            _library.unavailable,
            _native_declines,
            products_go_elsewhere,
        ),
        _triton.implementation(_triton_kernel, _triton.declines),
        Implementation("torch", _in_chunks, "PyTorch"),
    ],
)


@_op.public
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of x W^T + bias against target, without the logits.

    x: (..., C); weight: (V, C); bias: (V,) or None; one dtype (under autocast: any). target: (...,) int64 or int32 in
    [0, V), or ignore_index for rows that do not count. reduction: "mean" (over the rows that count; 0 if none does),
    "sum", or "none" (losses (...,), 0 where ignored; its backward computes the logits again). label_smoothing in [0,
    1]. Returns a float32 (float64 for float64) scalar or (...,). Differentiable once. Raises
    ``ValueError``/``TypeError`` for arguments that do not fit; a target out of range is a ``ValueError`` on a CPU and a
    NaN loss on a GPU.
    """
    _checks.floating("linear_cross_entropy", "x", x)
    _checks.floating("linear_cross_entropy", "weight", weight, 2)
    V = weight.shape[0]
    _checks.parameter("linear_cross_entropy", "weight", weight, (V, x.shape[-1]), x)
    if bias is not None:
        _checks.parameter("linear_cross_entropy", "bias", bias, (V,), x)
    if not isinstance(target, Tensor) or target.dtype not in (torch.int64, torch.int32):
        got = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"linear_cross_entropy: target must be an int64 or int32 tensor, got {got}")
    if target.shape != x.shape[:-1] or target.device != x.device:
        raise ValueError(
            f"linear_cross_entropy: target must be {tuple(x.shape[:-1])} on {x.device}, "
            f"got {tuple(target.shape)} on {target.device}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"linear_cross_entropy: reduction must be {', '.join(REDUCTIONS)}, "
            f"got {reduction!r}{suggest(str(reduction), REDUCTIONS)}"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"linear_cross_entropy: label_smoothing must lie in [0, 1], got {label_smoothing!r}")
    return _op(x, weight, target, bias, ignore_index, reduction, label_smoothing)
