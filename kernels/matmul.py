"""The matrix product that the kernels share, in any of its three layouts.

    out (M, N) = factor a b^T + bias [+ out]            a (M, K), b (N, K), by any strides

so that x W^T, dy W and dy^T x are one kernel: a transposed operand is a view. ``walk`` is the loop over K alone, for
kernels with an epilogue of their own; ``_product`` is the loop with the plain epilogue.

Tiling: a program owns BLOCK_M x BLOCK_N of the output in float32 registers and walks over K; tiles are numbered in
groups of GROUP rows, so that programs that run together share operands in L2. Every sum is made by one program.
Bytes moved: a once every BLOCK_N columns of the output and b once every BLOCK_M rows, mostly from L2. FLOPs: 2 M N K.
Source: the order of tiles is that of Triton's matrix multiplication tutorial.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmfast.kernels.common import Tuned, dot_precision, tile_of, with_bias


@triton.jit
def walk(
    a_ptr, b_ptr, accumulator, m, n, M, N, A_K, K, a_row, a_step, b_row, b_step, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """accumulator + a[m] b[n]^T of a (M, A_K) and b (N, K), by row and step; what lies outside of them counts as zero.

    The elements of ``a`` are cast to those of ``b``. A_K >= K: a may have columns to spare, which align its rows.
    """
    k = tl.arange(0, BLOCK_K)
    a_at = a_ptr + m.to(tl.int64)[:, None] * a_row + k.to(tl.int64)[None, :] * a_step
    b_at = b_ptr + k.to(tl.int64)[:, None] * b_step + n.to(tl.int64)[None, :] * b_row
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_at, mask=(m < M)[:, None] & (k < A_K - start)[None, :], other=0.0)
        b = tl.load(b_at, mask=(k < K - start)[:, None] & (n < N)[None, :], other=0.0)
        accumulator = tl.dot(a.to(b.dtype), b, accumulator, input_precision=PRECISION)
        a_at += BLOCK_K * a_step
        b_at += BLOCK_K * b_step
    return accumulator


@triton.jit
def _product(
    a_ptr, b_ptr, bias_ptr, factor_ptr, out_ptr, M, N, K, A_M, A_K, a_row, a_step, b_row, b_step, out_row, out_step,
    ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    _, _, m, n = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP)
    out = walk(
        a_ptr, b_ptr, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), m, n, A_M, N, A_K, K, a_row, a_step, b_row, b_step,
        BLOCK_K, PRECISION,
    )  # fmt: skip
    if factor_ptr is not None:
        out *= tl.load(factor_ptr)
    out = with_bias(out, bias_ptr, n, N)
    at = out_ptr + m.to(tl.int64)[:, None] * out_row + n.to(tl.int64)[None, :] * out_step
    inside = (m < M)[:, None] & (n < N)[None, :]
    if ADD:
        out += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)


TILES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "num_warps", "num_stages")
SAFE = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 8, "num_warps": 4, "num_stages": 2}
SMALL = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 2}
SEARCH = [
    dict(zip(TILES, row, strict=True))
    for row in (
        (128, 128, 64, 8, 8, 3), (128, 128, 64, 8, 4, 3), (128, 256, 64, 8, 8, 3), (256, 128, 64, 8, 8, 3),
        (64, 128, 64, 8, 4, 3), (128, 64, 64, 8, 4, 3), (64, 64, 64, 8, 4, 4), (128, 128, 32, 8, 8, 4),
    )
]  # fmt: skip

_product_tuned = Tuned(_product, default=SAFE, interpreted=SMALL, search=SEARCH)


def tiles(M: int, N: int):
    """The grid of a kernel with one program a tile of an (M, N) output."""
    return lambda config: (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"]),)


def product(
    a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None = None, factor: Tensor | None = None, add: bool = False
) -> Tensor:
    """factor a b^T + bias in ``out`` (M, N), or added to it; a (M, K), b (N, K), one dtype; factor: one float32.

    a may have rows to spare, which are not used, and columns to spare, which must be zero.
    """
    (M, N), K = out.shape, b.shape[1]
    if M and N:
        _product_tuned(
            tiles(M, N),
            a, b, bias, factor, out, M, N, K, *a.shape, *a.stride(), *b.stride(), *out.stride(), add,
            dot_precision(a.dtype),
            dtype=b.dtype, dims={"M": M, "N": N, "K": K, "float32_out": int(out.dtype is torch.float32)},
            adds_to=out if add else None,
        )  # fmt: skip
    return out
