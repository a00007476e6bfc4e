"""Who takes a whole training step: llmfast, plain PyTorch, the ladder of a naive GPT made fast, and the peers.

Every provider starts from the same weights and batch, and takes the same step: forward, backward, clipping at norm 1,
AdamW. The peers get PyTorch's fused AdamW, which on a CPU is kinder to nanoGPT than its own choice. The book's and
train-llm-from-scratch's models have other parameters: their losses are their own.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from llmfast.bench.case import resident
from llmfast.errors import UserError

BACKEND = ExitStack()  # holds the backend of this process for its whole life
CPU_SECONDS = "LLMFAST_CPU_SECONDS"  # in the environment: CPU seconds of the process count, not time on the wall
PEERS = "LLMFAST_PEERS"  # the folder that holds nanoGPT, llm.c, LLMs-from-scratch and train-llm-from-scratch
# As its users run it, and tuned: an allocator that keeps its pages, and whichever float32 matmul precision is faster.
PROVIDERS = [
    "llmfast", "llmfast torch",
    "nanogpt", "nanogpt tuned", "nanogpt compile", "nanogpt compile tuned",
    "huggingface", "huggingface tuned",
    "eager", "eager tuned", "compile", "compile tuned",
    "floor",
]  # fmt: skip
# Each rung adds one thing to those before it.
LADDER = [
    "naive", "tf32", "fused-adamw", "bf16", "native-norm-gelu", "flash", "compile", "padded-vocab", "larger-batch",
]  # fmt: skip
FOLDERS = {
    "nanogpt": "nanoGPT", "llm.c": "llm.c", "book": "LLMs-from-scratch", "book fast": "LLMs-from-scratch",
    "train-llm-from-scratch": "train-llm-from-scratch",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    block_size: int
    batch_size: int

    @property
    def tokens(self) -> int:
        return self.batch_size * self.block_size

    @property
    def parameters(self) -> int:
        return 12 * self.n_layer * self.n_embd**2 + (self.vocab_size + self.block_size) * self.n_embd

    @property
    def sizes(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")}


def plain_gpt(s: Shape) -> Any:
    """A GPT-2 as one writes it in plain PyTorch: nn.Linear, nn.LayerNorm, SDPA, cross_entropy."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def gelu(x):
        return F.gelu(x, approximate="tanh")

    class Block(nn.Module):
        attend: Any
        gelu: Any
        attn: Any
        mlp: Any

        def __init__(self):
            super().__init__()
            self.attend, self.gelu = attend, gelu
            self.ln_1, self.ln_2 = nn.LayerNorm(s.n_embd), nn.LayerNorm(s.n_embd)
            self.attn, self.mlp = nn.Module(), nn.Module()
            self.attn.c_attn, self.attn.c_proj = nn.Linear(s.n_embd, 3 * s.n_embd), nn.Linear(s.n_embd, s.n_embd)
            self.mlp.c_fc, self.mlp.c_proj = nn.Linear(s.n_embd, 4 * s.n_embd), nn.Linear(4 * s.n_embd, s.n_embd)

        def forward(self, x):
            B, T, C = x.shape
            q, k, v = self.attn.c_attn(self.ln_1(x)).view(B, T, 3, s.n_head, -1).permute(2, 0, 3, 1, 4)
            y = self.attend(q, k, v)
            x = x + self.attn.c_proj(y.transpose(1, 2).reshape(B, T, C))
            return x + self.mlp.c_proj(self.gelu(self.mlp.c_fc(self.ln_2(x))))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(s.vocab_size, s.n_embd), nn.Embedding(s.block_size, s.n_embd)
            self.h = nn.Sequential(*[Block() for _ in range(s.n_layer)])
            self.ln_f = nn.LayerNorm(s.n_embd)

        def forward(self, x, y):
            h = self.h(self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device)))
            logits = F.linear(self.ln_f(h), self.wte.weight)
            return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    return GPT()


def naive_gpt(s: Shape, rungs: list[str]) -> Any:
    """The GPT-2 of a first lesson, formula by formula, and with the rungs' own pieces of PyTorch instead."""
    import torch
    from torch import nn

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(s.n_embd)), nn.Parameter(torch.zeros(s.n_embd))

        def forward(self, x):
            mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
            return self.weight * (x - mean) / torch.sqrt(var + 1e-5) + self.bias

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))

    def attend(q, k, v):
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        mask = torch.triu(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device), diagonal=1)
        return scores.masked_fill(mask, float("-inf")).softmax(-1) @ v

    model = plain_gpt(s)
    if "native-norm-gelu" not in rungs:
        model.ln_f = Norm()
        for block in model.h:
            block.ln_1, block.ln_2, block.gelu = Norm(), Norm(), gelu
    if "flash" not in rungs:
        for block in model.h:
            block.attend = attend
    return model


