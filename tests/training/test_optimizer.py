"""Schedule, decay groups and updates, against formulas and PyTorch's own optimizer."""

from __future__ import annotations

import math

import pytest
import torch

from llmfast.config import GPTConfig, TrainConfig
from llmfast.nn import GPT
from llmfast.ops import use_backend
from llmfast.ops._library import why_not_loaded
from llmfast.training.errors import NotFiniteError
from llmfast.training.optimizer import AdamW, build_optimizer, decay_groups
from llmfast.training.schedule import learning_rate_at
from llmfast.training.update import Update


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_by_formula(schedule):
    config = TrainConfig(schedule=schedule, learning_rate=0.8, min_learning_rate=0.2, warmup_steps=3)
    rates = [learning_rate_at(step, config, 11) for step in range(12)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.6])
    half = {"cosine": 0.5, "linear": 0.5, "constant": 0.8}[schedule]
    assert (rates[3], rates[7]) == (pytest.approx(0.8), pytest.approx(half))
    assert rates[11] == pytest.approx(0.8 if schedule == "constant" else 0.2)
    if schedule == "cosine":
        assert rates[5] == pytest.approx(0.2 + 0.6 * (1 + math.cos(math.pi / 4)) / 2)


def test_the_final_rate_defaults_to_a_tenth_and_no_warmup_starts_at_the_peak():
    config = TrainConfig(learning_rate=0.5, warmup_steps=0)
    assert learning_rate_at(0, config, 10) == 0.5
    assert learning_rate_at(10, config, 10) == pytest.approx(0.05)
    # A warm-up as long as the run never divides by zero.
    assert learning_rate_at(4, TrainConfig(warmup_steps=4, learning_rate=1.0), 4) > 0


def test_biases_and_norms_do_not_decay_and_embeddings_do():
    model = GPT(GPTConfig(vocab_size=11, block_size=4, n_layer=1, n_head=1, n_embd=8))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = decay_groups(model, TrainConfig(weight_decay=0.3))
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {names[id(p)].split(".", 1)[1] for p in decayed["params"]} == {
        "wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight",
        "h.0.mlp.c_proj.weight",
    }  # fmt: skip
    assert all(names[id(p)].endswith("bias") or "ln_" in names[id(p)] for p in others["params"])
    (everything,) = decay_groups(model, TrainConfig(weight_decay=0.3, decay="all"))
    assert len(everything["params"]) == len(names)
    model.transformer.wte.weight.requires_grad_(False)
    assert all(p is not model.transformer.wte.weight for p in decay_groups(model, TrainConfig())[0]["params"])


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_adamw_equals_pytorchs(backend):
    torch.manual_seed(0)
    shapes = [(7, 5), (1,), (3,), (0, 4), (131, 127)]  # the last takes more than one block of the kernel
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    groups = [dict(weight_decay=0.1), dict(weight_decay=0.0)]
    a = AdamW([{**g, "params": ours[i::2]} for i, g in enumerate(groups)], 1e-2, (0.8, 0.95), 1e-7)
    b = torch.optim.AdamW([{**g, "params": theirs[i::2]} for i, g in enumerate(groups)], 1e-2, (0.8, 0.95), 1e-7)
    for step in range(5):
        for group in (*a.param_groups, *b.param_groups):
            group["lr"] = 1e-2 / (step + 1)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad / 1.7
        with use_backend(backend):
            a.step(grad_scale=1.7), b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_the_gradient_norm_is_exact_in_one_thread_or_two():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.empty(shape)) for shape in [(300, 301), (1,), (0,), (70, 1000)]]
    for p in parameters:
        p.grad = torch.randn(p.shape)
    exact = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))
    before = torch.get_num_threads()
    try:
        norms = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            norms.append(AdamW(parameters, 0.1).gradient_norm().item())
    finally:
        torch.set_num_threads(before)
    assert norms[0] == norms[1] == pytest.approx(exact, rel=2e-7)


@pytest.mark.skipif(why_not_loaded() is not None, reason=str(why_not_loaded()))
def test_the_raw_update_reads_gradients_of_any_strides():
    updated = []
    for grad in (torch.arange(6.0).view(2, 3).T, torch.arange(6.0).view(2, 3).T.contiguous()):
        p, m, v = (torch.zeros(3, 2) for _ in range(3))
        torch.ops.llmfast.adamw_([p], [grad], [m], [v], 1.0, 0.1, 0.9, 0.9, 0.0, 1e-8, 1.0)
        updated.append(m)
        assert torch.ops.llmfast.total_norm([grad]) == pytest.approx(math.sqrt(55))
    assert torch.equal(*updated)


