"""The native token step: logits against float64, the same ids as the ordinary path, any threads, reasons, bad input."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from llmfast import use_backend
from llmfast.config import GPTConfig
from llmfast.generation import generate_ids, native
from llmfast.nn import GPT, KVCache, quantize_int8
from llmfast.ops import _library

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(_library.why_not_loaded() is not None, reason=str(_library.why_not_loaded())),
]

SMALL = dict(vocab_size=97, block_size=40, n_layer=2, n_head=2, n_embd=48, init="pytorch")
MODELS = {
    "tied": {},
    "no bias": dict(bias=False),
    "no qkv bias, exact gelu": dict(qkv_bias=False, activation="gelu"),
    "untied relu, head bias": dict(tie_embeddings=False, lm_head_bias=True, activation="relu"),
    "no output projection": dict(attn_out_proj=False, attn_scale="n_embd"),
    "odd": dict(n_embd=35, n_head=5, vocab_size=101, layer_norm_eps=1e-3),
    "one of each": dict(n_embd=1, n_head=1, n_layer=1, vocab_size=1, layer_norm_eps=0.1),
    "wide": dict(n_embd=260, n_head=2, n_layer=1),
}
KINDS = {
    "float32": lambda model: model,
    "bfloat16": lambda model: model.bfloat16(),
    "int8": quantize_int8,
}


def small(kind: str = "float32", **options) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **options})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ln_" in name:  # not ones and zeros
                p.add_(0.3 * torch.randn_like(p))
    return KINDS[kind](model)


def exact(model: GPT) -> GPT:
    """The same weights, as they are, in float64."""
    twin = GPT(model.config).double().eval()
    with torch.no_grad():
        for name, module in twin.named_modules():
            if list(module.parameters(recurse=False)):
                source = model.get_submodule(name)
                module.weight.copy_(source.weight)
                if getattr(module, "bias", None) is not None:
                    module.bias.copy_(source.bias)
    return twin


def step_of(model: GPT) -> native.NativeStep:
    assert native.why_not(model) == []
    return native.NativeStep(model)


@torch.inference_mode()
def logits_of(step, config: GPTConfig, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(B, T, V): every token of ids (B, T) read alone."""
    cache = KVCache(config, len(ids), ids.shape[1], dtype=dtype)
    return torch.stack([step(column.tolist(), cache) for column in ids.T], 1)


def ids_of(model: GPT, B: int, T: int = 37) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(B))


