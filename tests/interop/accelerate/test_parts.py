"""accelerate() on single parts: the book's attentions, LoRA layers, plain module trees, and look-alikes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llmfast
from llmfast import ops
from llmfast.ops import _library
from tests.interop.accelerate.models import HEADS, C, V, book, hugging_face, notebook_classes, peer, spread

pytestmark = pytest.mark.usefixtures("one_thread")
BONUS = "ch03/02_bonus_efficient-multihead-attention/mha-implementations.ipynb"
SIZES = dict(d_in=C, d_out=C, context_length=80, dropout=0.0, num_heads=HEADS)
X = torch.randn(2, 70, C, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def kernels():
    with ops.use_backend("cpp" if _library.why_not_loaded() is None else "torch"):
        yield


def run(module: nn.Module, x: torch.Tensor = X) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]
    module.zero_grad(set_to_none=True)
    return found


def assert_swapped(module: nn.Module, kind: str, x: torch.Tensor = X, rel: float = 2e-5) -> None:
    """Swaps of that kind alone, with the module's own numbers and gradients."""
    wanted = run(module, x)
    report = llmfast.accelerate(module)
    assert {e.swap for e in report.entries} == {kind}, str(report)
    largest = max(float(t.norm()) for t in wanted)  # the gradient of a key's bias is zero but for rounding
    for a, b in zip(run(module, x), wanted, strict=True):
        assert float((a - b).norm()) <= rel * max(float(b.norm()), 0.01 * largest)


NOTEBOOK = ["MultiHeadAttentionCombinedQKV", "MHAEinsum", "MHAPyTorchScaledDotProduct", "MHAPyTorchClass"]


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("name", NOTEBOOK)
def test_the_books_attentions_of_the_bonus_notebook(name, qkv_bias):
    module = notebook_classes(BONUS, name)[name](**SIZES, qkv_bias=qkv_bias)
    if name == "MHAPyTorchClass" and qkv_bias:  # add_bias_kv gives every query one more key
        assert "dropouts" in llmfast.accelerate(module).kept[0].reason
    else:
        assert_swapped(spread(module), "attention")


def test_an_attention_that_looks_at_the_future_is_left_alone():
    """The notebook's mask is True where a key is hidden; scaled_dot_product_attention reads it the other way round."""
    name = "MHAPyTorchSDPAWithoutFlash"
    report = llmfast.accelerate(spread(notebook_classes(BONUS, name)[name](**SIZES)))
    assert "something else than the known one" in report.kept[0].reason


@pytest.mark.parametrize("name", ["CausalAttention", "MultiHeadAttentionWrapper", "MultiHeadAttention"])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_the_books_attentions_of_chapter_3(name, qkv_bias):
    chapter = peer("LLMs-from-scratch/pkg/llms_from_scratch", "ch03")
    sizes = dict(SIZES) | ({"d_out": C // HEADS} if name == "MultiHeadAttentionWrapper" else {})
    if name == "CausalAttention":
        del sizes["num_heads"]
    assert_swapped(spread(getattr(chapter, name)(**sizes, qkv_bias=qkv_bias)), "attention")


def test_a_sequence_longer_than_the_mask_is_the_modules_own_mistake():
    module = peer("LLMs-from-scratch/pkg/llms_from_scratch", "ch03").MultiHeadAttention(**SIZES)
    llmfast.accelerate(module)
    with pytest.raises(RuntimeError):
        module(torch.randn(1, 81, C))


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.ReLU()])
def test_any_tree_with_norms_and_perceptrons(act):
    tree = nn.ModuleDict({"a": nn.Sequential(nn.Linear(C, 70), act, nn.Linear(70, 9)), "b": nn.LayerNorm(C, eps=0.1)})
    tree["c"] = nn.Sequential(nn.Linear(C, 8, bias=False), act, nn.Linear(8, C, bias=False), nn.Dropout(0.5))
    tree["d"] = nn.LayerNorm(C, elementwise_affine=False)
    wanted = [tree[k](X) for k in "abd"]
    report = llmfast.accelerate(tree)
    assert {e.name: e.swap for e in report.entries} == {"a": "mlp", "b": "layer norm", "c": "mlp", "d": "layer norm"}
    for k, y in zip("abd", wanted, strict=True):
        torch.testing.assert_close(tree[k](X), y, rtol=1e-5, atol=1e-5)
    kept = (tree["c"](X) != 0).float().mean()
    assert 0.45 < float(kept) < 0.55
    found = tree.eval()["c"](X)
    torch.testing.assert_close(found, llmfast.restore(tree)["c"](X), rtol=1e-5, atol=1e-5)