def peer(kind: str, s: Shape) -> Any:
    """The model of a checkout under LLMFAST_PEERS; ``forward`` as that program has it."""
    folder = Path(os.environ.get(PEERS, "")) / FOLDERS[kind]
    if PEERS not in os.environ or not folder.is_dir():
        raise UserError(f"no {FOLDERS[kind]} under {PEERS}")
    inside = {"book": "pkg", "book fast": "pkg"}.get(kind, "")
    sys.path.insert(0, str(folder / inside))
    if kind == "nanogpt":
        module = importlib.import_module("model")
        return module.GPT(module.GPTConfig(dropout=0.0, bias=True, **s.sizes))
    if kind == "llm.c":
        module = importlib.import_module("train_gpt2")
        vars(module)["FLASH"] = 1
        return module.GPT(module.GPTConfig(**s.sizes))
    if kind == "train-llm-from-scratch":
        module = importlib.import_module("src.models.transformer")
        return module.Transformer(s.n_head, s.n_embd, s.block_size, s.vocab_size, s.n_layer)
    module = importlib.import_module("llms_from_scratch.ch04")
    sizes: dict[str, Any] = {"vocab_size": s.vocab_size, "context_length": s.block_size, "emb_dim": s.n_embd}
    sizes |= {"n_heads": s.n_head, "n_layers": s.n_layer, "drop_rate": 0.0, "qkv_bias": True}
    return (module.GPTModelFast if kind == "book fast" else module.GPTModel)(sizes)


def huggingface(s: Shape) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {**s.sizes, "n_positions": s.block_size}
    del sizes["block_size"]
    return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes)).train()


def same_weights(model: Any, transposed: bool) -> None:
    """Draw the parameters by name: every provider computes the same losses. ``transposed``: Linears are (in, out)."""
    import torch

    with torch.no_grad():
        for name, p in model.named_parameters():
            linear = transposed and p.dim() == 2 and ".h." in name
            generator = torch.Generator().manual_seed(zlib.crc32(name.removeprefix("transformer.").encode()))
            values = torch.randn(p.t().shape if linear else p.shape, generator=generator) * 0.02
            p.copy_(values.t() if linear else values)
            if ".ln_" in f".{name}" and name.endswith("weight"):
                p.add_(1.0)


