"""Random shapes and memory layouts for every op, implementation, dtype and matmul route, against float64.

    python -m tests.ops.fuzz --cases 2000 --seed 1                          # everything, one process an op
    python -m tests.ops.fuzz --op mlp --isa avx2 portable --cases 500       # one op on two instruction sets
    python -m tests.ops.fuzz --cases 2000 --log benchmarks/results/DEVICE/fuzz.txt

With several instruction sets, what runs none of our kernels runs on the first one alone.
One line each: cases that ran, cases that the implementation declined, worst error over allowed error. A wrong case, or
one that ends the process, is shown with the command that repeats it alone; then the exit status is 1.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfast.ops import _library, _verify, matmul, set_matmul_routing
from llmfast.ops._registry import FLOATING, OPS, Implementation, Op

ISAS = ("best", "portable", "avx2", "avx512", "avx512_bf16")
LAYOUTS = ("plain", "plain", "transposed", "every second", "padded rows", "offset")
PRODUCTS = ("mlp", "lora_linear", "linear_cross_entropy")  # ops whose "torch" implementation follows the routing
LARGE = 2**21  # product of all sizes of a shape


def arranged(t: Tensor, layout: str) -> Tensor:
    """The values of ``t`` in another layout, among NaNs: reading one element too many shows."""
    filler = float("nan") if t.is_floating_point() else 0
    if layout == "transposed" and t.dim() >= 2:
        return t.mT.contiguous().mT
    if layout == "every second" and t.dim():
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), filler)
        return wide[..., ::2].copy_(t)
    if layout == "padded rows" and t.dim():
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), filler)
        return wide[..., : t.shape[-1]].copy_(t)
    if layout == "offset":
        return t.new_full((t.numel() + 2,), filler)[1:-1].view(t.shape).copy_(t)
    return t


def drawn(op: Op, seed: int, i: int) -> tuple[dict[str, Any], str]:
    """Shape and layout of case ``i``. All but every 20th are small, so that thousands take minutes."""
    rng = random.Random(f"{seed} {op.name} {i}")
    shape = op.random_shape(rng)
    while i % 20 and math.prod(n for n in sizes(shape.values()) if n > 0) > LARGE:
        shape = op.random_shape(rng)
    return shape, rng.choice(LAYOUTS)


def sizes(values: Iterable[Any]) -> Iterator[int]:
    for value in values:
        if isinstance(value, tuple):
            yield from value
        elif type(value) is int:
            yield value


def routes(op: Op, implementation: Implementation, dtype: torch.dtype) -> Iterator[str]:
    """The matmul routes that change what ``implementation`` runs in ``dtype`` on this machine."""
    if op.name not in PRODUCTS or implementation.backend != "torch" or dtype not in matmul.ROUTED:
        yield "default"
        return
    for route in matmul.ROUTES:
        try:
            set_matmul_routing({matmul.ROUTED[dtype]: route})
        except ValueError:
            continue
        yield route


def cells(op: Op, device: str, only_ours: bool) -> Iterator[tuple[Implementation, torch.dtype, str]]:
    for implementation in op.implementations:
        for dtype in FLOATING:
            if not implementation.why_not_on(torch.device(device), dtype):
                for route in routes(op, implementation, dtype):
                    if not only_ours or implementation.by == "ours" or route == "ours":
                        yield implementation, dtype, route


def work(options: argparse.Namespace) -> None:
    """One op on this process's instruction set; tells the parent each case that begins, and each result."""
    asked, found = os.environ.get("LLMFAST_CPU_ISA"), _library.build_config().get("cpu_isa")
    if found is None or (asked and asked != found):
        sys.exit(_library.why_not_loaded() or f"this CPU has no {asked}: the kernels run on {found}")
    torch.set_num_threads(1)
    matmul.MIN_MACS = matmul.MIN_OWN_MACS = 0  # the route counts, not the speed
    (name,) = options.op
    op = OPS[name]
    for implementation, dtype, route in cells(op, options.device, options.only_ours):
        backend, kind = implementation.backend, str(dtype).removeprefix("torch.")
        cell = f"{backend} {kind} {route}"
        if options.cell and cell != options.cell:
            continue
        if dtype in matmul.ROUTED:
            set_matmul_routing({matmul.ROUTED[dtype]: route})
        worst, where, declined, wrong = 0.0, "", 0, []
        cases = range(options.cases) if options.case is None else [options.case]
        for i in cases:
            print(f"at {i} {cell}", flush=True)
            shape, layout = drawn(op, options.seed, i)
            if _verify.why_not(op, implementation, shape, dtype, options.device):
                declined += 1
                continue
            ratio, part = _verify.worst_ratio(
                op, backend, shape, dtype, options.device, arrange=lambda t, layout=layout: arranged(t, layout)
            )
            if ratio > 1:
                wrong.append(i)
                print(f"wrong {i} {cell} {part} {ratio:.2f} times the allowed error, {layout}, {shape}", flush=True)
            if ratio > worst:
                worst, where = ratio, f"{part} of {shape}, {layout}"
        row = (
            f"{name:22}{backend:8}{kind:10}{route:9}{len(cases) - declined:6} {declined:8} {len(wrong):6}  {worst:5.2f}"
        )
        print(f"row {row}  {where}", flush=True)


