"""Interleaved timing: the providers take turns, so that whatever else the machine does hits all of them alike.

On a GPU a call is timed by events, behind a wait on the device long enough for the host to queue the call: what is
measured is the device's work and not the launch. On a CPU the clock is ``perf_counter``. Before every timed call one
element of the inputs changes, so that an answer kept from an earlier call is of no use.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# On a GPU (True) and on a CPU: seconds that one sample should take, the mean over several calls where they are short.
SAMPLE = {True: 0.001, False: 0.01}
MAX_CALLS = {True: 5, False: 200}
QUEUE_CYCLES = 1_200_000  # about 0.6 ms on the device, for the host to queue a call of many launches


@dataclass(frozen=True)
class Task:
    """What is timed: ``run(prepare())``, and of that ``run`` alone; ``touch`` changes an input before each call.

    context: entered around each sample (a forced backend), outside of what is timed.
    """

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]
    touch: Callable[[], None]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


class Clock:
    """Times calls on one device. ``cold``: a buffer larger than the caches is written before every call."""

    def __init__(self, device: torch.device, cold: bool = False) -> None:
        self.device, self.gpu = device, device.type == "cuda"
        self._flush: Tensor | None = None
        if cold:
            cache = torch.cuda.get_device_properties(device).L2_cache_size if self.gpu else 64 << 20
            self._flush = torch.empty(2 * max(cache, 32 << 20), dtype=torch.int8, device=device)

    def calls_for(self, task: Task) -> int:
        """How many calls make a sample of the wanted length."""
        once = min(self.sample(task, 1) for _ in range(2))
        wanted = SAMPLE[self.gpu] / max(once, 1e-7)
        return max(1, min(MAX_CALLS[self.gpu], round(wanted)))

    def sample(self, task: Task, calls: int) -> float:
        """Seconds of one call, the mean over ``calls``."""
        with task.context():
            return (self._on_gpu if self.gpu else self._on_host)(task, calls)

    def _on_host(self, task: Task, calls: int) -> float:
        total = 0.0
        for _ in range(calls):
            task.touch()
            state = task.prepare()
            if self._flush is not None:
                self._flush.fill_(1)
            start = time.perf_counter()
            task.run(state)
            if self.device.type == "mps":
                torch.mps.synchronize()
            total += time.perf_counter() - start
            del state  # before the next one is made, which may then have its memory
        return total / calls

    def _on_gpu(self, task: Task, calls: int) -> float:
        events = []
        for _ in range(calls):
            task.touch()
            state = task.prepare()
            if self._flush is not None:
                self._flush.fill_(1)
            torch.cuda._sleep(QUEUE_CYCLES)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            task.run(state)
            end.record()
            events.append((start, end))
            del state
        torch.cuda.synchronize(self.device)
        return sum(start.elapsed_time(end) for start, end in events) / 1e3 / calls


def others_seconds() -> float:
    """CPU seconds that this machine has spent on all but this process and its ended children; 0 if it does not tell."""
    try:
        fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return 0.0
    return sum(fields[i] for i in (0, 1, 2, 5, 6, 7)) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


class Others:
    """What other programs use of this machine from now on."""

    def __init__(self) -> None:
        self._before, self._began = others_seconds(), time.perf_counter()

    def share(self) -> float:
        """0 to 1, of all cores."""
        elapsed = max(time.perf_counter() - self._began, 1e-3)
        return min(1.0, max(0.0, (others_seconds() - self._before) / elapsed / (os.cpu_count() or 1)))


def interleave(
    clock: Clock, tasks: dict[str, Task], samples: int, advance: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """``samples`` samples of every task, in rounds of changing order: the n-th of each make a pair."""
    calls = {name: clock.calls_for(task) for name, task in tasks.items()}
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    draw = random.Random(0)
    for _ in range(samples):
        for name in draw.sample(list(tasks), len(tasks)):
            seconds[name].append(clock.sample(tasks[name], calls[name]))
        advance()
    return seconds


def interleave_calls(
    calls: dict[str, Callable[[], T]], turns: int, advance: Callable[[], Any] = lambda: None
) -> dict[str, list[T]]:
    """What each of the calls, which time themselves, returned in each turn, after one turn to warm up."""
    for call in calls.values():
        call()
    taken: dict[str, list[T]] = {name: [] for name in calls}
    draw = random.Random(0)
    for _ in range(turns):
        for name in draw.sample(list(calls), len(calls)):
            taken[name].append(calls[name]())
        advance()
    return taken


@dataclass(frozen=True)
class Spread:
    """A median and the tenth and ninetieth percentile."""

    median: float
    low: float
    high: float

    def to_list(self) -> list[float]:
        return [self.median, self.low, self.high]


def spread(values: list[float]) -> Spread:
    ordered = sorted(values)
    last = len(ordered) - 1
    return Spread(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])


def paired_ratio(theirs: list[float], ours: list[float]) -> Spread:
    """How many times as fast ``ours`` is as ``theirs``, pair by pair."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])
