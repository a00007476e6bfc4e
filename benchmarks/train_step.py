"""Whole training steps on the CPU, side by side: llmfast, nanoGPT, Hugging Face, plain PyTorch, and the products alone.

Each provider lives in a process of its own, because allocator and matmul settings hold for a whole process; float32 and
bfloat16 (autocast) are two. The processes take turns, so that whatever else the machine does hits all of them alike; a
sample during which other processes used the cores is taken again. The figure is the median of the undisturbed ones.
Models that do not fit into memory together run in parts, several times over. What "tuned", the floor and the memory
mean stands in step_providers.py.

    LLMFAST_PEERS=folder/with/nanoGPT python benchmarks/train_step.py --shape 30m --json out.json
    LLMFAST_PEERS=folder/with/nanoGPT python benchmarks/train_step.py --shape 124m --isa avx2
    python benchmarks/train_step.py --quick
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from step_providers import PEERS, PROVIDERS, Floor, Provider, Shape, timed

SHAPES = {
    "char": Shape(4, 4, 128, 65, 64, 12),
    "30m": Shape(6, 6, 384, 50304, 256, 4),
    "124m": Shape(12, 12, 768, 50304, 512, 1),
    "124m-1024": Shape(12, 12, 768, 50304, 1024, 1),
}
DISTURBED = 0.05  # share of the cores that other processes used during a sample
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
# On a lesser instruction set: never slower than PyTorch tuned.
ISA_TARGETS = [(f"llmfast {d}", f"{peer} tuned {d}", 1.0) for d in ("fp32", "bf16") for peer in ("nanogpt", "eager")]


def others_seconds() -> float:
    """CPU seconds that this machine has spent on anything but this process."""
    try:
        fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return 0.0
    busy = sum(fields[i] for i in (0, 1, 2, 5, 6, 7)) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:2])


def sample(provider: Any, least: float = 0.3) -> tuple[float, float]:
    """Seconds of one step, averaged over ``least`` seconds, and the share of the machine that others used meanwhile."""
    before, start, steps = others_seconds(), time.perf_counter(), 0
    seconds = 0.0
    while time.perf_counter() - start < least:
        seconds += provider.seconds() if isinstance(provider, Floor) else timed(provider.step)
        steps += 1
    elapsed = time.perf_counter() - start
    return seconds / steps, (others_seconds() - before - 0.02) / elapsed / (os.cpu_count() or 1)


def serve(name: str, shape: Shape, pipe: Connection) -> None:
    """In the provider's own process: build, warm up, report, then one sample a request."""
    try:
        kind, _, dtype = name.rpartition(" ")
        provider = Floor(shape, dtype) if kind == "floor" else Provider(kind, shape, dtype)
        extra = provider.extra_bytes()
        pipe.send({"losses": list(provider.losses), "extra": extra, "setting": provider.setting})
        while pipe.recv():
            pipe.send(sample(provider))
    except Exception as error:  # a provider that cannot run says why and leaves the table
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


@contextmanager
def workers(names: list[str], shape: Shape, facts: dict[str, Any]) -> Iterator[dict[str, Connection]]:
    """A process for each name, ready to take steps; what they report goes into ``facts``."""
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name in names:  # one after the other: the warm-up should not be disturbed either
        ours, theirs = spawn.Pipe()
        processes.append(spawn.Process(target=serve, args=(name, shape, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        try:
            answer = ours.recv()
        except EOFError:
            answer = "its process ended"
        if isinstance(answer, dict):
            pipes[name], facts[name] = ours, answer
            print(f"ready: {name}", file=sys.stderr, flush=True)
        else:
            print(f"{name}: cannot run: {answer}", file=sys.stderr, flush=True)
    try:
        yield pipes
    finally:
        for pipe in pipes.values():
            pipe.send(False)
        for process in processes:
            process.join(30)


def parts(names: list[str], shape: Shape) -> list[list[str]]:
    """The names in as few groups as memory allows, of about equal size."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    each = 16 * shape.parameters + 16 * shape.tokens * shape.vocab_size + (1 << 29)
    room = max(1, int(0.7 * memory / each))
    count = -(-len(names) // room)
    return [names[i::count] for i in range(count)]


def measure(
    names: list[str], shape: Shape, turns: int, repeats: int
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, Any]]:
    """Every sample (seconds, share of others) and what each provider reported.

    A disturbed sample is taken again, ``repeats`` times at most.
    """
    samples: dict[str, list[tuple[float, float]]] = {}
    facts: dict[str, Any] = {}
    groups = parts(names, shape)
    passes = 1 if len(groups) == 1 else min(3, turns)
    for _ in range(passes):
        for group in groups:
            with workers(group, shape, facts) as pipes:
                for _ in range(-(-turns // passes)):
                    for name, pipe in pipes.items():
                        for _ in range(1 + repeats):
                            pipe.send(True)
                            taken = pipe.recv()
                            samples.setdefault(name, []).append(taken)
                            if taken[1] <= DISTURBED:
                                break
    return samples, facts


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


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("llmfast", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def provenance() -> dict[str, Any]:
    """What a recorded run was: the command, the day, the commit, the machine and the versions."""
    here = Path(__file__).resolve().parent
    describe = ["git", "-C", str(here), "describe", "--always", "--dirty=-dirty", "--abbrev=12"]
    return {
        "schema": 1,
        "command": " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": str(date.today()),
        "commit": subprocess.run(describe, capture_output=True, text=True).stdout.strip(),
        "device": f"{cpu_name()}, {os.cpu_count()} cores",
        "versions": versions(),
        "torch": versions().get("torch"),
    }


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
    parser.add_argument("--quick", action="store_true", help="a look in a minute or two: few providers, three turns")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.isa:
        os.environ["LLMFAST_CPU_ISA"] = args.isa
    shape, turns = SHAPES[args.shape], 3 if args.quick else args.turns
    kinds = args.providers or (QUICK if args.quick else PROVIDERS)
    names = [
        name
        for kind in kinds
        for name in ([f"{kind} {dtype}" for dtype in args.dtype] if kind in PROVIDERS else [kind])
        if "nanogpt" not in kind or PEERS in os.environ
    ]
    samples, facts = measure(names, shape, turns, repeats=0 if args.quick else 2)

    quiet = {name: [t for t, others in taken if others <= DISTURBED] for name, taken in samples.items()}
    seconds = {name: quiet[name] if len(quiet[name]) >= 2 else [t for t, _ in samples[name]] for name in samples}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    speed = {name: shape.tokens / t for name, t in median.items()}
    extra = {name: fact["extra"] for name, fact in facts.items() if fact["extra"] is not None}
    pairs = ISA_TARGETS if args.isa else TARGETS[args.shape]
    targets = judge(speed, pairs, below=False)
    if args.shape.startswith("124m") and not args.isa:
        targets += judge(extra, MEMORY_TARGETS, below=True)

    base = "nanogpt fp32" if "nanogpt fp32" in speed else "eager fp32"
    print(f"shape {args.shape}: {shape}, kernels {args.isa or 'best'}, torch {versions().get('torch')}, {cpu_name()}")
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
            **provenance(),
            "isa": args.isa or "best",
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
