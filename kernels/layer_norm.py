"""Layer norm, alone or after dropout and the residual sum, forward and backward.

    s = residual + dropout(x)     y = (s - mean) rstd w + b             xhat = (s - mean) rstd, g = w dy
    ds = rstd (g - mean(g) - xhat mean(g xhat)) + incoming ds           dw = sum dy xhat, db = sum dy over the rows
    dx = dropout mask * ds

Tiling: a program owns BLOCK_R whole rows of C elements in registers, so that every pass reads its input once. Backward:
a fixed number of programs walks over the rows and keeps its share of dw and db in float32 registers; a second kernel
adds the shares. No atomics: the result does not depend on timing.
Bytes moved, e a element's size: forward 2 e N C (with residual 4 e N C); backward 3 e N C (with residual up to 5 e N C)
and 8 C a program.
Source: Ba, Kiros, Hinton 2016; the split of the backward's sums is that of every persistent layer-norm kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmfast.kernels.common import Tuned, column_sum, dropout_limit, keep, multiprocessors, rows_of

MAX_WIDTH = 8192  # elements of a row that fit the registers of a program


@triton.jit
def _layer_norm_forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, s_ptr, y_ptr, mean_ptr, rstd_ptr,
    N, C, eps, drop, gain,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C)
    valid = column[None, :] < C
    inside = (row < N)[:, None] & valid
    at = row[:, None] * C + column[None, :]
    s = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        s = tl.where(keep(tl.load(seed_ptr), row, 0, drop, BLOCK_C), s * gain, 0.0)
    if residual_ptr is not None:
        s += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        stored = s.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + at, stored, mask=inside)
        s = stored.to(tl.float32)  # the backward pass sees what was stored
    mean = tl.sum(s, 1) / C
    centred = tl.where(valid, s - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < N)
    tl.store(rstd_ptr + row, rstd, mask=row < N)


@triton.jit
def _layer_norm_backward(
    dy_ptr, ds_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr, dx_ptr, dresidual_ptr, dw_ptr, db_ptr,
    N, C, drop, gain,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK_C)
    valid = column[None, :] < C
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    db = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for block in range(program, tl.cdiv(N, BLOCK_R), programs):
        row = block * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        inside = (row < N)[:, None] & valid
        at = row[:, None] * C + column[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < N, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)
        xhat = tl.where(inside, (s - mean[:, None]) * rstd[:, None], 0.0)
        g = dy
        if weight_ptr is not None:
            g = dy * weight
        ds = rstd[:, None] * (g - (tl.sum(g, 1) / C)[:, None] - xhat * (tl.sum(g * xhat, 1) / C)[:, None])
        if ds_ptr is not None:
            ds += tl.load(ds_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + at, ds.to(dresidual_ptr.dtype.element_ty), mask=inside)
        if dx_ptr is not None:
            if seed_ptr is not None:
                ds = tl.where(keep(tl.load(seed_ptr), row, 0, drop, BLOCK_C), ds * gain, 0.0)
            tl.store(dx_ptr + at, ds.to(dx_ptr.dtype.element_ty), mask=inside)
        if dw_ptr is not None:
            dw += dy * xhat
        if db_ptr is not None:
            db += dy
    own = program.to(tl.int64) * C + column
    if dw_ptr is not None:
        tl.store(dw_ptr + own, tl.sum(dw, 0), mask=column < C)
    if db_ptr is not None:
        tl.store(db_ptr + own, tl.sum(db, 0), mask=column < C)


# One row a program keeps the registers few at every width; narrow rows are gathered by the tuned rows of configs/.
_forward_tuned = Tuned(
    _layer_norm_forward,
    default={"BLOCK_R": 1, "num_warps": 16, "num_stages": 1},
    interpreted={"BLOCK_R": 8},
    search=[{"BLOCK_R": r, "num_warps": w, "num_stages": 1} for r in (1, 2, 4) for w in (4, 8, 16)],
)
_backward_tuned = Tuned(
    _layer_norm_backward,
    default={"BLOCK_R": 1, "num_warps": 16, "num_stages": 1},
    interpreted={"BLOCK_R": 4},
    search=[{"BLOCK_R": r, "num_warps": w, "num_stages": s} for r in (1, 2, 4) for w in (4, 8, 16) for s in (1, 2)],
)


def _block(C: int) -> int:
    return max(16, triton.next_power_of_2(C))


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, s, mean, rstd) of x, residual (..., C); s is x itself without a residual. mean, rstd (rows,) float32."""
    rows = rows_of(x)
    N, C = rows.shape
    y = torch.empty_like(rows)
    s = rows if residual is None else torch.empty_like(rows, dtype=residual.dtype)
    mean, rstd = (torch.empty(N, dtype=torch.float32, device=x.device) for _ in range(2))
    drop, gain = dropout_limit(p)
    if N:
        _forward_tuned(
            lambda config: (triton.cdiv(N, config["BLOCK_R"]),),
            rows, None if residual is None else rows_of(residual), weight, bias, seed, s, y, mean, rstd,
            N, C, eps, drop, gain, _block(C),
            dtype=x.dtype, dims={"C": C},
        )  # fmt: skip
    return y.view(x.shape), s.view(x.shape), mean, rstd


def backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool,
    p: float, seed: Tensor | None, dx_dtype: torch.dtype | None, dresidual_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx, dresidual, dw, db); a gradient whose dtype is None is not written. ds: the gradient that s brings along."""
    rows, dy_rows = rows_of(s), rows_of(dy)
    N, C = rows.shape
    dx = None if dx_dtype is None else torch.empty_like(rows, dtype=dx_dtype)
    dresidual = None if dresidual_dtype is None else torch.empty_like(rows, dtype=dresidual_dtype)
    like = weight if weight is not None else rows
    dw = torch.zeros(C, dtype=like.dtype, device=s.device) if weight is not None else None
    db = torch.zeros(C, dtype=like.dtype, device=s.device) if has_bias else None
    if N:
        programs = min(2 * multiprocessors(s.device), N)
        shares = [
            None if g is None else torch.empty(programs, C, dtype=torch.float32, device=s.device) for g in (dw, db)
        ]
        drop, gain = dropout_limit(p)
        _backward_tuned(
            lambda config: (programs,),
            dy_rows, None if ds is None else rows_of(ds), rows, weight, mean, rstd, seed, dx, dresidual, *shares,
            N, C, drop, gain, _block(C),
            dtype=s.dtype, dims={"C": C},
        )  # fmt: skip
        for share, total in zip(shares, (dw, db), strict=True):
            if share is not None and total is not None:
                column_sum(share, total)
    dx, dresidual = (None if g is None else g.view(s.shape) for g in (dx, dresidual))
    return dx, dresidual, dw, db
