"""The output head and its loss in chunks of rows, so that the (N, V) logits never exist as a whole.

    z = x W^T + b    lse = log sum exp z    loss[n] = lse - (1 - s) z[t] - s mean(z)         s: label smoothing
    dz = c (softmax(z) - (1 - s) onehot(t) - s / V)    dx = dz W    dW = dz^T x    db = sum dz over the rows

c: the row's weight in the loss; ignored rows have 0. Four kernels a chunk, two where only the loss is wanted:

    _logits     a tile of z in registers gives the tile's share of each row's maximum, sum of exponentials and mean, and
                z[t], in float32; z itself is stored only where gradients are wanted
    _losses     shares -> lse, loss
    _gradient   z becomes dz in place; c enters as c / max |c|, in [-1, 1], so that a mean over many rows does not
                underflow in float16; max |c| is the ``factor`` of the products
    _product    dx, and dW, which is added up over the chunks in float32 (kernels/matmul.py)

The rows of the buffer of z are padded with zeros to a multiple of 64 elements: V is a multiple of nothing, rows that
are not aligned could not be read by vectors, and the padding adds nothing to a product.
Tiling: BLOCK_M rows x BLOCK_N of the vocabulary, see kernels/matmul.py. No atomics.
Bytes moved a chunk of R rows, e an element's size: loss alone e (R C + V C); with gradients 4 e R V (z written, made
dz, read twice) and 8 V C for dW. FLOPs: 2 N V C for the loss, 6 N V C with gradients.
Source: the chunks are those of Hsu et al., "Liger Kernel", 2024; a loss without stored logits is Wijmans et al., "Cut
Your Losses", 2024; the shares of a row's sum are Milakov and Gimelshein's, "Online normalizer calculation", 2018.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmfast.kernels.common import INTERPRET, Tuned, column_sum, dot_precision, place, tile_of, with_bias
from llmfast.kernels.matmul import SAFE, SEARCH, SMALL, product, tiles, walk

CHUNK_ELEMENTS = 1 << 12 if INTERPRET else 1 << 26
PAD = 64
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _logits(
    x_ptr, weight_ptr, bias_ptr, target_ptr, z_ptr, top_ptr, total_ptr, mean_ptr, at_target_ptr,
    R, V, C, x_row, w_row, w_step, z_row,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    _, tile_v, r, v = tile_of(R, V, BLOCK_M, BLOCK_N, GROUP)
    z = walk(
        x_ptr, weight_ptr, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), r, v, R, V, C, C, x_row, 1, w_row, w_step,
        BLOCK_K, PRECISION,
    )  # fmt: skip
    z = with_bias(z, bias_ptr, v, V)
    if z_ptr is not None:
        at, inside = place(r, v, R, z_row, z_row)
        tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=inside)
    share = tile_v.to(tl.int64) * R + r
    target = tl.load(target_ptr + r, mask=r < R, other=-1).to(tl.int32)
    own = (target >= tile_v * BLOCK_N) & (target < tile_v * BLOCK_N + BLOCK_N)
    tl.store(at_target_ptr + r, tl.sum(tl.where(v[None, :] == target[:, None], z, 0.0), 1), mask=own)
    if mean_ptr is not None:
        tl.store(mean_ptr + share, tl.sum(tl.where((v < V)[None, :], z, 0.0), 1) / V, mask=r < R)
    z = tl.where((v < V)[None, :], z, float("-inf"))
    top = tl.max(z, 1)
    tl.store(top_ptr + share, top, mask=r < R)
    tl.store(total_ptr + share, tl.sum(tl.exp2((z - top[:, None]) * LOG2_E), 1), mask=r < R)


@triton.jit
def _losses(
    top_ptr, total_ptr, mean_ptr, at_target_ptr, lse_ptr, loss_ptr, R, shares, smoothing,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    s = tl.arange(0, BLOCK_S)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    mean = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, shares, BLOCK_S):
        at, inside = place(start + s, r, shares, R, R)
        tops = tl.load(top_ptr + at, mask=inside, other=float("-inf"))
        totals = tl.load(total_ptr + at, mask=inside, other=0.0)
        top_now = tl.maximum(top, tl.max(tops, 0))
        base = tl.where(top_now == float("-inf"), 0.0, top_now)
        total = total * tl.exp2((top - base) * LOG2_E) + tl.sum(totals * tl.exp2((tops - base[None, :]) * LOG2_E), 0)
        top = top_now
        if mean_ptr is not None:
            mean += tl.sum(tl.load(mean_ptr + at, mask=inside, other=0.0), 0)
    at_target = tl.load(at_target_ptr + r, mask=r < R, other=0.0)
    loss = tl.log(total) + (1.0 - smoothing) * (top - at_target)
    if mean_ptr is not None:
        loss += smoothing * (top - mean)
    tl.store(loss_ptr + r, loss, mask=r < R)
    tl.store(lse_ptr + r, top + tl.log(total), mask=r < R)


@triton.jit
def _gradient(z_ptr, lse_ptr, target_ptr, weight_ptr, factor_ptr, V, z_row, smoothing, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = z_ptr + r * z_row + v
    z = tl.load(at, mask=v < z_row, other=0.0).to(tl.float32)
    p = tl.exp2((z - tl.load(lse_ptr + r)) * LOG2_E)
    target = tl.load(target_ptr + r)
    dz = p - tl.where(v == target, 1.0 - smoothing, 0.0) - smoothing / V
    dz = tl.where(v < V, dz * (tl.load(weight_ptr + r) / tl.load(factor_ptr)), 0.0)
    tl.store(at, dz.to(z_ptr.dtype.element_ty), mask=v < z_row)


_logits_tuned = Tuned(_logits, default=SAFE, interpreted=SMALL, search=SEARCH)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, row_weight: Tensor, smoothing: float,
    dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None,
) -> Tensor:  # fmt: skip
    """Losses (N,) float32 of every row; fills the gradients of sum(row_weight * losses) that are given.

    x (N, C), weight (V, C) and bias (V,) of one dtype; target (N,) int64 in [0, V); row_weight (N,) float32.
    """
    x, target, row_weight = x.contiguous(), target.contiguous(), row_weight.contiguous()
    (N, C), V = x.shape, weight.shape[0]
    options: Any = {"dtype": torch.float32, "device": x.device}
    losses = torch.empty(N, **options)
    grads = [g for g in (dx, dweight, dbias) if g is not None]
    if not N:
        for g in grads:
            g.zero_()
        return losses
    rows = min(N, max(1, CHUNK_ELEMENTS // V))
    padded = triton.cdiv(V, PAD) * PAD
    z = torch.empty(rows, padded, dtype=x.dtype, device=x.device) if grads else None
    shares = torch.empty(3, triton.cdiv(V, _logits_tuned.least("BLOCK_N")), rows, **options)
    lse, at_target = torch.empty(rows, **options), torch.empty(rows, **options)
    factor = row_weight.abs().amax()
    factor = torch.where(factor == 0, 1.0, factor)
    sums = None if dweight is None else torch.empty(V, C, **options)
    bias_sums = None if dbias is None else torch.empty(V, **options)
    for start in range(0, N, rows):
        R = min(rows, N - start)
        part = slice(start, start + R)
        used: list[int] = []

        def grid(config, R=R, used=used):
            used[:] = [triton.cdiv(V, config["BLOCK_N"])]
            return tiles(R, V)(config)

        _logits_tuned(
            grid,
            x[part], weight, bias, target[part], z, *shares[:2], shares[2] if smoothing else None, at_target,
            R, V, C, x.stride(0), *weight.stride(), padded, dot_precision(x.dtype),
            dtype=x.dtype, dims={"M": R, "N": V, "K": C},
        )  # fmt: skip
        block = 8 if INTERPRET else 32
        _losses[(triton.cdiv(R, block),)](
            *shares[:2], shares[2] if smoothing else None, at_target, lse, losses[part], R, used[0], smoothing,
            BLOCK_R=block, BLOCK_S=16, num_warps=4,
        )  # fmt: skip
        if z is None:
            continue
        block = 256 if INTERPRET else 2048
        _gradient[(R, triton.cdiv(padded, block))](
            z, lse, target[part], row_weight[part], factor, V, padded, smoothing, BLOCK=block, num_warps=8
        )
        if dx is not None:
            product(z[:R], weight.t(), dx[part], factor=factor)
        if sums is not None:
            product(z[:R].t(), x[part].t(), sums, add=start > 0)
        if bias_sums is not None:
            column_sum(z[:R, :V], bias_sums, add=start > 0)
    if dweight is not None and sums is not None:
        torch.mul(sums, factor, out=dweight)
    if dbias is not None and bias_sums is not None:
        torch.mul(bias_sums, factor, out=dbias)
    return losses
