"""How an op chooses its implementation, and says why.

Every op file makes one ``Op``: reference, eager baseline, sample inputs, cost model, tolerance, and its implementations
in order of preference. Tests, the fuzzer, the benchmarks and ``llmfast info`` iterate ``OPS``.

The setting ("auto", a backend, or one per op) comes from ``use_backend`` on this thread, else from ``LLMFAST_BACKEND``.
It lives in PyTorch's own thread-local state, which autograd hands on to its backward threads, so that a forward
recomputed there (activation checkpointing) chooses as the first one did. ``torch.compile`` fixes the choice when it
traces; it guards on the innermost ``use_backend`` of the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfast.config import suggest
from llmfast.errors import UserError
from llmfast.ops import _checks, _library

logger = logging.getLogger("llmfast.ops")

BACKENDS = ("cuda", "triton", "cpp", "torch")
SHORT_NAMES = {
    "attention": "causal_attention",
    "loss": "linear_cross_entropy",
    "cross_entropy": "linear_cross_entropy",
    "lora": "lora_linear",
}
OPS: dict[str, Op] = {}
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ---- Setting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: parse_setting makes each once
class Setting:
    """The backend of every op, and the exceptions."""

    default: str = "auto"
    per_op: tuple[tuple[str, str], ...] = ()

    def backend(self, op: str) -> str:
        return dict(self.per_op).get(op, self.default)

    def __str__(self) -> str:
        return ",".join([self.default, *(f"{op}={backend}" for op, backend in self.per_op)])


AUTO = Setting()


@functools.lru_cache(maxsize=256)
def parse_setting(text: str, outer: Setting, source: str = "backend") -> Setting:
    """``text`` ("torch", or "attention=triton,layer_norm=cuda") on top of ``outer``."""
    default, per_op = outer.default, dict(outer.per_op)
    for part in text.split(","):
        op, equals, backend = (s.strip().lower() for s in part.strip().rpartition("="))
        if backend not in (*BACKENDS, "auto"):
            known = ("auto", *BACKENDS)
            raise UserError(
                f"{source}: unknown backend {backend!r}{suggest(backend, known)}; backends: {', '.join(known)}"
            )
        if not equals:
            default, per_op = backend, {}
            continue
        op = SHORT_NAMES.get(op, op)
        if op not in OPS:
            known_ops = [*OPS, *SHORT_NAMES]
            raise UserError(f"{source}: unknown op {op!r}{suggest(op, known_ops)}; ops: {', '.join(OPS)}")
        per_op[op] = backend
    return Setting(default, tuple(sorted(per_op.items())))


@functools.lru_cache(maxsize=1)
def _environment_setting() -> Setting:
    text = os.environ.get("LLMFAST_BACKEND", "").strip()
    return parse_setting(text, AUTO, "LLMFAST_BACKEND") if text else AUTO


_TLS_KEY = "llmfast_backend"  # its value: what use_backend has set on this thread, None outside of it
_has, _get = torch._C._is_key_in_tls, torch._C._get_obj_in_tls
_traced: str | None = None  # what torch.compile sees and guards on: plain, since torch 2.10 takes no object of ours


def _stash(setting: Setting | None) -> None:
    """Set this thread's setting. torch 2.10 keeps the object without counting its reference, but drops one later."""
    before = sys.getrefcount(setting)
    torch._C._stash_obj_in_tls(_TLS_KEY, setting)
    if sys.getrefcount(setting) == before:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(setting))


