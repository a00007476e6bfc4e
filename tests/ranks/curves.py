"""The same run on 1 to 4 ranks, in every mode: python tests/ranks/curves.py, a few minutes

Prints how far loss curves and final weights are from those of one process, a hash of the order of the samples, and
what FSDP2 holds on each rank; ends with an error where a bound is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import worker
from launching import launch, metrics_of, weights

from llmfast.training.plan import bytes_sent, sharing

SHAPE = dict(n_layer=3, n_embd=32, n_head=4)
missed = []


def report(what: str, value: float, bound: float) -> None:
    print(f"{what:<64} {value:10.2e}  (bound {bound:.0e})", flush=True)
    if not value <= bound:
        missed.append(what)


def apart(left: Path, right: Path, keys: tuple[str, ...] = ("loss", "val_loss")) -> float:
    """The largest difference of losses."""
    a, b = metrics_of(left), metrics_of(right)
    assert [line["step"] for line in a] == [line["step"] for line in b]
    return max(abs(x[key] - y[key]) for x, y in zip(a, b, strict=True) for key in keys if key in x)


def weights_apart(left: Path, right: Path) -> float:
    a, b = weights(left), weights(right)
    return max((a[name] - b[name]).abs().max().item() for name in a)


def said(done, word: str) -> str:
    """What the first rank printed after ``word``."""
    [line] = [line for line in done.said[0].splitlines() if line.startswith(f"{word} ")]
    return line.split()[1]


def order(done) -> str:
    return said(done, "order")


def same_run(root: Path, steps: int, bound: float, dtype: str, sizes: list[tuple[int, str]]) -> None:
    options = dict(weights=dtype, max_steps=steps, eval_every=steps // 2, larger=SHAPE)
    alone = launch(root / "one", 1, worker.train, **options)
    for size, mode in sizes:
        name = f"{dtype}, {steps} steps, {size} ranks, {mode}"
        micro = 1 if mode == "hsdp" else 3  # copies of shards are averaged after the last of three
        done = launch(root / name, size, worker.train, parallel=mode, micro_batch_size=micro, **options)
        keys = ("loss", "val_loss") if micro == 3 else ("loss",)  # evaluations are cut into micro batches
        report(f"{name}: losses", apart(root / "one", root / name, keys), bound)
        if dtype == "float64":
            report(f"{name}: weights", weights_apart(root / "one", root / name), bound)
        print(f"    order of samples {order(done)[:16]}, on one {order(alone)[:16]}")
        if order(done) != order(alone):
            missed.append(f"{name}: order")


def accumulation(root: Path) -> None:
    """4 x 1 = 2 x 2 = 1 x 4: micro batches of a rank x ranks, of 4 samples."""
    options = dict(weights="float64", max_steps=20, batch_size=4, micro_batch_size=1, larger=SHAPE)
    for size in (1, 2, 4):
        launch(root / f"x{size}", size, worker.train, parallel="ddp", **options)
        launch(root / f"x{size} fsdp", size, worker.train, parallel="fsdp", **options)
    for name in ("x2", "x4", "x2 fsdp", "x4 fsdp"):
        report(f"accumulation 4x1 = {name}: losses", apart(root / "x1", root / name), 1e-12)
        report(f"accumulation 4x1 = {name}: weights", weights_apart(root / "x1", root / name), 1e-12)


def moves(root: Path) -> None:
    """Saved on 4 ranks with fsdp, resumed on others."""
    options = dict(weights="float64", schedule="constant", save_every=10, eval_every=10, larger=SHAPE)
    launch(root / "whole", 1, worker.train, max_steps=20, **options)
    for size, mode in ((1, "auto"), (2, "fsdp"), (3, "fsdp"), (2, "ddp")):
        name = f"fsdp x 4, then {mode} x {size}"
        launch(root / name, 4, worker.train, max_steps=10, parallel="fsdp", gather=True, **options)
        gathered = torch.load(root / name / "run" / "gathered.pt", weights_only=True)
        merged = weights(root / name)
        unlike = [key for key, value in merged.items() if not torch.equal(gathered[key], value)]
        assert merged.keys() == gathered.keys() - {"lm_head.weight"}
        report(f"{name}: merged weights unlike the gathered", len(unlike), 0)
        launch(root / name, size, worker.train, max_steps=20, parallel=mode, resume=True, **options)
        report(f"{name}: losses", apart(root / "whole", root / name), 1e-9)
        report(f"{name}: weights", weights_apart(root / "whole", root / name), 1e-9)
    done = launch(root / "held 4", 4, worker.train, max_steps=2, parallel="fsdp", **options)
    held = [int(line.split()[1]) for said in done.said for line in said.splitlines() if line.startswith("held")]
    whole = int(said(launch(root / "held", 1, worker.train, max_steps=2, **options), "held"))
    print(f"bytes of parameters, gradients and moments: {whole:,} on one, {held} on 4")
    report("fsdp x 4: largest share of a rank", max(held) / whole, 0.3)


def compiled(root: Path) -> None:
    """Activation checkpointing and torch.compile, alone and together."""
    options = dict(weights="float64", max_steps=20, eval_every=10, larger=SHAPE)
    launch(root / "one", 1, worker.train, **options)
    for mode in ("ddp", "fsdp"):
        for settings in (
            dict(activation_checkpointing=True),
            dict(compile=True),
            dict(compile=True, activation_checkpointing=True),
        ):
            name = f"{mode} x 2, {' and '.join(settings)}"
            done = launch(root / name, 2, worker.train, parallel=mode, **settings, **options)
            report(f"{name}: losses", apart(root / "one", root / name), 1e-9)
            report(f"{name}: weights", weights_apart(root / "one", root / name), 1e-9)
            print(f"    graphs compiled: {said(done, 'graphs')}")
            if (said(done, "graphs") != "0") != ("compile" in settings):
                missed.append(f"{name}: graphs")


def crossed() -> int:
    """Bytes that the loopback device of this network namespace has sent."""
    [line] = [line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split()[9])


def communication(root: Path) -> None:
    """What crosses the loopback device in a step, beside the plan's formula; exact where nothing else runs there:
    unshare -rn bash -c 'ip link set lo up; python tests/ranks/curves.py communication'."""
    larger: dict = dict(n_layer=4, n_embd=128, n_head=4)
    for size, mode in ((2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp"), (4, "hsdp")):
        for micro in (4, 2):
            sent = []
            for steps in (5, 25):
                options = dict(max_steps=steps, batch_size=4 * size, micro_batch_size=micro, eval_every=0)
                before = crossed()
                launch(
                    root / f"{mode} {size} {micro} {steps}", size, worker.train, parallel=mode, larger=larger, **options
                )
                sent.append(crossed() - before)
            measured = (sent[1] - sent[0]) / 20 / size
            predicted = bytes_sent(replace(worker.SHAPE, **larger), sharing(mode, size, 2), 4 // micro)
            what = f"{mode} x {size}, {4 // micro} micro batches"
            print(f"{what}: {measured:,.0f} bytes a step and rank, {predicted:,} by formula", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["float64", "hsdp", "float32", "accumulation", "moves", "compiled"])
    options = parser.parse_args()
    several = [(size, mode) for mode in ("ddp", "fsdp") for size in (2, 3, 4)]
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            root = Path(folder, part)
            root.mkdir()
            if part == "float64":
                same_run(root, 50, 1e-9, "float64", several)
            elif part == "hsdp":
                same_run(root, 50, 1e-9, "float64", [(4, "hsdp")])
            elif part == "float32":
                same_run(root, 200, 1e-3, "float32", [(4, "ddp"), (3, "fsdp")])
            else:
                {f.__name__: f for f in (accumulation, moves, compiled, communication)}[part](root)
    print(f"missed: {missed}" if missed else "all within their bounds")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
