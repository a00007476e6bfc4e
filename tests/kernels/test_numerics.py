"""The Triton kernels against float64, beyond the samples of the registry (tests/ops runs those with ``-k triton``)."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl

from llmfast.kernels import causal_attention, common, layer_norm
from llmfast.ops import _library, _verify, use_backend
from llmfast.ops._registry import OPS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Norm of the error over the norm of the exact value.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def assert_close(ours, exact, dtype, where):
    norm = float(exact.double().norm())
    error = float((ours.double() - exact.double()).norm())
    assert error <= TOLERANCE[dtype] * norm + 1e-30, f"{where}: {error / norm if norm else error:.1e}"


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    c = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)) * 1.5
    tl.store(c_ptr + at, (c.to(tl.bfloat16) + tl.load(a_ptr + at)).to(tl.float32))


def test_canary_the_interpreter_computes_bfloat16():
    """Without tests/kernels/mended_interpreter.py the errors are of order 1e9."""
    a, b = torch.randn(2, 32, 32).bfloat16()
    c = torch.empty(32, 32)
    _product[(1,)](a, b, c, 32)
    assert_close(c, a.double() @ b.double() * 1.5 + a.double(), torch.bfloat16, "product")


def errors(name, inputs, dtype):
    op = OPS[name]
    doubles = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    exact = _verify._outputs_and_gradients(op.reference, doubles)
    with use_backend(f"{name}=triton"):
        ours = _verify._outputs_and_gradients(op.function, inputs)
    for key, value in ours.items():
        if float(exact[key].abs().max() if exact[key].numel() else 0) > 1e-9:
            assert_close(value, exact[key], dtype, key)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "T"), [(16, 1), (32, 300), (64, 31), (80, 65), (96, 127), (128, 64), (64, 2), (16, 97)])
def test_attention_of_every_head_size(D, T, dtype):
    shape = {"B": 1, "H": 2, "Tq": T, "Tk": T, "D": D, "packed": True}
    errors("causal_attention", OPS["causal_attention"].inputs(shape, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("Tq", "Tk"), [(1, 67), (5, 64), (33, 70), (7, 3)])
def test_attention_of_cached_and_packed_rows(Tq, Tk, dtype):
    shape = {"B": 2, "H": 1, "Tq": Tq, "Tk": Tk, "D": 32, "kv_lens": True, "doc_ids": Tq <= Tk}
    errors("causal_attention", OPS["causal_attention"].inputs(shape, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 63), (37, 257), (130, 96), (5, 1600)])
def test_layer_norms_of_every_width(rows, width, dtype):
    shape = {"rows": (rows,), "width": width, "eps": 0.1 if width < 5 else 1e-5}
    for name in ("layer_norm", "add_layer_norm"):
        errors(name, OPS[name].inputs(shape, dtype), dtype)


# ---- Dropout ---------------------------------------------------------------------------------------------------------

P = 0.1
SEED = torch.tensor(0x1234_5678_9ABC_DEF1)


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


# ---- Configurations --------------------------------------------------------------------------------------------------


def test_rows_are_chosen_by_shape_and_dtype():
    tuned = causal_attention._forward_tuned
    small = tuned.choose(90, torch.bfloat16, (("D", 64), ("T", 1024), ("dropout", 0), ("documents", 0)))
    exact = tuned.choose(90, torch.float32, (("D", 64), ("T", 1024), ("dropout", 0), ("documents", 0)))
    assert (small["BLOCK_M"], exact["BLOCK_M"]) == (128, 32)
    assert common.table(86) == common.table(80)  # the newest architecture that is not newer
    assert common.table(75) == {}


def test_every_row_names_a_kernel_and_its_tiles():
    for arch in (80, 90, 100):
        for name, rows in common.table(arch).items():
            for row in rows:
                assert set(row["config"]) == set(common.TUNED[name].default)
                ranges = [limits for key, limits in row["when"].items() if key != "dtype"]
                assert all(low <= high for low, high in ranges)
