"""Compiles every Triton kernel with every shipped configuration for sm_80, sm_90 and sm_100, without a GPU.

    python -m tests.kernels.aot [--arch 80 90 100] [--only TEXT] [--save]

The kernels are launched on meta tensors under a driver that compiles and never runs; launches that are alike are
compiled once. The machine code then tells registers, spills, shared memory, how many blocks share a multiprocessor, and
whether the tensor cores are used. A launch fails where it spills, needs more shared memory than there is, fits no
multiprocessor, lacks HMMA / wgmma / tcgen05 though it multiplies matrices, has its wgmma serialized, is worse than
``aot_baseline.json`` says, or is not among the launches of its case there (--save writes that file).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# isort: off
from tests.kernels.machine_code import ARCHS, Launch, disassembled, instructions, launching, statistics
import torch
import triton

from llmfast.kernels import causal_attention, common, layer_norm, linear_cross_entropy, lora_linear, mlp

BASELINE = Path(__file__).with_name("aot_baseline.json")
# Allowed growth over the baseline.
GROWTH = {"registers": 1.1, "shared": 1.0, "loop": 1.15}
COMPARED = [*GROWTH, "resident"]
AWKWARD = (" ones", " odd")  # cases that must compile, for sm_90, but that no tiles were chosen for


def verdict(s: dict, arch: int, multiplies: bool, awkward: bool, base: dict | None) -> list[str]:
    """Reasons against a launch."""
    machine, bad = ARCHS[arch], []
    if s["spills"] and not awkward:
        bad.append(f"spills {s['spills']} bytes")
    if s["shared"] > machine.block:
        bad.append(f"{s['shared']} KiB of shared memory, above {machine.block}")
    if s["resident"] < 1:
        bad.append("fits no multiprocessor")
    if s["serialized"] and not awkward:
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


def _layer_norm(C: int, dtype, dropout: bool, N: int = 8192):
    x, weight = empty(N, C, dtype=dtype), empty(C, dtype=dtype)
    stats = empty(N, dtype=torch.float32)
    p, seed = (0.1, empty(1, dtype=torch.int64)[0]) if dropout else (0.0, None)
    layer_norm.forward(x, x if dropout else None, weight, weight, 1e-5, p, seed)
    options = (p, seed, dtype, dtype if dropout else None)
    layer_norm.backward(x, x if dropout else None, x, weight, stats, stats, True, *options)


def _attention(D: int, dtype, dropout: bool, documents: bool = False, T: int = 1024, H: int = 12):
    q, k, v = empty(8, T, 3, H, D, dtype=dtype).unbind(2)
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
    # Sizes of one are constants to Triton, and odd ones take every vector load away: these must compile.
    for kind, C, N, r, T in (("ones", 1, 1, 1, 1), ("odd", 771, 37, 5, 77)):
        found[f"layer_norm {kind}"] = lambda C=C, N=N: _layer_norm(C, bf16, True, N)
        found[f"attention {kind}"] = lambda r=r, T=T: _attention(r, bf16, True, True, T, r)
        found[f"mlp {kind}"] = lambda C=C, N=N: _mlp(bf16, N=N, C=C)
        found[f"lora {kind}"] = lambda C=C, N=N, r=r: _lora(bf16, r, True, N, C)
        found[f"linear_cross_entropy {kind}"] = lambda C=C, N=N, r=r: _loss(bf16, 0.1, r, N, C)
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


def launches_of(name: str, arch: int, wanted: Collection[int]) -> list[Launch]:
    """The launches of one case, those ``wanted`` compiled."""
    with launching(arch, wanted) as found, defaults() if name.endswith(" default") else contextlib.nullcontext():
        cases()[name]()
    return found


def compile_launches(name: str, arch: int, wanted: list[int]) -> dict[str, tuple[dict[str, Any] | None, str]]:
    """Key -> (statistics, error) of the ``wanted`` launches of a case."""
    launches = launches_of(name, arch, wanted)
    done = [launches[i] for i in wanted if not launches[i].error]
    codes = disassembled([instructions(launch.compiled.asm["cubin"]) for launch in done], arch)
    found = {launch.key: statistics(launch, code, arch) for launch, code in zip(done, codes, strict=True)}
    return {launch.key: (found.get(launch.key), launch.error) for launch in (launches[i] for i in wanted)}


def compiled(names: list[str], archs: list[int]) -> Iterator[tuple[str, int, Launch, dict[str, Any] | None, str]]:
    """(case, architecture, launch, statistics, error) of every launch; alike ones are compiled once."""
    plan = [
        (name, arch, i, launch)
        for arch in archs
        for name in names
        if arch == 90 or not name.endswith(AWKWARD)
        for i, launch in enumerate(launches_of(name, arch, ()))
    ]
    home: dict[str, tuple[str, int]] = {}
    wanted: dict[tuple[str, int], list[int]] = collections.defaultdict(list)
    for name, arch, i, launch in plan:
        if launch.key not in home:
            home[launch.key] = name, arch
            wanted[name, arch].append(i)
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        jobs = {job: workers.submit(compile_launches, *job, numbers) for job, numbers in wanted.items()}
        for name, arch, _, launch in plan:
            yield name, arch, launch, *jobs[home[launch.key]].result()[launch.key]


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
    print(f"triton {triton.__version__}")
    print(f"{'case':34s} {'kernel':28s} {'tiles':>16s}  sm warps regs spill shared resident  mma  code loop")
    times: collections.Counter[tuple[str, int, str]] = collections.Counter()
    different = set()
    for name, arch, launch, s, error in compiled([name for name in cases() if arguments.only in name], arguments.arch):
        kernel, tiles = launch.kernel, shown(launch.options)
        times[name, arch, kernel] += 1
        key, bad = f"{name} | {kernel} {times[name, arch, kernel]} | sm{arch}", [error]
        line = f"{name:34s} {kernel:28s} {tiles:>16s} {arch:3d}"
        launched.add((arch, kernel, tiles))
        different.add(launch.key)
        if s is not None:
            awkward = name.endswith(AWKWARD)
            if not awkward:
                measured[key] = [s[name] for name in COMPARED]
            products = MULTIPLIES.match(kernel) and not awkward and not re.search("fp32|default", name)
            bad = verdict(s, arch, bool(products), awkward, base.get(key))
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
    took = f"{time.time() - began:.0f} s"
    print(f"{times.total()} launches, {len(different)} of them different, compiled in {took}, {failed} failed")
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
