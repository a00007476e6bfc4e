"""Linear cross-entropy in chunks of rows: logits become their own gradient in one reused buffer.

For a chunk of rows: logits = x W^T + b, softmax in place, then per row

    loss    = lse(z) - (1 - s) z[t] - s mean(z)                    s: label smoothing
    dz      = softmax(z) - (1 - s) onehot(t) - s / V
    dx = c dz W,  dW += dz^T (c x),  db += dz^T c                  c: the row's weight in the loss

The gradients come in the forward pass, since dz is at hand there; the backward pass only multiplies them by the
incoming scalar. The chunk loop is here in plain PyTorch (the row weights c go onto x and dx, which are narrow, instead
of dz), around a kernel for GPUs (csrc/cuda/cross_entropy.cu), and as one raw op in csrc/cpu/linear_cross_entropy.cpp
and kernels/linear_cross_entropy.py. N rows, C width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmfast.ops import _checks, _library, _triton
from llmfast.ops.matmul import add_mm_tn, mm_nn, mm_nt, mm_tn, uses_onednn, with_onednn

# Rows of a chunk at least (measured on a CPU: fewer stream the weight too often), and elements where there may be more.
ROWS = 512
CPU_ELEMENTS, GPU_ELEMENTS = 1 << 18, 1 << 26
# A library may sum a result of so few elements in one long chain: it is made in pieces of so many terms instead.
SMALL_RESULT, PIECE = 1 << 12, 128


@dataclass
class Chunked:
    """Losses (N,), float32 or float64, 0 for ignored rows; and the gradients that were asked for."""

    losses: Tensor
    dx: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None


def chunked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    counts: Tensor,
    row_weight: Tensor,
    label_smoothing: float,
    wants: tuple[bool, bool, bool] = (False, False, False),
    dtype: torch.dtype | None = None,
    kernel: str = "",
) -> Chunked:
    """Losses of all rows, and the gradients of sum(row_weight * losses) by x, weight and bias where ``wants`` says so.

    x (N, C), weight (V, C), bias (V,) or None; target (N,) int64, every one in [0, V); counts (N,): 1, or 0 for an
    ignored row (its row_weight must be 0 too), or NaN to poison it; row_weight (N,) float; dtype: of the products
    (default: x's); kernel: the raw op, as NAMESPACE.NAME, that does all of it (linear_cross_entropy) or the softmax
    alone (softmax_gradient_); without one, PyTorch does. The gradients have the dtypes of what they belong to; sums
    over rows are kept in float32 or better. On a CPU, ignored rows cost nothing.
    """
    (N, C), V = x.shape, weight.shape[0]
    if x.is_cpu:  # elsewhere, looking would wait for the device
        kept = counts.nonzero()[:, 0]
        if len(kept) < N:
            few = (x[kept], weight, bias, target[kept], counts[kept], row_weight[kept])
            return _spread(chunked(*few, label_smoothing, wants, dtype, kernel), kept, N)
    low, dtype = dtype or x.dtype, _loss_dtype(x)
    namespace, _, name = kernel.partition(".")
    if name == "softmax_gradient_":
        return _cuda_chunks(x, weight, bias, target, counts, row_weight, label_smoothing, wants, low, namespace)
    if name:
        products = low is torch.bfloat16 if namespace == "llmfast" else low
        raw = getattr(getattr(torch.ops, namespace), name).default
        done = raw(x, weight, bias, target, row_weight, label_smoothing, products, *wants)
        gradients = (g if want else None for g, want in zip(done[1:], wants, strict=True))
        return Chunked(done[0] * counts, *gradients)
    xs, ws = x.to(low), weight.to(low)
    bs = None if bias is None else bias.to(low)
    onednn = uses_onednn(xs[:ROWS], ws)
    rows = max(ROWS, (CPU_ELEMENTS if x.is_cpu else GPU_ELEMENTS) // max(V, 1))
    exact = low is dtype  # float32 or float64: the products accumulate into the gradients themselves

    losses = torch.zeros(N, dtype=dtype, device=x.device)
    dx = torch.empty(N, C, dtype=x.dtype, device=x.device) if wants[0] else None
    dweight = None  # the first chunk makes it
    dbias = torch.zeros(V, dtype=dtype, device=x.device) if wants[2] else None
    buffer = torch.empty(min(rows, N), V, dtype=low, device=x.device)
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        xc, tc, c = xs[part], target[part, None], row_weight[part].to(dtype)
        logits = _logits(xc, ws, bs, buffer[: xc.shape[0]], onednn)
        z = logits if exact else logits.to(dtype)
        top = z.amax(1)
        expected = (1 - label_smoothing) * (z.gather(1, tc)[:, 0] - top)
        if label_smoothing:
            expected += label_smoothing * (z.mean(1) - top)
        p = torch.softmax(z, 1, out=z) if z.is_cpu else torch.softmax(z, 1)
        # The largest probability is exp(top - lse): it cannot underflow, so that lse is exact however small p[t] is.
        losses[part] = (-p.amax(1).log() - expected) * counts[part]
        if not any(wants):
            continue
        if label_smoothing:
            p.sub_(label_smoothing / V)
        p.scatter_add_(1, tc, p.new_full((1, 1), label_smoothing - 1).expand_as(tc))
        dz = p if exact else logits.copy_(p)
        if dx is not None:
            pieces = V if len(xc) * C > SMALL_RESULT else 16 * PIECE
            product = sum(
                mm_nn(dzp, wp, onednn).to(dtype) for dzp, wp in zip(dz.split(pieces, 1), ws.split(pieces), strict=True)
            )
            dx[part] = product * c[:, None]
        if wants[1]:
            scaled = xc * c[:, None].to(low)
            small = V * C <= SMALL_RESULT
            for dzp, xp in zip(dz.split(PIECE if small else rows), scaled.split(PIECE if small else rows), strict=True):
                if dweight is None:
                    dweight = mm_tn(dzp, xp, onednn).to(dtype)
                elif exact and not small:  # which may go on with the same chain
                    add_mm_tn(dweight, dzp, xp, onednn)
                else:
                    dweight += mm_tn(dzp, xp, onednn)
        if dbias is not None:
            for few, weights in zip(p.split(64), c.split(64), strict=True):  # a long running sum would lose bits
                dbias += few.t().mv(weights)
    if wants[1] and dweight is None:
        dweight = torch.zeros(V, C, dtype=dtype, device=x.device)
    return Chunked(
        losses,
        dx,
        None if dweight is None else dweight.to(weight.dtype),
        None if dbias is None or bias is None else dbias.to(bias.dtype),
    )


def _cuda_chunks(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, counts: Tensor, row_weight: Tensor,
    label_smoothing: float, wants: tuple[bool, bool, bool], low: torch.dtype, namespace: str,
) -> Chunked:  # fmt: skip
    """As ``chunked``, with the softmax, its loss and its gradient in one kernel of csrc/cuda/cross_entropy.cu.

    The rows of the buffer are padded to a multiple of 64 elements, so that those of any vocabulary are aligned. The row
    weights c enter as c / max |c|, so that a mean over many rows does not underflow in float16.
    """
    (N, C), V = x.shape, weight.shape[0]
    raw = getattr(torch.ops, namespace)
    xs, ws, bs = x.to(low), weight.to(low), None if bias is None else bias.to(low).contiguous()
    rows = max(1, min(N, 2 * GPU_ELEMENTS // max(V, 1)))  # each chunk reads and writes all of the float32 dweight
    buffer = torch.empty(rows, -(-V // 64) * 64, dtype=low, device=x.device)
    losses = torch.empty(N, dtype=torch.float32, device=x.device)
    dx = torch.empty(N, C, dtype=x.dtype, device=x.device) if wants[0] else None
    dweight = torch.zeros(V, C, dtype=torch.float32, device=x.device) if wants[1] else None
    dbias = torch.zeros(V, dtype=torch.float32, device=x.device) if wants[2] else None
    largest = row_weight.float().abs().amax() if N else row_weight.new_zeros((), dtype=torch.float32)
    factor = torch.where(largest == 0, 1.0, largest)
    scale = row_weight.float() / factor if any(wants) else None
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        z = buffer[: part.stop - start, :V]
        torch.mm(xs[part], ws.t(), out=z)
        own = None if scale is None else scale[part]
        losses[part] = raw.softmax_gradient_.default(z, bs, target[part], own, label_smoothing)
        if dx is not None:
            dx[part] = torch.mm(z, ws) * factor
        if dweight is not None:
            dweight += torch.mm(z.t(), xs[part])
        if dbias is not None:
            dbias += torch.sum(z, 0, dtype=torch.float32)
    return Chunked(
        losses * counts,
        dx,
        None if dweight is None else (dweight * factor).to(weight.dtype),
        None if dbias is None or bias is None else (dbias * factor).to(bias.dtype),
    )


def _spread(few: Chunked, kept: Tensor, N: int) -> Chunked:
    """What ``few`` has for the rows ``kept``, for N rows; the others get zeros."""
    losses = few.losses.new_zeros(N).index_copy_(0, kept, few.losses)
    dx = None if few.dx is None else few.dx.new_zeros(N, few.dx.shape[1]).index_copy_(0, kept, few.dx)
    return Chunked(losses, dx, few.dweight, few.dbias)


def _loss_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, onednn: bool) -> Tensor:
    """x W^T + b in ``out``."""
    if onednn and x.dtype is not torch.float32:
        return mm_nt(x, weight, True, bias)  # without out=, which only the switched products have
    product, args = (torch.mm, (x, weight.t())) if bias is None else (torch.addmm, (bias, x, weight.t()))
    return with_onednn(product, *args, out=out) if onednn else product(*args, out=out)


# ---- Eager autograd --------------------------------------------------------------------------------------------------


class ChunkedSum(torch.autograd.Function):
    """sum(row_weight * losses), a scalar whose gradients are ready when it is."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, counts: Tensor, row_weight: Tensor,
        label_smoothing: float, dtype: torch.dtype, kernel: str,
    ) -> Tensor:  # fmt: skip
        wants = ctx.needs_input_grad[:3]
        done = chunked(x, weight, bias, target, counts, row_weight, label_smoothing, wants, dtype, kernel)
        ctx.save_for_backward(done.dx, done.dweight, done.dbias)
        return (done.losses * row_weight).sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        _checks.once("linear_cross_entropy")
        grads = ctx.saved_tensors
        kept = torch._C._autograd._get_current_graph_task_keep_graph()  # autograd adds to what it was given
        if kept or not (dloss.is_cpu and dloss.item() == 1.0):  # asking a GPU would wait for it
            grads = tuple(None if g is None else (g * dloss).to(g.dtype) for g in grads)
        return (*grads, *([None] * 6))


