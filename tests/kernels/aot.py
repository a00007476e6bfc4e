"""Compiles every Triton kernel with every shipped configuration for sm_80, sm_90 and sm_100, without a GPU.

    python -m tests.kernels.aot [--arch 80 90 100] [--only TEXT] [--save]

The kernels are launched on meta tensors under a driver that compiles and never runs. The machine code then tells
registers, spills, shared memory, how many blocks share a multiprocessor, and whether the tensor cores are used. A
launch fails where it spills, needs more shared memory than there is, fits no multiprocessor, lacks HMMA / wgmma /
tcgen05 though it multiplies matrices, has its wgmma serialized, is worse than ``aot_baseline.json`` says, or is
not among the launches of its case there (--save writes that file).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.update(TRITON_ALWAYS_COMPILE="1", TRITON_DUMP_PTXAS_LOG="1", TRITON_DEFAULT_FP_FUSION="1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from llmfast.kernels import causal_attention, common, layer_norm, linear_cross_entropy, lora_linear, mlp

BASELINE = Path(__file__).with_name("aot_baseline.json")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Arch:
    """What a multiprocessor offers: shared memory a block and in all (KiB), threads, its tensor-core instruction."""

    def __init__(self, block: int, total: int, threads: int, mma: str) -> None:
        self.block, self.total, self.threads, self.mma = block, total, threads, mma


ARCHS = {80: Arch(163, 164, 2048, "HMMA"), 90: Arch(227, 228, 2048, "HGMMA"), 100: Arch(227, 228, 2048, "UTCHMMA")}
# Allowed growth over the baseline.
GROWTH = {"registers": 1.1, "shared": 1.0, "loop": 1.15}
COMPARED = [*GROWTH, "resident"]


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


@contextlib.contextmanager
def compiling(arch: int):
    """Every launch inside compiles for ``arch`` and is recorded: (name, configuration, compiled kernel, ptxas log)."""
    found, run = [], JITFunction.run

    def record(self, *args, grid, warmup, **options):
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append((self.fn.__name__, options, kernel, log.getvalue()))
        return kernel

    JITFunction.run = record
    triton.runtime.driver.set_active(CompileOnly(arch))
    try:
        yield found
    finally:
        JITFunction.run = run


def statistics(kernel, log: str, arch: int) -> dict:
    """What the machine code says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-sass", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = int(re.search(r"REG:(\d+)", text)[1])
    code = [
        (int(address, 16), op, rest)
        for address, op, rest in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", text)
    ]
    total = _count(code)
    shared, warps = max(kernel.metadata.shared, 0), kernel.metadata.num_warps
    machine = ARCHS[arch]
    by_registers = 16384 // (-(-registers * 32 // 256) * 256) * 4 // (-(-warps // 4) * 4)
    resident = min(by_registers, machine.total * 1024 // (shared + 1024), machine.threads // (warps * 32), 32)
    spilled = re.search(r"(\d+) bytes spill stores", log)
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
        "serialized": "wgmma.mma_async instructions are serialized" in log,
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


def verdict(s: dict, arch: int, multiplies: bool, base: dict | None) -> list[str]:
    """Reasons against a launch."""
    machine, bad = ARCHS[arch], []
    if s["spills"]:
        bad.append(f"spills {s['spills']} bytes")
    if s["shared"] > machine.block:
        bad.append(f"{s['shared']} KiB of shared memory, above {machine.block}")
    if s["resident"] < 1:
        bad.append("fits no multiprocessor")
    if s["serialized"]:
        bad.append("wgmma serialized")
    if multiplies and not s[machine.mma]:
        bad.append(f"no {machine.mma}")
    for name, growth in GROWTH.items() if base else ():
        if s[name] > base[name] * growth:
            bad.append(f"{name} {base[name]} -> {s[name]}")
    if base and s["resident"] < base["resident"]:
        bad.append(f"resident blocks {base['resident']} -> {s['resident']}")
    return bad


# ---- What is compiled ------------------------------------------------------------------------------------------------


def empty(*shape: int, dtype=torch.bfloat16):
    return torch.empty(*shape, device="meta", dtype=dtype)


def _layer_norm(C: int, dtype, dropout: bool):
    x, weight = empty(8192, C, dtype=dtype), empty(C, dtype=dtype)
    stats = empty(8192, dtype=torch.float32)
    p, seed = (0.1, empty(1, dtype=torch.int64)[0]) if dropout else (0.0, None)
    layer_norm.forward(x, x if dropout else None, weight, weight, 1e-5, p, seed)
    options = (p, seed, dtype, dtype if dropout else None)
    layer_norm.backward(x, x if dropout else None, x, weight, stats, stats, True, *options)


def _attention(D: int, dtype, dropout: bool, documents: bool = False, T: int = 1024):
    q, k, v = empty(8, T, 3, 12, D, dtype=dtype).unbind(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    p, seed = (0.1, empty(1, dtype=torch.int64)[0]) if dropout else (0.0, None)
    docs = empty(8, T, dtype=torch.int64) if documents else None
    lens = empty(8, dtype=torch.int64) if documents else None
    out, lse = causal_attention.forward(q, k, v, 0.125, p, seed, lens, docs)
    causal_attention.backward(out, q, k, v, out, lse, 0.125, p, seed, lens, docs)


def _mlp(dtype, activation: str = "gelu_tanh", N: int = 8192, C: int = 768):
    x, fc, fc_bias, proj, proj_bias = (empty(*s, dtype=dtype) for s in ((N, C), (4 * C, C), (4 * C,), (C, 4 * C), (C,)))
    y, h = mlp.forward(x, fc, fc_bias, proj, proj_bias, activation, True)
    mlp.backward(y, x, h, fc, proj, activation, (x, fc, fc_bias, proj, proj_bias))


def _lora(dtype, r: int, dropout: bool, N: int = 8192, C: int = 768):
    x, weight, A, B = (empty(*s, dtype=dtype) for s in ((N, C), (3 * C, C), (r, C), (3 * C, r)))
    options = (2.0, 0.1, empty(1, dtype=torch.int64)[0]) if dropout else (2.0, 0.0, None)
    y, low = lora_linear.forward(x, weight, empty(3 * C, dtype=dtype), A, B, *options)
    lora_linear.backward(y, x, low, weight, A, B, *options, (x, None, None, A, B))


def _loss(dtype, smoothing: float = 0.0, V: int = 50257, N: int = 1024, C: int = 768, gradients: bool = True):
    x, weight, target = empty(N, C, dtype=dtype), empty(V, C, dtype=dtype), empty(N, dtype=torch.int64)
    wanted = (x, weight, None) if gradients else (None, None, None)
    linear_cross_entropy.forward(x, weight, None, target, empty(N, dtype=torch.float32), smoothing, *wanted)


def cases() -> dict:
    """Name -> launches at the shapes of GPT-2."""
    bf16, fp32 = torch.bfloat16, torch.float32
    found = {}
    for C in (768, 4096, 8192):
        found[f"layer_norm C{C} bf16"] = lambda C=C: _layer_norm(C, bf16, False)
    found["layer_norm C768 fp32"] = lambda: _layer_norm(768, fp32, False)
    found["add_layer_norm C768 bf16 dropout"] = lambda: _layer_norm(768, bf16, True)
    found["add_layer_norm C1600 fp32 dropout"] = lambda: _layer_norm(1600, fp32, True)
    for D in (64, 80, 128):
        found[f"attention D{D} bf16"] = lambda D=D: _attention(D, bf16, False)
    found["attention D64 bf16 dropout"] = lambda: _attention(64, bf16, True)
    found["attention D128 bf16 dropout"] = lambda: _attention(128, bf16, True)
    found["attention D64 bf16 documents"] = lambda: _attention(64, bf16, False, True)
    for D in (64, 128):
        found[f"attention D{D} fp32"] = lambda D=D: _attention(D, fp32, False)
    found["attention D128 bf16 documents"] = lambda: _attention(128, bf16, False, True)
    found["attention D128 bf16 default"] = lambda: _attention(128, bf16, True)
    found["layer_norm C8192 fp32 default"] = lambda: _layer_norm(8192, fp32, True)
    found["mlp bf16"] = lambda: _mlp(bf16)
    found["mlp bf16 erf"] = lambda: _mlp(bf16, "gelu")
    found["mlp fp32"] = lambda: _mlp(fp32)
    found["linear_cross_entropy bf16"] = lambda: _loss(bf16)
    found["linear_cross_entropy bf16 loss only"] = lambda: _loss(bf16, 0.1, gradients=False)
    found["linear_cross_entropy fp32"] = lambda: _loss(fp32)
    for r, dtype, dropout in ((16, bf16, False), (128, bf16, True), (16, fp32, True)):
        name = f"lora r{r} {common.DTYPE_NAMES[dtype]}{' dropout' * dropout}"
        found[name] = lambda r=r, dtype=dtype, dropout=dropout: _lora(dtype, r, dropout)
    found["lora r128 fp32 default"] = lambda: _lora(fp32, 128, True)
    return found


@contextlib.contextmanager
def defaults():
    """No row of configs/ counts."""
    table, common.table = common.table, lambda capability: {}
    for tuned in common.TUNED.values():
        tuned.choose.cache_clear()
    try:
        yield
    finally:
        common.table = table
        for tuned in common.TUNED.values():
            tuned.choose.cache_clear()


MULTIPLIES = re.compile(r"_attention_(forward|backward)|_product|_hidden|_logits|_lora")


def compile_case(job: tuple[str, int]) -> list[tuple]:
    """[(kernel, configuration, statistics or None, error)] of one case on one architecture."""
    name, arch = job
    with tempfile.TemporaryFile("w+") as diagnostics:  # MLIR writes them to file descriptor 2
        kept = os.dup(2)
        os.dup2(diagnostics.fileno(), 2)
        try:
            with compiling(arch) as found, defaults() if name.endswith(" default") else contextlib.nullcontext():
                cases()[name]()
        except Exception as error:
            diagnostics.seek(0)
            message = re.search(r"error: (?!Failures)([^\n]*)", diagnostics.read())
            said = message[1] if message else (str(error).strip().splitlines() or [type(error).__name__])[-1]
            return [("?", {}, None, f"{type(error).__name__}: {said[:120]}")]
        finally:
            os.dup2(kept, 2)
            os.close(kept)
    return [(kernel, options, statistics(compiled, log, arch), "") for kernel, options, compiled, log in found]


def shown(options: dict) -> str:
    tiles = "x".join(str(v) for k, v in options.items() if k.startswith("BLOCK"))
    return f"{tiles} w{options.get('num_warps', 4)}s{options.get('num_stages', 3)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS))
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--save", action="store_true", help="write what was compiled into the baseline")
    arguments = parser.parse_args()
    began, failed, measured, launched = time.time(), 0, {}, set()
    base = {} if arguments.save else read_baseline()
    known = {key.split(" | ")[0] for key in base}  # a new case is compared once it is saved
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    jobs = [(name, arch) for arch in arguments.arch for name in cases() if arguments.only in name]
    print(f"triton {triton.__version__}")
    print(f"{'case':34s} {'kernel':28s} {'tiles':>16s}  sm warps regs spill shared resident  mma  code loop")
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        for (name, arch), launches in zip(jobs, workers.map(compile_case, jobs), strict=True):
            times = collections.Counter()
            for kernel, options, s, error in launches:
                times[kernel] += 1
                key, bad = f"{name} | {kernel} {times[kernel]} | sm{arch}", [error]
                line = f"{name:34s} {kernel:28s} {shown(options):>16s} {arch:3d}"
                launched.add((arch, kernel, shown(options)))
                if s is not None:
                    measured[key] = [s[name] for name in COMPARED]
                    low_precision = not re.search("fp32|default", name)  # the default's tiles are too small for it
                    bad = verdict(s, arch, bool(MULTIPLIES.match(kernel)) and low_precision, base.get(key))
                    bad += ["a launch that the baseline has not"] * bool(name in known and key not in base)
                    line += f" {s['warps']:5d} {s['registers']:4d} {s['spills']:5d} {s['shared']:5d}K"
                    line += f" {s['resident']:8d} {s[ARCHS[arch].mma]:4d} {s['code']:5d} {s['loop']:4d}"
                bad = [reason for reason in bad if reason]
                print(line, "FAIL " + "; ".join(bad) if bad else "ok", flush=True)
                failed += bool(bad)
    never = [] if arguments.only else sorted(_rows(arguments.arch) - launched)
    for arch, kernel, tiles in never:
        print(f"sm{arch}: no case launches {kernel} with {tiles}, which configs/ has: FAIL")
    failed += len(never)
    if arguments.save:
        if arguments.only or arguments.arch != list(ARCHS):
            measured = {**{key: [*row.values()] for key, row in read_baseline().items()}, **measured}
        rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(measured[key])}" for key in sorted(measured))
        head = f'"triton": "{triton.__version__}", "columns": {json.dumps(COMPARED)}'
        BASELINE.write_text(f'{{{head}, "launches": {{\n{rows}\n}}}}\n')
    print(f"{len(measured)} launches compiled in {time.time() - began:.0f} s, {failed} failed")
    return int(bool(failed))


def read_baseline() -> dict[str, dict[str, int]]:
    """What the baseline says of each launch; nothing under another release of Triton."""
    found = json.loads(BASELINE.read_text())
    if found["triton"] != triton.__version__:
        return {}
    return {key: dict(zip(found["columns"], row, strict=True)) for key, row in found["launches"].items()}


def _rows(archs) -> set[tuple[int, str, str]]:
    """Every shipped row: (architecture, kernel, tiles)."""
    return {
        (arch, kernel, shown(row["config"]))
        for arch in archs
        for kernel, rows in common.table(arch).items()
        for row in rows
    }


if __name__ == "__main__":
    sys.exit(main())
