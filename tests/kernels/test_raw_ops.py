"""The raw ops under torch.library.opcheck: schema, fakes, autograd and what torch.compile makes of them."""

from __future__ import annotations

import pytest
import torch

from llmfast.ops import _triton

raw = torch.ops.llmfast_triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # part of the names, by which tools/gpu.py chooses
pytestmark = pytest.mark.parametrize("device", [DEVICE])
SEED = torch.tensor(5, device=DEVICE)


@pytest.fixture(autouse=True, scope="module")
def _registered():
    assert _triton.why_not_loaded() is None


def randn(*shapes, dtype=torch.float32):
    return [torch.randn(*shape).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def detached(*values):
    return tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in values)


def check(forward, backward, inputs, of_backward):
    """opcheck of ``forward`` with ``inputs``, and of ``backward`` with ``of_backward(inputs, outputs)``."""
    loose = {} if inputs[0].dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.library.opcheck(forward.default, inputs, **loose)
    with torch.no_grad():
        outputs = forward(*inputs)
        torch.library.opcheck(backward.default, detached(*of_backward(detached(*inputs), outputs)), **loose)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norms(device, dtype):
    inputs = (*randn((3, 5, 17), (17,), (17,), dtype=dtype), 1e-5)
    check(raw.layer_norm_fwd, raw.layer_norm_bwd, inputs, lambda i, o: (o[0], i[0], i[1], o[1], o[2], True))
    x, residual, w, b = randn((3, 5, 17), (3, 5, 17), (17,), (17,), dtype=dtype)
    check(
        raw.add_layer_norm_fwd,
        raw.add_layer_norm_bwd,
        (x, residual, w, b, 1e-5, 0.3, SEED),
        lambda i, o: (o[0], o[1], o[1], i[2], o[2], o[3], True, dtype, 0.3, SEED),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(device, dtype):
    rest = (0.3, 0.2, SEED, torch.tensor([4, 7], device=device), torch.arange(14, device=device).view(2, 7) // 3)
    inputs = (*randn((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), dtype=dtype), *rest)
    check(
        raw.causal_attention_fwd,
        raw.causal_attention_bwd,
        inputs,
        lambda i, o: (torch.ones_like(o[0]), *i[:3], *o, *rest),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlp(device, dtype):
    inputs = (*randn((2, 3, 5), (7, 5), (7,), (4, 7), (4,), dtype=dtype), "gelu", dtype, True)
    check(raw.mlp_fwd, raw.mlp_bwd, inputs, lambda i, o: (o[0], i[0], o[1], i[1], i[3], "gelu", 0b11111))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora(device, dtype):
    options = (0.5, 0.3, SEED, dtype)
    inputs = (*randn((2, 3, 5), (7, 5), (7,), (2, 5), (7, 2), dtype=dtype), *options)
    check(
        raw.lora_linear_fwd,
        raw.lora_linear_bwd,
        inputs,
        lambda i, o: (o[0], i[0], o[1], i[1], i[3], i[4], *options, 0b11111),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss(device, dtype):
    x, weight, bias = detached(*randn((6, 8), (11, 8), (11,), dtype=dtype))
    arguments = (
        x,
        weight,
        bias,
        torch.arange(6, device=device),
        torch.ones(6, device=device),
        0.1,
        dtype,
        True,
        True,
        True,
    )
    torch.library.opcheck(raw.linear_cross_entropy.default, arguments)
