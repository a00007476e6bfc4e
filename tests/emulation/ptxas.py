"""Compiles every CUDA kernel with nvcc for each architecture: no warning, no spill but where ALLOWED says why.

python tests/emulation/ptxas.py [--arch 80 90a] [FILE...]

What nvcc said is kept under build/ptxas/, by what it compiled, so that only what has changed is compiled again.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC, KEPT = ROOT / "csrc", ROOT / "build/ptxas"

# architecture and kernels (a pattern) -> bytes that they may spill, and why
ALLOWED = {
    r"(for|back)ward_kernel<\w+, \w+, 1, true>": (
        16,
        "add_layer_norm of rows that cannot be read in packs: a row and its mask beside the residual's",
    ),
    r"backward_sm90_kernel<\w+, 128, true, true>": (
        16,
        "dk and dv take 128 registers of 240, p and dp 64, Philox wants its own",
    ),
    r"80 .*(keys|queries)_kernel<float, 128, true>": (
        48,
        "heads above 64: dk and dv take 128 registers, a factor two, and Philox wants its own",
    ),
    r"90a .*(keys|queries)_kernel<float, 128, true>": (112, "the same: float32 has no wgmma here"),
    r"keys_kernel<float, 128, false>": (
        56,
        "heads above 64: dk and dv take 128 registers, a factor two",
    ),
}


def sources_of(path: Path) -> dict[Path, str]:
    """The texts of a source and of what it includes of csrc/, whichever way the preprocessor would go."""
    texts, left = {}, [path]
    while left:
        one = left.pop()
        if one not in texts and one.exists():
            texts[one] = one.read_text(encoding="utf-8")
            left += [CSRC / name for name in re.findall(r'#include "([^"]+)"', texts[one])]
    return texts


@functools.cache
def nvcc_version() -> str:
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout


def nvcc_says(path: Path, arch: str) -> str:
    """What nvcc prints; its last line is the exit status."""
    command = f"nvcc -std=c++17 -O3 -gencode arch=compute_{arch},code=sm_{arch} -Xptxas -v -c"
    texts = sources_of(path)
    what = "".join([command, nvcc_version(), *(texts[key] for key in sorted(texts))])
    known = KEPT / f"{path.stem}-{arch}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.txt"
    if not known.exists():
        with tempfile.TemporaryDirectory() as folder:
            rest = [f"-I{CSRC}", str(path), "-o", f"{folder}/out.o"]
            done = subprocess.run([*command.split(), *rest], capture_output=True, text=True)
        KEPT.mkdir(parents=True, exist_ok=True)
        for stale in KEPT.glob(f"{path.stem}-{arch}-*"):
            stale.unlink()
        known.write_text(f"{done.stderr}\n{done.returncode}")
    return known.read_text()


def compile_one(path: Path, arch: str) -> tuple[list[str], list[str]]:
    """(lines of the table, problems)"""
    said, status = nvcc_says(path, arch).rsplit("\n", 1)
    names = re.findall(r"Compiling entry function '(\w+)'", said)
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.findall(r"Used (\d+) registers", said)
    warnings = [line for line in said.splitlines() if re.search("warning|error|Performance Loss", line, re.I)]
    lines, problems = [], [f"{path.name} sm_{arch}: {line}" for line in warnings]
    if status != "0" or not len(plain) == len(spilled) == len(registers):
        problems.append(f"{path.name} sm_{arch}: does not compile, or says so in an unknown form")
    for name, (stores, loads), used in zip(plain, spilled, registers, strict=False):
        short = re.sub(r"llmfast::cuda::|\(anonymous namespace\)::|^void |\(.*\)$", "", name)
        allowed = next((most for pattern, (most, _) in ALLOWED.items() if re.search(pattern, f"{arch} {short}")), 0)
        lines.append(f"sm_{arch:4}{used:>5} registers {stores:>5} {loads:>5} bytes spilled  {short}")
        if max(int(stores), int(loads)) > allowed:
            problems.append(f"{path.name} sm_{arch}: {short} spills {stores} bytes, loads {loads}, not {allowed}")
    return lines, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="of csrc/cuda (default: all)")
    parser.add_argument("--arch", nargs="+", default=["80", "90a"])
    options = parser.parse_args()
    paths = [CSRC / "cuda" / name for name in options.files] or sorted((CSRC / "cuda").glob("*.cu"))
    work = [(path, arch) for path in paths for arch in options.arch]
    problems = []
    with ThreadPoolExecutor(2) as pool:
        for lines, found in pool.map(lambda item: compile_one(*item), work):
            print(*lines, sep="\n", flush=True)
            problems += found
    print(*(f"PROBLEM {problem}" for problem in problems), sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
