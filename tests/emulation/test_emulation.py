"""CUDA kernels run on the CPU: the same sources, compiled by g++ against csrc/emulation/, in three builds.

release: equal to float64 references, and bit for bit equal under different thread schedules;
sanitized: no access outside an array, no undefined behaviour;
race: no two threads touch a cell without a barrier between them, no read of uninitialised shared memory.

LLMFAST_EMULATION_CASES sets the number of random cases (release; the slower builds run a share of it); `make
fuzz FUZZ=emulation` runs 200 in every build.
"""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from builds import CSRC, DRIVERS, HERE, cached_test, compile_test, driver, run

CASES = int(os.environ.get("LLMFAST_EMULATION_CASES", "120"))

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ not found")


SLOW = {"attention": 5, "gemm": 2, "lora_linear": 4}  # a share of the cases


@pytest.mark.parametrize(
    ("build", "share", "environment"),
    [("release", 1, {}), ("sanitized", 4, {}), ("race", 15, {}), ("race", 40, {"LLMFAST_RACE_GLOBAL": "1"})],
)
@pytest.mark.parametrize("name", DRIVERS)
def test_a_kernel_equals_float64_under_every_schedule(name, build, share, environment):
    cases = max(1, CASES // share // SLOW.get(name, 1))
    done = run(driver(build, name), cases, 1, **environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", DRIVERS)
def test_a_kernel_reaches_offsets_beyond_32_bits(name):
    done = run(driver("release", name), "huge")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("build", ["release", "sanitized", "race"])
def test_every_wrapper_of_ptx_does_what_it_says(build):
    done = run(cached_test(build, [HERE / "conformance.cu"]))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_conformance_test_compiles_for_a_gpu(arch, tmp_path):
    command = ["nvcc", "-std=c++17", f"-arch={arch}", "-Werror=all-warnings", f"-I{CSRC}", HERE / "conformance.cu"]
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
        ("copies", "release", "ok"),
        ("copies-without-wait", "release", "a thread ends while its copies are under way"),
        ("blocks-share-a-cell", "race", "RACE write after write at global memory"),
    ],
)
def test_the_emulator_tells_a_right_kernel_from_a_wrong_one(kernel, build, says):
    environment = {"LLMFAST_RACE_GLOBAL": "1"} if kernel == "blocks-share-a-cell" else {}
    done = run(cached_test(build, [HERE / "machine.cu"]), kernel, **environment)
    assert (done.returncode == 0) == (says == "ok"), done.stdout + done.stderr
    assert says in done.stdout + done.stderr
