"""The Triton kernels against float64, beyond the samples of the registry (tests/ops runs those with ``-k triton``)."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from llmfast.kernels import causal_attention
from llmfast.ops import _verify, use_backend
from llmfast.ops._registry import OPS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Norm of the error over the norm of the exact value.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def assert_close(ours, exact, dtype, where):
    error = norm(ours.double() - exact.double())
    assert error <= TOLERANCE[dtype] * norm(exact), f"{where}: {error / norm(exact):.1e}"


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
    """Within TOLERANCE. Where a gradient cancels, as with two keys of which one has all the weight, nobody's relative
    error is small: there the rule of tests/ops counts, twice PyTorch's own error."""
    op = OPS[name]
    doubles = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    exact = _verify.outputs_and_gradients(op.reference, doubles)
    with use_backend(f"{name}=triton"):
        ours = _verify.outputs_and_gradients(op.function, inputs)
    largest = max(map(norm, exact.values()))
    for key, value in ours.items():
        error, size = norm(value - exact[key]), norm(exact[key])
        if error > TOLERANCE[dtype] * size:
            cancels = key.startswith("d ") and size < largest / 4
            assert cancels or not size, f"{key}: {error / size:.1e}"
            worst, where = _verify.Standard(op, inputs, dtype).worst(ours)
            assert worst <= 1, f"{where}: {worst:.2f} times the allowed error"


def norm(t):
    return float(t.double().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [16, 32, 64, 80, 96, 128])
@pytest.mark.parametrize("T", [1, 2, 31, 64])
def test_attention_of_every_head_size(D, T, dtype):
    shape = {"B": 1, "H": 2, "Tq": T, "Tk": T, "D": D, "packed": True}
    errors("causal_attention", OPS["causal_attention"].inputs(shape, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "T"), [(16, 300), (32, 127), (80, 97), (128, 65)])
def test_attention_of_longer_rows(D, T, dtype):
    """Every T from 1 to 300: tests/kernels/fuzz.py."""
    shape = {"B": 1, "H": 1, "Tq": T, "Tk": T, "D": D}
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
        {"rows": (11,), "C": 17, "V": 1009, "ignored": 0.3, "ignore_index": 5, "reduction": "none"},
        {"rows": (2,), "C": 16, "V": 3001, "label_smoothing": 0.1},
        {"rows": (9,), "C": 8, "V": 11, "ignored": 1.0},
        {"rows": (9,), "C": 8, "V": 11, "ignored": 1.0, "label_smoothing": 0.1, "reduction": "sum", "bias": True},
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
