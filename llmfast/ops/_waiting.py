"""How threads wait for each other where other processes use the same cores.

The OpenMP of PyTorch's Linux wheels (GNU's libgomp) lets a thread that waits spin for milliseconds before it sleeps.
That is the fastest way as long as every thread has a core. Where one has lost its core to another process, the others
burn the very time that it waits for: a training step takes three to twenty times as long (docs/log.md, "training under
load"). libgomp spins a thousandth as long while it manages more threads than there are cores (its manual,
GOMP_SPINCOUNT). So while this process's threads queue for cores, idle teams of threads are held here that raise the
count; what is computed does not change. Never spinning would cost a tiny model a quarter of its speed on quiet cores.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

TICK = 0.5  # seconds over which it is measured how long the threads queue for a core
CROWDED, STILL_CROWDED = 0.35, 0.2  # seconds a second, of all threads together (0.1 to 0.2 beside niced processes)
TASKS = Path("/proc/self/task")


def why_not() -> str | None:
    """Why threads wait as they are used to here, whatever happens; None where ``Watch`` can do something."""
    if any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        return "set by OMP_WAIT_POLICY or GOMP_SPINCOUNT"
    try:
        if "libgomp" not in Path("/proc/self/maps").read_text():
            return "no libgomp in this process"
    except OSError:
        return "not Linux"
    return None if queued() is not None else "this kernel does not tell how long threads queue for a core"


def queued(tasks: Path = TASKS) -> float | None:
    """Seconds that the threads of this process were ready to run and had no core; None where Linux does not tell."""
    total, found = 0, False
    for task in tasks.glob("*/schedstat"):  # running, waiting (ns), time slices
        with contextlib.suppress(OSError, IndexError, ValueError):  # a thread that has ended
            total += int(task.read_text().split()[1])
            found = True
    return total / 1e9 if found else None


class Watch(threading.Thread):
    """Looks every half second whether the cores are crowded, and lets PyTorch's threads wait accordingly."""

    def __init__(self, tasks: Path = TASKS) -> None:
        super().__init__(name="llmfast-waiting", daemon=True)
        self._tasks = tasks
        self._end = threading.Event()
        self.crowded = False

    def run(self) -> None:
        while not self._end.is_set():
            self.crowded = self._queue_longer(CROWDED)
            if self.crowded:
                with short_waits():
                    while self._queue_longer(STILL_CROWDED):
                        pass

    def stop(self) -> None:
        self._end.set()
        self.join()

    def _queue_longer(self, limit: float) -> bool:
        """Whether the threads queue for more than ``limit`` seconds a second from now on; False at once at the end."""
        before, began = queued(self._tasks) or 0.0, time.perf_counter()
        if self._end.wait(TICK):
            return False
        elapsed = time.perf_counter() - began
        return torch.get_num_threads() > 1 and (queued(self._tasks) or 0.0) - before > limit * elapsed


@contextlib.contextmanager
def short_waits() -> Iterator[None]:
    """Inside the block libgomp's threads sleep almost at once when they wait."""
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    each = max(1, threads - 1)  # by which a team raises libgomp's count
    end = threading.Event()
    keepers = [threading.Thread(target=_keep_team, args=(end,), daemon=True) for _ in range(threads, cores + 1, each)]
    for keeper in keepers:
        keeper.start()
    try:
        yield
    finally:
        end.set()
        for keeper in keepers:
            keeper.join()


def _keep_team(end: threading.Event) -> None:
    torch.zeros(1 << 16).add_(1.0)  # on all threads: a team of this thread's own, which ends with it
    end.wait()