@pytest.mark.skipif(why_not_loaded() is not None, reason=str(why_not_loaded()))
def test_the_raw_update_refuses_tensors_that_do_not_fit():
    def adamw(p, g):
        torch.ops.llmfast.adamw_([p], [g], [torch.zeros(3)], [torch.zeros(3)], 1.0, 0.1, 0.9, 0.9, 0.0, 1e-8, 1.0)

    with pytest.raises(RuntimeError, match="grads must have the sizes of the parameters"):
        adamw(torch.zeros(3), torch.zeros(4))
    with pytest.raises(RuntimeError, match="parameters must be contiguous float32 tensors on the CPU"):
        adamw(torch.zeros(3, dtype=torch.float64), torch.zeros(3))


def test_a_parameter_without_gradient_is_left_alone():
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = AdamW([{"params": [used, unused], "weight_decay": 0.5}], 0.1)
    used.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2))
    assert not torch.equal(used, torch.ones(2))


def test_a_held_back_update_changes_neither_weights_nor_state():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], 0.1)
    p.grad = torch.ones(3)
    optimizer.step()
    before = [p.detach().clone(), *(v.clone() for v in optimizer.state[p].values())]
    p.grad.fill_(math.nan)
    optimizer.step(found_inf=torch.ones(()))
    assert all(torch.equal(x, y) for x, y in zip(before, [p.detach(), *optimizer.state[p].values()], strict=True))


@pytest.mark.parametrize("divisor", [1.0, 0.75])
@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_clipping_equals_pytorchs(clip, divisor):
    torch.manual_seed(1)
    ours = [torch.nn.Parameter(torch.randn(n)) for n in (5, 3)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad / divisor
    optimizer = AdamW(ours, 0.1)
    norm = Update(optimizer, clip, torch.device("cpu"), torch.float32).apply(0, torch.ones(()), divisor)
    expected = torch.nn.utils.clip_grad_norm_(theirs, clip or math.inf)
    torch.testing.assert_close(norm, expected)
    for p, q in zip(ours, theirs, strict=True):  # the first average is 0.1 times the gradient that arrived
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * q.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_update(where):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, math.inf if where == "gradient" else 1.0, 1.0])
    update = Update(AdamW([p], 0.1), 1.0, torch.device("cpu"), torch.float32)
    with pytest.raises(NotFiniteError, match=where):
        update.apply(4, torch.tensor(math.nan if where == "loss" else 1.0), 1.0)
    assert torch.equal(p, torch.ones(3))


def test_the_flag_on_a_device_holds_back_every_later_update_and_tells_the_step():
    # The path of CUDA devices, run here on CPU tensors: the host learns of it only at the next check.
    p = torch.nn.Parameter(torch.ones(3))
    update = Update(AdamW([p], 0.1), 1.0, torch.device("cpu"), torch.float32)
    update._on_device = True
    for step in range(100, 103):  # a resumed run
        p.grad = torch.ones(3)
        update.apply(step, torch.ones(()), 1.0)
    update.check(103)
    after = p.detach().clone()
    assert not torch.equal(after, torch.ones(3))
    for step in range(103, 108):
        p.grad = torch.full((3,), math.nan if step == 105 else 0.5)
        update.apply(step, torch.ones(()), 1.0)
        after = p.detach().clone() if step < 105 else after
    with pytest.raises(NotFiniteError) as caught:
        update.check(108)
    assert caught.value.step == 105
    assert torch.equal(p, after)


def test_device_clipping_equals_host_clipping():
    results = []
    for on_device in (False, True):
        p = torch.nn.Parameter(torch.arange(4.0))
        p.grad = torch.tensor([3.0, -1.0, 2.0, 0.5])
        update = Update(AdamW([p], 0.1), 0.5, torch.device("cpu"), torch.float32)
        update._on_device = on_device
        update.apply(0, torch.ones(()), 0.9)
        results.append((p.detach(), update.optimizer.state[p]["exp_avg"]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_configured_optimizer_has_the_configured_values():
    model = GPT(GPTConfig(vocab_size=11, block_size=4, n_layer=1, n_head=1, n_embd=8))
    for group in build_optimizer(model, TrainConfig(beta1=0.7, beta2=0.8, adam_eps=1e-5)).param_groups:
        assert (group["betas"], group["eps"]) == ((0.7, 0.8), 1e-5)
