"""Dropout in the Triton kernels: the mask is Philox of seed, row and column, forward and backward, in every tile."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from llmfast.kernels import causal_attention, common, layer_norm, lora_linear
from llmfast.ops import _library, _triton
from tests.kernels.test_numerics import DTYPES, assert_close
from tests.ops.test_philox import LOW, philox

P = 0.1
SEED = torch.tensor(0x1234_5678_9ABC_DEF1)


def mask(rows, columns):
    """(rows, columns) float64: 0 or 1 / (1 - p), by the layout of csrc/cpu/philox.h; rows: their numbers."""
    drop, gain = common.dropout_limit(P)
    row, group = np.asarray(rows, np.uint64)[:, None], np.arange(-(-columns // 4), dtype=np.uint64)[None]
    words = philox((group & LOW, row & LOW, row >> 32, group >> 32), (int(SEED) & LOW, int(SEED) >> 32))
    words = np.stack(np.broadcast_arrays(*words), -1).reshape(len(rows), -1)[:, :columns]
    return torch.from_numpy((words >= drop) * gain)


def drawn(*shapes, dtype):
    return [torch.randn(*shape).to(dtype) for shape in shapes]


def exact(function, leaves, cotangents):
    """Outputs and gradients in float64."""
    leaves = [t.double().requires_grad_() for t in leaves]
    outputs = function(*leaves)
    return *outputs, *torch.autograd.grad(outputs, leaves, [c.double() for c in cotangents])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "T"), [(16, 33), (32, 45), (64, 33), (80, 31), (96, 17), (128, 33)])
def test_attention_with_dropout_is_exact(D, T, dtype):
    q, k, v, dout = drawn(*4 * [(1, 2, T, D)], dtype=dtype)
    dropped = torch.stack([mask([(head << 32) + query for query in range(T)], T) for head in range(2)])

    def function(q, k, v):
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        return ((q @ k.mT * 0.2).masked_fill(hidden, float("-inf")).softmax(-1) * dropped @ v,)

    out, lse = causal_attention.forward(q, k, v, 0.2, P, SEED, None, None)
    ours = out, *causal_attention.backward(dout, q, k, v, out, lse, 0.2, P, SEED, None, None)
    for value, true, where in zip(ours, exact(function, (q, k, v), [dout]), ("out", "dq", "dk", "dv"), strict=True):
        assert_close(value, true, dtype, where)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_layer_norm_with_dropout_is_exact(dtype):
    N, C = 37, 130
    x, residual, dy, ds, w, b = drawn(*4 * [(N, C)], (C,), (C,), dtype=dtype)

    def function(x, residual, w, b):
        s = residual + x * mask(range(N), C)
        return torch.nn.functional.layer_norm(s, (C,), w, b), s

    y, s, mean, rstd = layer_norm.forward(x, residual, w, b, 1e-5, P, SEED)
    ours = y, s, *layer_norm.backward(dy, ds, s, w, mean, rstd, True, P, SEED, dtype, dtype)
    true = exact(function, (x, residual, w, b), [dy, ds])
    for value, right, where in zip(ours, true, ("y", "s", "dx", "dresidual", "dw", "db"), strict=True):
        assert_close(value, right, dtype, where)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [3, 16])
def test_lora_with_dropout_is_exact(rank, dtype):
    N, K, M = 67, 45, 33
    x, weight, A, B, dy = drawn((N, K), (M, K), (rank, K), (M, rank), (N, M), dtype=dtype)

    def function(x, weight, A, B):
        return (x @ weight.T + 0.5 * (x * mask(range(N), K)) @ A.T @ B.T,)

    y, low = lora_linear.forward(x, weight, None, A, B, 0.5, P, SEED)
    gradients = [torch.empty_like(t) for t in (x, weight, A, B)]
    lora_linear.backward(dy, x, low, weight, A, B, 0.5, P, SEED, (*gradients[:2], None, *gradients[2:]))
    true = exact(function, (x, weight, A, B), [dy])
    for value, right, where in zip((y, *gradients), true, ("y", "dx", "dweight", "dA", "dB"), strict=True):
        assert_close(value, right, dtype, where)


def test_layer_norm_drops_the_same_elements_forward_and_backward():
    x, zeros = torch.ones(67, 130), torch.zeros(67, 130)
    _, s, mean, rstd = layer_norm.forward(x, zeros, None, None, 1e-5, P, SEED)
    dx, _, _, _ = layer_norm.backward(zeros, x, s, None, mean, rstd, False, P, SEED, torch.float32, torch.float32)
    torch.testing.assert_close(dx, s, rtol=0, atol=0)
    assert sorted(s.unique().tolist()) == pytest.approx([0.0, 1 / (1 - P)])
    assert float((s == 0).double().mean()) == pytest.approx(P, abs=4 * (P * (1 - P) / s.numel()) ** 0.5)


def test_attention_drops_the_same_elements_forward_and_backward():
    """With the identity as values the output is the dropped matrix, with it as cotangent so is dv."""
    T = 128
    q, k = torch.randn(2, 1, 2, T, T)
    eye = torch.eye(T).expand(1, 2, T, T).contiguous()
    out, lse = causal_attention.forward(q, k, eye, 0.1, P, SEED, None, None)
    _, _, dv = causal_attention.backward(eye, q, k, eye, out, lse, 0.1, P, SEED, None, None)
    torch.testing.assert_close(dv.mT, out, rtol=1e-5, atol=1e-7)
    visible = torch.ones(T, T, dtype=torch.bool).tril().expand(1, 2, T, T)
    dropped = float((out[visible] == 0).double().mean())
    assert dropped == pytest.approx(P, abs=4 * (P * (1 - P) / int(visible.sum())) ** 0.5)
    assert not torch.equal(out[0, 0] == 0, out[0, 1] == 0)


def test_tiles_do_not_matter_to_dropout(monkeypatch):
    q, k, v, dout = torch.randn(4, 1, 2, 70, 32)

    def run(m, n):
        tiles = {"BLOCK_M": m, "BLOCK_N": n}
        for tuned in (causal_attention._forward_tuned, causal_attention._keys_tuned, causal_attention._queries_tuned):
            monkeypatch.setattr(tuned, "interpreted", tiles)
        out, lse = causal_attention.forward(q, k, v, 0.2, P, SEED, None, None)
        return out, *causal_attention.backward(dout, q, k, v, out, lse, 0.2, P, SEED, None, None)

    for a, b in zip(run(32, 32), run(64, 16), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(_library.why_not_loaded() is not None, reason="the compiled kernels are not built")
def test_masks_are_those_of_the_compiled_kernels():
    """Both make the mask of csrc/cpu/philox.h, so that a run may change its device."""
    x, residual, weight = torch.randn(9, 65), torch.randn(9, 65), torch.ones(65)
    theirs = torch.ops.llmfast.add_layer_norm_fwd(x, residual, weight, None, 1e-5, P, SEED)
    ours = layer_norm.forward(x, residual, weight, None, 1e-5, P, SEED)
    for a, b in itertools.islice(zip(ours, theirs, strict=True), 2):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    q, k, v, dout = torch.randn(4, 2, 3, 45, 16)
    theirs = torch.ops.llmfast.causal_attention_fwd(q, k, v, 0.25, P, SEED, None, None)
    ours = causal_attention.forward(q, k, v, 0.25, P, SEED, None, None)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    exact = torch.ops.llmfast.causal_attention_bwd(dout, q, k, v, *theirs, 0.25, P, SEED, None, None)
    grads = causal_attention.backward(dout, q, k, v, *ours, 0.25, P, SEED, None, None)
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(_library.why_not_loaded() is not None, reason="the compiled kernels are not built")
@pytest.mark.parametrize("rank", [3, 16])
def test_the_mask_of_lora_is_that_of_the_compiled_kernels(rank):
    x, weight, A, B, dy = (torch.randn(*s) for s in ((67, 45), (33, 45), (rank, 45), (33, rank), (67, 33)))
    options = (0.5, P, SEED, torch.float32)
    y, low = torch.ops.llmfast.lora_linear_fwd(x, weight, None, A, B, *options)
    assert _triton.why_not_loaded() is None
    ours = torch.ops.llmfast_triton.lora_linear_fwd(x, weight, None, A, B, *options)
    for a, b in zip(ours, (y, low), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    exact = torch.ops.llmfast.lora_linear_bwd(dy, x, low, weight, A, B, *options, 0b11111)
    grads = torch.ops.llmfast_triton.lora_linear_bwd(dy, x, low, weight, A, B, *options, 0b11111)
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_lora_drops_the_same_elements_forward_and_backward():
    """With A the identity the update is the dropped input, and so is its gradient for B = 1 and a cotangent of x."""
    x, eye = torch.ones(67, 32), torch.eye(32)
    zeros = torch.zeros(32, 32)
    y, low = lora_linear.forward(x, zeros, None, eye, eye, 1.0, P, SEED)
    dx, dA = torch.empty(67, 32), torch.empty(32, 32)
    lora_linear.backward(x, x, low, zeros, eye, eye, 1.0, P, SEED, (dx, None, None, dA, None))
    torch.testing.assert_close(dx, y)
    assert sorted(y.unique().tolist()) == pytest.approx([0.0, 1 / (1 - P)])
    assert float((y == 0).double().mean()) == pytest.approx(P, abs=4 * (P * (1 - P) / y.numel()) ** 0.5)
    torch.testing.assert_close(dA, y.sum(0).expand(32, 32))
