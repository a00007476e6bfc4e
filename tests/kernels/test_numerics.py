"""The Triton kernels against float64, beyond the samples of the registry (tests/ops runs those with ``-k triton``)."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl

from llmfast.kernels import causal_attention, common, layer_norm, lora_linear
from llmfast.ops import _library, _triton, _verify, use_backend
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
    exact = _verify.outputs_and_gradients(op.reference, doubles)
    with use_backend(f"{name}=triton"):
        ours = _verify.outputs_and_gradients(op.function, inputs)
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


def test_attention_reads_no_block_beyond_the_diagonal():
    """Not a number in a key that is never read stays out of the result; the interpreter's blocks are 32 x 32."""
    q, k, v, dout = torch.randn(4, 1, 1, 96, 16)
    options = (0.25, 0.0, None, None, None)
    late_k, late_v = k.clone(), v.clone()
    late_k[..., 64:, :] = late_v[..., 64:, :] = float("nan")
    out, lse = causal_attention.forward(q, late_k, late_v, *options)
    assert out[..., :64, :].isfinite().all()
    dq, _, _ = causal_attention.backward(dout, q, late_k, late_v, out.nan_to_num(), lse.nan_to_num(), *options)
    assert dq[..., :64, :].isfinite().all()
    early_q, early_dout = q.clone(), dout.clone()
    early_q[..., :32, :] = early_dout[..., :32, :] = float("nan")
    out, lse = causal_attention.forward(q, k, v, *options)
    _, dk, dv = causal_attention.backward(early_dout, early_q, k, v, out, lse, *options)
    assert dk[..., 32:, :].isfinite().all()
    assert dv[..., 32:, :].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 63), (37, 257), (130, 96), (5, 1600)])
def test_layer_norms_of_every_width(rows, width, dtype):
    shape = {"rows": (rows,), "width": width, "eps": 0.1 if width < 5 else 1e-5}
    for name in ("layer_norm", "add_layer_norm"):
        errors(name, OPS[name].inputs(shape, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu"])
@pytest.mark.parametrize(("rows", "C", "M"), [(17, 13, 65), (67, 31, 97), (33, 64, 130)])
def test_mlp_of_every_activation(rows, C, M, activation, dtype):
    errors("mlp", OPS["mlp"].inputs({"rows": (rows,), "C": C, "M": M, "activation": activation}, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "K", "N", "r"), [(1, 1, 1, 1), (67, 31, 97, 3), (33, 65, 128, 16), (40, 48, 33, 65)])
def test_lora_of_every_rank(rows, K, N, r, dtype):
    errors("lora_linear", OPS["lora_linear"].inputs({"rows": (rows,), "K": K, "N": N, "r": r}, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        {"rows": (37,), "C": 48, "V": 257},
        {"rows": (61,), "C": 33, "V": 131, "bias": True, "label_smoothing": 0.1, "ignored": 0.3, "reduction": "sum"},
        {"rows": (19,), "C": 17, "V": 1009, "ignored": 0.3, "ignore_index": 5, "reduction": "none"},
        {"rows": (3,), "C": 16, "V": 9973, "label_smoothing": 0.1},
        {"rows": (9,), "C": 8, "V": 11, "ignored": 1.0},
        {"rows": (1,), "C": 1, "V": 1},
    ],
    ids=str,
)
def test_loss_of_every_vocabulary(shape, dtype):
    errors("linear_cross_entropy", OPS["linear_cross_entropy"].inputs(shape, dtype), dtype)


def test_the_loss_alone_is_the_loss_with_gradients():
    inputs = OPS["linear_cross_entropy"].inputs(
        {"rows": (37,), "C": 48, "V": 257, "label_smoothing": 0.1}, torch.float32
    )
    with use_backend("triton"):
        alone = OPS["linear_cross_entropy"].function(**inputs)
        inputs["x"].requires_grad_()
        assert torch.equal(alone, OPS["linear_cross_entropy"].function(**inputs).detach())


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
