"""A tied table gets the gradient that plain autograd would give it, in the head's own tensor."""

from __future__ import annotations

import pytest
import torch

from llmfast.config import GPTConfig
from llmfast.nn import GPT, embedding

pytestmark = pytest.mark.usefixtures("one_thread")

V, T, C = 53, 13, 16


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=V, block_size=T, n_layer=2, n_head=2, n_embd=C, init="pytorch"))


@pytest.fixture
def idx():
    idx = torch.randint(V, (3, 9), generator=torch.Generator().manual_seed(1))
    idx[:, 2:6] = 7  # one token many times
    return idx


def gradients(model, run):
    model.zero_grad()
    run()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_as_plain(monkeypatch, model, run):
    """``run`` leaves the gradients that it leaves without the function, and the function was used."""
    calls = []
    backward = embedding._TiedEmbedding.backward
    monkeypatch.setattr(
        embedding._TiedEmbedding, "backward", staticmethod(lambda *args: calls.append(args) or backward(*args))
    )
    ours = gradients(model, run)
    assert calls
    monkeypatch.setattr(embedding, "_adds_rows", lambda *_: False)
    count = len(calls)
    plain = gradients(model, run)
    assert len(calls) == count
    assert ours.keys() == plain.keys()
    for name, g in plain.items():
        torch.testing.assert_close(ours[name], g, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def accumulate(model, idx):
    for part in (idx, idx.flip(0), idx[:1]):
        model(part, part)[1].backward()


def two_losses_in_one_graph(model, idx):
    (model(idx, idx)[1] + 2 * model(idx[:1], idx[:1])[1]).backward()


def retained_graph(model, idx):
    loss = model(idx, idx)[1]
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    (-3 * loss).backward()


def logits_only(model, idx):
    model(idx)[0].square().mean().backward()


def logits_and_loss(model, idx):
    logits, loss = model(idx, idx, return_logits=True)
    (loss + logits.square().mean()).backward()


def the_table_in_another_term(model, idx):
    (model(idx, idx)[1] + model.lm_head.weight.square().sum()).backward()


def head_unused(model, idx):
    model.hidden_states(idx).square().mean().backward()


def frozen_positions(model, idx):
    model.transformer.wpe.weight.requires_grad_(False)
    model(idx, idx)[1].backward()


def int32_columns(model, idx):
    model(idx.T.int(), idx.T)[1].backward()


def autocast(model, idx):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, idx)[1]
    loss.backward()


def checkpointing(model, idx):
    model.activation_checkpointing = True
    model(idx, idx)[1].backward()


@pytest.mark.parametrize(
    "step",
    [
        accumulate, two_losses_in_one_graph, retained_graph, logits_only, logits_and_loss, the_table_in_another_term,
        head_unused, frozen_positions, int32_columns, autocast, checkpointing,
    ],
)  # fmt: skip
def test_gradients_are_those_of_plain_autograd(monkeypatch, model, idx, step):
    assert_as_plain(monkeypatch, model, lambda: step(model, idx))


def test_the_heads_gradient_becomes_the_tables_without_a_copy(monkeypatch, model, idx):
    seen = []
    backward = embedding._TiedEmbedding.backward

    def watched(ctx, dx, dhead):
        seen.append(dhead.data_ptr())
        return backward(ctx, dx, dhead)

    monkeypatch.setattr(embedding._TiedEmbedding, "backward", staticmethod(watched))
    model(idx, idx)[1].backward()
    assert model.lm_head.weight.grad.data_ptr() == seen[0]


def test_hooks_of_the_table_see_its_whole_gradient_once(model, idx):
    seen, wte = [], model.transformer.wte.weight
    wte.register_hook(lambda g: seen.append(g.clone()))
    wte.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    model(idx, idx)[1].backward()
    assert len(seen) == 2
    assert torch.equal(seen[0], wte.grad)
    assert torch.equal(seen[1], wte.grad)


def test_gradients_by_autograd_grad_leave_grad_alone(model, idx):
    wte = model.transformer.wte.weight
    (g,) = torch.autograd.grad(model(idx, idx)[1], wte)
    assert wte.grad is None
    model(idx, idx)[1].backward()
    assert torch.equal(g, wte.grad)


def test_a_gradient_of_a_gradient_is_right_or_refused(model, idx):
    wte = model.transformer.wte.weight

    def embeddings(table):
        return embedding.embed(idx, table, model.transformer.wpe.weight, table)

    x, head = embeddings(wte)
    (g,) = torch.autograd.grad((x.pow(3)).sum() + head.pow(3).sum(), wte, create_graph=True)
    (ours,) = torch.autograd.grad(g.square().sum(), wte)
    x, head = torch.nn.functional.embedding(idx, wte) + model.transformer.wpe.weight[:9], wte
    (g,) = torch.autograd.grad((x.pow(3)).sum() + head.pow(3).sum(), wte, create_graph=True)
    (plain,) = torch.autograd.grad(g.square().sum(), wte)
    torch.testing.assert_close(ours, plain)
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(model(idx, idx)[1], wte, create_graph=True)


@pytest.mark.parametrize("change", ["untied", "frozen", "compiled", "no_grad"])
def test_elsewhere_the_plain_way_is_taken(monkeypatch, model, idx, change):
    def refuse(*_):
        raise AssertionError("the function was used")

    monkeypatch.setattr(embedding._TiedEmbedding, "forward", staticmethod(refuse))
    if change == "untied":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    elif change == "frozen":
        model.lm_head.weight.requires_grad_(False)
    elif change == "compiled":
        torch._dynamo.reset()
        torch.compile(model, fullgraph=True, backend="aot_eager")(idx, idx)[1].backward()
        return
    else:
        with torch.no_grad():
            model(idx, idx)
        return
    model(idx, idx)[1].backward()
    assert (model.transformer.wte.weight.grad is None) == (change == "frozen")
