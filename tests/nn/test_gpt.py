"""GPT: its shape, its numbers against a plain float64 model, its initialisation, dropout and error messages."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plain_gpt import plain_logits, plain_loss

from llmfast.config import GPTConfig
from llmfast.nn import GPT
from llmfast.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(vocab_size=53, block_size=13, n_layer=3, n_head=3, n_embd=21)
VARIANTS = {
    "defaults": {},
    "no bias": dict(bias=False),
    "no qkv bias": dict(qkv_bias=False, init="pytorch"),
    "only qkv bias": dict(bias=False, qkv_bias=True, init="pytorch"),
    "erf": dict(activation="gelu"),
    "relu": dict(activation="relu", init="pytorch"),
    "untied": dict(tie_embeddings=False),
    "head bias": dict(tie_embeddings=False, lm_head_bias=True, init="pytorch"),
    "tied head bias": dict(lm_head_bias=True, init="pytorch"),
    "no output projection": dict(attn_out_proj=False),
    "scale by width": dict(attn_scale="n_embd", init="pytorch"),
    "scale by number": dict(attn_scale=0.3, init="pytorch"),
    "eps": dict(layer_norm_eps=0.1),
    "one of each": dict(n_layer=1, n_head=1),
}


def small(**options) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **options}))


def ids(*shape: int, high: int = SMALL["vocab_size"]) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("book-124m", 163_009_536),
        ("tlfs-13m", 13_142_656),
        ("tlfs-77m", 77_031_552),
        ("tlfs-406m", 406_359_168),
        ("tlfs-3b", 3_429_684_352),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, count):
    with torch.device("meta"):
        assert GPT(GPTConfig.preset(preset)).num_parameters() == count


def test_parameter_names_are_nanogpts():
    names = set(small().state_dict())
    parts = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    layers = {f"transformer.h.{n}.{part}.{kind}" for n in range(3) for part in parts for kind in ("weight", "bias")}
    ends = {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert names == layers | ends | {"lm_head.weight"}


def test_options_remove_their_parameters():
    names = set(small(bias=False, attn_out_proj=False).state_dict())
    assert not [name for name in names if name.endswith("bias") or "attn.c_proj" in name]
    names = set(small(qkv_bias=False, tie_embeddings=False, lm_head_bias=True).state_dict())
    assert "transformer.h.0.attn.c_attn.bias" not in names
    assert {"transformer.h.0.attn.c_proj.bias", "lm_head.bias"} <= names


@pytest.mark.parametrize("T", [1, 7, 13])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_loss_and_gradients_equal_a_plain_float64_model(options, T):
    model = small(**options).double()
    idx, targets = ids(2, T), ids(2, T, high=50)
    targets[0, :-1] = -100
    logits, loss = model(idx, targets, return_logits=True)
    loss.backward()

    # A tied matrix is one leaf under two names, so that its gradient is the sum of both uses.
    leaves = {id(p): p.detach().clone().requires_grad_() for p in model.parameters()}
    plain = {name: leaves[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    config = model.config
    scale = {"n_embd": config.n_embd**-0.5}.get(config.attn_scale, config.attn_scale)
    expected = plain_logits(
        plain, idx, n_head=config.n_head, activation=config.activation, scale=scale, eps=config.layer_norm_eps
    )
    expected_loss = plain_loss(expected, targets)
    expected_loss.backward()

    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name].grad, rtol=1e-7, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_float32_stays_close_to_float64():
    model = small(init="pytorch")
    logits = model(ids(4, 13))[0]
    torch.testing.assert_close(logits.double(), model.double()(ids(4, 13))[0], rtol=1e-4, atol=1e-5)


def test_targets_alone_give_a_loss_and_no_logits():
    model = small()
    logits, loss = model(ids(2, 5), ids(2, 5))
    assert logits is None
    assert loss.shape == ()
    logits, loss = model(ids(2, 5))
    assert logits.shape == (2, 5, 53)
    assert loss is None


def test_int32_and_non_contiguous_ids_give_the_same_logits():
    model, idx = small(), ids(5, 4)
    expected = model(idx.T.contiguous())[0]
    assert torch.equal(model(idx.T)[0], expected)
    assert torch.equal(model(idx.T.int())[0], expected)


def test_later_tokens_do_not_change_earlier_logits():
    model, idx = small(init="pytorch"), ids(1, 13)
    changed = idx.clone()
    changed[0, 6:] = (changed[0, 6:] + 1) % 53
    torch.testing.assert_close(model(idx)[0][0, :6], model(changed)[0][0, :6])
    assert not torch.allclose(model(idx)[0][0, 6:], model(changed)[0][0, 6:])


def test_gpt2_init_has_gpt2s_spread():
    model = GPT(GPTConfig(vocab_size=997, block_size=128, n_layer=8, n_head=2, n_embd=128, tie_embeddings=False))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(p, torch.zeros_like(p)), name
        elif ".ln_" in name:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert abs(p.std().item() / std - 1) < 5 / math.sqrt(2 * p.numel()), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name


@pytest.mark.parametrize("tied", [True, False])
def test_pytorch_init_has_the_spread_of_pytorchs_modules(tied):
    model = GPT(
        GPTConfig(vocab_size=997, block_size=128, n_layer=2, n_head=2, n_embd=128, tie_embeddings=tied, init="pytorch")
    )
    for name, module in model.named_modules():
        if not isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) or (tied and name == "transformer.wte"):
            continue
        twin = (
            torch.nn.Linear(module.in_features, module.out_features)
            if isinstance(module, torch.nn.Linear)
            else torch.nn.Embedding(module.num_embeddings, module.embedding_dim)
        )
        for kind, p in module.named_parameters():
            expected = getattr(twin, kind)
            assert abs(p.std() / expected.std() - 1) < 10 / math.sqrt(p.numel()), (name, kind)
            assert abs(p.abs().max() / expected.abs().max() - 1) < 0.35, (name, kind)
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied


def test_the_seed_alone_decides_the_weights():
    first, again = small(init="pytorch").state_dict(), small(init="pytorch").state_dict()
    torch.manual_seed(1)
    other = GPT(GPTConfig(**SMALL, init="pytorch")).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_a_model_made_on_meta_is_filled_like_one_made_in_place_and_stays_tied():
    expected = small().state_dict()
    with torch.device("meta"):
        model = GPT(GPTConfig(**SMALL))
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)


def test_a_model_on_meta_tells_the_shapes_of_a_step():
    with torch.device("meta"):
        model, idx = GPT(GPTConfig(**SMALL, dropout=0.1)), torch.empty(2, 8, dtype=torch.int64)
    logits, loss = model(idx, idx, return_logits=True)
    loss.backward()
    assert logits.shape == (2, 8, SMALL["vocab_size"])
    assert loss.shape == ()
    assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("init", ["gpt2", "pytorch"])
def test_the_books_model_starts_at_the_loss_of_a_uniform_guess(init):
    if "LLMFAST_TEST_DATA" not in os.environ:
        pytest.skip("LLMFAST_TEST_DATA is not set")
    data = Path(os.environ["LLMFAST_TEST_DATA"])
    tokens = load_tokenizer(data / "gpt2").encode((data / "text/the-verdict.txt").read_text(encoding="utf-8"))
    torch.manual_seed(123)
    model = GPT(GPTConfig.preset("book-124m", block_size=256, init=init))
    text = torch.tensor(tokens[:513])
    with torch.no_grad():
        loss = model.eval()(text[:-1].view(2, 256), text[1:].view(2, 256))[1].item()
    assert 10.8 < loss < 11.1


def spread_of_the_stream(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """The residual stream that the last norm reads."""
    seen = []
    add = model.transformer.ln_f.add
    model.transformer.ln_f.add = lambda *args: seen.append(add(*args)) or seen[-1]
    model.hidden_states(idx)
    return seen[0][1].detach()


def test_dropout_falls_on_embeddings_and_on_both_residual_branches():
    # Embeddings sum to 2 and every branch to 1, whatever is read: with keep rate q = 1 - p, the stream is
    # 2 Bernoulli(q) / q plus 2 n_layer times Bernoulli(q) / q.
    p, model = 0.25, GPT(GPTConfig(vocab_size=5, block_size=128, n_layer=3, n_head=2, n_embd=64, dropout=0.25))
    with torch.no_grad():
        model.transformer.wte.weight.fill_(1.0)
        model.transformer.wpe.weight.fill_(1.0)
        for block in model.transformer.h:
            for proj in (block.attn.c_proj, block.mlp.c_proj):
                proj.weight.zero_()
                proj.bias.fill_(1.0)
    idx = torch.zeros(4, 128, dtype=torch.long)
    torch.manual_seed(0)
    stream = spread_of_the_stream(model, idx)
    units = stream * (1 - p)
    torch.testing.assert_close(units, units.round(), rtol=0, atol=1e-4)
    count = stream.numel()
    variance = (4 + 6) * p / (1 - p)
    assert abs(stream.mean() - 8) < 5 * math.sqrt(variance / count)
    assert abs(stream.var() / variance - 1) < 0.05
    model.eval()
    assert torch.equal(spread_of_the_stream(model, idx), torch.full_like(stream, 8.0))


def test_dropout_falls_on_attention_weights():
    # Keys of zero weigh all t tokens alike and values are 1: the sum of the kept weights is Binomial(t, q) / (t q).
    p, model = 0.25, GPT(GPTConfig(vocab_size=5, block_size=64, n_layer=1, n_head=16, n_embd=64, dropout=0.25))
    attn = model.transformer.h[0].attn
    with torch.no_grad():
        attn.c_attn.weight.zero_()
        attn.c_attn.bias[128:].fill_(1.0)
        attn.c_proj.weight.copy_(torch.eye(64))
    torch.manual_seed(0)
    y = attn(torch.zeros(32, 64, 64))
    last = y[:, 63, ::4]  # one column of each head: 32 x 16 independent sums of 64 weights
    assert abs(last.mean() - 1) < 5 * math.sqrt(p / (1 - p) / 64 / last.numel())
    assert abs(last.var() / (p / (1 - p) / 64) - 1) < 0.35
    torch.testing.assert_close(attn.eval()(torch.zeros(1, 64, 64)), torch.ones(1, 64, 64))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_keeps_loss_and_gradients(dropout):
    model, idx = small(dropout=dropout, init="pytorch"), ids(3, 13)

    def step(checkpointing: bool):
        model.activation_checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(5)
        loss = model(idx, idx)[1]
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(step(False), step(True), strict=True))


def test_activation_checkpointing_keeps_fewer_activations():
    model, idx = small(n_layer=6), ids(3, 13)

    def kept(checkpointing: bool) -> int:
        model.activation_checkpointing = checkpointing
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.setdefault(t.data_ptr(), t), lambda t: t):
            model(idx, idx)
        parameters = {p.data_ptr() for p in model.parameters()}
        return sum(t.numel() for pointer, t in sizes.items() if pointer not in parameters)

    assert kept(True) < kept(False) / 2


def test_compiles_without_a_graph_break():
    model, idx = small(dropout=0.1, n_layer=1), ids(2, 13)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.eval()
    for T in (13, 7):  # from the second length on, the length is symbolic
        torch.testing.assert_close(compiled(idx[:, :T], idx[:, :T])[1], model(idx[:, :T], idx[:, :T])[1])
    model.train()
    compiled(idx, idx)[1].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bfloat16_autocast_trains_float32_weights():
    model, idx = small(init="pytorch"), ids(4, 13)
    exact = model(idx, idx)[1]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, idx)[1]
    loss.backward()
    assert abs(loss - exact) < 0.02 * exact
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("idx", "targets", "message"),
    [
        (torch.zeros(2, 14, dtype=torch.long), None, "14 tokens, block_size is 13"),
        (torch.zeros(5, dtype=torch.long), None, r"\(batch, sequence\)"),
        (torch.zeros(2, 0, dtype=torch.long), None, "not empty"),
        (torch.zeros(2, 3), None, "int64 or int32 token ids, got torch.float32"),
        (torch.tensor([[0, 53, 2]]), None, r"in \[0, 53\), got ids from 0 to 53"),
        (torch.tensor([[0, -1, 2]]), None, r"in \[0, 53\), got ids from -1 to 2"),
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long), r"shape \(2, 3\), got \(2, 4\)"),
        (torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), 53), "53"),
    ],
)
def test_bad_input_is_one_clear_value_error(idx, targets, message):
    with pytest.raises(ValueError, match=message):
        small()(idx, targets)


def test_a_model_is_made_without_loading_the_compiler():
    """It would cost every command seconds and 70 MB."""
    code = (
        "import sys; from llmfast.config import GPTConfig; from llmfast.nn import GPT; GPT(GPTConfig.preset('tiny'));"
        "print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
