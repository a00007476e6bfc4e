"""The fused decoder layer: the numbers of the single ops, wherever it stands in for them, and nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmfast import ops
from llmfast.config import GPTConfig, LoRAConfig
from llmfast.nn import add_lora
from llmfast.nn.layers import Block, Linear
from llmfast.nn.lora import lora_disabled, lora_layers
from llmfast.ops import _library
from llmfast.ops import decoder_layer as fused

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(_library.why_not_loaded() is not None, reason="needs the compiled kernels"),
]

VARIANTS = {
    "defaults": {},
    "no bias": dict(bias=False),
    "only qkv bias": dict(bias=False, qkv_bias=True),
    "erf": dict(activation="gelu"),
    "relu": dict(activation="relu", n_head=1),
    "no output projection": dict(attn_out_proj=False),
    "scale": dict(attn_scale="n_embd", layer_norm_eps=0.1),
    "wide": dict(n_embd=96, n_head=2),
}
ADAPTERS = {
    "every linear": dict(targets=("all-linear",), split_qkv=True),
    "one for qkv": dict(targets=("c_attn",)),
    "attention's projection": dict(targets=("attn.c_proj",)),
    "the hidden layer": dict(targets=("c_fc",)),
    "the MLP's projection": dict(targets=("mlp.c_proj",)),
}


def block(width: int = 21, **options) -> Block:
    config = GPTConfig(**{"n_embd": width, "n_head": 3, "n_layer": 1, "vocab_size": 5, "block_size": 64, **options})
    made, generator = Block(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.normal_(0.0, p.shape[-1] ** -0.5, generator=generator)
            if name.startswith("ln") and name.endswith("weight"):
                p.add_(1.0)
    return made


def adapted(layer: Block, dropout: float = 0.0, r: int = 3, **options) -> Block:
    """With adapters as training leaves them; all else is frozen."""
    generator = torch.Generator().manual_seed(3)
    add_lora(layer, LoRAConfig(r=r, alpha=5, dropout=dropout, **options))
    with torch.no_grad():
        for linear in lora_layers(layer).values():
            linear.lora_A.normal_(0.0, 0.3, generator=generator)
            linear.lora_B.normal_(0.0, 0.3, generator=generator)
    return layer


def inputs(C: int, B: int = 2, T: int = 19, branch: bool = True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x, b = (torch.randn(B, T, C, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    return x, b if branch else None


def results(layer, x, branch, bf16=False):
    """The two outputs, and the gradients of what wants them under fixed cotangents, in float64."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        stream, m = layer(x, branch)
    generator = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (stream, m)]
    leaves = [t for t in (x, branch, *layer.parameters()) if t is not None and t.requires_grad]
    return [t.detach().double() for t in (stream, m, *torch.autograd.grad((stream, m), leaves, cotangents))]


def exact(layer, x, branch):
    with ops.use_backend("torch"):
        double = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in (x, branch)]
        return results(copy.deepcopy(layer).double(), *double)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_is_as_exact_as_the_single_ops(name, branch, bf16, fused_calls):
    layer = block(**VARIANTS[name])
    x, b = inputs(layer.ln_1.weight.numel(), branch=branch)
    ours = results(layer, x, b, bf16)
    assert fused_calls == [1]
    with ops.use_backend("torch"):
        single = results(layer, x, b, bf16)
    eps = 2.0**-7 if bf16 else 2.0**-22
    for a, theirs, truth in zip(ours, single, exact(layer, x, b), strict=True):
        size = truth.norm() + 1e-6
        assert (a - truth).norm() <= 2 * (theirs - truth).norm() + eps * size


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_as_exact_as_the_single_ops(name, frozen, bf16, fused_calls):
    """``frozen``: as LoRA trains; else with the gradients of everything."""
    layer = adapted(block(), **ADAPTERS[name])
    if not frozen:
        layer.requires_grad_(True)
    x, b = inputs(21)
    ours = results(layer, x, b, bf16)
    assert fused_calls == [1]
    with ops.use_backend("torch"):
        single = results(layer, x, b, bf16)
    eps = 2.0**-7 if bf16 else 2.0**-22
    truths = exact(layer, x, b)
    assert len(ours) == 4 + (2 * len(lora_layers(layer)) if frozen else len(list(layer.parameters())))
    for a, theirs, truth in zip(ours, single, truths, strict=True):
        assert (a - truth).norm() <= 2 * (theirs - truth).norm() + eps * (truth.norm() + 1e-6)


