"""The output head and its loss on the CPU, forward and backward, side by side: time and extra peak memory.

"eager" is F.cross_entropy(F.linear(x, weight), target), "torch" PyTorch's own F.linear_cross_entropy where it has one,
"chunked" our loop in plain PyTorch, "ours" the C++ kernel. bfloat16 is autocast over float32 weights. Each takes its
turn in one process and its least CPU time counts (of all threads; on a busy machine time on the wall tells of the
neighbours). Extra memory is the peak of resident memory during one step in a fresh process, less what is resident
before it and less the gradients.

    python benchmarks/linear_cross_entropy.py --threads 1 --json out.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from llmfast.bench.environment import header

SHAPES = [(1024, 768, 50257), (1024, 384, 50304)]
PROVIDERS = ["eager", "torch", "chunked", "ours"]
DTYPES = ["float32", "bfloat16"]


def build(provider: str, N: int, C: int, V: int, dtype: str) -> Callable[[], None]:
    """A function that makes one loss and the gradients by x and weight."""
    import torch
    import torch.nn.functional as F

    from llmfast import ops

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=generator).requires_grad_()
    weight = torch.randn(V, C, generator=generator).mul_(C**-0.5).requires_grad_()
    target = torch.randint(V, (N,), generator=generator)
    losses = {
        "eager": lambda: F.cross_entropy(F.linear(x, weight), target),
        "torch": lambda: F.linear_cross_entropy(x, weight, target),
        "chunked": ops.use_backend("torch")(lambda: ops.linear_cross_entropy(x, weight, target)),
        "ours": ops.use_backend("cpp")(lambda: ops.linear_cross_entropy(x, weight, target)),
    }

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = losses[provider]()
        loss.backward()
        x.grad = weight.grad = None

    return step


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def extra_memory(provider: str, N: int, C: int, V: int, dtype: str) -> int:
    """Peak bytes of one step beyond what was resident before and the two gradients; run in a process of its own."""
    build(provider, 64, 64, 640, dtype)()  # loads libraries and decides matmul routes
    step = build(provider, N, C, V, dtype)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts afresh
    step()
    return resident("VmHWM") - before - 4 * (N + V) * C


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)  # what the child processes run
    args = parser.parse_args()

    import torch
    import torch.nn.functional as F

    import llmfast

    torch.set_num_threads(args.threads)
    if args.memory_of:
        provider, *shape, dtype = args.memory_of
        print(extra_memory(provider, *map(int, shape), dtype))
        return
    llmfast.tune_process(args.threads)  # the allocator's settings help all of them
    providers = [p for p in PROVIDERS if p != "torch" or hasattr(F, "linear_cross_entropy")]
    print(f"torch {torch.__version__}, {args.threads} threads, {args.turns} turns")
    print(f"{'shape':>16} {'dtype':9} {'':8} {'ms':>8} {'x eager':>8} {'GFLOP/s':>8} {'extra MB':>9} {'of eager':>9}")
    records = []
    for N, C, V in SHAPES:
        for dtype in DTYPES:
            steps = {p: build(p, N, C, V, dtype) for p in providers}
            seconds = dict.fromkeys(providers, float("inf"))
            for _ in range(args.turns):
                for p, step in steps.items():
                    start = time.process_time()
                    step()
                    seconds[p] = min(seconds[p], time.process_time() - start)
            del steps
            child = [sys.executable, __file__, "--threads", str(args.threads), "--memory-of"]
            memory = {
                p: int(subprocess.check_output([*child, p, str(N), str(C), str(V), dtype], text=True))
                for p in providers
            }
            for p in providers:
                record = {"shape": [N, C, V], "dtype": dtype, "provider": p, "cpu_seconds": seconds[p]}
                record |= {"speedup": seconds["eager"] / seconds[p], "extra_bytes": memory[p]}
                records.append(record)
                rate = 6e-9 * N * C * V / seconds[p]
                row = f"{N:>5}x{C}x{V:<6} {dtype:9} {p:8} {1e3 * seconds[p]:8.0f} {record['speedup']:8.2f}"
                print(f"{row} {rate:8.0f} {memory[p] / 2**20:9.0f} {memory[p] / memory['eager']:9.2f}", flush=True)
    if args.json:
        record = {**header("script"), "threads": args.threads, "turns": args.turns, "rows": records}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
