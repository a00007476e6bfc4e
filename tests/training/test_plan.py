"""The plan's arithmetic against real models and the tensors that they really keep."""

from __future__ import annotations

import pytest
import torch

from llmfast import ops
from llmfast.config import PRESETS, GPTConfig, TrainConfig
from llmfast.errors import UserError
from llmfast.nn import GPT
from llmfast.ops import _library
from llmfast.training.device import flops_per_token
from llmfast.training.optimizer import build_optimizer
from llmfast.training.plan import count_parameters, measure_matmul, memory, plan

needs_kernels = pytest.mark.skipif(_library.why_not_loaded() is not None, reason="the kernels are not built")
KNOWN = {"gpt2": 124_439_808, "gpt2-xl": 1_557_611_200, "book-124m": 163_009_536, "tlfs-3b": 3_429_684_352}


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_model(preset):
    config = GPTConfig.preset(preset)
    assert count_parameters(config) == KNOWN.get(preset, count_parameters(config))
    with torch.device("meta"):
        assert count_parameters(config) == GPT(config).num_parameters()


@pytest.mark.parametrize(
    "options", [dict(bias=False), dict(attn_out_proj=False), dict(qkv_bias=False, lm_head_bias=True)]
)
def test_parameters_follow_every_option(options):
    config = GPTConfig(vocab_size=37, block_size=5, n_layer=3, n_head=2, n_embd=6, **options)
    assert count_parameters(config) == GPT(config).num_parameters()


def test_flops_are_those_of_the_loop():
    config = GPTConfig.preset("book-124m")
    with torch.device("meta"):
        model = GPT(config)
    answer = plan(config, TrainConfig(block_size=256), flops_per_second=1e12)
    assert answer.flops_per_token == flops_per_token(model, 256)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 64, 128, 4, 2, 257), (2, 96, 96, 2, 3, 2003)])
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_kernels)])
def test_activation_memory_is_what_backward_really_keeps(backend, shape, dtype, dropout, checkpointing):
    B, T, C, H, L, V = shape
    config = GPTConfig(vocab_size=V, block_size=T, n_layer=L, n_head=H, n_embd=C, dropout=dropout)
    options = TrainConfig(micro_batch_size=B, activation_checkpointing=checkpointing)
    model = GPT(config).train()
    model.activation_checkpointing = checkpointing
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(V, (B, T + 1))
    with ops.use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            _, loss = model(ids[:, :-1], ids[:, 1:])
        measured = sum(storage.nbytes() for storage in kept.values())
    with ops.use_backend(backend):
        assert memory(config, options, dtype, "cpu").activations == pytest.approx(measured, rel=0.2)
    assert loss.isfinite()


def test_state_memory_is_what_the_optimizer_really_holds():
    config = GPTConfig(vocab_size=101, block_size=8, n_layer=1, n_head=1, n_embd=32)
    model = GPT(config)
    optimizer = build_optimizer(model, TrainConfig())
    ids = torch.randint(101, (2, 9))
    model(ids[:, :-1], ids[:, 1:])[1].backward()
    optimizer.step()
    moments = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.dim())
    expected = memory(config, TrainConfig(), torch.float32, "cpu")
    assert expected.weights == sum(p.nbytes for p in model.parameters())
    assert expected.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert expected.optimizer == moments


def test_what_fits_grows_with_memory_and_shrinks_with_the_batch():
    config = GPTConfig.preset("gpt2")
    small, large = (plan(config, TrainConfig(micro_batch_size=n), flops_per_second=1e12).gpus for n in (16, 64))
    assert small["RTX 4090 (24 GB)"]
    assert not small["RTX 4060 (8 GB)"]
    assert sum(large.values()) < sum(small.values())
    assert large["H200 (141 GB)"]
    saved = plan(config, TrainConfig(micro_batch_size=64, activation_checkpointing=True), flops_per_second=1e12)
    assert sum(saved.gpus.values()) > sum(large.values())
    sizes = [float(name.split("(")[1].split()[0]) for name in small]
    assert (min(sizes), max(sizes)) == (8, 141)


def test_steps_tokens_and_time():
    config = GPTConfig.preset("tiny")
    answer = plan(config, TrainConfig(micro_batch_size=4, batch_size=8, max_steps=10), flops_per_second=2e9)
    assert (answer.tokens_per_step, answer.tokens) == (8 * 128, 10 * 8 * 128)
    assert answer.seconds == pytest.approx(answer.tokens * answer.flops_per_token / (2e9 * answer.share))
    epochs = plan(config, TrainConfig(micro_batch_size=4, epochs=3), tokens=128 * 40 + 1, flops_per_second=2e9)
    assert epochs.steps == 30
    assert answer.to_dict()["memory"]["total"] == answer.memory.total
    with pytest.raises(UserError, match="needs the data"):
        plan(config, TrainConfig(epochs=3))
    with pytest.raises(UserError, match="above the model's 128"):
        plan(config, TrainConfig(block_size=129))


def test_the_measured_matmul_rate_is_a_rate():
    assert 1e8 < measure_matmul(torch.float32, size=256, seconds=0.02) < 1e14
