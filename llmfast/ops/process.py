"""What a training process wants on a CPU: an allocator that keeps its pages, threads, how they wait, matmul routing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llmfast.errors import UserError
from llmfast.ops import _waiting, matmul

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_HUGE = 2**31 - 1
_GLIBC_MMAP_THRESHOLD = 128 << 10

_allocator: str | None = None
_watch: _waiting.Watch | None = None


@dataclass(frozen=True)
class ProcessReport:
    """What ``tune_process`` found or set."""

    allocator: str
    threads: int
    waiting: str
    matmul: dict[str, str]

    def __str__(self) -> str:
        routes = ", ".join(f"{name} {route}" for name, route in self.matmul.items())
        threads = f"{self.threads}, which wait {self.waiting}"
        return f"allocator: {self.allocator}; threads: {threads}; matrix products: {routes}"


def tune_process(threads: int | None = None) -> ProcessReport:
    """Make this process fast at training on a CPU; the command line and the training loop call it, importing does not.

    Large tensors are kept by the allocator instead of going back to the system (page faults on them cost a third of a
    step), ``threads`` PyTorch threads are set (None: as they are), which from now on sleep rather than spin while they
    wait for each other and other processes hold their cores (Linux), and the matrix-product routing is measured if it
    is not yet decided. Calling it again changes nothing but a new ``threads``. ``UserError`` for fewer than one thread.
    """
    global _allocator, _watch
    if threads is not None:
        if threads < 1:
            raise UserError(f"threads must be at least 1, got {threads}")
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
    if _allocator is None:
        _allocator = _keep_pages()
    unwatched = _waiting.why_not() if _watch is None else None
    if _watch is None and unwatched is None:
        _watch = _waiting.Watch()
        _watch.start()
    waiting = "as the cores are free or crowded" if unwatched is None else f"as PyTorch has it ({unwatched})"
    return ProcessReport(_allocator, torch.get_num_threads(), waiting, matmul.matmul_routing())


def cores_are_crowded() -> bool:
    """Whether other processes held the cores of this process's threads when that was last looked at."""
    return _watch is not None and _watch.crowded


def _keep_pages() -> str:
    """Tell glibc's malloc never to map or trim; says what it did."""
    if platform.libc_ver()[0] != "glibc":
        return f"nothing done (no glibc on {platform.system()})"
    if any(name in os.environ.get("LD_PRELOAD", "") for name in ("jemalloc", "tcmalloc", "mimalloc")):
        return "nothing done (another allocator is preloaded)"
    mallopt = ctypes.CDLL(None).mallopt
    if not (mallopt(_M_MMAP_THRESHOLD, _HUGE) and mallopt(_M_TRIM_THRESHOLD, _HUGE)):
        return "nothing done (mallopt refused)"
    return "glibc keeps freed memory"


def release_freed_memory() -> None:
    """Give the memory that was freed back to the system, which a tuned allocator does not do by itself."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Inside the block large tensors go back to the system as soon as they are freed: to measure memory."""
    mallopt = ctypes.CDLL(None).mallopt if platform.libc_ver()[0] == "glibc" else None
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    try:
        yield
    finally:
        if mallopt:
            mallopt(_M_MMAP_THRESHOLD, _HUGE if _allocator else _GLIBC_MMAP_THRESHOLD)


def allocator_state() -> str:
    """What ``tune_process`` did to the allocator, or that it has not run."""
    return _allocator or "not tuned (tune_process has not run)"
