"""Training steps of other people's models before and after ``llmfast.accelerate(model)``, on the CPU.

Each model is a pair of processes, the original and the one after ``accelerate``: a step of the one, a step of the
other, in turns, so that both see the same machine. Processor seconds of all threads are kept beside the seconds on the
clock: with OMP_NUM_THREADS=1 they tell the ratio on a machine that others use, too. "As is" the original is what its
users run and the accelerated one has the one line more (with the allocator it sets); "tuned" gives the original that
allocator, too, and whichever float32 matmul precision is faster. After the last turn the accelerated model is restored
and takes its steps in turn with the original again. The ratio is the median over the turns of original / accelerated,
its spread the quarter and three quarter points.

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
from multiprocessing.connection import Connection
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


def serve(name: str, accelerated: bool, tuned: bool, pipe: Connection) -> None:
    """Answer "step" with its seconds, on the clock and of the processor, and do "restore", until "end" comes."""
    import torch

    import llmfast

    model, loss_of = build(name)
    setting = str(llmfast.tune_process()) if tuned else "PyTorch as it comes"
    if accelerated:
        setting = llmfast.accelerate(model).process or setting
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)  # as the peers' CPU users have it

    def step() -> tuple[float, float]:
        start = time.perf_counter(), time.process_time()
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start[0], time.process_time() - start[1]

    def choose_precision() -> str:
        seconds = {}
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            step()
            seconds[precision] = min(step()[0] for _ in range(2))
        fastest = min(seconds, key=seconds.__getitem__)
        torch.set_float32_matmul_precision(fastest)
        return fastest

    loss = loss_of().item()
    if tuned and not accelerated:
        setting += f"; matmul precision {choose_precision()}"
    step()
    pipe.send({"setting": setting, "loss": loss, "threads": torch.get_num_threads()})
    while (order := pipe.recv()) != "end":
        if order == "restore":
            llmfast.restore(model)
            if tuned:
                choose_precision()
            step()
        pipe.send(step() if order == "step" else None)


def measure(name: str, tuned: bool, turns: int) -> dict[str, Any]:
    """Steps of the original beside the accelerated model and then the restored one, and what both processes say."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes, told = {}, [], {}
    for kind in ("original", "accelerated"):
        pipes[kind], there = spawn.Pipe()
        processes.append(spawn.Process(target=serve, args=(name, kind == "accelerated", tuned, there), daemon=True))
        processes[-1].start()
        there.close()  # so that recv() ends where the process does
        told[kind] = pipes[kind].recv()

    def ask(kind: str, order: str) -> Any:
        pipes[kind].send(order)
        return pipes[kind].recv()

    phases = {}
    for phase in ("accelerated", "restored"):
        if phase == "restored":
            ask("accelerated", "restore")
        taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in pipes}
        for _ in range(turns):
            for kind in pipes:
                taken[kind].append(min(ask(kind, "step") for _ in range(2)))
        phases[phase] = {**compared(taken, 0), "processor": compared(taken, 1)}
    for kind, process in zip(pipes, processes, strict=True):
        pipes[kind].send("end")
        process.join()
    return {**phases, "processes": told}


def compared(taken: dict[str, list[tuple[float, float]]], clock: int) -> dict[str, Any]:
    """Seconds by one of the two clocks, and the ratio of the turns with its spread."""
    seconds = {kind: [step[clock] for step in steps] for kind, steps in taken.items()}
    low, ratio, high = statistics.quantiles(
        [a / b for a, b in zip(seconds["original"], seconds["accelerated"], strict=True)], n=4
    )
    return {"ratio": ratio, "spread": [low, high], "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print(f"{'model':12} {'setting':8} {'original ms':>12} {'accelerated':>12} {'ratio':>6} {'spread':>12} "
          f"{'processor':>9} {'restored':>9} target")  # fmt: skip
    for name in args.models:
        for tuned in (False, True):
            row = measure(name, tuned, args.turns)
            fast, target = row["accelerated"], 1.0 if tuned else TARGET
            ms = {kind: 1e3 * statistics.median(taken) for kind, taken in fast["seconds"].items()}
            low, high = fast["spread"]
            print(f"{name:12} {'tuned' if tuned else 'as is':8} {ms['original']:12.0f} {ms['accelerated']:12.0f} "
                  f"{fast['ratio']:6.2f} {low:5.2f} - {high:4.2f} {fast['processor']['ratio']:9.2f} "
                  f"{row['restored']['ratio']:9.2f} {target} {'met' if fast['ratio'] >= target else 'NOT MET'}",
                  flush=True)  # fmt: skip
            rows.append({"model": name, "tuned": tuned, "target": target, **row})
            if args.json:  # after each row, so that what is measured is kept
                write(args.json, rows)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    import torch

    from llmfast.bench.environment import header

    record = {**header("script", torch.device("cpu")), "tokens": B * T, "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
