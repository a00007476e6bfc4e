"""Low-rank adapters: equal at first, exact when merged, the base untouched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmfast.config import GPTConfig, LoRAConfig
from llmfast.errors import UserError
from llmfast.nn import (
    GPT,
    GPTForClassification,
    Linear,
    LoRALinear,
    add_lora,
    lora_disabled,
    lora_state_dict,
    merge_lora,
)
from llmfast.nn.lora import lora_layers
from llmfast.ops import use_backend

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = dict(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=24)


def tiny(**options):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SHAPE, **options}))


def ids(rows=3):
    return torch.randint(0, 61, (rows, 13), generator=torch.Generator().manual_seed(1))


def stir(model):
    """Adapters as training leaves them: B is no longer zero."""
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, 0.0, 0.1)
    return model


CONFIGS = {
    "as PEFT": LoRAConfig(r=4, alpha=8),
    "one each for q, k and v": LoRAConfig(r=3, alpha=5, split_qkv=True),
    "with the head": LoRAConfig(r=4, alpha=4, targets=("all-linear", "lm_head")),
    "attention alone": LoRAConfig(r=2, alpha=1, targets=("c_attn", "attn.c_proj")),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_nothing_changes_at_first_and_merging_changes_nothing(config):
    model, idx = tiny().eval(), ids()
    with torch.no_grad():
        with use_backend("torch"):  # where the plain and the adapted model run the same products
            bits = model(idx)[0]
        before = model(idx)[0]
        add_lora(model, config)
        with use_backend("torch"):
            assert torch.equal(model(idx)[0], bits)
        torch.testing.assert_close(model(idx)[0], before, rtol=1e-6, atol=1e-6)
        stir(model)
        adapted, loss = model(idx, idx, return_logits=True)
        assert not torch.allclose(adapted, before, atol=1e-2)
        with lora_disabled(model):
            torch.testing.assert_close(model(idx)[0], before, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(loss, nn.functional.cross_entropy(adapted.flatten(0, 1), idx.flatten()))
        merge_lora(model)
        assert not lora_layers(model)
        torch.testing.assert_close(model(idx)[0], adapted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_gradients_equal_dense_updates_in_float64(config):
    model, idx = stir(add_lora(tiny(), config)), ids()
    model(idx, idx)[1].backward()
    reference = tiny().double()
    deltas = {}
    for name, layer in lora_layers(model).items():
        A, B = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B))
        parts = zip(A.chunk(layer.splits), B.chunk(layer.splits), strict=True)
        deltas[name] = A, B, torch.cat([b @ a for a, b in parts]) * config.alpha / config.r
    weights = dict(reference.named_parameters())
    head = deltas.pop("lm_head", None)
    changed = {f"{name}.weight": weights[f"{name}.weight"] + delta for name, (_, _, delta) in deltas.items()}
    hidden = torch.func.functional_call(Hidden(reference), {f"gpt.{k}": v for k, v in changed.items()}, (idx,))
    table = weights["transformer.wte.weight"]
    logits = hidden @ (table if head is None else table + head[2]).T
    nn.functional.cross_entropy(logits.flatten(0, 1), idx.flatten()).backward()
    if head is not None:
        deltas["lm_head"] = head
    for name, layer in lora_layers(model).items():
        A, B, _ = deltas[name]
        torch.testing.assert_close(layer.lora_A.grad.double(), A.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(layer.lora_B.grad.double(), B.grad, rtol=1e-4, atol=1e-7)
        assert layer.weight.grad is None


class Hidden(nn.Module):
    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, idx):
        return self.gpt.hidden_states(idx)


def test_the_bases_tensors_stay_what_they_are():
    model = tiny()
    weight, bias = model.transformer.h[0].attn.c_attn.weight, model.transformer.h[0].attn.c_attn.bias
    add_lora(model, LoRAConfig())
    layer = model.transformer.h[0].attn.c_attn
    assert layer.weight is weight
    assert layer.bias is bias
    assert [name for name, p in model.named_parameters() if p.requires_grad] == list(lora_state_dict(model))
    copy = weight.clone()
    stir(model)
    merge_lora(model)
    assert torch.equal(weight, copy)
    assert type(model.transformer.h[0].attn.c_attn) is Linear
    assert all(p.requires_grad for p in model.parameters())


def test_a_tied_head_with_an_adapter_is_untied_by_merging(tmp_path):
    model = stir(add_lora(tiny(), LoRAConfig(targets=("lm_head",))))
    table = model.transformer.wte.weight.clone()
    logits = model(ids())[0]
    merge_lora(model).save_pretrained(tmp_path)
    assert torch.equal(model.transformer.wte.weight, table)
    torch.testing.assert_close(GPT.from_pretrained(tmp_path)(ids())[0], logits, rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_alone_and_follows_the_seed():
    layer = LoRALinear(nn.Linear(32, 8), 4, 8, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 32)
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.allclose(layer(x), first)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_the_books_numbers_of_parameters():
    """r 16 on every linear layer and the head, one each for q, k and v; gpt2 has a head of two classes."""
    with torch.device("meta"):
        classifier = GPTForClassification(GPTConfig.preset("gpt2"), ["ham", "spam"])
        medium = GPT(GPTConfig.preset("gpt2-medium"))
    assert classifier.num_parameters() == 124_441_346
    add_lora(classifier, LoRAConfig(r=16, alpha=16, targets=("all-linear", "score"), split_qkv=True))
    add_lora(medium, LoRAConfig(r=16, alpha=16, targets=("all-linear", "lm_head"), split_qkv=True))
    assert sum(p.numel() for p in classifier.parameters() if p.requires_grad) == 2_666_528
    assert sum(p.numel() for p in medium.parameters() if p.requires_grad) == 7_898_384


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (dict(r=0), "lora_r must be a positive integer"),
        (dict(alpha=-1.0), "lora_alpha must be a number above 0"),
        (dict(dropout=1.0), r"lora_dropout must lie in \[0, 1\)"),
        (dict(r=100_000), "lora_r 100000 is above 24, the full rank of transformer.h.0.attn.c_attn"),
        (dict(targets=()), "lora_targets must be names"),
        (dict(targets=("q_proj",)), "no linear layer is called 'q_proj'"),
        (dict(targets=("c_atn",)), r"did you mean c_attn\?"),
    ],
)
def test_mistakes_are_named(config, says):
    with pytest.raises(UserError, match=says):
        add_lora(tiny(), LoRAConfig(**config))


def test_adapters_are_not_stacked():
    with pytest.raises(UserError, match="has adapters already"):
        add_lora(add_lora(tiny(), LoRAConfig()), LoRAConfig())
