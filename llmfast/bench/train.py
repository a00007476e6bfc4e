"""``bench train``: whole training steps, each provider in a process of its own, in turns."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from llmfast.bench.ceilings import measure_ceilings
from llmfast.bench.environment import header
from llmfast.bench.steps import FOLDERS, LADDER, PEERS, Floor, Provider, Shape, timed
from llmfast.bench.timing import others_seconds, paired_ratio, spread
from llmfast.config import suggest
from llmfast.errors import UserError

DISTURBED = 0.05  # share of the cores that other processes used during a sample
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = ["llmfast", "eager", "compile", "huggingface"]
BASELINE = "eager"
AGREE = {"fp32": 1e-3, "bf16": 2e-2}  # how far the first losses may differ, relative to plain PyTorch's in float32


def default_kinds() -> list[str]:
    """llmfast, plain PyTorch, Hugging Face, and the peers whose checkouts LLMFAST_PEERS holds."""
    folder = Path(os.environ.get(PEERS, ""))
    peers = [kind for kind, name in FOLDERS.items() if PEERS in os.environ and (folder / name).is_dir()]
    return [*KINDS, *peers]


def known_kinds() -> list[str]:
    return [
        *KINDS,
        "llmfast torch",
        "llmfast ours",
        *FOLDERS,
        "nanogpt compile",
        *(f"ladder {rung}" for rung in LADDER),
    ]


def flops_per_token(s: Shape) -> float:
    """Forward and backward: 6 N + 12 L C T, as the training loop counts; N without the positions."""
    return 6.0 * (s.parameters - s.block_size * s.n_embd) + 12.0 * s.n_layer * s.n_embd * s.block_size


def bench_train(
    shape: Shape, device: torch.device, kinds: list[str], dtype: str, turns: int, *, progress: bool = True
) -> dict[str, Any]:
    """The results as ``header`` and these keys; times in seconds a step, [median, 10th, 90th percentile].

    steps: one record a provider (tokens/s; mfu: model FLOPs over the rate of a large product measured in this run;
    extra_bytes beyond parameters, gradients and moments; the first losses, and whether they agree with plain
    PyTorch's); not_run: who did not, and why. ``UserError`` for a provider that does not exist.
    """
    for kind in kinds:
        if kind not in known_kinds():
            raise UserError(f"unknown provider {kind!r}{suggest(kind, known_kinds())}; {', '.join(known_kinds())}")
    from tqdm import tqdm

    results = header("train", device) | {"shape": vars(shape), "dtype": dtype, "turns": turns}
    ceilings = measure_ceilings(device, list(DTYPES.values()))
    names = [kind if kind.startswith("ladder") else f"{kind} {dtype}" for kind in kinds]
    with tqdm(total=turns, unit="turn", disable=None if progress else True, leave=False) as bar:
        bar.set_description("starting the providers")
        samples, facts = measure(names, shape, turns, 0, str(device), bar.update)
    seconds = {name: [t for t, _ in taken] for name, taken in samples.items()}
    base = f"{BASELINE} {dtype}"
    records = [_record(name, shape, dtype, seconds, facts, base, ceilings.matmul) for name in seconds]
    not_run = [{"provider": name, "why": fact["why"]} for name, fact in facts.items() if "why" in fact]
    return results | {"ceilings": ceilings.to_dict(), "steps": records, "not_run": not_run}


def _record(
    name: str,
    shape: Shape,
    dtype: str,
    seconds: dict[str, list[float]],
    facts: dict[str, Any],
    base: str,
    rates: dict[str, float],
) -> dict[str, Any]:
    time, fact = spread(seconds[name]), facts[name]
    if name.startswith("ladder"):
        dtype = "bf16" if LADDER.index(name.split()[1]) >= LADDER.index("bf16") else "fp32"
    speed = fact["tokens"] / time.median
    record = {
        "provider": name, "dtype": dtype, "seconds": time.to_list(), "samples": len(seconds[name]),
        "tokens": fact["tokens"], "tokens_per_second": speed,
        "mfu": speed * flops_per_token(shape) / rates["bfloat16" if dtype == "bf16" else "float32"],
        "extra_bytes": fact["extra"], "losses": fact["losses"], "setting": fact["setting"],
    }  # fmt: skip
    if base in seconds:
        ratio = paired_ratio(seconds[base], seconds[name]).to_list()
        record["ratio_to_eager"] = [r * fact["tokens"] / facts[base]["tokens"] for r in ratio]
        ours, theirs = fact["losses"], facts[base]["losses"]
        comparable = fact["tokens"] == facts[base]["tokens"] and not name.startswith(("book", "train-llm"))
        if comparable and "padded-vocab" not in name:
            worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
            record["loss_agrees"] = worst <= max(AGREE[dtype], AGREE[facts[base].get("dtype", dtype)])
    return record


def sample(provider: Any, least: float = 0.3) -> tuple[float, float]:
    """Seconds of one step, averaged over ``least`` seconds, and the share of the machine that others used meanwhile."""
    before, start, steps = others_seconds(), time.perf_counter(), 0
    seconds = 0.0
    while time.perf_counter() - start < least:
        seconds += provider.seconds() if isinstance(provider, Floor) else timed(provider.step)
        steps += 1
    elapsed = time.perf_counter() - start
    return seconds / steps, (others_seconds() - before - 0.02) / elapsed / (os.cpu_count() or 1)


def serve(name: str, shape: Shape, device: str, pipe: Connection) -> None:
    """In the provider's own process: build, warm up, report, then one sample a request."""
    try:
        kind, _, dtype = name.rpartition(" ")
        provider = Floor(shape, dtype) if kind == "floor" else Provider(kind, shape, dtype, device)
        extra = provider.extra_bytes()
        facts = {"losses": list(provider.losses), "extra": extra, "setting": provider.setting}
        pipe.send({**facts, "tokens": getattr(provider, "tokens", shape.tokens)})
        while pipe.recv():
            pipe.send(sample(provider))
    except Exception as error:  # a provider that cannot run says why and leaves the table
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


@contextmanager
def workers(names: list[str], shape: Shape, facts: dict[str, Any], device: str) -> Iterator[dict[str, Connection]]:
    """A process for each name, ready to take steps; what they report goes into ``facts``."""
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name in names:  # one after the other: the warm-up should not be disturbed either
        ours, theirs = spawn.Pipe()
        processes.append(spawn.Process(target=serve, args=(name, shape, device, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        try:
            answer = ours.recv()
        except EOFError:
            answer = "its process ended"
        if isinstance(answer, dict):
            pipes[name], facts[name] = ours, answer
        else:
            facts[name] = {"why": answer}
            print(f"{name}: cannot run: {answer}", file=sys.stderr, flush=True)
    try:
        yield pipes
    finally:
        for pipe in pipes.values():
            pipe.send(False)
        for process in processes:
            process.join(30)


def parts(names: list[str], shape: Shape, device: str) -> list[list[str]]:
    """The names in as few groups as memory allows, of about equal size."""
    if device.startswith("cuda"):
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    each = 16 * shape.parameters + 16 * shape.tokens * shape.vocab_size + (1 << 29)
    room = max(1, int(0.7 * memory / each))
    count = -(-len(names) // room)
    return [names[i::count] for i in range(count)]


def measure(
    names: list[str],
    shape: Shape,
    turns: int,
    repeats: int,
    device: str = "cpu",
    advance: Callable[[], Any] = lambda: None,
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, Any]]:
    """Every sample (seconds, share of others) and what each provider reported, or why it cannot run.

    A disturbed sample is taken again, ``repeats`` times at most.
    """
    samples: dict[str, list[tuple[float, float]]] = {}
    facts: dict[str, Any] = {}
    groups = parts(names, shape, device)
    passes = 1 if len(groups) == 1 else min(3, turns)
    for _ in range(passes):
        for group in groups:
            with workers(group, shape, facts, device) as pipes:
                for _ in range(-(-turns // passes)):
                    for name, pipe in pipes.items():
                        for _ in range(1 + repeats):
                            pipe.send(True)
                            taken = pipe.recv()
                            samples.setdefault(name, []).append(taken)
                            if taken[1] <= DISTURBED:
                                break
                    advance()
    return samples, facts
