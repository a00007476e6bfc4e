"""Causal attention without the (Tq, Tk) matrix, forward and backward.

    s = scale q k^T (masked)    p = exp(s - lse)    out = (mask * p) v      lse: log-sum-exp of a row of s
    dv = (mask * p)^T dout      dp = mask * (dout v^T)
    ds = p (dp - delta), delta = rowsum(dout * out)      dq = scale ds k      dk = scale ds^T q

Query i sees key j where j <= i + Tk - Tq, j < kv_lens[b] and doc_ids[b, j] == doc_ids[b, i + Tk - Tq]. mask: dropout,
0 or 1 / (1 - p), a function of (seed, batch and head, query, key) alone (``common.keep``), so that the tiles of forward
and backward may differ. A query that sees no key gives zeros, and an lse of +inf, which makes its p zero.

Tiling: forward and dq own BLOCK_M queries and walk over the keys, those left of the diagonal without a mask; dk and dv
own BLOCK_N keys and walk over the queries. Scores are kept in base 2 (scale log2 e), so that exp is one instruction.
Every sum is made by one program: no atomics, the same bits every time.
Bytes moved: q, k, v, out once, and k, v once more a block of BLOCK_M queries, mostly from L2. FLOPs: 4 D a visible pair
forward, 10 D backward, of which 4 D for the scores again, in each of its two kernels.
Source: Dao et al., "FlashAttention", 2022, and "FlashAttention-2", 2023.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmfast.kernels.common import Tuned, dot_precision, dropout_limit, keep, place

MAX_HEAD_SIZE = 128
LOG2_E = 1.4426950408889634


@triton.jit
def _load(pointer, rows, stride, columns, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECKED: tl.constexpr):
    """(rows, BLOCK_D) of a matrix whose rows are ``stride`` apart; zeros from row ``limit`` and column D on."""
    at = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if CHECKED and BLOCK_D != D:
        return tl.load(at, mask=(rows < limit)[:, None] & (columns < D)[None, :], other=0.0)
    elif CHECKED:
        return tl.load(at, mask=(rows < limit)[:, None], other=0.0)
    elif BLOCK_D != D:
        return tl.load(at, mask=(columns < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _store(pointer, values, rows, stride, columns, limit, D: tl.constexpr):
    """What ``_load`` would read."""
    at, inside = place(rows, columns, limit, D, stride)
    tl.store(pointer + at, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _head(H):
    """(number, batch row, head) of what this program works on."""
    which = tl.program_id(1).to(tl.int64)
    return which, which // H, which % H


@triton.jit
def _keys(kv_lens_ptr, batch, Tk):
    """How many keys the batch row has."""
    if kv_lens_ptr is not None:
        return tl.minimum(tl.load(kv_lens_ptr + batch).to(tl.int32), Tk)
    else:
        return Tk


@triton.jit
def _visible(query, key, offset, keys, docs_ptr, query_docs):
    """(queries, keys) bool; keys: how many this batch row has; docs_ptr: of this batch row, or None."""
    seen = (key[None, :] <= (query + offset)[:, None]) & (key < keys)[None, :]
    if docs_ptr is not None:
        docs = tl.load(docs_ptr + key, mask=key < keys, other=-1)
        seen = seen & (query_docs[:, None] == docs[None, :])
    return seen


@triton.jit
def _load_docs(docs_ptr, query, offset, Tq):
    if docs_ptr is not None:
        inside = (query < Tq) & (query + offset >= 0)
        return tl.load(docs_ptr + query + offset, mask=inside, other=-2)
    else:
        return query


@triton.jit
def _attend(
    q, accumulator, top, total, k_ptr, v_ptr, k_stride, v_stride, docs_ptr, query_docs, seed_ptr,
    first, last, query, offset, keys, head_row, scale, drop, gain,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk over the keys first .. last - 1: running maximum, sum and weighted values of BLOCK_M queries."""
    column = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, key, k_stride, column, keys, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if MASKED:
            s = tl.where(_visible(query, key, offset, keys, docs_ptr, query_docs), s, float("-inf"))
        top_now = tl.maximum(top, tl.max(s, 1))
        base = top_now
        if MASKED:
            base = tl.where(top_now == float("-inf"), 0.0, top_now)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        if seed_ptr is not None:
            kept = keep(tl.load(seed_ptr), head_row + query, start, drop, BLOCK_N)
            p = tl.where(kept, p * gain, 0.0)
        v = _load(v_ptr, key, v_stride, column, keys, D, BLOCK_D, MASKED)
        accumulator = tl.dot(p.to(v.dtype), v, accumulator * shrink[:, None], input_precision=PRECISION)
        top = top_now
    return accumulator, top, total