class ChunkedRows(torch.autograd.Function):
    """The losses of all rows; the backward pass computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, counts: Tensor, row_weight: Tensor,
        label_smoothing: float, dtype: torch.dtype, kernel: str,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, bias, target, counts)
        ctx.options = label_smoothing, dtype, kernel
        return chunked(x, weight, bias, target, counts, row_weight, label_smoothing, dtype=dtype, kernel=kernel).losses

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        _checks.once("linear_cross_entropy")
        x, weight, bias, target, counts = ctx.saved_tensors
        label_smoothing, dtype, kernel = ctx.options
        wants = ctx.needs_input_grad[:3]
        done = chunked(x, weight, bias, target, counts, dlosses * counts, label_smoothing, wants, dtype, kernel)
        return (done.dx, done.dweight, done.dbias, *([None] * 6))


# ---- torch.compile ---------------------------------------------------------------------------------------------------
# The chunk loop as one opaque op, so that a compiled graph holds neither the unrolled loop nor an (N, V) tensor.


@torch.library.custom_op("llmfast::chunked_sum", mutates_args=())
def chunked_sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    counts: Tensor,
    row_weight: Tensor,
    label_smoothing: float,
    dtype: torch.dtype,
    kernel: str,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum(row_weight * losses), dx, dweight, dbias); gradients that are not wanted are empty."""
    with torch.autocast(x.device.type, enabled=False):
        want = (wants[0], wants[1], wants[2])
        done = chunked(x, weight, bias, target, counts, row_weight, label_smoothing, want, dtype, kernel)
    dx, dweight, dbias = (x.new_empty(0) if g is None else g for g in (done.dx, done.dweight, done.dbias))
    return (done.losses * row_weight).sum(), dx, dweight, dbias