@pytest.mark.parametrize("trained", ["mlp.c_proj", "mlp.c_fc", "attn.c_proj", "attn.c_attn"])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_gradients_of_one_adapter_are_those_of_all(trained, part, fused_calls):
    layer = adapted(block(), dropout=0.2)
    x, b = inputs(21)
    torch.manual_seed(0)
    whole = results(layer, x, b)[4:]
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    for leaf in (x, b):
        leaf.requires_grad_(False)
    for name, p in layer.named_parameters():
        p.requires_grad_(name == f"{trained}.{part}")
    torch.manual_seed(0)
    (got,) = results(layer, x, b)[2:]
    assert torch.equal(got, whole[names.index(f"{trained}.{part}")])
    assert fused_calls == [2]


def seeded_runs(layer, x, b, bf16, single):
    """Twice in one call, by the ops one by one (the setting ``single``), and in one call from another seed."""
    runs = []
    for backend, seed in (("cpp", 5), ("cpp", 5), (single, 5), ("cpp", 6)):
        torch.manual_seed(seed)
        with ops.use_backend(backend):
            runs.append(results(layer, x, b, bf16))
    return runs


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("layer_drops", [False, True])
def test_dropout_of_adapters_is_that_of_the_single_ops(bf16, layer_drops, fused_calls):
    layer = adapted(block(dropout=0.3 if layer_drops else 0.0), dropout=0.4).train()
    x, b = inputs(21)
    runs = seeded_runs(layer, x, b, bf16, "lora_linear=torch")
    assert fused_calls == [3]
    for first, again, single in zip(*runs[:3], strict=True):
        assert torch.equal(first, again)
        assert (first - single).norm() <= (5e-2 if bf16 else 1e-5) * single.norm()  # another mask: about 1
    assert not torch.equal(runs[0][0], runs[3][0])
    layer.eval()
    state = torch.get_rng_state()
    layer(x, b)
    assert torch.equal(state, torch.get_rng_state())


def test_switched_off_adapters_leave_the_frozen_layer(fused_calls):
    plain = block()
    x, b = inputs(21)
    expected = [t.detach() for t in plain(x, b)]
    layer = adapted(block())
    with lora_disabled(layer):
        got = layer(x, b)
    assert all(torch.equal(a, e) for a, e in zip(got, expected, strict=True))
    assert fused_calls == [2]


@pytest.mark.parametrize("shape", [(1, 1), (1, 65), (3, 1), (5, 2)])
def test_small_and_odd_shapes(shape, fused_calls):
    layer = block(n_embd=5, n_head=1)
    x, b = inputs(5, *shape)
    for a, truth in zip(results(layer, x, b), exact(layer, x, b), strict=True):
        torch.testing.assert_close(a, truth, rtol=1e-4, atol=1e-5)
    assert fused_calls == [1]


