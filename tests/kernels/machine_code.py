"""What a compiled kernel is like, without a GPU: launches are recorded and compiled, and their machine code is read.

The driver has no GPU and never runs anything; the tensors of a launch may lie on the meta device. Import this before
anything else of Triton, whose switches are read once.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import io
import itertools
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.update(TRITON_ALWAYS_COMPILE="1", TRITON_DUMP_PTXAS_LOG="1", TRITON_DEFAULT_FP_FUSION="1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"


class Arch:
    """What a multiprocessor offers: shared memory a block and in all (KiB), threads, its tensor-core instruction."""

    def __init__(self, block: int, total: int, threads: int, mma: str) -> None:
        self.block, self.total, self.threads, self.mma = block, total, threads, mma


ARCHS = {80: Arch(163, 164, 2048, "HMMA"), 90: Arch(227, 228, 2048, "HGMMA"), 100: Arch(227, 228, 2048, "UTCHMMA")}


class CompileOnly(DriverBase):
    """A driver without a GPU; the number of its device is the architecture, so that caches do not mix."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")

    def get_benchmarker(self):
        raise RuntimeError("nothing runs here")

    def map_python_to_cpp_type(self, kind):
        return kind


@dataclass
class Launch:
    """``key`` tells launches apart; one that is compiled has ``compiled`` and ptxas's ``log``, or else ``error``."""

    kernel: str
    options: dict[str, int]
    key: str = ""
    compiled: Any = None
    log: str = ""
    error: str = ""


@contextlib.contextmanager
def launching(arch: int, wanted: Collection[int]) -> Iterator[list[Launch]]:
    """Every launch inside is recorded, for ``arch``; those whose numbers are ``wanted`` are compiled, none runs."""
    launches: list[Launch] = []
    run, compile = JITFunction.run, JITFunction._do_compile

    def record(self, *args, grid, warmup, **options):
        launches.append(launch := Launch(self.fn.__name__, options))
        log = io.StringIO()
        with diagnostics() as said, contextlib.redirect_stdout(log):
            try:
                launch.compiled = run(self, *args, grid=grid, warmup=True, **options)
            except Exception as error:
                launch.error = f"{type(error).__name__}: {said(str(error))[:120]}"
        launch.log = log.getvalue()

    def compile_wanted(self, key, *rest):
        launches[-1].key = f"sm{arch} {self.fn.__name__} {key}"
        return compile(self, key, *rest) if len(launches) - 1 in wanted else None

    JITFunction.run, JITFunction._do_compile = record, compile_wanted
    triton.runtime.driver.set_active(CompileOnly(arch))
    try:
        yield launches
    finally:
        JITFunction.run, JITFunction._do_compile = run, compile


@contextlib.contextmanager
def diagnostics():
    """A function that finds the reason of an error: MLIR writes it to file descriptor 2, which is silent meanwhile."""
    with tempfile.TemporaryFile("w+") as file:

        def said(error: str) -> str:
            file.seek(0)
            found = re.search(r"error: (?!Failures)([^\n]*)", file.read())
            return found[1] if found else (error.strip().splitlines() or ["?"])[-1]

        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def instructions(cubin: bytes) -> bytes:
    """The instructions of a cubin's kernel: section .text of an ELF file of 64 bits."""
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    text = [s for s in sections if cubin[sections[names][4] + s[0] :].startswith(b".text.")]
    ((_, _, _, _, start, length),) = text
    return cubin[start : start + length]


def disassembled(codes: list[bytes], arch: int) -> list[list[tuple[int, str, str]]]:
    """(address, operation, operands) of each instruction of each code; one call for all, whose start takes longest."""
    if not codes:
        return []
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [str(NVDISASM), "--binary", f"SM{arch}{'a' * (arch >= 90)}", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [
        (int(address, 16), op, rest)
        for address, op, rest in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", text)
    ]
    ends = list(itertools.accumulate(map(len, codes)))
    parts: list[list[tuple[int, str, str]]] = [[] for _ in codes]
    for instruction in found:
        parts[bisect.bisect(ends, instruction[0])].append(instruction)
    return parts


def statistics(launch: Launch, code: list[tuple[int, str, str]], arch: int) -> dict[str, Any]:
    """What the machine code and ptxas say."""
    total = _count(code)
    registers = int(re.search(r"Used (\d+) registers", launch.log)[1])
    shared, warps = max(launch.compiled.metadata.shared, 0), launch.compiled.metadata.num_warps
    machine = ARCHS[arch]
    by_registers = 16384 // (-(-registers * 32 // 256) * 256) * 4 // (-(-warps // 4) * 4)
    resident = min(by_registers, machine.total * 1024 // (shared + 1024), machine.threads // (warps * 32), 32)
    spilled = re.search(r"(\d+) bytes spill stores", launch.log)
    loop = _hottest_loop(code)
    return {
        "warps": warps,
        "registers": registers,
        "spills": max(int(spilled[1]) if spilled else 0, total["LDL"] + total["STL"]),
        "shared": -(-shared // 1024),
        "resident": resident,
        "HMMA": total["HMMA"],
        "HGMMA": total["HGMMA"],
        "UTCHMMA": sum(n for op, n in total.items() if op.startswith("UTC") and "MMA" in op),
        "code": len(code),
        "loop": sum(loop.values()),
        "serialized": "wgmma.mma_async instructions are serialized" in launch.log,
    }


def _count(code) -> collections.Counter:
    return collections.Counter(op.split(".")[0] for _, op, _ in code)


def _products(counts) -> int:
    return sum(n for op, n in counts.items() if re.fullmatch(r"HMMA|HGMMA|UTC\w*MMA", op))


def _hottest_loop(code) -> collections.Counter:
    """The innermost loop with the most matrix instructions, else the longest."""
    loops = []
    for (_, before, _), (address, op, rest) in itertools.pairwise(code):
        target = re.search(r"0x([0-9a-f]+)", rest)
        # A branch right after a branch is the way back from code moved out of line.
        if op.startswith("BRA") and not before.startswith("BRA") and target and int(target[1], 16) < address:
            loops.append([i for i in code if int(target[1], 16) <= i[0] <= address])
    with_products = [body for body in loops if _products(_count(body))] or loops

    def inside(a, b):
        return a[0][0] >= b[0][0] and a[-1][0] <= b[-1][0] and len(a) < len(b)

    innermost = [b for b in with_products if not any(inside(a, b) for a in with_products)]
    counts = [_count(body) for body in innermost]
    return max(counts, key=lambda c: (_products(c), sum(c.values())), default=collections.Counter())
