"""Whole training steps on the CPU, side by side: llmfast, eager PyTorch, torch.compile and nanoGPT.

Each provider lives in a process of its own, because the allocator and matmul settings that llmfast makes hold for a
whole process, and gets the same shape, batch and fused AdamW. The processes take turns, so that whatever else the
machine does hits all of them alike; the figure is the median over the turns. The floor is the time of the step's matrix
products alone, through the faster of PyTorch's own two routes, timed in the same turns.

    python benchmarks/train_step.py --shape 30m
    LLMFAST_PEERS=folder/with/nanoGPT python benchmarks/train_step.py --shape char --json out.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path


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


SHAPES = {
    "char": Shape(4, 4, 128, 65, 64, 12),
    "30m": Shape(6, 6, 384, 50304, 256, 4),
    "124m": Shape(12, 12, 768, 50304, 512, 1),
}
PROVIDERS = ["llmfast", "llmfast torch", "eager", "eager tuned", "compile", "nanogpt", "nanogpt tuned", "floor"]

Step = Callable[[], float]


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def plain_gpt(s: Shape):
    """A GPT-2 as one writes it in plain PyTorch: nn.Linear, nn.LayerNorm, SDPA, cross_entropy."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(s.n_embd), nn.LayerNorm(s.n_embd)
            self.c_attn, self.c_proj = nn.Linear(s.n_embd, 3 * s.n_embd), nn.Linear(s.n_embd, s.n_embd)
            self.mlp = nn.Sequential(
                nn.Linear(s.n_embd, 4 * s.n_embd), nn.GELU(approximate="tanh"), nn.Linear(4 * s.n_embd, s.n_embd)
            )

        def forward(self, x):
            B, T, C = x.shape
            q, k, v = self.c_attn(self.ln_1(x)).view(B, T, 3, s.n_head, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, C))
            return x + self.mlp(self.ln_2(x))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(s.vocab_size, s.n_embd), nn.Embedding(s.block_size, s.n_embd)
            self.blocks = nn.Sequential(*[Block() for _ in range(s.n_layer)])
            self.ln_f = nn.LayerNorm(s.n_embd)

        def forward(self, x, y):
            h = self.blocks(self.wte(x) + self.wpe(torch.arange(x.shape[1])))
            logits = F.linear(self.ln_f(h), self.wte.weight)
            return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    model = GPT()
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    return model


def nanogpt(s: Shape):
    sys.path.insert(0, str(Path(os.environ["LLMFAST_PEERS"]) / "nanoGPT"))
    from model import GPT, GPTConfig

    shape = {k: getattr(s, k) for k in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")}
    model = GPT(GPTConfig(dropout=0.0, bias=True, **shape))
    return lambda x, y: model(x, y)[1], model


def floor(s: Shape) -> Step:
    """One pass over every matrix product of a training step, forward, dX and dW, through PyTorch's faster route."""
    import torch

    L, C, V, M = s.n_layer, s.n_embd, s.vocab_size, s.tokens
    layers = [(L, M, C, 3 * C), (L, M, C, C), (L, M, C, 4 * C), (L, M, 4 * C, C), (1, M, C, V)]
    products = []
    for count, m, k, n in layers:
        x, w, dy = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
        products += [(count, x, w.t()), (count, dy, w), (count, dy.t(), x)]

    def run() -> float:
        total = 0.0
        for count, a, b in products:
            best = float("inf")
            for precision in ("highest", "medium"):
                torch.set_float32_matmul_precision(precision)
                out = torch.empty(a.shape[0], b.shape[1])
                torch.mm(a, b, out=out)
                start = time.perf_counter()
                torch.mm(a, b, out=out)
                best = min(best, time.perf_counter() - start)
            total += count * best
        return total

    return run


def build(provider: str, s: Shape, dtype: str) -> Step:
    """A function that takes training steps and returns the seconds of one."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    if provider.endswith("tuned") or provider == "floor":
        import ctypes

        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)
        libc.mallopt(-3, 2**31 - 1)
        torch.set_float32_matmul_precision("medium")
    if provider == "floor":
        return floor(s)
    g = torch.Generator().manual_seed(1)
    x = torch.randint(s.vocab_size, (s.batch_size, s.block_size), generator=g)
    y = torch.randint(s.vocab_size, (s.batch_size, s.block_size), generator=g)
    if provider.startswith("llmfast"):
        import llmfast
        from llmfast import ops
        from llmfast.config import GPTConfig

        llmfast.tune_process()
        shape = {k: getattr(s, k) for k in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")}
        model = llmfast.GPT(GPTConfig(**shape))
        backend = ops.use_backend("torch" if provider.endswith("torch") else "auto")
        backend.__enter__()
        loss_of = lambda x, y: model(x, y)[1]  # noqa: E731
    elif provider.startswith("nanogpt"):
        loss_of, model = nanogpt(s)
    else:
        model = plain_gpt(s)
        loss_of = torch.compile(model) if provider == "compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = loss_of(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - start

    return step


def serve(provider: str, shape: Shape, dtype: str, pipe: Connection) -> None:
    try:
        step = build(provider, shape, dtype)
        step(), step()  # the first calls compile, measure and touch memory
        pipe.send("ready")
        while pipe.recv():
            pipe.send(min(step() for _ in range(2)))
    except Exception as error:  # a provider that cannot run says why and leaves the table
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def main() -> None:
    import multiprocessing

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="30m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--providers", nargs="+", default=PROVIDERS, choices=PROVIDERS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    names = [p for p in args.providers if "nanogpt" not in p or "LLMFAST_PEERS" in os.environ]

    spawn = multiprocessing.get_context("spawn")
    workers = {}
    for name in names:  # one after the other: the warm-up should not be disturbed either
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(name, shape, args.dtype, theirs), daemon=True)
        process.start()
        answer = ours.recv()
        if answer == "ready":
            workers[name] = ours
        else:
            print(f"{name}: cannot run: {answer}")
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(args.turns):
        for name, pipe in workers.items():
            pipe.send(True)
            seconds[name].append(pipe.recv())
    for pipe in workers.values():
        pipe.send(False)

    import torch

    median = {name: statistics.median(values) for name, values in seconds.items()}
    base = next((n for n in ("nanogpt", "eager") if n in median), None)
    print(f"shape {args.shape}: {shape}, {args.dtype}")
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {args.turns} turns")
    print(f"{'provider':16} {'ms/step':>9} {'tokens/s':>10} {'x ' + str(base):>12} {'of floor':>9}   spread")
    for name, t in median.items():
        ratio = f"{median[base] / t:.2f}" if base else ""
        share = f"{median['floor'] / t:.2f}" if "floor" in median else ""
        row = f"{name:16} {t * 1e3:9.1f} {shape.tokens / t:10.0f} {ratio:>12} {share:>9}"
        print(f"{row}   {min(seconds[name]) * 1e3:.1f}-{max(seconds[name]) * 1e3:.1f}")
    if args.json:
        record = {
            "schema": 1,
            "command": f"benchmarks/train_step.py --shape {args.shape} --dtype {args.dtype} --turns {args.turns}",
            "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
            "device": f"{cpu_name()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
            "seconds": seconds,
            "median": median,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
