"""The arithmetic of a run before it starts: parameters, memory, work and time.

Letters: B micro batch, T block size, C width, L layers, H heads, V vocabulary; e bytes of the compute type.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from llmfast.config import GPTConfig, TrainConfig
from llmfast.errors import UserError
from llmfast.training.device import GPUS, choose_device, choose_dtype, peak_flops
from llmfast.training.parallel import Sharing, sharing
from llmfast.training.settings import check

# Share of the matmul rate that a whole training step reaches: on a CPU against the rate measured here, on a GPU
# against its data sheet. Assumptions, told as such wherever the time is.
CPU_SHARE, GPU_SHARE = 0.7, 0.4
CPU_LOSS_ROWS, GPU_LOSS_ELEMENTS = 512, 1 << 27  # rows, and elements, of logits that exist at a time
CPU_LOSS_BYTES = 38 << 20  # the same of the native kernel (csrc/cpu/linear_cross_entropy.cpp)
GPU_OVERHEAD = 1.0e9  # the CUDA context and the libraries' workspaces, in bytes
FRAGMENTATION = 1.05


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept from forward to backward
    transient: int  # logits of a chunk; with activation checkpointing one recomputed layer

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Plan:
    """What a run takes; memory is one rank's, all else the whole run's."""

    parameters: int
    flops_per_token: float  # forward and backward
    tokens_per_step: int
    steps: int
    memory: Memory
    device: str
    dtype: str
    flops_per_second: float | None  # the matmul rate of the device, measured or from its data sheet
    seconds: float | None  # of training, at the assumed share of that rate
    share: float
    gpus: dict[str, bool]  # GPU (memory in GB) -> whether the run fits
    ranks: Sharing
    bytes_sent: int  # by a rank in an optimizer step

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    def to_dict(self) -> dict[str, Any]:
        memory = {**dataclasses.asdict(self.memory), "total": self.memory.total}
        return {**dataclasses.asdict(self), "tokens": self.tokens, "memory": memory}


def plan(
    model: GPTConfig,
    config: TrainConfig,
    *,
    tokens: int | None = None,
    flops_per_second: float | None = None,
    world_size: int = 1,
    ranks_per_machine: int = 8,
) -> Plan:
    """Plan the run of ``model`` and ``config`` without making the model.

    ``tokens`` is the size of the training data, which ``config.epochs`` needs. ``flops_per_second`` is the device's
    matmul rate (default: a known GPU's peak, or measured on a CPU in a tenth of a second). Memory and time are those of
    ``config.device`` and ``config.dtype``; ``gpus`` assumes a GPU's type (bfloat16 for auto). ``world_size`` ranks,
    each such a device, share the model as ``config.parallel`` says.
    """
    check(config)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    T = config.block_size or model.block_size
    if model.block_size < T:
        raise UserError(f"block size {T} is above the model's {model.block_size}")
    batch = config.batch_size or config.micro_batch_size
    steps = config.max_steps
    if config.epochs is not None:
        if tokens is None:
            raise UserError("a plan in epochs needs the data: give --data, or --max-steps instead")
        samples = max(1, (tokens - 1 - T) // (config.stride or T) + 1)
        steps = max(1, int(config.epochs * samples / batch))
    parameters = count_parameters(model)
    lookups = model.block_size * model.n_embd + (0 if model.tie_embeddings else model.vocab_size * model.n_embd)
    flops = 6.0 * (parameters - lookups) + 12.0 * model.n_layer * model.n_embd * T
    rate = flops_per_second or peak_flops(device, dtype)
    if rate is None and device.type == "cpu":
        rate = measure_matmul(dtype)
    share = CPU_SHARE if device.type == "cpu" else GPU_SHARE
    on_gpu = torch.bfloat16 if config.dtype == "auto" else dtype
    ranks = sharing(config.parallel, world_size, ranks_per_machine)
    own = -(-batch // world_size)  # sequences of a step that are one rank's
    micro = min(config.micro_batch_size, own)
    of_rank = dataclasses.replace(config, micro_batch_size=micro, batch_size=None)
    needed = memory_of_a_rank(memory(model, of_rank, on_gpu, "cuda"), model, ranks).total * FRAGMENTATION + GPU_OVERHEAD
    return Plan(
        parameters=parameters,
        flops_per_token=flops,
        tokens_per_step=batch * T,
        steps=steps,
        memory=memory_of_a_rank(memory(model, of_rank, dtype, device.type), model, ranks),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        flops_per_second=rate,
        seconds=None if rate is None else steps * batch * T * flops / (rate * share * min(world_size, batch)),
        share=share,
        gpus={f"{gpu.name} ({gpu.memory_gb:g} GB)": needed <= gpu.memory_gb * 1e9 for gpu in GPUS},
        ranks=ranks,
        bytes_sent=bytes_sent(model, ranks, -(-own // micro)),
    )


def count_parameters(model: GPTConfig) -> int:
    """Number of parameters of ``GPT(model)``, a tied matrix counted once."""
    C, V = model.n_embd, model.vocab_size
    norm = 2 * C if model.bias else C
    attention = 3 * C * C + (3 * C if model.has_qkv_bias else 0)
    if model.attn_out_proj:
        attention += C * C + (C if model.bias else 0)
    mlp = 8 * C * C + (5 * C if model.bias else 0)
    head = (0 if model.tie_embeddings else V * C) + (V if model.lm_head_bias else 0)
    return (V + model.block_size) * C + model.n_layer * (2 * norm + attention + mlp) + norm + head


def memory(model: GPTConfig, config: TrainConfig, dtype: torch.dtype, device_type: str) -> Memory:
    """Bytes of float32 weights, gradients and Adam's two moments, and of the activations by ``layer_bytes``.

    The loss keeps the gradients of the head (V C) and of the last hidden states from forward to backward.
    """
    B, T = config.micro_batch_size, config.block_size or model.block_size
    C, V, L, N = model.n_embd, model.vocab_size, model.n_layer, B * T
    e = 4 if dtype == torch.float32 else 2
    native = device_type == "cpu" and runs_native_layers(dtype)
    layer = N * (native_layer_bytes(model, e) if native else layer_bytes(model, T, e, device_type))
    casts = 0 if e == 4 or native else 2 * (count_parameters(model) - (V + model.block_size) * C)  # autocast's copies
    if config.activation_checkpointing:
        kept = L * N * (4 + e) * C - N * e * C  # the residual stream and the open branch; the first layer has none
        transient = layer
    else:
        kept = L * layer + casts
        transient = 0
    ends = N * (8 * C + 8) + 4 * V * C
    if model.dropout and not native:  # the masks of the embeddings and of the last branch
        ends += N * (4 + e) * C
    rows = CPU_LOSS_ROWS if device_type == "cpu" else max(CPU_LOSS_ROWS, GPU_LOSS_ELEMENTS // V)
    parameters = count_parameters(model)
    return Memory(
        weights=4 * parameters,
        gradients=4 * parameters,
        optimizer=8 * parameters,
        activations=kept + ends,
        transient=transient + min(min(rows, N) * V * e, CPU_LOSS_BYTES if native else sys.maxsize),
    )


def runs_native_layers(dtype: torch.dtype) -> bool:
    """Whether layers in products of ``dtype`` run as one native call each way on this CPU."""
    from llmfast.ops import decoder_layer

    return decoder_layer.why_not_dtype(dtype) is None


def native_layer_bytes(model: GPTConfig, e: int) -> int:
    """Bytes a token that one native layer keeps (ops/decoder_layer.py): the residual stream twice (2 C) and statistics
    in float32, queries, keys, values and attention's output (4 C) and the MLP's pre-activation (4 C) in the compute
    type. Dropout's masks are drawn again."""
    C, H = model.n_embd, model.n_head
    return 4 * (2 * C + 4 + H) + e * 8 * C


def layer_bytes(model: GPTConfig, T: int, e: int, device_type: str) -> int:
    """Bytes a token that one layer keeps for its backward pass, as PyTorch's own operations do (ours keep no more).

    float32: the residual stream at both norms (2 C), statistics of the norms (4) and of attention (H). Compute type:
    both norms' outputs (2 C), queries, keys and values (3 C), attention's output (C), the MLP's hidden layer before and
    after the activation (8 C; ReLU and own kernels keep one of them). Dropout: the masks of both branches (2 C), and
    where attention has no fused kernel for it (CPU) weights and masks of H T numbers: 5 bytes each in float32, 15 in
    bfloat16, which is multiplied out in float32.
    """
    C, H = model.n_embd, model.n_head
    total = 4 * (2 * C + 4 + H) + e * 14 * C
    if model.dropout:
        total += 2 * e * C + (H * T * (5 if e == 4 else 15) if device_type == "cpu" else 0)
    return total


def measure_matmul(dtype: torch.dtype, size: int = 768, seconds: float = 0.1) -> float:
    """FLOP/s of the routed product of two square matrices on this CPU: the best of a short series."""
    from llmfast import ops

    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    with torch.no_grad():
        ops.linear(a, b)
        while (began := time.perf_counter()) < end or best == float("inf"):
            ops.linear(a, b)
            best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


# ---- Several ranks: P parameters, of which P_b in one block and P_r in no block; W ranks, of which S share one set of
# parameters; R = W / S sets. All in float32, 4 bytes.


def memory_of_a_rank(memory: Memory, model: GPTConfig, ranks: Sharing) -> Memory:
    """``memory`` of one process with a rank's micro batch, as a rank has it.

    In shards, weights, gradients and moments are 16 P / S bytes. Beside them exist, whole, the parameters of no block
    and their gradients (8 P_r), the block at work, the one fetched meanwhile, and the gradients of two (16 P_b).
    """
    S = ranks.shards
    if S == 1:
        return memory
    rest, block = parts(model)
    return dataclasses.replace(
        memory,
        weights=-(-memory.weights // S),
        gradients=-(-memory.gradients // S),
        optimizer=-(-memory.optimizer // S),
        transient=memory.transient + 8 * rest + 16 * block,
    )


def bytes_sent(model: GPTConfig, ranks: Sharing, micro_batches: int) -> int:
    """Bytes that a rank sends, and receives, in an optimizer step of so many micro batches, in rings.

    ddp: one all-reduce of the gradients, 2 (W - 1) / W 4 P. fsdp: in every micro batch each block is gathered for
    forward and backward, the rest once, and all gradients are summed into shards:
    (S - 1) / S 4 ((2 (P - P_r) + P_r) + P). hsdp, beside that: once a step the shards' gradients are averaged over
    the sets, 2 (R - 1) / R 4 P / S.
    """
    P = count_parameters(model)
    R, S = ranks.copies, ranks.shards
    rest, _ = parts(model)
    in_shards = (S - 1) / S * 4 * (3 * P - rest) * micro_batches
    between_copies = 2 * (R - 1) / R * 4 * P / S
    return round(in_shards + between_copies)


def parts(model: GPTConfig) -> tuple[int, int]:
    """(P_r, P_b): parameters outside the blocks, and of one block."""
    one, two = (count_parameters(dataclasses.replace(model, n_layer=layers)) for layers in (1, 2))
    return 2 * one - two, two - one
