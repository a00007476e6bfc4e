"""The two-layer perceptron: both products with the activation inside, forward and backward.

    h = x W1^T + b1     a = act(h)     y = a W2^T + b2                            act: gelu_tanh, gelu (erf) or relu
    da = dy W2     dh = da act'(h)     dx = dh W1     dW1 = dh^T x     db1 = sum dh     dW2 = dy^T a     db2 = sum dy

    _hidden             x W1^T; the epilogue adds b1, stores h (where a gradient will be wanted) and a
    _hidden_backward    dy W2; the epilogue reads h, stores dh, makes a again, which the forward pass did not keep, and
                        stores the tile's column sums of dh, the shares of db1
    _product            y, dx, dW1, dW2 (kernels/matmul.py)

Tiling: BLOCK_M rows x BLOCK_N hidden units, see kernels/matmul.py. The activation is computed in float32 from the
product's own registers. No atomics: shares of db1 are added by a second kernel.
Bytes moved beyond the products' operands, e an element's size, N rows, M hidden: forward 2 e N M (h, a written),
backward 3 e N M (h read, dh and a written). FLOPs: 4 N C M forward, 8 N C M backward.
Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; the fusion is cuBLASLt's GELU_AUX and DGELU_BGRAD.
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
    activate,
    activate_backward,
    column_sum,
    dot_precision,
    place,
    tile_of,
    with_bias,
)
from llmfast.kernels.matmul import SAFE, SEARCH, SMALL, product, tiles, walk


@triton.jit
def _hidden(
    x_ptr, weight_ptr, bias_ptr, h_ptr, a_ptr, N, M, C, w_row, w_step,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    _, _, r, j = tile_of(N, M, BLOCK_M, BLOCK_N, GROUP)
    h = walk(
        x_ptr, weight_ptr, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), r, j, N, M, C, C, C, 1, w_row, w_step, BLOCK_K,
        PRECISION,
    )  # fmt: skip
    h = with_bias(h, bias_ptr, j, M)
    at, inside = place(r, j, N, M, M)
    if h_ptr is not None:
        tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=inside)
    tl.store(a_ptr + at, activate(h, ACTIVATION).to(a_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _hidden_backward(
    dy_ptr, weight_ptr, h_ptr, dh_ptr, a_ptr, sums_ptr, N, M, C, w_row, w_step,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile_r, _, r, j = tile_of(N, M, BLOCK_M, BLOCK_N, GROUP)
    da = walk(
        dy_ptr, weight_ptr, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), r, j, N, M, C, C, C, 1, w_step, w_row, BLOCK_K,
        PRECISION,
    )  # fmt: skip
    at, inside = place(r, j, N, M, M)
    h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if a_ptr is not None:
        tl.store(a_ptr + at, activate(h, ACTIVATION).to(a_ptr.dtype.element_ty), mask=inside)
    dh = da * activate_backward(h, ACTIVATION)
    tl.store(dh_ptr + at, dh.to(dh_ptr.dtype.element_ty), mask=inside)
    if sums_ptr is not None:
        tl.store(sums_ptr + tile_r.to(tl.int64) * M + j, tl.sum(dh, 0), mask=j < M)


_hidden_tuned = Tuned(_hidden, default=SAFE, interpreted=SMALL, search=SEARCH)
_hidden_backward_tuned = Tuned(_hidden_backward, default=SAFE, interpreted=SMALL, search=SEARCH)


def forward(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None,
    activation: str, keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y (N, C_out), and h (N, M), the input of the activation, if ``keep``. x (N, C) contiguous; one dtype."""
    (N, C), M = x.shape, fc_weight.shape[0]
    options: Any = {"dtype": x.dtype, "device": x.device}
    h = torch.empty(N, M, **options) if keep else None
    a, y = torch.empty(N, M, **options), torch.empty(N, proj_weight.shape[0], **options)
    if N:
        _hidden_tuned(
            tiles(N, M),
            x, fc_weight, fc_bias, h, a, N, M, C, *fc_weight.stride(), activation, dot_precision(x.dtype),
            dtype=x.dtype, dims={"M": N, "N": M, "K": C},
        )  # fmt: skip
    return product(a, proj_weight, y, bias=proj_bias), h


def backward(
    dy: Tensor, x: Tensor, h: Tensor, fc_weight: Tensor, proj_weight: Tensor, activation: str,
    gradients: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Fills ``gradients``: of x (N, C), fc_weight, fc_bias, proj_weight, proj_bias; None where not wanted.

    dy (N, C_out), x and h contiguous; one dtype, but for the gradients.
    """
    dx, dfc, dfc_bias, dproj, dproj_bias = gradients
    (N, C), M = dy.shape, h.shape[1]
    if not N:
        for g in gradients:
            if g is not None:
                g.zero_()
        return
    if dx is not None or dfc is not None or dfc_bias is not None or dproj is not None:
        dh = torch.empty(N, M, dtype=h.dtype, device=h.device)
        a = None if dproj is None else torch.empty(N, M, dtype=h.dtype, device=h.device)
        sums = None
        if dfc_bias is not None:
            most = triton.cdiv(N, _hidden_backward_tuned.least("BLOCK_M"))
            sums = torch.empty(most, M, dtype=torch.float32, device=h.device)
        used: list[int] = []

        def grid(config):
            used[:] = [triton.cdiv(N, config["BLOCK_M"])]
            return tiles(N, M)(config)

        _hidden_backward_tuned(
            grid,
            dy, proj_weight, h, dh, a, sums, N, M, C, *proj_weight.stride(), activation, dot_precision(h.dtype),
            dtype=h.dtype, dims={"M": N, "N": M, "K": C, "erf": int(activation == "gelu")},
        )  # fmt: skip
        if dx is not None:
            product(dh, fc_weight.t(), dx)
        if dfc is not None:
            product(dh.t(), x.t(), dfc)
        if sums is not None and dfc_bias is not None:
            column_sum(sums[: used[0]], dfc_bias)
        if a is not None and dproj is not None:
            product(dy.t(), a.t(), dproj)
    if dproj_bias is not None:
        column_sum(dy, dproj_bias)
