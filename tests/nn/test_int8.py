"""quantize_int8: what the weights become, what they cost, what such a model refuses."""

from __future__ import annotations

import pytest
import torch

from llmfast.config import GPTConfig
from llmfast.errors import UserError
from llmfast.nn import GPT, quantize_int8
from llmfast.nn.int8 import Int8GPT, quantize_rows, weight_bytes
from llmfast.ops import _library, matmul
from llmfast.ops.matmul import floats

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(vocab_size=97, block_size=16, n_layer=2, n_head=2, n_embd=32, init="pytorch")


def small(**options) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **options}))


def test_rows_are_rounded_to_their_own_scale():
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(-3, 4)[:, None]
    weight[2] = 0.0
    q, scale = quantize_rows(weight)
    assert q.dtype is torch.int8
    assert q.abs().amax(1).tolist() == [127, 127, 0, 127, 127, 127, 127]
    assert ((q * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize(
    "options", [{}, dict(tie_embeddings=False, lm_head_bias=True), dict(attn_out_proj=False, bias=False)]
)
def test_it_computes_with_the_rounded_weights(options):
    model = small(**options)
    reference, idx = quantize_int8(model), torch.randint(97, (2, 16))
    assert reference.num_parameters() == model.num_parameters()
    expected = small(**options)
    with torch.no_grad():
        for module in expected.modules():
            if isinstance(module, torch.nn.Linear) or module is expected.transformer.wte:
                q, scale = quantize_rows(module.weight)
                if module is not expected.lm_head or not expected.config.tie_embeddings:  # a tied one only once
                    module.weight.copy_(q * scale[:, None])
    logits, loss = reference(idx, idx, return_logits=True)
    torch.testing.assert_close(logits, expected(idx)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, expected(idx, idx)[1], rtol=1e-4, atol=1e-5)
    assert (logits - model(idx)[0]).abs().max() > 1e-5


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40)])
def test_a_linear_layer_reads_int8_rows_as_they_are_where_it_may(shape, monkeypatch):
    if _library.why_not_loaded() is not None:
        pytest.skip(str(_library.why_not_loaded()))
    monkeypatch.setattr(matmul, "MIN_OWN_MACS", 1)
    monkeypatch.setattr(matmul, "route_of", lambda dtype: "ours")
    made = []
    monkeypatch.setattr(matmul, "floats", lambda *args: made.append(1) or floats(*args))
    torch.manual_seed(0)
    x, bias, (q, scales) = torch.randn(shape), torch.randn(50), quantize_rows(torch.randn(50, 40))
    exact = x.double() @ (q * scales.double()[:, None]).t() + bias.double()
    torch.testing.assert_close(matmul.linear_int8(x, q, scales, bias).double(), exact, rtol=1e-5, atol=1e-5)
    assert not made
    for one, other in ((x.clone().requires_grad_(), bias), (x, bias.clone().requires_grad_())):
        y = matmul.linear_int8(one, q, scales, other)
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
        y.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul.linear_int8(x, q, scales, bias).dtype is torch.bfloat16
    assert len(made) == 3
    with pytest.raises(ValueError, match=r"weight must be \(N, K\)"):
        matmul.linear_int8(x[..., 1:], q, scales, bias)


def test_a_tied_matrix_is_held_once_also_after_a_move():
    model = quantize_int8(small(n_embd=128))
    assert weight_bytes(model) < 0.32 * weight_bytes(small(n_embd=128))
    model = model.to(torch.float64).to(torch.float32)
    assert model.lm_head.quantized is model.transformer.wte.quantized
    assert model.lm_head.scale is model.transformer.wte.scale


def test_the_model_that_it_is_made_from_stays_as_it_was():
    model = small().bfloat16()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    quantized = quantize_int8(model)
    assert isinstance(quantized, Int8GPT)
    assert {p.dtype for p in quantized.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(t, before[name]) and t.dtype is torch.bfloat16 for name, t in model.state_dict().items())


def test_what_it_refuses(tmp_path):
    model = quantize_int8(small())
    with pytest.raises(UserError, match="an int8 model is not saved"):
        model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="quantized already"):
        quantize_int8(model)
    broken = small()
    with torch.no_grad():
        broken.transformer.h[0].mlp.c_fc.weight[3, 3] = float("nan")
    with pytest.raises(UserError, match=r"transformer.h.0.mlp.c_fc.weight is not finite"):
        quantize_int8(broken)
