"""Weights kept as (in, out), as GPT-2's Conv1D does: read through the transposed view, gradients laid out alike."""

from __future__ import annotations

import pytest
import torch

from llmfast import ops
from llmfast.ops import _library
from llmfast.ops.decoder_layer import LayerOptions, decoder_layer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(_library.why_not_loaded() is not None, reason="needs the compiled kernels"),
]
C, HEADS = 48, 3
SHAPES = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)]  # (in, out) of qkv, out, fc and proj


def layer(x, w, rest):
    norms, b = rest[:4], rest[4:]
    pairs = [t for i in (0, 1) for t in (w[i], b[i])], [t for i in (2, 3) for t in (w[i], b[i])]
    options = LayerOptions(HEADS, "gelu_tanh", 0.25, 1e-5)
    return torch.cat(decoder_layer(x, None, (*norms[:2], *pairs[0], *norms[2:], *pairs[1]), options))


CALLS = {
    "decoder_layer": (layer, [(C,)] * 4 + [(out,) for _, out in SHAPES]),
    "mlp": (lambda x, w, rest: ops.mlp(x, w[2], rest[0], w[3], rest[1]), [(4 * C,), (C,)]),
    "linear": (lambda x, w, rest: ops.linear(x, w[0], rest[0]), [(3 * C,)]),
    "lora_linear": (
        lambda x, w, rest: ops.lora_linear(x, w[0], rest[0], rest[1], rest[2], scaling=2.0, dropout_p=0.1),
        [(3 * C,), (5, C), (3 * C, 5)],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_they_give_the_same_numbers_and_gradients_laid_out_as_they_are(name, dtype):
    call, shapes = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    stored = [torch.randn(*shape, generator=generator) * shape[0] ** -0.5 for shape in SHAPES]
    rest = [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]
    x = torch.randn(2, 37, C, generator=generator).requires_grad_()
    results = []
    for weights in (stored, [w.t().contiguous() for w in stored]):
        weights = [w.clone().requires_grad_() for w in weights]
        transposed = weights[0].shape == SHAPES[0]
        torch.manual_seed(1)
        with ops.use_backend("cpp"), torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            y = call(x, [w.t() if transposed else w for w in weights], rest)
        y.float().square().sum().backward()
        used = [w.grad for w in weights if w.grad is not None]
        assert len(used) in (1, 2, 4)
        assert all(grad.is_contiguous() for grad in used)
        grads = [g.t() if transposed else g for g in used] + [t.grad for t in (x, *rest)]
        results.append([y.detach().float(), *grads])
        for t in (x, *rest):
            t.grad = None
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
