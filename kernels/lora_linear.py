"""A linear layer with a low-rank update, forward and backward, with dropout in front of the update.

    low = s drop(x) A^T    y = x W^T + low B^T + b         W (M, K), A (r, K), B (M, r), s the scaling
    dlow = s dy B          dx = dy W + mask (dlow A)       dA = dlow^T drop(x)      dB = dy^T low      dW = dy^T x

    _lora_low              low (N, r), float32: x is read once, its mask is made on the way
    _lora_forward          one product: it walks over K with x and W, goes on over r with low and B, and adds b
    _lora_backward_low     dlow and the shares of dB from one reading of dy
    _lora_backward_input   one product: over r with dlow and A, the mask on what that gave, then over M with dy and W
    _lora_backward_a       the shares of dA, again with the mask made on the way
    _product          dW, where the base weight is trained too (kernels/matmul.py)

The mask is a function of seed, row and column (``common.keep``) and is never stored; its gain 1 / (1 - p) is in low and
dlow. Tiling of the two large products: kernels/matmul.py; the small ones own BLOCK_M rows and the whole rank.
Bytes moved beyond the plain product's, e an element's size, N rows: forward e N K + 8 N r, backward e N (M + K) +
16 N r and the shares of dB and dA. No atomics. FLOPs: 2 N M K + 2 N r (M + K) forward, twice that backward.
Source: Hu et al., "LoRA", 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmfast.kernels.common import (
    Tuned,
    column_sum,
    dot_precision,
    dropout_limit,
    keep,
    multiprocessors,
    place,
    tile_of,
    with_bias,
)
from llmfast.kernels.matmul import SAFE, SEARCH, SMALL, product, tiles, walk

MAX_RANK = 128


@triton.jit
def _lora_low(
    x_ptr, A_ptr, seed_ptr, low_ptr, N, K, r, A_row, A_step, factor, drop,
    PRECISION: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, j = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, RANK)
    low = tl.zeros([BLOCK_M, RANK], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at, inside = place(row, k, N, K, K)
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        if seed_ptr is not None:
            x = tl.where(keep(tl.load(seed_ptr), row.to(tl.int64), start, drop, BLOCK_K), x, 0.0)
        A = tl.load(
            A_ptr + k[:, None] * A_step + j[None, :] * A_row, mask=(k < K)[:, None] & (j < r)[None, :], other=0.0
        )
        low = tl.dot(x.to(A.dtype), A, low, input_precision=PRECISION)
    at, inside = place(row, j, N, r, r)
    tl.store(low_ptr + at, low * factor, mask=inside)


@triton.jit
def _lora_forward(
    x_ptr, weight_ptr, bias_ptr, low_ptr, B_ptr, y_ptr, N, M, K, r, w_row, w_step, B_row, B_step,
    PRECISION: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    _, _, m, n = tile_of(N, M, BLOCK_M, BLOCK_N, GROUP)
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    y = walk(x_ptr, weight_ptr, y, m, n, N, M, K, K, K, 1, w_row, w_step, BLOCK_K, PRECISION)
    y = walk(low_ptr, B_ptr, y, m, n, N, M, r, r, r, 1, B_row, B_step, STEP, PRECISION)
    at, inside = place(m, n, N, M, M)
    tl.store(y_ptr + at, with_bias(y, bias_ptr, n, M).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _lora_backward_low(
    dy_ptr, B_ptr, low_ptr, dlow_ptr, dB_ptr, N, M, r, B_row, B_step, factor,
    PRECISION: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    row, j = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, RANK)
    at_low, inside_low = place(row, j, N, r, r)
    if dB_ptr is not None:
        low = tl.load(low_ptr + at_low, mask=inside_low, other=0.0).to(dy_ptr.dtype.element_ty)
        dB_ptr += block.to(tl.int64) * M * r
    dlow = tl.zeros([BLOCK_M, RANK], tl.float32)
    for start in range(0, M, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at, inside = place(row, n, N, M, M)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0)
        inside = (n < M)[:, None] & (j < r)[None, :]
        B = tl.load(B_ptr + n[:, None] * B_row + j[None, :] * B_step, mask=inside, other=0.0)
        dlow = tl.dot(dy, B, dlow, input_precision=PRECISION)
        if dB_ptr is not None:
            dB = tl.dot(tl.trans(dy), low, input_precision=PRECISION)
            tl.store(dB_ptr + n[:, None] * r + j[None, :], dB, mask=inside)
    tl.store(dlow_ptr + at_low, dlow * factor, mask=inside_low)


@triton.jit
def _lora_backward_input(
    dy_ptr, weight_ptr, dlow_ptr, A_ptr, seed_ptr, dx_ptr, N, M, K, r, w_row, w_step, A_row, A_step, drop,
    PRECISION: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    _, tile_k, m, k = tile_of(N, K, BLOCK_M, BLOCK_N, GROUP)
    dx = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dx = walk(dlow_ptr, A_ptr, dx, m, k, N, K, r, r, r, 1, A_step, A_row, STEP, PRECISION)
    if seed_ptr is not None:
        dx = tl.where(keep(tl.load(seed_ptr), m.to(tl.int64), tile_k * BLOCK_N, drop, BLOCK_N), dx, 0.0)
    dx = walk(dy_ptr, weight_ptr, dx, m, k, N, K, M, M, M, 1, w_step, w_row, BLOCK_K, PRECISION)
    at, inside = place(m, k, N, K, K)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _lora_backward_a(
    dlow_ptr, x_ptr, seed_ptr, dA_ptr, N, K, r, drop,
    PRECISION: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    k, j = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, RANK)
    share, shares = tl.program_id(1), tl.num_programs(1)
    dA = tl.zeros([BLOCK_K, RANK], tl.float32)  # transposed: wgmma has no rows fewer than 64
    for start in range(share * BLOCK_M, N, shares * BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        at, inside = place(row, k, N, K, K)
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        if seed_ptr is not None:
            kept = keep(tl.load(seed_ptr), row.to(tl.int64), tl.program_id(0) * BLOCK_K, drop, BLOCK_K)
            x = tl.where(kept, x, 0.0).to(x.dtype)
        at, inside = place(row, j, N, r, r)
        dlow = tl.load(dlow_ptr + at, mask=inside, other=0.0)
        dA = tl.dot(tl.trans(x), dlow.to(x.dtype), dA, input_precision=PRECISION)
    at = (share.to(tl.int64) * r + j[None, :]) * K + k[:, None]
    tl.store(dA_ptr + at, dA, mask=(k < K)[:, None] & (j < r)[None, :])


_WALK: Any = {"default": {"BLOCK_M": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}}
_low_tuned = Tuned(_lora_low, **_WALK, interpreted={"BLOCK_M": 32, "BLOCK_K": 32})
_forward_tuned = Tuned(_lora_forward, default=SAFE, interpreted=SMALL, search=SEARCH)
_backward_low_tuned = Tuned(
    _lora_backward_low,
    default={"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    interpreted={"BLOCK_M": 32, "BLOCK_N": 32},
)
_backward_input_tuned = Tuned(_lora_backward_input, default=SAFE, interpreted=SMALL, search=SEARCH)
_backward_a_tuned = Tuned(_lora_backward_a, **_WALK, interpreted={"BLOCK_M": 32, "BLOCK_K": 32})


def _sizes(x: Tensor, r: int) -> tuple[str, int]:
    return dot_precision(x.dtype), max(16, triton.next_power_of_2(r))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y (N, M), and low (N, r) float32. x (N, K) contiguous; one dtype."""
    (N, K), M, r = x.shape, weight.shape[0], A.shape[0]
    y = torch.empty(N, M, dtype=x.dtype, device=x.device)
    low = torch.empty(N, r, dtype=torch.float32, device=x.device)
    if not N:
        return y, low
    drop, gain = dropout_limit(p)
    dims = {"M": N, "N": M, "K": K, "r": r, "dropout": int(p > 0)}
    _low_tuned(
        lambda config: (triton.cdiv(N, config["BLOCK_M"]),),
        x, A, seed, low, N, K, r, *A.stride(), scaling * gain, drop, *_sizes(x, r),
        dtype=x.dtype, dims=dims,
    )  # fmt: skip
    _forward_tuned(
        tiles(N, M),
        x, weight, bias, low, B, y, N, M, K, r, *weight.stride(), *B.stride(), *_sizes(x, min(r, 32)),
        dtype=x.dtype, dims=dims,
    )  # fmt: skip
    return y, low