@chunked_sum.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wants = rest[-1]
    return (
        x.new_empty((), dtype=_loss_dtype(x)),
        x.new_empty(x.shape) if wants[0] else x.new_empty(0),
        weight.new_empty(weight.shape) if wants[1] else x.new_empty(0),
        bias.new_empty(bias.shape) if wants[2] and bias is not None else x.new_empty(0),
    )


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wants = inputs[-1]
    ctx.save_for_backward(*output[1:])


def _sum_backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = ((g * dloss).to(g.dtype) if want else None for g, want in zip(ctx.saved_tensors, ctx.wants, strict=True))
    return (*grads, *([None] * 7))


chunked_sum.register_autograd(_sum_backward, setup_context=_sum_setup)


@torch.library.custom_op("llmfast::chunked_rows", mutates_args=())
def chunked_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    counts: Tensor,
    label_smoothing: float,
    dtype: torch.dtype,
    kernel: str,
) -> Tensor:
    """The losses (N,)."""
    with torch.autocast(x.device.type, enabled=False):
        return chunked(x, weight, bias, target, counts, counts, label_smoothing, dtype=dtype, kernel=kernel).losses


@chunked_rows.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=_loss_dtype(x))


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.label_smoothing, ctx.dtype, ctx.kernel = inputs
    ctx.save_for_backward(*tensors)


def _rows_backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, target, counts = ctx.saved_tensors
    wants = list(ctx.needs_input_grad[:3])
    options = ctx.label_smoothing, ctx.dtype, ctx.kernel, wants
    grads = chunked_sum(x, weight, bias, target, counts, dlosses * counts, *options)[1:]
    return (*(g if want else None for g, want in zip(grads, wants, strict=True)), *([None] * 5))


chunked_rows.register_autograd(_rows_backward, setup_context=_rows_setup)


# ---- The native ops --------------------------------------------------------------------------------------------------


@_triton.on_load
@_library.on_load
def _register(namespace: str = "llmfast") -> None:
    @torch.library.register_fake(f"{namespace}::linear_cross_entropy")
    def _(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        want_dx, want_dweight, want_dbias = rest[-3:]
        return (
            x.new_empty(x.shape[0], dtype=torch.float32),
            x.new_empty(x.shape if want_dx else 0),
            weight.new_empty(weight.shape if want_dweight else 0),
            x.new_empty(0, dtype=torch.float32) if bias is None or not want_dbias else bias.new_empty(bias.shape),
        )

    if namespace != _triton.NAMESPACE:

        @torch.library.register_fake(f"{namespace}::softmax_gradient_")
        def _(z: Tensor, *_: Any) -> Tensor:
            return z.new_empty(z.shape[0], dtype=torch.float32)