def test_what_only_looks_alike_stays_and_the_report_says_why():
    class LayerNorm(nn.Module):  # an RMS norm under another's name
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(C)), None

        def forward(self, x):
            return x * self.weight * x.square().mean(-1, keepdim=True).add(1e-5).rsqrt()

    module = spread(nn.ModuleDict({
        "norm": LayerNorm(), "odd": nn.LayerNorm((70, C)),
        "silu": nn.Sequential(nn.Linear(C, 5), nn.SiLU(), nn.Linear(5, 5)),
        "embedding": nn.Embedding(3, 4), "linear": nn.Linear(4, 4), "conv": nn.Conv1d(1, 1, 1),
    }))  # fmt: skip
    before = [module[k](X) for k in ("norm", "odd", "silu")]
    report = llmfast.accelerate(module)
    assert not report.swapped
    reasons = {e.name: e.reason for e in report.kept}
    assert "computes something else than the known one" in reasons["norm"]
    assert "last dimension alone" in reasons["odd"]
    assert "GELU" in reasons["silu"]
    assert reasons.keys() == {"norm", "odd", "silu", "embedding", "linear", "conv"}
    for k, y in zip(("norm", "odd", "silu"), before, strict=True):
        assert torch.equal(module[k](X), y)


def test_a_changed_nanogpt_keeps_what_was_changed():
    model = peer("nanoGPT", "model")

    class CausalSelfAttention(model.CausalSelfAttention):
        def forward(self, x):  # scores scaled otherwise, as in muP
            q, k, v = (t.view(*x.shape[:2], self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).chunk(3, 2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=8 / q.shape[-1])
            return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(x.shape)))

    config = model.GPTConfig(block_size=80, vocab_size=V, n_layer=1, n_head=HEADS, n_embd=C)
    gpt = spread(model.GPT(config))
    gpt.transformer.h[0].attn = spread(CausalSelfAttention(config))
    ids = torch.randint(V, (2, 70))
    wanted = gpt(ids, ids)[1]
    report = llmfast.accelerate(gpt)
    kept = {e.name: e.reason for e in report.kept if e.type != "Embedding"}
    assert set(kept) == {"transformer.h.0", "transformer.h.0.attn"}
    assert all("something else" in reason for reason in kept.values())
    torch.testing.assert_close(gpt(ids, ids)[1], wanted)


def test_hooks_fire_and_replaced_parts_are_called():
    model, calls = book(), []
    llmfast.accelerate(model)
    ids = torch.randint(V, (1, 70))
    att = model.trf_blocks[0].att
    handles = [m.register_forward_hook(lambda m, *_: calls.append(type(m).__name__)) for m in (att, att.W_key, model)]
    model(ids)
    assert calls == ["Linear", "MultiHeadAttention", "GPTModel"]
    for handle in handles:
        handle.remove()
    model.trf_blocks[1].ff.layers[1] = nn.ReLU()
    with torch.no_grad():
        found = model(ids)
        torch.testing.assert_close(found, llmfast.restore(model)(ids), rtol=1e-4, atol=1e-4)


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def peft_model(**options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj"], **options})
    return spread(peft.get_peft_model(hugging_face(), config))


@pytest.mark.parametrize("order", ["after peft", "before and after"])
def test_peft_models_train_the_same(order):
    pytest.importorskip("peft")
    ids = torch.randint(1, V, (2, 70), generator=torch.Generator().manual_seed(4))
    model = peft_model()

    def results():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        model.zero_grad(set_to_none=True)
        return loss.detach(), grads

    loss, grads = results()
    assert len(grads) == 12
    if order == "before and after":
        llmfast.accelerate(model, lora=False)
    report = llmfast.accelerate(model)
    assert len([e for e in report.swapped if e.swap == "lora"]) == 6
    found = results()
    torch.testing.assert_close(found[0], loss)
    for name, grad in grads.items():
        assert float((found[1][name] - grad).norm()) < 1e-4 * float(grad.norm()), name
    model.eval()
    for use in (model.merge_adapter, model.unmerge_adapter):
        use()
        logits = model(input_ids=ids).logits
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=ids).logits, logits)
        llmfast.restore(model)
        torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=1e-3, atol=1e-3)
        llmfast.accelerate(model)


def test_adapters_of_other_kinds_take_their_own_way():
    model = peft_model(use_dora=True, target_modules=["c_attn"])
    report = llmfast.accelerate(model)
    assert "DoRA" in next(e.reason for e in report.kept if "c_attn" in e.name)


def test_the_books_lora_layer():
    layer = peer("LLMs-from-scratch/pkg/llms_from_scratch", "appendix_e").LinearWithLoRA(nn.Linear(C, 20), 4, 8)
    assert_swapped(spread(layer), "lora")
