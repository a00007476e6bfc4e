"""CUDA kernels run on the CPU: the same sources, compiled by g++ against csrc/emulation/, in three builds.

release: equal to float64 references, and bit for bit equal under different thread schedules;
sanitized: no access outside an array, no undefined behaviour;
race: no two threads touch a cell without a barrier between them, no read of uninitialised shared memory.

LLMFAST_EMULATION_CASES sets the number of random cases (release; the slower builds run a share of it).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HERE = Path(__file__).resolve().parent
CASES = int(os.environ.get("LLMFAST_EMULATION_CASES", "120"))

# -fno-thread-jumps: a barrier that gcc has duplicated would look like two. -fstack-clash-protection: a frame larger
# than the guard page below a fiber's stack touches that page on its way.
FLAGS = (
    "-std=c++17 -g -O1 -Wall -Wextra -Werror -Wno-unknown-pragmas -fno-strict-aliasing -fno-thread-jumps"
    " -fstack-clash-protection -DLLMFAST_EMULATE"
)
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all"
# name -> flags of the kernels, of the rest, and of the link
BUILDS = {
    "release": ("", "", ""),
    "sanitized": (SANITIZE, SANITIZE, SANITIZE),
    "race": ("-fsanitize=thread -fno-threadsafe-statics", "", "-rdynamic"),
    "ucontext": ("-DLLMFAST_EMULATE_UCONTEXT", "-DLLMFAST_EMULATE_UCONTEXT", ""),
}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ not found")


def gcc(*arguments: str | Path) -> None:
    command = ["g++", *FLAGS.split(), f"-I{CSRC}", f"-I{HERE}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def compile_test(build: str, sources: list[Path], out: Path, *extra: str) -> Path:
    """The test program made of ``sources`` (.cu files are kernels) in the given build."""
    kernel_flags, other_flags, link_flags = (flags.split() for flags in BUILDS[build])
    sources = sources + ([CSRC / "emulation/race.cpp"] if build == "race" else [])

    def compile_one(i: int) -> Path:
        flags = kernel_flags if sources[i].suffix == ".cu" else other_flags
        gcc(*flags, *extra, "-x", "c++", "-c", sources[i], "-o", out.with_suffix(f".{i}.o"))
        return out.with_suffix(f".{i}.o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, range(len(sources))))
    gcc(*link_flags, *objects, "-ldl", "-o", out)
    return out


def cached_test(build: str, sources: list[Path]) -> Path:
    """As compile_test, under build/emulation/; compiled again only when a source has changed."""
    digest = hashlib.sha256((FLAGS + str(BUILDS[build])).encode())
    for path in sorted([*sources, *CSRC.glob("emulation/*"), *CSRC.glob("cuda/*"), *HERE.glob("*.h")]):
        digest.update(path.read_bytes())
    directory = ROOT / "build/emulation"
    directory.mkdir(parents=True, exist_ok=True)
    name = f"{sources[0].stem}-{build}"
    out = directory / f"{name}-{digest.hexdigest()[:16]}"
    if not out.exists():
        for stale in directory.glob(f"{name}-*"):
            stale.unlink()
        compile_test(build, sources, out.with_suffix(".new")).rename(out)
    return out


def run(program: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": "", **environment}
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, env=env, timeout=600)


@pytest.mark.parametrize(
    ("build", "cases", "environment"),
    [
        ("release", CASES, {}),
        ("sanitized", CASES // 4, {}),
        ("race", CASES // 15, {}),
        ("race", CASES // 40, {"LLMFAST_RACE_GLOBAL": "1"}),
    ],
)
def test_layer_norm_equals_float64_under_every_schedule(build, cases, environment):
    program = cached_test(build, [HERE / "layer_norm.cpp", CSRC / "cuda/layer_norm.cu"])
    done = run(program, cases, 1, **environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_layer_norm_reaches_offsets_beyond_32_bits():
    done = run(cached_test("release", [HERE / "layer_norm.cpp", CSRC / "cuda/layer_norm.cu"]), "huge")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("build", ["release", "sanitized", "race"])
def test_every_wrapper_of_ptx_does_what_it_says(build):
    done = run(cached_test(build, [HERE / "conformance.cu"]))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found")
def test_the_conformance_test_compiles_for_a_gpu(tmp_path):
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-Werror=all-warnings", f"-I{CSRC}", HERE / "conformance.cu"]
    done = subprocess.run([*command, "-o", tmp_path / "conformance"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


FLOAT32_ONLY = [
    ("    case DType::f16: return with_dtype(__half());\n", ""),
    ("    case DType::bf16: return with_dtype(__nv_bfloat16());\n", ""),
]
# what is wrong -> the build that finds it, and what to replace in the source by what
FAULTS = {
    "no barrier before the row's sum is read": ("race", "  __syncthreads();\n  v = 0.f;", "  v = 0.f;"),
    "both sums of the backward share their scratch": (
        "race", "scratch + (2 * turn + 1) * kMaxWarps", "scratch + 2 * turn * kMaxWarps"
    ),
    "the variance counts what lies beyond the row": (
        "release", "pack_column<N>(p) < n ? v[p * N + e] - mu : 0.f", "v[p * N + e] - mu"
    ),
    "unaligned rows are read in packs": ("sanitized", "is_aligned && a.n % kFull == 0", "a.n % kFull == 0"),
    "threads without a row leave before the barrier": (
        "release", "row < rows;\n    float v[", "row < rows;\n    if (!there) return;\n    float v["
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_in_layer_norm_is_found(fault, tmp_path):
    build, old, new = FAULTS[fault]
    source = (CSRC / "cuda/layer_norm.cu").read_text()
    for before, after in [*FLOAT32_ONLY, (old, new)]:
        assert source.count(before) == 1, before
        source = source.replace(before, after)
    (tmp_path / "faulty.cu").write_text(source)
    program = compile_test(build, [HERE / "layer_norm.cpp", tmp_path / "faulty.cu"], tmp_path / "test", "-w")
    done = run(program, 40, 1, 0)
    assert done.returncode != 0, "not found"


@pytest.mark.parametrize(
    ("kernel", "build", "says"),
    [
        ("swap", "race", "ok"),
        ("swap-without-sync", "release", "WRONG RESULT"),
        ("swap-without-sync", "race", "uninitialised shared memory, values"),
        ("one-barrier", "release", "ok"),
        ("two-barriers", "release", "meet at different __syncthreads"),
        ("early-exit", "release", "1 threads (first 7) have exited; 63 threads (first 0) wait at __syncthreads"),
        ("warp-collectives", "release", "ok"),
        ("warp-collectives", "ucontext", "ok"),
        ("partial-warp", "release", "names lanes beyond the block"),
        ("dynamic", "sanitized", "ok"),
        ("dynamic-overrun", "sanitized", "use-after-poison"),
        ("dynamic-alignment", "release", "alignment above 1024"),
        ("dynamic-64-KiB", "release", "over the limit"),
        ("dynamic-64-KiB-allowed", "release", "ok"),
        ("1025-threads", "release", "invalid launch configuration"),
        ("uninitialised", "release", "WRONG RESULT"),
        ("uninitialised", "race", "uninitialised shared memory"),
        ("huge-frame", "release", ""),
        ("blocks-share-a-cell", "race", "RACE write after write at global memory"),
    ],
)
def test_the_emulator_tells_a_right_kernel_from_a_wrong_one(kernel, build, says):
    environment = {"LLMFAST_RACE_GLOBAL": "1"} if kernel == "blocks-share-a-cell" else {}
    done = run(cached_test(build, [HERE / "machine.cu"]), kernel, **environment)
    assert (done.returncode == 0) == (says == "ok"), done.stdout + done.stderr
    assert says in done.stdout + done.stderr