def watch(name: str, isa: str, options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Run one op in a process of its own; its rows, and what went wrong."""
    command = [sys.executable, "-m", "tests.ops.fuzz", "--op", name, "--seed", str(options.seed)]
    command += ["--device", options.device]
    one = ["--case", str(options.case)] if options.case is not None else ["--cases", str(options.cases)]
    one += ["--cell", options.cell] if options.cell else []
    one += ["--only-ours"] if options.only_ours or isa != options.isa[0] else []
    environment = {**os.environ, "LLMFAST_CPU_ISA": "" if isa == "best" else isa, "OMP_NUM_THREADS": "1"}
    rows, wrong = [], []
    at, cell, said = "", "", time.monotonic()
    with subprocess.Popen([*command, *one, "--worker"], env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            kind, _, rest = line.rstrip().partition(" ")
            again = f'python {" ".join(command[1:])} --isa {isa} --cell "{{}}" --case {{}}'
            if kind == "at":
                at, _, cell = rest.partition(" ")
                if time.monotonic() - said > 30:
                    said = time.monotonic()
                    print(f"... {isa} {name}: {cell}, case {at} of {options.cases}", flush=True)
            elif kind == "wrong":
                if len(wrong) < 5:
                    wrong.append(f"{isa} {name}: {rest}\n    " + again.format(cell, at))
            elif kind == "row":
                rows.append(f"{isa:12}{rest}")
                print(rows[-1], flush=True)
    if process.returncode:
        how = signal.Signals(-process.returncode).name if process.returncode < 0 else f"exit {process.returncode}"
        wrong.append(f"{isa} {name}: ended by {how}\n    " + again.format(cell, at))
    return rows, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--cases", type=int, default=20, help="random cases per op, implementation, dtype and route")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--isa", nargs="+", default=["best"], choices=ISAS, help="instruction sets of the kernels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--log", type=Path, help="also write the table here")
    parser.add_argument("--cell", help='only this "backend dtype route"')
    parser.add_argument("--case", type=int, help="only the case of this number")
    parser.add_argument("--only-ours", action="store_true", help="pass over what runs none of our kernels")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return 0
    title = f"{'isa':12}{'op':22}{'backend':8}{'dtype':10}{'route':9}{'ran':>6} declined  wrong  worst  where"
    print(title, flush=True)
    started = time.monotonic()
    rows: list[str] = []
    wrong: list[str] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(watch, name, isa, options) for isa in options.isa for name in options.op]
        for job in as_completed(jobs):
            rows += job.result()[0]
            wrong += job.result()[1]
    verdict = f"{len(rows)} combinations, {len(wrong)} wrong, {time.monotonic() - started:.0f} s"
    print("\n".join([*wrong, verdict]))
    if options.log:
        command = (
            f"python -m tests.ops.fuzz --cases {options.cases} --seed {options.seed} --isa {' '.join(options.isa)}"
        )
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip()
        head = [f"{date.today()}, commit {commit}, torch {torch.__version__}", command, "", title]
        options.log.parent.mkdir(parents=True, exist_ok=True)
        options.log.write_text("\n".join([*head, *sorted(rows), "", *wrong, verdict]) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
