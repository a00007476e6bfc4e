"""One op at one shape and dtype: the inputs that every provider shares, the truth in float64, and what is timed.

A provider is checked before it is timed and once more afterwards, each time on other numbers, which are written into
the very tensors that it got: wrong values, memory that it never wrote (it is full of NaNs during the check) and an
answer kept from an earlier call are found.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfast.bench.providers import Call, Provider
from llmfast.bench.timing import Task
from llmfast.ops import process
from llmfast.ops._registry import Op
from llmfast.ops._verify import Standard

MODES = ("forward", "backward", "both")
_M_PERTURB = -6  # malloc.h: new memory is filled with this byte, inverted: huge numbers in every floating-point type
# Error over allowed error from which on an answer is wrong. Allowed is twice eager PyTorch's own, whose products add in
# blocks; one running sum over the 1024 terms of a float32 gradient, as torch.compile and others have it, reaches 1.3 of
# that (figures in docs/log.md).
WRONG = 4.0
WHOLE = 1 << 27  # elements of a float64 attention matrix; beyond, some heads stand for all


class Case:
    """``inputs`` are the leaves that every provider computes on; ``fill(n)`` writes draw ``n`` into them."""

    def __init__(self, op: Op, shape: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        self.op, self.shape, self.dtype, self.device = op, shape, dtype, device
        given = op.inputs(shape, dtype, device)
        self.inputs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in given.items()}
        self.tensors = {k: v for k, v in self.inputs.items() if isinstance(v, Tensor)}
        self.wanted = [k for k, v in self.tensors.items() if v.is_floating_point() and k not in op.frozen]
        for name in self.wanted:
            self.inputs[name].requires_grad_()
        self._first = {k: v.detach().clone() for k, v in self.tensors.items() if v.is_floating_point()}
        self._standards: dict[int, Standard] = {}
        self._numbers = itertools.cycle([1e-3 * i for i in range(1, 100)])
        with torch.no_grad():
            outputs = _tuple(op.eager(**self.inputs))
        generator = torch.Generator(device).manual_seed(1)
        self.cotangents = [  # laid out as the outputs are, as a model's backward pass has them
            torch.empty_like(y, dtype=torch.float32).normal_(generator=generator).to(y.dtype) for y in outputs
        ]
        cost = op.cost(**self.inputs)
        read = sum(t.nbytes for t in self.tensors.values()) + sum(t.nbytes for t in self.cotangents)
        written = sum(self.tensors[name].nbytes for name in self.wanted)
        backward = (read + written, round(cost.flops * op.backward_flops))
        self.costs = {
            "forward": (cost.bytes, cost.flops),
            "backward": backward,
            "both": (cost.bytes + backward[0], cost.flops + backward[1]),
        }

    # ---- Checks ----

    def fill(self, draw: int) -> None:
        """Write draw ``draw`` into the inputs: the first one's numbers, moved on and, each second time, negated."""
        for name, first in self._first.items():
            new = first.flatten().roll(draw * 7919).view(first.shape)
            self.tensors[name].data.copy_(-new if draw % 2 else new)

    def why_wrong(self, call: Call, draws: tuple[int, ...]) -> tuple[float, str | None]:
        """Worst error over allowed error on these draws, and what is wrong, if anything is."""
        worst, like = 0.0, [*self.cotangents, *(self.inputs[name] for name in self.wanted)]
        for draw in draws:
            self.fill(draw)
            with self._without_dropout(), poisoned(self.device, like):
                got = self._run(call)
            if isinstance(got, str):
                return float("inf"), got
            standard = self._standard(draw)
            ratio, where = standard.worst({name: self._part(t) for name, t in got.items()})
            if ratio > WRONG:
                how = "is not finite" if ratio == float("inf") else f"is off by {ratio:.3g} times the allowed error"
                text = where if "shape" in where or "missing" in where else f"{where} {how}"
                return ratio, text + (" after its inputs changed" if draw else "")
            worst = max(worst, ratio)
        return worst, None

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """What is random has no true value: it is checked at 0, and timed as given."""
        p = self.inputs.get("dropout_p")
        if p is None:
            yield
            return
        self.inputs["dropout_p"] = 0.0
        try:
            yield
        finally:
            self.inputs["dropout_p"] = p

    def _run(self, call: Call) -> dict[str, Tensor] | str:
        outputs = _tuple(call())
        if len(outputs) != len(self.cotangents):
            return f"{len(outputs)} outputs instead of {len(self.cotangents)}"
        for i, (y, c) in enumerate(zip(outputs, self.cotangents, strict=True)):
            if y.shape != c.shape:
                return f"y{i} has shape {tuple(y.shape)}, not {tuple(c.shape)}"
        if not all(y.requires_grad for y in outputs):
            return "an output has no gradient"
        gradients = self._gradients(outputs)
        missing = [name for name, g in zip(self.wanted, gradients, strict=True) if g is None]
        if missing:
            return f"no gradient by {', '.join(missing)}"
        named = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
        return {**named, **{f"d {name}": g for name, g in zip(self.wanted, gradients, strict=True)}}

    def _gradients(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        leaves = [self.inputs[name] for name in self.wanted]
        given = [c.to(y.dtype) for c, y in zip(self.cotangents, outputs, strict=True)]
        return torch.autograd.grad(outputs, leaves, given, allow_unused=True)

    def _standard(self, draw: int) -> Standard:
        """The truth about draw ``draw``, whose numbers the inputs hold now."""
        if draw not in self._standards:
            inputs = {k: self._part(v) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
            inputs = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
            inputs.pop("dropout_p", None)
            self._standards[draw] = Standard(
                self.op, inputs, self.dtype, cotangents=[self._part(c) for c in self.cotangents]
            )
        return self._standards[draw]

    def _part(self, t: Tensor) -> Tensor:
        """What is compared, where there is float64: of attention whose weights would not fit, some heads of one row."""
        t = t.cpu() if t.device.type == "mps" else t
        q = self.tensors.get("q")
        if q is None or q.shape[:2].numel() * q.shape[2] * self.tensors["k"].shape[2] <= WHOLE:
            return t
        heads = max(1, WHOLE // (q.shape[2] * self.tensors["k"].shape[2]))
        return t[-1:, -heads:] if t.dim() == 4 else t[-1:]

    # ---- What is timed ----

    def task(self, provider: Provider, call: Call, mode: str) -> Task:
        first = next(iter(self.tensors.values())).data
        element = first.as_strided((), (), first.storage_offset())
        leaves = [self.inputs[name] for name in self.wanted]
        with provider.context(self.op):
            outputs = _tuple(call())
        cotangents = [c.to(y.dtype) for c, y in zip(self.cotangents, outputs, strict=True)]
        del outputs

        def touch() -> None:
            element.fill_(next(self._numbers))

        def backward(outputs: Any) -> Any:
            return torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)

        runs: dict[str, tuple[Call, Callable[[Any], Any]]] = {
            "forward": (lambda: None, lambda _: call()),
            "backward": (lambda: _tuple(call()), backward),
            "both": (lambda: None, lambda _: backward(_tuple(call()))),
        }
        prepare, run = runs[mode]
        return Task(prepare, run, touch, lambda: provider.context(self.op))

    def peak_bytes(self, provider: Provider, call: Call) -> int | None:
        """Memory of one forward and backward pass beyond what was there before; None where the system does not tell."""
        task = self.task(provider, call, "both")

        def run() -> None:
            with task.context():
                task.run(task.prepare())

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            run()
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - before
        return resident_growth(run) if self.device.type == "cpu" else None


def resident_growth(run: Call) -> int | None:
    """By how much resident memory grew at most while ``run`` ran, from the kernel's high-water mark (Linux).

    It runs in a thread of its own, whose threads hold no scratch memory of earlier calls yet.
    """
    gc.collect(1)  # not the oldest generation: with torch.compile in the process that takes half a second
    process.release_freed_memory()
    with process.freed_memory_returned():
        before = resident("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        peak = resident("VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


def resident(field: str) -> int | None:
    """Bytes from /proc/self/status: VmRSS now, VmHWM at most since it was set back."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return None


@contextmanager
def poisoned(device: torch.device, like: list[Tensor]) -> Iterator[None]:
    """Fresh memory holds what no answer does: on a CPU whatever glibc's malloc hands out, on a GPU the blocks that
    PyTorch's allocator keeps for tensors of these sizes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        blocks = [torch.full_like(t, float("nan")) for t in like for _ in range(3)]
        del blocks
    mallopt = ctypes.CDLL(None).mallopt if platform.libc_ver()[0] == "glibc" else lambda *_: None
    mallopt(_M_PERTURB, 1)
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
