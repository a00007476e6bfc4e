"""Whole training steps on the CPU, side by side: llmfast, nanoGPT, Hugging Face, plain PyTorch, and the products alone.

Each provider lives in a process of its own, because allocator and matmul settings hold for a whole process; float32 and
bfloat16 (autocast) are two. The processes take turns, so that whatever else the machine does hits all of them alike; a
sample during which other processes used the cores is taken again. The figure is the median of the undisturbed ones.
Models that do not fit into memory together run in parts, several times over. On a machine that is never quiet,
--cpu-seconds counts those of one thread instead, the least of all samples: ratios, not what a user waits for. What
"tuned", the floor and the memory mean stands in llmfast/bench/steps.py.

    LLMFAST_PEERS=folder/with/nanoGPT python benchmarks/train_step.py --shape 30m --json out.json
    LLMFAST_PEERS=folder/with/nanoGPT python benchmarks/train_step.py --shape 124m --isa avx2 --all-held
    python benchmarks/train_step.py --quick
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch

from llmfast.bench.environment import header
from llmfast.bench.steps import CPU_SECONDS, PEERS, PROVIDERS, Shape
from llmfast.bench.train import DISTURBED, measure
from llmfast.ops.describe import cpu_name

SHAPES = {
    "char": Shape(4, 4, 128, 65, 64, 12),
    "30m": Shape(6, 6, 384, 50304, 256, 4),
    "124m": Shape(12, 12, 768, 50304, 512, 1),
    "124m-1024": Shape(12, 12, 768, 50304, 1024, 1),
}
QUICK = ["llmfast", "llmfast torch", "nanogpt", "eager", "eager tuned", "floor"]
# Speed of the first over the second, at least this.
TARGETS = {
    "char": [("llmfast fp32", "nanogpt fp32", 2.0), ("llmfast bf16", "nanogpt fp32", 3.0)],
    "30m": [
        ("llmfast fp32", "nanogpt fp32", 2.5),
        ("llmfast fp32", "nanogpt tuned fp32", 1.15),
        ("llmfast fp32", "floor fp32", 0.95),
        ("llmfast bf16", "nanogpt fp32", 4.2),
        ("llmfast bf16", "nanogpt compile tuned bf16", 1.25),
        ("llmfast bf16", "floor bf16", 0.75),
    ],
    "124m": [("llmfast fp32", "nanogpt fp32", 2.2), ("llmfast bf16", "nanogpt fp32", 4.0)],
}
TARGETS["124m-1024"] = TARGETS["124m"]
MEMORY_TARGETS = [("llmfast fp32", "nanogpt fp32", 0.5), ("llmfast bf16", "nanogpt bf16", 0.5)]  # at most
# What holds PyTorch and its libraries to an instruction set.
HELD = {
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
}
# On a lesser instruction set: never slower than PyTorch tuned.
ISA_TARGETS = [(f"llmfast {d}", f"{peer} tuned {d}", 1.0) for d in ("fp32", "bf16") for peer in ("nanogpt", "eager")]


def judge(figures: dict[str, float], pairs: list[tuple[str, str, float]], below: bool) -> list[dict[str, Any]]:
    """Targets against what was measured: figures are tokens/s (at least the factor) or bytes (``below``: at most)."""
    rows = []
    for ours, other, factor in pairs:
        if ours in figures and other in figures:
            ratio = figures[ours] / figures[other]
            met = ratio <= factor if below else ratio >= factor
            what = "memory" if below else "speed"
            rows.append({"what": f"{what} {ours} / {other}", "ratio": ratio, "target": factor, "met": met})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="30m")
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument(
        "--providers", nargs="+", choices=[*PROVIDERS, *(f"{p} {d}" for p in PROVIDERS for d in ("fp32", "bf16"))],
        metavar="NAME", help="such as 'nanogpt tuned', or 'nanogpt fp32' for one dtype only; default: all there are",
    )  # fmt: skip
    parser.add_argument("--isa", choices=["portable", "avx2", "avx512"], help="llmfast's kernels use no more than this")
    parser.add_argument("--all-held", action="store_true", help="PyTorch's libraries, too: as on a CPU without more")
    parser.add_argument("--quick", action="store_true", help="a look in a minute or two: few providers, three turns")
    parser.add_argument("--cpu-seconds", action="store_true", help="of one thread, least of all samples")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.all_held and args.isa not in HELD:
        parser.error(f"--all-held needs --isa {' or '.join(HELD)}")
    if args.cpu_seconds:
        os.environ |= {CPU_SECONDS: "1", "OMP_NUM_THREADS": "1"}
    if args.isa:
        os.environ |= {"LLMFAST_CPU_ISA": args.isa, **(HELD[args.isa] if args.all_held else {})}
    shape, turns = SHAPES[args.shape], 3 if args.quick else args.turns
    kinds = args.providers or (QUICK if args.quick else PROVIDERS)
    names = [
        name
        for kind in kinds
        for name in ([f"{kind} {dtype}" for dtype in args.dtype] if kind in PROVIDERS else [kind])
        if "nanogpt" not in kind or PEERS in os.environ
    ]
    samples, facts = measure(names, shape, turns, repeats=0 if args.quick or args.cpu_seconds else 2)

    quiet = {name: [t for t, others in taken if others <= DISTURBED] for name, taken in samples.items()}
    seconds = {name: quiet[name] if len(quiet[name]) >= 2 else [t for t, _ in samples[name]] for name in samples}
    if args.cpu_seconds:
        seconds = {name: [t for t, _ in taken] for name, taken in samples.items()}
    median = {name: (min if args.cpu_seconds else statistics.median)(values) for name, values in seconds.items()}
    speed = {name: shape.tokens / t for name, t in median.items()}
    extra = {name: fact["extra"] for name, fact in facts.items() if fact["extra"] is not None}
    pairs = ISA_TARGETS if args.isa else TARGETS[args.shape]
    targets = judge(speed, pairs, below=False)
    if args.shape.startswith("124m") and not args.isa:
        targets += judge(extra, MEMORY_TARGETS, below=True)

    base = "nanogpt fp32" if "nanogpt fp32" in speed else "eager fp32"
    isa = f"{args.isa or 'best'}{' of all' if args.all_held else ''}"
    print(f"shape {args.shape}: {shape}, kernels {isa}, torch {torch.__version__}, {cpu_name()}")
    head = (
        f"{'provider':26} {'ms/step':>9} {'tokens/s':>9} {'x ' + base:>15} {'of floor':>9} {'extra MB':>9} {'quiet':>7}"
    )
    print(f"{head}  losses of the first steps; setting")
    for name, t in median.items():
        ratio = f"{speed[name] / speed[base]:.2f}" if base in speed else ""
        floor = median.get(f"floor {name.rpartition(' ')[2]}")
        share = f"{floor / t:.2f}" if floor else ""
        memory = f"{extra[name] / 1e6:.0f}" if name in extra else ""
        losses = " ".join(f"{loss:.4f}" for loss in facts[name]["losses"])
        count = f"{len(quiet[name])}/{len(samples[name])}"
        row = f"{name:26} {t * 1e3:9.1f} {speed[name]:9.0f} {ratio:>15} {share:>9} {memory:>9} {count:>7}"
        print(f"{row}  {losses}; {facts[name]['setting']}")
    for row in targets:
        verdict = "met" if row["met"] else "NOT MET"
        print(f"{row['what']:60} {row['ratio']:6.2f}   target {row['target']:<5} {verdict}")
    if args.json:
        record = {
            **header("script"),
            "isa": args.isa or "best",
            "all_held": args.all_held,
            "clock": "CPU seconds of one thread" if args.cpu_seconds else "wall",
            "tokens": shape.tokens,
            "seconds": {name: [round(t, 6) for t in values] for name, values in seconds.items()},
            "disturbed": {name: len(samples[name]) - len(quiet[name]) for name in samples},
            "median": median,
            "facts": facts,
            "targets": targets,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
