"""Training steps of other people's models before and after ``llmfast.accelerate(model)``, on the CPU.

Each model is a pair in one process: one step of the original, one of the accelerated model, in turns, restored and
accelerated again in between, so that both see the same machine. Processor seconds of all threads are kept beside the
seconds on the clock: with OMP_NUM_THREADS=1 they tell the ratio on a machine that others use, too. "As users run it"
is PyTorch as it comes; "tuned" is after ``llmfast.tune_process()`` (an allocator that keeps its pages), where the
original also gets whichever float32 matmul precision is faster. A second process a model does that, for the allocator
cannot be set back. The ratio is the median over the turns of original / accelerated, its spread the quarter and three
quarter points.

    LLMFAST_PEERS=folder/with/nanoGPT/and/LLMs-from-scratch python benchmarks/accelerated_models.py --json out.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

L, H, C, V, B, T = 6, 6, 384, 50304, 4, 256  # the 30M shape
MODELS = ("huggingface", "nanogpt", "book")
TARGET = 1.5  # accelerated over original, as users run it; tuned: 1


def build(name: str) -> tuple[Any, Callable[[], Any]]:
    """The model in training mode, and its loss on one batch as its users take it. Dropout is off."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    x, y = torch.randint(V, (2, B, T), generator=torch.Generator().manual_seed(1))
    if name == "huggingface":
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = dict(vocab_size=V, n_positions=T, n_embd=C, n_layer=L, n_head=H)
        model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()
        return model, lambda: model(x, labels=x).loss
    peers = Path(os.environ["LLMFAST_PEERS"])
    if name == "nanogpt":
        sys.path.insert(0, str(peers / "nanoGPT"))
        from model import GPT, GPTConfig

        model = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=L, n_head=H, n_embd=C, dropout=0.0, bias=True))
        return model, lambda: model(x, y)[1]
    sys.path.insert(0, str(peers / "LLMs-from-scratch" / "ch04" / "01_main-chapter-code"))
    from gpt import GPTModel

    sizes = dict(vocab_size=V, context_length=T, emb_dim=C, n_heads=H, n_layers=L, drop_rate=0.0, qkv_bias=False)
    model = GPTModel(sizes)
    return model, lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def measure(name: str, tuned: bool, turns: int) -> dict[str, Any]:
    """Seconds of a step, original and accelerated, turn by turn, and the first losses of both."""
    import torch

    import llmfast

    model, loss_of = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)  # as the peers' CPU users have it
    setting = str(llmfast.tune_process()) if tuned else "PyTorch as it comes"

    def step() -> tuple[float, float]:
        """Seconds on the clock and of the processor."""
        start = time.perf_counter(), time.process_time()
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start[0], time.process_time() - start[1]

    precision = "highest"
    if tuned:
        seconds = {}
        for candidate in ("highest", "medium"):
            torch.set_float32_matmul_precision(candidate)
            step()
            seconds[candidate] = min(step()[0] for _ in range(2))
        precision = min(seconds, key=seconds.__getitem__)
        setting += f"; the original's matmul precision {precision}"
    first = []
    for swap in (llmfast.restore, llmfast.accelerate):
        swap(model)
        first.append(loss_of().item())
    taken: dict[str, list[float]] = {"original": [], "accelerated": []}
    busy: dict[str, list[float]] = {"original": [], "accelerated": []}
    for _ in range(turns):
        for kind, swap in (("original", llmfast.restore), ("accelerated", llmfast.accelerate)):
            swap(model)
            torch.set_float32_matmul_precision(precision if kind == "original" else "highest")
            step()
            clock, processor = zip(*(step() for _ in range(2)), strict=True)
            taken[kind].append(min(clock))
            busy[kind].append(min(processor))
    return {
        "seconds": taken,
        "processor_seconds": busy,
        "threads": torch.get_num_threads(),
        "losses": first,
        "setting": setting,
    }


def ratios(seconds: dict[str, list[float]]) -> list[float]:
    """original / accelerated, turn by turn"""
    return [a / b for a, b in zip(seconds["original"], seconds["accelerated"], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    rows = []
    print(
        f"{'model':12} {'setting':8} {'original ms':>12} {'accelerated':>12} {'ratio':>6} {'spread':>12} "
        f"{'processor':>9} {'target':>7}"
    )
    for name in args.models:
        for tuned in (False, True):
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                row = process.submit(measure, name, tuned, args.turns).result()
            low, ratio, high = statistics.quantiles(ratios(row["seconds"]), n=4)
            processor = statistics.median(ratios(row["processor_seconds"]))
            target = 1.0 if tuned else TARGET
            ms = {kind: 1e3 * statistics.median(taken) for kind, taken in row["seconds"].items()}
            verdict = f"{target} {'met' if ratio >= target else 'NOT MET'}"
            kind = "tuned" if tuned else "as is"
            print(f"{name:12} {kind:8} {ms['original']:12.0f} {ms['accelerated']:12.0f} {ratio:6.2f} "
                  f"{low:5.2f} - {high:4.2f} {processor:9.2f} {verdict:>7}", flush=True)  # fmt: skip
            rows.append({"model": name, "tuned": tuned, "ratio": ratio, "spread": [low, high],
                         "processor_ratio": processor, "target": target, **row})  # fmt: skip
            if args.json:  # after each row, so that what is measured is kept
                write(args.json, rows)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    import torch

    from llmfast.bench.environment import header

    record = {**header("script", torch.device("cpu")), "tokens": B * T, "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
