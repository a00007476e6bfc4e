"""Breaks the kernels on purpose: each mutation must be caught by one of the lanes.

    python -m tests.kernels.mutate [NAME...]

The lanes themselves show that the kernels as they are pass. A mutation is one exchange of text in a copy of kernels/.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
INTERPRETER, COMPILER = {"TRITON_INTERPRET": "1"}, {"TRITON_INTERPRET": "0"}


class Mutation(NamedTuple):
    file: str
    old: str
    new: str
    lane: dict[str, str]
    command: tuple[str, ...]


NUMERICS = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/kernels/test_numerics.py", "-k")
MUTATIONS = {
    "drop the causal skip": Mutation(
        "causal_attention.py",
        "end = tl.maximum(tl.minimum((block + 1) * BLOCK_M + offset, keys), 0)  # no",
        "end = tl.maximum(keys, 0)  # no",
        INTERPRETER,
        (*NUMERICS, "beyond_the_diagonal"),
    ),
    "forget the diagonal": Mutation(
        "causal_attention.py",
        "seen = (key[None, :] <= (query + offset)[:, None]) & (key < keys)[None, :]",
        "seen = (key[None, :] <= (query + offset)[:, None] + 1) & (key < keys)[None, :]",
        INTERPRETER,
        (*NUMERICS, "cached_and_packed"),
    ),
    "remove a mask of a load": Mutation(
        "matmul.py",
        "mask=(k < K - start)[:, None] & (n < N)[None, :], other=0.0",
        "mask=(k < K - start)[:, None]",
        INTERPRETER,
        ("tests/kernels/guarded.py", "matmul", "60"),
    ),
    "lose the activation of an epilogue": Mutation(
        "mlp.py",
        "tl.store(a_ptr + at, activate(h, ACTIVATION).to(a_ptr.dtype.element_ty), mask=inside)\n\n\n@triton.jit",
        "tl.store(a_ptr + at, h.to(a_ptr.dtype.element_ty), mask=inside)\n\n\n@triton.jit",
        INTERPRETER,
        (*NUMERICS, "mlp and 17-13"),
    ),
    "tiles too large for an epilogue": Mutation(
        "configs/sm90.json",
        '"erf": [1, 1]}, "config": {"BLOCK_M": 128, "BLOCK_N": 64,',
        '"erf": [1, 1]}, "config": {"BLOCK_M": 128, "BLOCK_N": 128,',
        COMPILER,
        ("-m", "tests.kernels.aot", "--arch", "90", "--only", "mlp bf16 erf"),
    ),
}


def caught(mutation: Mutation) -> tuple[bool, str]:
    """Whether the lane fails, and the last line it says."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        (copy / "llmfast").mkdir()
        for child in (ROOT / "llmfast").iterdir():
            if child.name != "kernels":
                (copy / "llmfast" / child.name).symlink_to(child)
        shutil.copytree(ROOT / "kernels", copy / "llmfast/kernels")
        (copy / "tests").symlink_to(ROOT / "tests")
        file = copy / "llmfast/kernels" / mutation.file
        text = file.read_text()
        assert text.count(mutation.old) == 1, f"{mutation.file} has not one {mutation.old!r}"
        file.write_text(text.replace(mutation.old, mutation.new))
        environment = {**os.environ, **mutation.lane, "PYTHONPATH": folder}
        done = subprocess.run(
            [sys.executable, *mutation.command], cwd=folder, env=environment, capture_output=True, text=True
        )
    said = [line for line in done.stdout.splitlines() if line.startswith("E  ") or " FAIL " in line]
    said.append(f"exit {done.returncode}")  # of a signal, where it is below zero
    return done.returncode != 0, " ".join(said[0].split())


def main(names: list[str]) -> int:
    def run(name: str) -> bool:
        began = time.time()
        found, said = caught(MUTATIONS[name])
        print(f"{'caught' if found else 'MISSED'}: {name} ({time.time() - began:.0f} s): {said}", flush=True)
        return found

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return int(not all(list(pool.map(run, names or MUTATIONS))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