@pytest.mark.parametrize("B", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_logits_are_as_exact_as_the_ordinary_path(options, kind, B):
    model = small(kind, **options)
    ids, dtype = ids_of(model, B), model.transformer.wpe.weight.dtype
    with torch.inference_mode():
        truth = exact(model)(ids)[0]

    def ordinary(tokens, cache):
        with use_backend("torch"):
            return model(torch.tensor(tokens)[:, None], cache=cache)[0][:, 0]

    ours, theirs = (
        (logits_of(step, model.config, ids, dtype) - truth).abs().max() for step in (step_of(model), ordinary)
    )
    scale = truth.abs().max()
    allowed = 2e-4 if kind == "int8" else 1e-6  # int8: activations of 16 bits
    assert ours <= 2 * theirs + allowed * scale


def test_a_cache_in_bfloat16_beside_float32_weights():
    model = small()
    ids = ids_of(model, 2)
    with torch.inference_mode():
        truth = exact(model)(ids)[0]
    error = (logits_of(step_of(model), model.config, ids, torch.bfloat16) - truth).abs().max()
    assert 1e-5 < error < 1e-2 * truth.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_on_neither_threads_nor_neighbours(kind):
    model = small(kind, n_embd=96, vocab_size=1009)
    ids = ids_of(model, 7)
    whole = logits_of(step_of(model), model.config, ids)
    for b in (0, 6):
        assert torch.equal(logits_of(step_of(model), model.config, ids[b : b + 1])[0], whole[b])
    torch.set_num_threads(3)  # one_thread sets it back
    assert torch.equal(logits_of(step_of(model), model.config, ids), whole)


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize(
    "prompts",
    [
        [[1, 2, 3], [5] * 60, list(range(40)), [7]],  # rows of different length, and windows that slide
        [[1, 2, 3], [7]],  # read by steps
    ],
)
def test_greedy_ids_are_those_of_the_ordinary_path_at_any_length(kind, prompts):
    model = small(kind)
    ours = generate_ids(model, prompts, max_new_tokens=50, temperature=0)
    with use_backend("torch"):
        assert native.step_of(model, 4, 50) is None
        assert generate_ids(model, prompts, max_new_tokens=50, temperature=0) == ours


def test_generation_takes_the_native_step_alone(monkeypatch):
    model, steps = small(), []
    call = native.NativeStep.__call__
    monkeypatch.setattr(native.NativeStep, "__call__", lambda *a: steps.append(1) or call(*a))
    generate_ids(model, [[1, 2]], max_new_tokens=20, temperature=0)
    assert len(steps) == 1 + 20  # a short prompt is read by steps, too


def test_huge_pages_change_nothing():
    model = small(n_embd=512, vocab_size=3001)  # matrices of more than one such page
    step, ids = step_of(model), ids_of(model, 1, 3)
    before = logits_of(step, model.config, ids)
    step.use_huge_pages()
    assert torch.equal(logits_of(step, model.config, ids), before)


def test_reasons_against_it():
    model = small()
    assert native.why_not(model) == []
    with use_backend("causal_attention=torch"):
        assert native.why_not(model) == ["backend torch is asked for"]
    with torch.autocast("cpu", torch.bfloat16):
        assert native.why_not(model) == ["under autocast"]
    assert native.why_not(small().double()) == ["weights of torch.float64"]
    assert native.why_not(small().to("meta")) == ["the model is on meta"]
    handle = model.transformer.h[1].register_forward_hook(lambda *_: None)
    assert native.why_not(model) == ["forward hooks"]
    handle.remove()
    model.transformer.h[0].mlp = torch.nn.Sequential(model.transformer.h[0].mlp)
    assert native.why_not(model) == ["modules of other kinds: Sequential"]
    assert len(generate_ids(model, [[1]], max_new_tokens=5, temperature=0)[0]) == 5


def test_bad_input_to_the_raw_ops_is_one_line():
    model = small()
    step, cache = step_of(model), KVCache(model.config, 1, 4)
    run, prepare, storage = step.run, _library.raw("decode_prepare"), cache.storage
    weights = step.weights
    for message, call in [
        ("tokens must lie", lambda: run(step.plan, [97], [0], storage)),
        ("tokens must lie", lambda: run(step.plan, [-1], [0], storage)),
        ("lengths must lie in .0, 4., got 4", lambda: run(step.plan, [1], [4], storage)),
        ("lengths must have 1 numbers", lambda: run(step.plan, [1], [], storage)),
        ("cache must be", lambda: run(step.plan, [1, 2], [0, 0], storage)),
        ("cache must be", lambda: run(step.plan, [1], [0], storage.transpose(4, 5))),
        ("cache must be float32 or bfloat16", lambda: run(step.plan, [1], [0], storage.double())),
        ("plan must come from", lambda: run(-1, [1], [0], storage)),
        ("weights must be 8 tensors and 16", lambda: prepare(weights[:-1], 2, 1.0, 1e-5, 0)),
        ("n_head must divide", lambda: prepare(weights, 5, 1.0, 1e-5, 0)),
        ("activation must be", lambda: prepare(weights, 2, 1.0, 1e-5, 3)),
        (
            r"weights\[10\] must be contiguous Float",
            lambda: prepare([*weights[:10], *weights[11:], weights[0]], 2, 1.0, 1e-5, 0),
        ),
        (
            r"weights\[8\] must be contiguous float32",
            lambda: prepare([*weights[:8], weights[0], *weights[9:]], 2, 1.0, 1e-5, 0),
        ),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.skipif("LLMFAST_CPU_ISA" in os.environ, reason="the instruction set is given")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])  # a CPU without it takes the best that it has
def test_the_lesser_instruction_sets_are_as_exact(isa):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "logits and (odd or wide)",
        __file__,
    ]
    done = subprocess.run(command, env={**os.environ, "LLMFAST_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