def current_setting() -> Setting:
    """The setting in force on this thread."""
    return (_get(_TLS_KEY) if _has(_TLS_KEY) else None) or _environment_setting()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run ops with backend ``name`` inside the block (or the decorated function).

    name: "auto", "cuda", "triton", "cpp", "torch", or per op such as "attention=triton,layer_norm=cuda", which leaves
    the other ops as the surrounding block has them.
    A forced backend runs or raises ``BackendError`` with its reasons. ``UserError`` for a name that does not exist.
    """
    global _traced
    outer, outer_traced = (_get(_TLS_KEY) if _has(_TLS_KEY) else None), _traced
    inner = parse_setting(name, outer or _environment_setting())
    _stash(inner)
    _traced = str(inner)
    try:
        yield
    finally:
        _stash(outer)
        _traced = outer_traced


class BackendError(UserError, RuntimeError):
    """No implementation of the backend that was asked for can run these inputs; one line that says why."""


# ---- What an op consists of ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    backend: one of ``BACKENDS``.
    run: takes the public function's arguments by position.
    by: "ours", or whose code does the work ("PyTorch", "SDPA", ...).
    devices, dtypes: device types (empty: all) and dtypes of the first argument that it takes.
    unavailable: reasons why it cannot run on a device of this machine (library not built, ...).
    declines: reasons against these arguments; checked at every call, so keep it cheap, or None.
    elsewhere: whether "auto" passes it over for products in this dtype, whatever their sizes, since another library is
        faster.
    not_worth: whether it does for these arguments (too small to pay, ...); checked at every call. torch.compile does
        not ask: sizes may be unknown when it traces, and what a call costs in Python does not count there.
    """

    backend: str
    run: Callable[..., Any]
    by: str
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATING
    unavailable: Callable[[torch.device], list[str]] | None = None
    declines: Callable[..., list[str]] | None = None
    elsewhere: Callable[[torch.dtype], bool] | None = None
    not_worth: Callable[..., bool] | None = None

    def why_not_on(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        """Reasons against this device and dtype, whatever the other arguments are."""
        reasons = []
        if self.devices and device.type not in self.devices:
            reasons.append(f"runs on {'/'.join(self.devices)}, not on {device.type}")
        if dtype not in self.dtypes:
            reasons.append(f"takes {'/'.join(map(_name, self.dtypes))}, not {_name(dtype)}")
        if not reasons and self.unavailable is not None:
            reasons += self.unavailable(device)
        return reasons

    def passed_over(self, args: tuple[Any, ...]) -> bool:
        """Whether "auto" leaves ``args`` to the next one, though this one could run them."""
        if self.elsewhere is not None and self.elsewhere(_checks.autocast_dtype(args[0]) or args[0].dtype):
            return True
        return self.not_worth is not None and self.not_worth(*args)

    def why_not(self, args: tuple[Any, ...]) -> list[str]:
        """Every reason why this implementation cannot run ``args``; empty if it can."""
        reasons = self.why_not_on(args[0].device, args[0].dtype)
        return reasons or (self.declines(*args) if self.declines is not None else [])


@dataclass(frozen=True)
class Cost:
    """What one forward pass has to move and compute: the denominators of GB/s and TFLOP/s."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Tolerance:
    """Allowed error = ``ratio`` x eager PyTorch's own error against float64 + ``floor`` x eps x max |reference|."""

    ratio: float = 2.0
    floor: float = 3.0


@dataclass
class Op:
    """One public op. Shapes are dicts of sizes and options; ``inputs`` turns one into keyword arguments.

    function: the public function; reference: the same by plain formulas (run in float64 by tests); eager: what a
    PyTorch user writes, the baseline of error and speed; samples / gpu_samples: shapes for tests and for benchmarks;
    random_shape(rng): one more shape for the fuzzer; inputs(shape, dtype, device): keyword arguments, deterministic;
    cpu_samples: small shapes for benchmarks on a CPU; frozen: inputs that need no gradient in training; backward_flops:
    FLOPs of a backward pass over those of a forward pass.
    """

    name: str
    reference: Callable[..., Any]
    eager: Callable[..., Any]
    samples: list[dict[str, Any]]
    gpu_samples: list[dict[str, Any]]
    random_shape: Callable[[Any], dict[str, Any]]
    inputs: Callable[..., dict[str, Any]]
    cost: Callable[..., Cost]
    implementations: list[Implementation]
    tolerance: Tolerance = field(default_factory=Tolerance)
    cpu_samples: list[dict[str, Any]] = field(default_factory=list)
    frozen: tuple[str, ...] = ()
    backward_flops: float = 2.0
    function: Callable[..., Any] = field(init=False)
    _candidates: dict[Any, tuple[Implementation, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        OPS[self.name] = self

    def public(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator that marks the public function of this op."""
        self.function = function
        return function

    def __call__(self, *args: Any) -> Any:
        """Run the implementation that the setting, the device and the arguments lead to."""
        probe: Tensor = args[0]
        if torch.compiler.is_compiling():
            compute = _checks.autocast_dtype(probe) or probe.dtype
            for name in _traced_candidates(self.name, _traced, str(probe.device), probe.dtype, compute):
                implementation = self.implementations[name]
                if implementation.declines is None or not implementation.declines(*args):
                    return implementation.run(*args)
            raise BackendError(f"{self.name}: no implementation takes these arguments under torch.compile")
        setting = current_setting()
        key = (setting, probe.dtype, None if probe.is_cpu else probe.device)  # a device takes long to hash
        candidates = self._candidates.get(key)
        if candidates is None:
            candidates = self._candidates[key] = self.resolve(setting, probe.device, probe.dtype)
        auto = len(candidates) > 1  # a forced backend is the only candidate
        for implementation in candidates:
            if auto and implementation.passed_over(args):
                continue
            if implementation.declines is None:
                return implementation.run(*args)
            reasons = implementation.declines(*args)
            if not reasons:
                return implementation.run(*args)
            if auto:
                _log_fallback(self.name, implementation.backend, "; ".join(reasons))
        why_not = self.reasons(probe.device, probe.dtype)
        for implementation in self.implementations:
            why_not[implementation.backend] = implementation.why_not(args)
        tensors = [f"{tuple(a.shape)} {_name(a.dtype)} {a.device}" for a in args if isinstance(a, Tensor)]
        raise self.refusal(setting, why_not, ", ".join(tensors))

    def resolve(self, setting: Setting, device: torch.device, dtype: torch.dtype) -> tuple[Implementation, ...]:
        """The implementations to try on this device and dtype, best first."""
        wanted = setting.backend(self.name)
        found = []
        for implementation in self.implementations:
            if wanted not in ("auto", implementation.backend):
                continue
            reasons = implementation.why_not_on(device, dtype)
            if not reasons and wanted == "auto":
                reasons = self.why_not_default(implementation, device)
            if not reasons:
                found.append(implementation)
            elif (
                wanted == "auto"
                and implementation.by == "ours"
                and device.type in (implementation.devices or (device.type,))
            ):
                _log_fallback(self.name, implementation.backend, "; ".join(reasons))
        return tuple(found)

    def why_not_default(self, implementation: Implementation, device: torch.device) -> list[str]:
        """Evidence before default: on a GPU, ours is a default only where a recorded run shows it right and as fast;
        on a CPU, where it runs on vectors (measured: without, PyTorch's own is nearly always ahead)."""
        if implementation.by == "ours" and device.type == "cpu" and _library.without_vectors():
            return ["the kernels run without AVX2 or AVX-512 here, where PyTorch's own are faster"]
        if implementation.by != "ours" or device.type != "cuda" or evidence(self.name, implementation.backend, device):
            return []
        return ["no recorded run under benchmarks/results shows it correct and at least as fast as PyTorch on this GPU"]

    def reasons(self, device: torch.device, dtype: torch.dtype) -> dict[str, list[str]]:
        """Per backend, why it cannot run on this device and dtype; an empty list where it can."""
        answer = {}
        for backend in BACKENDS:
            own = [i for i in self.implementations if i.backend == backend]
            answer[backend] = own[0].why_not_on(device, dtype) if own else [f"no {backend} kernel for {self.name} yet"]
        return answer

    def refusal(self, setting: Setting, reasons: dict[str, list[str]], inputs: str) -> BackendError:
        """The error of a setting that leads to no implementation; ``reasons``: per backend, why not."""
        wanted = setting.backend(self.name)
        why = reasons.get(wanted) or [f"{backend}: {'; '.join(own)}" for backend, own in reasons.items() if own]
        could = ", ".join(backend for backend, own in reasons.items() if not own) or "none"
        return BackendError(
            f"{self.name}: backend {wanted} cannot run {inputs}: {'; '.join(why)} (backends that could: {could})"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _traced_candidates(op: str, traced: str | None, device: str, dtype: torch.dtype, compute: torch.dtype) -> list[int]:
    one, setting = OPS[op], parse_setting(traced, AUTO) if traced else _environment_setting()
    found = one.resolve(setting, torch.device(device), dtype)
    if not found:
        place = torch.device(device)
        raise one.refusal(setting, one.reasons(place, dtype), f"{_name(dtype)} on {device}")
    if len(found) > 1:
        found = tuple(i for i in found if i.elsewhere is None or not i.elsewhere(compute))
    return [one.implementations.index(i) for i in found]


# What torch.compiler.assume_constant_result does, without its import of the whole compiler.
_traced_candidates._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _log_fallback(op: str, backend: str, reasons: str) -> None:
    """Say once that an automatic choice passed over a backend."""
    logger.info("%s: not %s (%s)", op, backend, reasons)


def forget_choices() -> None:
    """Choose afresh (the environment or the library has changed)."""
    for op in OPS.values():
        op._candidates.clear()
    for cache in (_environment_setting, _log_fallback, _evidence_records):
        cache.cache_clear()


# ---- Evidence --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _evidence_records() -> tuple[dict[str, Any], ...]:
    """Records of benchmarks/results (beside the package in a checkout, inside it in a wheel)."""
    package = Path(__file__).resolve().parents[1]
    records: list[dict[str, Any]] = []
    for folder in (package / "results", package.parent / "benchmarks" / "results"):
        for path in sorted(folder.rglob("*.json")):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                records += [{**r, "file": path.name} for r in content.get("ops", [])]  # none: of something else
            except (OSError, ValueError, AttributeError, TypeError):
                logger.warning("%s is not a results file; ignored", path)
    return tuple(records)


def evidence(op: str, backend: str, device: torch.device) -> str | None:
    """The results file whose runs on such a GPU make ``backend`` a default of ``op``: all correct, none slower.

    Forward and backward together count, where they were also timed apart.
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    runs = [r for r in _evidence_records() if (r.get("op"), r.get("backend"), r.get("device")) == (op, backend, gpu)]
    runs = [r for r in runs if r.get("mode", "both") == "both" or r.get("correct") is not True]
    if runs and all(r.get("correct") is True and r.get("speedup", 0) >= 1 for r in runs):
        return str(runs[0]["file"])
    return None
