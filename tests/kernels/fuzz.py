"""Many launches of the Triton kernels in the interpreter: every kernel on guarded pages, attention of every length.

    TRITON_INTERPRET=1 python -m tests.kernels.fuzz [--launches 300] [--seed 0] [--log FILE]

Guarded: each kernel is launched so often with tensors that lie against forbidden pages (guarded.py). Lengths: causal
attention forward and backward at every T from 1 to 300, head sizes and dtypes in turn, against float64. A process a
core; one line each, the first failure of a part ends it, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import torch
import triton

FOLDER = Path(__file__).parent
HEAD_SIZES = (16, 32, 64, 80, 96, 128)
LENGTHS, PARTS = 300, 6


def lengths(part: int) -> None:
    """Every PARTS-th length; prints the worst error of each dtype."""
    sys.path.insert(0, str(FOLDER))
    import mended_interpreter

    from tests.kernels import test_numerics

    mended_interpreter.mend()
    for T in range(1 + part, LENGTHS + 1, PARTS):
        turn = T // PARTS + part
        shape = {"B": 1, "H": 1, "Tq": T, "Tk": T, "D": HEAD_SIZES[turn % len(HEAD_SIZES)]}
        dtype = test_numerics.DTYPES[turn % 3]
        test_numerics.errors("causal_attention", test_numerics.OPS["causal_attention"].inputs(shape, dtype), dtype)
    print(f"{len(range(1 + part, LENGTHS + 1, PARTS))} lengths within the tolerances")


def commands(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    for part in range(PARTS):
        yield f"lengths {part + 1}/{PARTS}", ["-m", "tests.kernels.fuzz", "--part", str(part)]
    for module in sorted(path.stem for path in (FOLDER.parents[1] / "kernels").glob("*.py")):
        if module != "__init__":
            yield module, [str(FOLDER / "guarded.py"), module, str(options.launches), str(options.seed)]


def run(job: tuple[str, list[str]]) -> tuple[bool, str]:
    name, command = job
    began = time.monotonic()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    said = done.stdout.strip().splitlines()[-1:] or [""]
    if said[0].startswith("{"):
        said = [", ".join(f"{kernel} {count}" for kernel, count in json.loads(said[0]).items())]
    if done.returncode:
        said = [f"exit {done.returncode} (below zero: a signal) {' '.join(done.stderr.splitlines()[-1:])}"]
    line = f"{name:22}{'ok' if not done.returncode else 'WRONG':7}{time.monotonic() - began:5.0f} s  {said[0]}"
    print(line, flush=True)
    return not done.returncode, line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=300, help="of each kernel")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="also write the lines here")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        lengths(options.part)
        return 0
    began = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(run, commands(options)))
    wrong = sum(not ok for ok, _ in results)
    verdict = f"{len(results)} parts, {wrong} wrong, {time.monotonic() - began:.0f} s"
    print(verdict)
    if options.log:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout
        head = f"{date.today()}, commit {commit.strip()}, triton {triton.__version__}, torch {torch.__version__}"
        command = f"python -m tests.kernels.fuzz --launches {options.launches} --seed {options.seed}"
        options.log.parent.mkdir(parents=True, exist_ok=True)
        options.log.write_text("\n".join([head, command, "", *(line for _, line in results), "", verdict]) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
