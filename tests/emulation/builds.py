"""Compiles CUDA sources for the CPU: g++ against csrc/emulation/, in four builds."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HERE = Path(__file__).resolve().parent

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


def gcc(*arguments: str | Path) -> None:
    command = ["g++", *FLAGS.split(), f"-I{CSRC}", f"-I{HERE}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def compile_test(build: str, sources: list[Path], out: Path, *extra: str) -> Path:
    """The test program made of ``sources`` (.cu files are kernels) in the given build."""
    kernel_flags, other_flags, link_flags = (flags.split() for flags in BUILDS[build])
    sources = sources + ([CSRC / "emulation/race.cpp"] if build == "race" else [])

    flags = {".cu": kernel_flags}
    objects = _compile(sources, out, lambda source: [*flags.get(source.suffix, other_flags), *extra])
    return _link(link_flags, objects, out)


def _compile(sources: list[Path], out: Path, flags: Callable[[Path], list[str]]) -> list[Path]:
    def compile_one(i: int) -> Path:
        gcc(*flags(sources[i]), "-x", "c++", "-c", sources[i], "-o", out.with_suffix(f".{i}.o"))
        return out.with_suffix(f".{i}.o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, range(len(sources))))


def _link(flags: list[Any], objects: list[Path], out: Path) -> Path:
    gcc("-o", out, *objects, *flags, "-ldl")
    for path in objects:
        path.unlink()
    return out


def cached_test(build: str, sources: list[Path]) -> Path:
    """As compile_test, under build/emulation/; compiled again only when a source has changed."""
    digest = hashlib.sha256((FLAGS + str(BUILDS[build])).encode())
    for path in sorted([*sources, *CSRC.glob("emulation/*"), *CSRC.glob("cuda/*"), *HERE.glob("*.h")]):
        digest.update(path.read_bytes())
    return _cached(f"{sources[0].stem}-{build}", digest, "", lambda out: compile_test(build, sources, out))


# Drivers NAME.cpp, and the kernels in csrc/cuda/ that each calls.
DRIVERS = {
    "layer_norm": ["layer_norm"],
    "attention": ["attention_forward", "attention_forward_sm90", "attention_backward", "attention_backward_sm90"],
    "cross_entropy": ["cross_entropy"],
    "activation": ["activation"],
    "gemm": ["gemm", "gemm_sm90"],
    "lora_linear": ["lora_linear"],
}


def driver(build: str, name: str) -> Path:
    """The program that sets kernels against float64."""
    return cached_test(build, [HERE / f"{name}.cpp", *(CSRC / f"cuda/{kernel}.cu" for kernel in DRIVERS[name])])


def cached_library() -> Path:
    """The CUDA ops as a library for torch, on CPU tensors: csrc/cuda/*.cpp with the emulated kernels (release)."""
    digest = hashlib.sha256((FLAGS + torch.__version__).encode())
    sources = [CSRC / "ops.cpp", *sorted((CSRC / "cuda").glob("*.c*"))]
    for path in sorted([*sources, *CSRC.glob("*.h"), *CSRC.glob("emulation/*"), *CSRC.glob("cuda/*.h")]):
        digest.update(path.read_bytes())
    include = Path(torch.__file__).parent / "include"
    target = "-DTORCH_STABLE_ONLY -DTORCH_TARGET_VERSION=((2ULL<<56)|(10ULL<<48))".split()
    extra = ["-fPIC", f"-isystem{include}", *target]
    libtorch = ["-shared", "-Wl,--no-as-needed", include.parent / "lib/libtorch.so", "-Wl,--as-needed"]

    def build(out: Path) -> Path:
        return _link(libtorch, _compile(sources, out, lambda source: extra), out)

    return _cached("ops", digest, ".so", build)


def _cached(name: str, digest: Any, suffix: str, build: Callable[[Path], Path]) -> Path:
    directory = ROOT / "build/emulation"
    directory.mkdir(parents=True, exist_ok=True)
    out = directory / f"{name}-{digest.hexdigest()[:16]}{suffix}"
    if not out.exists():
        for stale in directory.glob(f"{name}-*"):
            stale.unlink()
        build(out.with_suffix(".new")).rename(out)
    return out


def run(program: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": "", **environment}
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, env=env, timeout=600)
