"""Activations that backward makes again: not kept, and the gradients stay what they are."""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from llmfast.config import GPTConfig, LoRAConfig
from llmfast.nn import GPT, add_lora, layers
from llmfast.nn.lora import lora_state_dict
from llmfast.nn.remade import remade

pytestmark = pytest.mark.usefixtures("one_thread")


def product(x, w, context):
    """sum(sin(x) w v), whose backward needs sin(x) twice, and weak references to what of it lives."""
    a, kept = torch.sin(x), x.detach()
    made = []

    def make():
        made.append(1)
        return torch.sin(kept)

    with context(a, make):
        b = a * w
        with context(b, lambda: a.detach() * w.detach()):
            y = (b.view(-1) * a.view(-1)).sum()
    return y, weakref.ref(b), made


def test_a_remade_tensor_is_not_kept_and_gradients_are_the_same():
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    y, b, made = product(x, w, remade)
    got = torch.autograd.grad(y, (x, w))
    assert b() is None
    assert made
    y, b, made = product(x, w, lambda *_: nullcontext())
    assert b() is not None
    for one, other in zip(got, torch.autograd.grad(y, (x, w)), strict=True):
        assert torch.equal(one, other)
    assert not made


def test_checkpointing_and_inference_keep_their_say():
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    made = []

    def run(x):
        y, _, calls = product(x, w, remade)
        made.append(calls)
        return y

    checkpoint(run, x, use_reentrant=False).backward()
    with torch.no_grad():
        run(x)
    assert len(made) >= 2
    assert not any(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_adapters_are_those_of_kept_activations(dtype, checkpointing, monkeypatch):
    idx = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))

    def gradients():
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=32))
        add_lora(model, LoRAConfig(r=4, dropout=0.1))
        for name, tensor in lora_state_dict(model).items():
            if name.endswith("lora_B"):
                tensor.normal_()
        model.train().activation_checkpointing = checkpointing
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(idx, idx)[1]
        loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    got = gradients()
    monkeypatch.setattr(layers, "remade", lambda *_: nullcontext())
    for one, other in zip(got, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_an_adapted_model_compiles_in_one_graph():
    torch.manual_seed(0)
    model = add_lora(GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=1, n_head=2, n_embd=32)), LoRAConfig(r=4))
    idx = torch.randint(50, (2, 16))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(idx, idx)[1], model(idx, idx)[1])