def climbed(s: Shape, rungs: list[str]) -> Shape:
    """The shape at the last of these rungs."""
    if "padded-vocab" in rungs:
        s = replace(s, vocab_size=-(-s.vocab_size // 64) * 64)
    return replace(s, batch_size=4 * s.batch_size) if "larger-batch" in rungs else s


def keep_pages() -> None:
    """What ``llmfast.tune_process`` does to glibc's malloc."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-1, 2**31 - 1)
    libc.mallopt(-3, 2**31 - 1)


class Provider:
    """Takes training steps. ``step()`` returns the loss; ``setting`` says what was tuned."""

    def __init__(self, name: str, s: Shape, dtype: str, device: str = "cpu") -> None:
        import torch

        torch.manual_seed(0)
        self.name, self.dtype, self.setting, self.count = name, dtype, "", 0
        self.device = torch.device(device)
        kind, *options = name.split()
        rungs = LADDER[: LADDER.index(options[0]) + 1] if kind == "ladder" else []
        if rungs:
            self.dtype = "bf16" if "bf16" in rungs else "fp32"
            s = climbed(s, rungs)
            if "tf32" in rungs:
                torch.set_float32_matmul_precision("high")
        self.tokens = s.tokens
        compiled = "compile" in (kind, *options, *rungs)
        g = torch.Generator().manual_seed(1)
        x, y = (torch.randint(s.vocab_size, (s.batch_size, s.block_size), generator=g) for _ in "xy")
        self.x, self.y = x.to(self.device), y.to(self.device)
        if kind == "llmfast":
            self._llmfast(s, options)
        else:
            if "tuned" in options:
                keep_pages()
            self._before = resident("VmRSS")
            self._another(s, name if name in FOLDERS else kind, rungs, compiled)
        self.losses = [self.step() for _ in range(3)]
        if "tuned" in options:
            self._choose_precision(compiled)

    def _another(self, s: Shape, kind: str, rungs: list[str], compiled: bool) -> None:
        import torch
        from torch.nn import functional as F

        if kind in FOLDERS:
            model = peer(kind, s)
        else:
            model = huggingface(s) if kind == "huggingface" else naive_gpt(s, rungs) if rungs else plain_gpt(s)
        same_weights(model, transposed=kind == "huggingface")
        model.to(self.device)
        self.parameters = list(model.parameters())
        fused = not rungs or "fused-adamw" in rungs
        optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=fused or None, foreach=None if fused else False)
        run = torch.compile(model) if compiled else model

        def book() -> Any:
            return F.cross_entropy(run(self.x).flatten(0, 1), self.y.flatten())

        self._loss = {
            "nanogpt": lambda: run(self.x, self.y)[1],
            "llm.c": lambda: run(self.x, self.y, return_logits=False)[1],
            "huggingface": lambda: run(input_ids=self.x, labels=self.y, shift_labels=self.y).loss,
            "book": book,
            "book fast": book,
            "train-llm-from-scratch": lambda: run(self.x, self.y)[1],
        }.get(kind, lambda: run(self.x, self.y))

        def update(loss: Any) -> None:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        self._update = update

    def _llmfast(self, s: Shape, options: list[str]) -> None:
        """Through the model, the optimizer and the update that ``llmfast pretrain`` uses."""
        import torch

        import llmfast
        from llmfast import ops
        from llmfast.config import GPTConfig, TrainConfig
        from llmfast.training.optimizer import build_optimizer
        from llmfast.training.update import Update

        self.setting = str(llmfast.tune_process())
        backend = options[0] if options else "auto"
        BACKEND.enter_context(ops.use_backend(our_kernels(self.device) if backend == "ours" else backend))
        self._before = resident("VmRSS")
        model = llmfast.GPT(GPTConfig(bias=True, **s.sizes))
        same_weights(model, transposed=False)
        model.to(self.device)
        self.parameters = list(model.parameters())
        optimizer = build_optimizer(model, TrainConfig(learning_rate=1e-4, weight_decay=0.01, beta2=0.999))
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]
        update = Update(optimizer, 1.0, self.device, dtype)
        self._loss = lambda: model(self.x, self.y)[1]

        def apply(loss: Any) -> None:
            update.backward(loss)
            self.count += 1
            update.apply(self.count, loss, 1.0)
            optimizer.zero_grad(set_to_none=True)

        self._update = apply

    def _choose_precision(self, compiled: bool) -> None:
        import torch

        def use(precision: str) -> None:
            if compiled:
                torch.compiler.reset()
            torch.set_float32_matmul_precision(precision)
            self.step()

        seconds = {}
        for precision in ("highest", "medium"):
            use(precision)
            seconds[precision] = min(timed(self.step) for _ in range(3))
        best = min(seconds, key=seconds.__getitem__)
        if best != "medium":
            use(best)
        self.setting = f"allocator kept, precision {best}"

    def step(self) -> float:
        import torch

        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == "bf16"):
            loss = self._loss()
        self._update(loss)
        return loss.item()

    def extra_bytes(self) -> int | None:
        """Peak memory of two steps beyond parameters, gradients and AdamW's moments; None where Linux does not tell.

        The kernel's high-water mark of resident memory (VmHWM, set back through clear_refs), less what the process held
        before the model was built, less four times the parameters. Memory that an allocator keeps counts.
        """
        import torch

        held = sum(4 * p.numel() * p.element_size() for p in self.parameters)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.step(), self.step()
            return torch.cuda.max_memory_allocated(self.device) - held
        if self._before is None:
            return None
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        self.step(), self.step()
        return (resident("VmHWM") or 0) - self._before - held


class Floor:
    """One pass over every matrix product of a training step, forward, dX and dW, with preallocated outputs.

    float32: each product through the faster of PyTorch's default library and oneDNN; bfloat16: ``torch.mm``. The
    products inside of attention are left out, so that the floor is low.
    """

    losses: tuple[float, ...] = ()
    setting = ""

    def __init__(self, s: Shape, dtype: str) -> None:
        import torch

        keep_pages()
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self.precisions = ("highest", "medium") if dtype == "fp32" else ("highest",)
        L, C, V, M = s.n_layer, s.n_embd, s.vocab_size, s.tokens
        layers = [(L, M, C, 3 * C), (L, M, C, C), (L, M, C, 4 * C), (L, M, 4 * C, C), (1, M, C, V)]
        self.products = []
        for count, m, k, n in layers:
            x, w, dy = (torch.randn(*size).to(kind) for size in ((m, k), (n, k), (m, n)))
            for a, b in ((x, w.t()), (dy, w), (dy.t(), x)):
                self.products.append((count, a, b, torch.empty(a.shape[0], b.shape[1], dtype=kind)))
        self.seconds()

    def extra_bytes(self) -> None:
        return None

    def seconds(self) -> float:
        import torch

        total = 0.0
        for count, a, b, out in self.products:
            best = float("inf")
            for precision in self.precisions:
                torch.set_float32_matmul_precision(precision)
                torch.mm(a, b, out=out)
                best = min(best, *(timed(partial(torch.mm, a, b, out=out)) for _ in range(2)))
            total += count * best
        return total


def our_kernels(device: Any) -> str:
    """The setting that forces llmfast's own kernel wherever there is one for ``device``, proven or not."""
    import torch

    from llmfast.ops._registry import OPS

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    own: dict[str, str] = {}
    for name, op in OPS.items():
        for implementation in op.implementations:
            if implementation.by == "ours" and not implementation.why_not_on(device, dtype):
                own.setdefault(name, implementation.backend)
    return ",".join(["auto", *(f"{name}={backend}" for name, backend in own.items())])


def timed(run: Callable[[], Any]) -> float:
    clock = time.process_time if CPU_SECONDS in os.environ else time.perf_counter
    start = clock()
    run()
    return clock() - start