@triton.jit
def _attention_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, seed_ptr, kv_lens_ptr, docs_ptr,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride, out_batch, out_head, out_stride,
    H, Tq, Tk, scale, drop, gain,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The queries that see most keys first: short blocks fill the gaps at the end.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    which, batch, head = _head(H)
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    out_ptr += batch * out_batch + head * out_head
    offset, keys = Tk - Tq, _keys(kv_lens_ptr, batch, Tk)
    if docs_ptr is not None:
        docs_ptr += batch * Tk

    query = block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    q = _load(q_ptr, query, q_stride, column, Tq, D, BLOCK_D, True)
    query_docs = _load_docs(docs_ptr, query, offset, Tq)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    head_row = which << 32

    end = tl.maximum(tl.minimum((block + 1) * BLOCK_M + offset, keys), 0)  # no query of the block sees more
    open_end = end * 0  # up to here every query sees every key
    if docs_ptr is None:
        open_end = tl.maximum(tl.minimum(block * BLOCK_M + offset + 1, keys), 0) // BLOCK_N * BLOCK_N
    accumulator, top, total = _attend(
        q, accumulator, top, total, k_ptr, v_ptr, k_stride, v_stride, docs_ptr, query_docs, seed_ptr,
        0, open_end, query, offset, keys, head_row, scale, drop, gain, D, BLOCK_D, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    accumulator, top, total = _attend(
        q, accumulator, top, total, k_ptr, v_ptr, k_stride, v_stride, docs_ptr, query_docs, seed_ptr,
        open_end, end, query, offset, keys, head_row, scale, drop, gain, D, BLOCK_D, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    empty = total == 0.0
    out = accumulator / tl.where(empty, 1.0, total)[:, None]
    _store(out_ptr, out, query, out_stride, column, Tq, D)
    lse = tl.where(empty, float("inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse_ptr + which * Tq + query, lse, mask=query < Tq)


@triton.jit
def _attention_delta(
    out_ptr, dout_ptr, delta_ptr, out_batch, out_head, out_stride, dout_batch, dout_head, dout_stride, H, Tq,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    which, batch, head = _head(H)
    query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    out_ptr += batch * out_batch + head * out_head
    dout_ptr += batch * dout_batch + head * dout_head
    out = _load(out_ptr, query, out_stride, column, Tq, D, BLOCK_D, True).to(tl.float32)
    dout = _load(dout_ptr, query, dout_stride, column, Tq, D, BLOCK_D, True).to(tl.float32)
    tl.store(delta_ptr + which * Tq + query, tl.sum(out * dout, 1), mask=query < Tq)


@triton.jit
def _attention_backward_keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, seed_ptr, kv_lens_ptr, docs_ptr,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride, dout_batch, dout_head, dout_stride,
    dk_batch, dk_head, dk_stride, dv_batch, dv_head, dv_stride,
    H, Tq, Tk, scale, score_scale, drop, gain,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    which, batch, head = _head(H)
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    dout_ptr += batch * dout_batch + head * dout_head
    offset, keys = Tk - Tq, _keys(kv_lens_ptr, batch, Tk)
    if docs_ptr is not None:
        docs_ptr += batch * Tk

    key = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    k = _load(k_ptr, key, k_stride, column, Tk, D, BLOCK_D, True)
    v = _load(v_ptr, key, v_stride, column, Tk, D, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    head_row = which << 32
    first = tl.maximum(tl.program_id(0) * BLOCK_N - offset, 0) // BLOCK_M * BLOCK_M  # earlier queries see none of them
    for start in range(first, Tq, BLOCK_M):
        query = start + tl.arange(0, BLOCK_M)
        q = _load(q_ptr, query, q_stride, column, Tq, D, BLOCK_D, True)
        lse = tl.load(lse_ptr + which * Tq + query, mask=query < Tq, other=float("inf"))
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * score_scale
        seen = tl.trans(_visible(query, key, offset, keys, docs_ptr, _load_docs(docs_ptr, query, offset, Tq)))
        p = tl.exp2(tl.where(seen, s, float("-inf")) - lse[None, :])
        dout = _load(dout_ptr, query, dout_stride, column, Tq, D, BLOCK_D, True)
        delta = tl.load(delta_ptr + which * Tq + query, mask=query < Tq, other=0.0)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        if seed_ptr is not None:
            kept = tl.trans(keep(tl.load(seed_ptr), head_row + query, tl.program_id(0) * BLOCK_N, drop, BLOCK_N))
            dv = tl.dot(tl.where(kept, p * gain, 0.0).to(dout.dtype), dout, dv, input_precision=PRECISION)
            dp = tl.where(kept, dp * gain, 0.0)
        else:
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    _store(dk_ptr + batch * dk_batch + head * dk_head, dk * scale, key, dk_stride, column, Tk, D)
    _store(dv_ptr + batch * dv_batch + head * dv_head, dv, key, dv_stride, column, Tk, D)


@triton.jit
def _attention_backward_queries(
    q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, lse_ptr, delta_ptr, seed_ptr, kv_lens_ptr, docs_ptr,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride, dout_batch, dout_head, dout_stride,
    dq_batch, dq_head, dq_stride,
    H, Tq, Tk, scale, score_scale, drop, gain,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    which, batch, head = _head(H)
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    dout_ptr += batch * dout_batch + head * dout_head
    offset, keys = Tk - Tq, _keys(kv_lens_ptr, batch, Tk)
    if docs_ptr is not None:
        docs_ptr += batch * Tk

    query = block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    q = _load(q_ptr, query, q_stride, column, Tq, D, BLOCK_D, True)
    dout = _load(dout_ptr, query, dout_stride, column, Tq, D, BLOCK_D, True)
    lse = tl.load(lse_ptr + which * Tq + query, mask=query < Tq, other=float("inf"))
    delta = tl.load(delta_ptr + which * Tq + query, mask=query < Tq, other=0.0)
    query_docs = _load_docs(docs_ptr, query, offset, Tq)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    head_row = which << 32
    end = tl.maximum(tl.minimum((block + 1) * BLOCK_M + offset, keys), 0)
    for start in range(0, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, key, k_stride, column, keys, D, BLOCK_D, True)
        v = _load(v_ptr, key, v_stride, column, keys, D, BLOCK_D, True)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_scale
        s = tl.where(_visible(query, key, offset, keys, docs_ptr, query_docs), s, float("-inf"))
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if seed_ptr is not None:
            kept = keep(tl.load(seed_ptr), head_row + query, start, drop, BLOCK_N)
            dp = tl.where(kept, dp * gain, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    _store(dq_ptr + batch * dq_batch + head * dq_head, dq * scale, query, dq_stride, column, Tq, D)


def _tiles(*sizes: tuple[int, int, int, int]) -> list[dict[str, int]]:
    return [{"BLOCK_M": m, "BLOCK_N": n, "num_warps": w, "num_stages": s} for m, n, w, s in sizes]


_SAFE = _tiles((16, 16, 4, 1))[0]
_SMALL = {"BLOCK_M": 32, "BLOCK_N": 32}
_forward_tuned = Tuned(
    _attention_forward,
    default=_SAFE,
    interpreted=_SMALL,
    search=_tiles((128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2), (64, 32, 4, 2)),
)
_keys_tuned = Tuned(
    _attention_backward_keys,
    default=_SAFE,
    interpreted=_SMALL,
    search=_tiles((64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2), (32, 64, 4, 2), (128, 64, 8, 2)),
)
_queries_tuned = Tuned(
    _attention_backward_queries,
    default=_SAFE,
    interpreted=_SMALL,
    search=_tiles((128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 2), (64, 32, 4, 2)),
)


def _strided(*tensors: Tensor) -> list[Tensor]:
    return [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]


def _steps(t: Tensor) -> tuple[int, int, int]:
    return t.stride(0), t.stride(1), t.stride(2)


def _heads(q: Tensor, T: int) -> Tensor:
    """An empty (B, H, T, D) that lies as (B, T, H, D), the layout of the projections before and after."""
    B, H, _, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2)


def _sizes(q: Tensor, k: Tensor) -> tuple[Any, ...]:
    D = q.shape[-1]
    return D, max(16, triton.next_power_of_2(D)), dot_precision(q.dtype)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, p: float, seed: Tensor | None, kv_lens: Tensor | None,
    doc_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, Tq, D) and lse (B, H, Tq) float32, in base 2 and of the scaled scores."""
    q, k, v = _strided(q, k, v)
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    out, lse = _heads(q, Tq), torch.empty(B, H, Tq, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    drop, gain = dropout_limit(p)
    _forward_tuned(
        lambda config: (triton.cdiv(Tq, config["BLOCK_M"]), B * H),
        q, k, v, out, lse, seed, kv_lens, None if doc_ids is None else doc_ids.contiguous(),
        *_steps(q), *_steps(k), *_steps(v), *_steps(out), H, Tq, Tk, scale * LOG2_E, drop, gain, *_sizes(q, k),
        dtype=q.dtype, dims={"D": D, "T": Tq, "dropout": int(p > 0), "documents": int(doc_ids is not None)},
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, p: float,
    seed: Tensor | None, kv_lens: Tensor | None, doc_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, shaped as q, k, v."""
    q, k, v, dout, out = _strided(q, k, v, dout, out)
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    dq, dk, dv = _heads(q, Tq), _heads(q, Tk), _heads(q, Tk)
    if not B * H * D:
        return dq, dk, dv
    docs = None if doc_ids is None else doc_ids.contiguous()
    delta = torch.empty_like(lse)
    sizes, dims = _sizes(q, k), {"D": D, "T": Tq, "dropout": int(p > 0), "documents": int(doc_ids is not None)}
    drop, gain = dropout_limit(p)
    numbers = (H, Tq, Tk, scale, scale * LOG2_E, drop, gain, *sizes)
    inputs = *_steps(q), *_steps(k), *_steps(v), *_steps(dout)
    if Tq:
        _attention_delta[(triton.cdiv(Tq, 32), B * H)](
            out, dout, delta, *_steps(out), *_steps(dout), H, Tq, D, sizes[1], 32, num_warps=4
        )
        _queries_tuned(
            lambda config: (triton.cdiv(Tq, config["BLOCK_M"]), B * H),
            q, k, v, dout, dq, lse, delta, seed, kv_lens, docs, *inputs, *_steps(dq), *numbers,
            dtype=q.dtype, dims=dims,
        )  # fmt: skip
    if Tk:
        _keys_tuned(
            lambda config: (triton.cdiv(Tk, config["BLOCK_N"]), B * H),
            q, k, v, dout, dk, dv, lse, delta, seed, kv_lens, docs, *inputs, *_steps(dk), *_steps(dv), *numbers,
            dtype=q.dtype, dims=dims,
        )  # fmt: skip
    return dq, dk, dv