def test_inputs_and_cotangents_need_not_be_contiguous(fused_calls):
    layer = block()
    x, b = (t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in inputs(21))
    sizes = [t.sum(-1, keepdim=True).expand_as(t) for t in layer(x, b)]  # stride 0
    ours = torch.autograd.grad(sizes, [x, b], [torch.ones(()).expand_as(t) for t in sizes])
    theirs = torch.autograd.grad(
        [t.sum(-1, keepdim=True).expand_as(t) for t in layer(*(t.contiguous() for t in (x, b)))],
        [x, b],
        [torch.ones_like(t) for t in sizes],
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert fused_calls == [2]


@pytest.mark.parametrize(
    "trained",
    [
        "mlp.c_proj",
        "mlp.c_proj.bias",
        "mlp.c_fc",
        "mlp.c_fc.bias",
        "ln_2.bias",
        "ln_2.weight",
        "attn.c_proj",
        "attn.c_attn",
        "attn.c_attn.bias",
        "ln_1",
        "x",
        "branch",
    ],
)
def test_gradients_of_a_part_are_those_of_the_whole(trained, fused_calls):
    layer = block()
    x, b = inputs(21)
    whole = results(layer, x, b)[2:]
    names = ["x", "branch", *(name for name, _ in layer.named_parameters())]
    wanted = [name == trained or name.startswith(f"{trained}.") for name in names]
    for want, leaf in zip(wanted, (x, b, *layer.parameters()), strict=True):
        leaf.requires_grad_(want)
    expected = [g for g, want in zip(whole, wanted, strict=True) if want]
    assert expected
    for ours, theirs in zip(results(layer, x, b)[2:], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("branch", [True, False])
def test_dropout_is_that_of_the_single_ops_and_follows_the_seed(branch, bf16, fused_calls):
    layer = block(dropout=0.3).train()
    x, b = inputs(21, branch=branch)
    runs = seeded_runs(layer, x, b, bf16, "mlp=torch")
    assert fused_calls == [3]
    for first, again, single in zip(*runs[:3], strict=True):
        assert torch.equal(first, again)
        torch.testing.assert_close(first, single, rtol=0.1 if bf16 else 1e-4, atol=0.2 if bf16 else 1e-5)
    assert not torch.equal(runs[0][0], runs[3][0])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    layer.eval()(x, b)
    assert torch.equal(state, torch.get_rng_state())


def test_checkpointing_accumulation_and_a_retained_graph_give_the_same_gradients(fused_calls):
    layer = block(dropout=0.2).train()
    x, b = inputs(21)
    leaves = [x, b, *layer.parameters()]
    hooked = []
    layer.mlp.c_fc.weight.register_post_accumulate_grad_hook(lambda p: hooked.append(p.grad.norm()))

    def gradients(run, times=1):
        for leaf in leaves:
            leaf.grad = None
        torch.manual_seed(3)
        loss = sum(t.square().sum() for t in run(x, b))
        for i in range(times):
            loss.backward(retain_graph=i + 1 < times)
        return [leaf.grad / times for leaf in leaves]

    once = gradients(layer)
    for run, times in ((lambda x, b: checkpoint(layer, x, b, use_reentrant=False), 1), (layer, 2)):
        for a, expected in zip(gradients(run, times), once, strict=True):
            assert torch.equal(a, expected)
    assert len(hooked) == 4
    assert fused_calls == [4]


def test_a_second_derivative_is_refused(fused_calls):
    layer = block()
    x, b = inputs(21)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(layer(x, b)[1].sum(), x, create_graph=True)


def test_without_gradients_nothing_is_kept(fused_calls):
    layer = block()
    x, b = inputs(21)
    expected = layer(x, b)
    with torch.no_grad():
        outputs = layer(x, b)
    assert all(torch.equal(a, e) and a.grad_fn is None for a, e in zip(outputs, expected, strict=True))
    assert fused_calls == [2]


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


class OwnLinear(Linear):
    pass


CHANGES = {
    "a wrapped linear": lambda b: setattr(b.attn, "c_attn", Twice(b.attn.c_attn)),
    "a linear of another class": lambda b: setattr(b.mlp.c_fc, "__class__", OwnLinear),
    "a forward hook": lambda b: b.attn.c_proj.register_forward_hook(lambda *_: None),
    "a forward pre-hook": lambda b: b.mlp.register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda b: b.ln_2.register_full_backward_hook(lambda *_: None),
    "a forward of its own": lambda b: setattr(b.attn, "forward", b.attn.forward),
    "a parametrization": lambda b: nn.utils.parametrizations.weight_norm(b.mlp.c_proj),
    "another eps": lambda b: setattr(b.ln_2, "eps", 0.1),
    "float64": lambda b: b.double(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_part_takes_the_single_ops(name, fused_calls):
    layer = block()
    CHANGES[name](layer)
    x, b = (t.to(layer.ln_1.weight.dtype) for t in inputs(21))
    with ops.use_backend("auto"):
        layer(x, b)
    assert fused_calls == [0]


def test_settings_and_routes_decide(fused_calls, monkeypatch):
    layer = block()
    x, b = inputs(21)
    for route, backend, count in (
        ("default", "auto", 0),
        ("ours", "auto", 1),
        ("ours", "torch", 0),
        ("ours", "mlp=torch", 0),
        ("ours", "linear_cross_entropy=torch", 1),
        ("ours", "lora_linear=torch", 1),
        ("default", "cpp", 1),
    ):
        monkeypatch.setattr(fused, "route_of", lambda dtype, route=route: route)
        fused_calls[0] = 0
        with ops.use_backend("auto"), ops.use_backend(backend):
            layer(x, b)
        assert fused_calls == [count], (route, backend)
    assert ops.describe()["decoder_layer"].keys() == {"float32", "bfloat16"}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("branch", "bias", "dropout", "lora"),
    [(True, True, 0.0, False), (False, False, 0.0, True), (True, True, 0.2, False), (True, False, 0.2, True)],
)
def test_opcheck_of_the_raw_ops(branch, bias, dropout, lora, bf16):
    layer = block(bias=bias)
    if lora:
        adapted(layer)
    parameters = [None if p is None else p.detach() for p in fused.arranged(*layer._plain_parts())]
    x, b = (None if t is None else t.detach() for t in inputs(21, branch=branch))
    seeds = torch.arange(7) if dropout else None
    settings = (3, 0, 0.3, 1e-5, dropout, dropout, [0.5] * 4, [dropout] * 4, seeds, bf16)
    raw = torch.ops.llmfast
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    tolerance = dict(rtol=2e-2, atol=2e-2) if bf16 else {}
    torch.library.opcheck(
        raw.decoder_layer_fwd.default, (x, b, parameters, *settings, True), test_utils=tests, **tolerance
    )
    stream, m, kept = raw.decoder_layer_fwd(x, b, parameters, *settings, True)
    for wants in ([True] * 22, [False] * 10 + [True] * 12):
        arguments = (stream, m, x, None if b is None else b.dtype, stream, kept, parameters, *settings, wants)
        torch.library.opcheck(raw.decoder_layer_bwd.default, arguments, test_utils=tests, **tolerance)


def test_bad_arguments_of_the_raw_op_are_refused():
    layer = adapted(block())
    x, b = (t.detach() for t in inputs(21))
    settings = (3, 0, 0.3, 1e-5, 0.0, 0.0, [1.0] * 4, [0.0] * 4, None, False, True)
    parameters = [None if p is None else p.detach() for p in fused.arranged(*layer._plain_parts())]
    run = torch.ops.llmfast.decoder_layer_fwd
    for changed, message in (
        ({2: torch.zeros(3, 21)}, "qkv_w"),
        ({0: None}, "ln1_w"),
        ({12: parameters[12].double()}, "fc_w"),
        ({5: None}, "qkv_A and qkv_B go together"),
        ({15: torch.zeros(84, 2)}, "fc_B"),
        ({18: torch.zeros(3, 21)}, "proj_A"),
        ({6: None, 7: None}, "out_A needs out_w"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(x, b, [changed.get(i, p) for i, p in enumerate(parameters)], *settings)
    with pytest.raises(RuntimeError, match="parameters must be 20"):
        run(x, b, parameters[:12], *settings)
    with pytest.raises(RuntimeError, match="heads"):
        run(x, b, parameters, 4, *settings[1:])
    with pytest.raises(RuntimeError, match="branch"):
        run(x, b[:1], parameters, *settings)
    with pytest.raises(RuntimeError, match="scalings"):
        run(x, b, parameters, *settings[:6], [1.0], *settings[7:])
    for p in ((*settings[:4], 0.1, *settings[5:]), (*settings[:7], [0.1] * 4, *settings[8:])):
        with pytest.raises(RuntimeError, match="seeds"):
            run(x, b, parameters, *p)