def backward(
    dy: Tensor, x: Tensor, low: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, p: float,
    seed: Tensor | None, gradients: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Fills ``gradients``: of x (N, K), weight, bias, A, B; None where not wanted.

    dy (N, M), x and low contiguous; dy, x, weight, A, B of one dtype.
    """
    dx, dweight, dbias, dA, dB = gradients
    (N, K), M, r = x.shape, weight.shape[0], A.shape[0]
    if not N:
        for g in gradients:
            if g is not None:
                g.zero_()
        return
    drop, gain = dropout_limit(p)
    options: Any = {"dtype": torch.float32, "device": x.device}
    dims = {"M": N, "N": K, "K": M, "r": r, "dropout": int(p > 0)}
    if dx is not None or dA is not None or dB is not None:
        dlow = torch.empty(N, r, **options)
        used: list[int] = []

        def blocks(config):
            used[:] = [triton.cdiv(N, config["BLOCK_M"])]
            return (used[0],)

        most = triton.cdiv(N, _backward_low_tuned.least("BLOCK_M"))
        shares = None if dB is None else torch.empty(most, M, r, **options)
        _backward_low_tuned(
            blocks,
            dy, B, low, dlow, shares, N, M, r, *B.stride(), scaling * gain, *_sizes(x, r),
            dtype=x.dtype, dims=dims,
        )  # fmt: skip
        if dB is not None and shares is not None:
            _sum_shares(shares[: used[0]], dB)
    if dx is not None:
        _backward_input_tuned(
            tiles(N, K),
            dy, weight, dlow, A, seed, dx, N, M, K, r, *weight.stride(), *A.stride(), drop, *_sizes(x, min(r, 32)),
            dtype=x.dtype, dims=dims,
        )  # fmt: skip
    if dA is not None:
        count = min(triton.cdiv(N, 128), triton.cdiv(2 * multiprocessors(x.device), triton.cdiv(K, 64)))
        shares = torch.empty(count, r, K, **options)
        _backward_a_tuned(
            lambda config: (triton.cdiv(K, config["BLOCK_K"]), count),
            dlow, x, seed, shares, N, K, r, drop, *_sizes(x, r),
            dtype=x.dtype, dims=dims,
        )  # fmt: skip
        _sum_shares(shares, dA)
    if dweight is not None:
        product(dy.t(), x.t(), dweight)
    if dbias is not None:
        column_sum(dy, dbias)


def _sum_shares(shares: Tensor, out: Tensor) -> None:
    """The sum of ``shares`` (n, ...) in ``out``, however that lies."""
    flat = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    column_sum(shares.flatten(1), flat.view(-1))
    if flat is not out:
        out.copy_(flat)
