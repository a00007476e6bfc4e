"""``linear`` and the matrix products under it: PyTorch's default on the CPU, or oneDNN where that measures faster.

PyTorch sends float32 products to MKL, which on AMD CPUs reaches about half of what oneDNN does. Which of the two runs
is decided once per process and dtype, by one short interleaved measurement of a forward product and both its gradients,
and only after a numeric self-test (on AMX machines oneDNN's fast mode really rounds to bfloat16; then it is refused).

Shapes: x (..., K), weight (N, K), y (..., N); M = rows of x.
- y = x W^T and dX = dY W take ``mkldnn::_linear_pointwise``, which reads a transposed view as it is.
- dW = dY^T X takes ``mm`` with oneDNN switched on for that one call, which reads the transposed dY as it is.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from llmfast.config import suggest
from llmfast.errors import UserError

ROUTED = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
ROUTES = ("default", "onednn")
# Below this many multiply-adds the calls cost as much as the product (measured: 32 x 128 x 512 is even).
MIN_MACS = 1 << 21
# oneDNN must win by this much, or the default stays.
MIN_GAIN = 1.1

_PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Route:
    """The decision for one dtype, and what it rests on (microseconds for forward, dX and dW of the probe)."""

    route: str
    reason: str
    default_us: float | None = None
    onednn_us: float | None = None


_routes: dict[torch.dtype, Route] = {}
_lock = threading.RLock()
_switch_lock = threading.Lock()
_switched = 0  # threads inside with_onednn
_found = "none"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, as ``torch.nn.functional.linear``, through the faster matrix product of this CPU.

    x: (..., K); weight: (N, K); bias: (N,) or None; all of one dtype. Returns (..., N).
    Off the CPU, under torch.compile, autocast or functorch, and for small products it is ``F.linear`` itself.
    Raises ``ValueError`` if the sizes do not fit.
    """
    if weight.dim() != 2 or x.size(-1) != weight.size(1):
        raise ValueError(f"linear: weight must be (N, K) for x (..., K) = {tuple(x.shape)}, got {tuple(weight.shape)}")
    if not uses_onednn(x, weight) or not (bias is None or (bias.dtype is x.dtype and bias.shape == weight.shape[:1])):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Linear.apply(x, weight, bias)
    return mm_nt(x, weight, True, bias)


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether products of x (..., K) and weight (N, K) take oneDNN: by type, shape and route alone."""
    return (
        x.is_cpu
        and x.numel() * weight.size(0) >= MIN_MACS
        and weight.is_cpu
        and not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and x.dtype is weight.dtype
        and x.dtype in ROUTED
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and _route(x.dtype).route == "onednn"
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return mm_nt(x, weight, True, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        fast = not torch.is_grad_enabled()  # with create_graph the gradients must be differentiable themselves
        dx = mm_nn(rows, weight, fast).view(x.shape) if ctx.needs_input_grad[0] else None
        dw = mm_tn(rows, x.reshape(-1, x.shape[-1]), fast) if ctx.needs_input_grad[1] else None
        return dx, dw, (rows.sum(0) if ctx.needs_input_grad[2] else None)


# ---- The three products ----------------------------------------------------------------------------------------------


def mm_nt(x: Tensor, weight: Tensor, onednn: bool, bias: Tensor | None = None) -> Tensor:
    """x (..., K) W^T + bias for weight (N, K)."""
    if onednn:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def mm_nn(dy: Tensor, weight: Tensor, onednn: bool) -> Tensor:
    """dY (M, N) W (N, K)."""
    if onednn:
        return torch.ops.mkldnn._linear_pointwise.default(dy, weight.t(), None, "none", [], "")
    return dy.mm(weight)


def mm_tn(dy: Tensor, x: Tensor, onednn: bool) -> Tensor:
    """dY^T X for dY (M, N) and X (M, K)."""
    return with_onednn(torch.mm, dy.t(), x) if onednn else dy.t().mm(x)


def add_mm_tn(total: Tensor, dy: Tensor, x: Tensor, onednn: bool) -> None:
    """total (N, K) += dY^T X."""
    if onednn:
        with_onednn(total.addmm_, dy.t(), x)
    else:
        total.addmm_(dy.t(), x)


def with_onednn(product: Callable[..., Tensor], *args: Tensor, **kwargs: Any) -> Tensor:
    """Run ``product`` while CPU float32 matrix products go to oneDNN; the switch costs half a microsecond.

    It is PyTorch's own and belongs to the whole process: another thread's product meanwhile takes oneDNN too, which
    has passed the self-test. The last thread to leave puts back what the first one found.
    """
    global _switched, _found
    with _switch_lock:
        if _switched == 0:
            _found = torch._C._get_fp32_precision_getter("mkldnn", "matmul")
            torch._C._set_fp32_precision_setter("mkldnn", "matmul", "bf16")
        _switched += 1
    try:
        return product(*args, **kwargs)
    finally:
        with _switch_lock:
            _switched -= 1
            if _switched == 0:
                torch._C._set_fp32_precision_setter("mkldnn", "matmul", _found)


# ---- The decision ----------------------------------------------------------------------------------------------------


def _route(dtype: torch.dtype) -> Route:
    found = _routes.get(dtype)
    if found is None:
        with _lock:
            found = _routes.get(dtype) or _decide(dtype)
            _routes[dtype] = found
    return found


def route_of(dtype: torch.dtype) -> str:
    """ "onednn" or "default"; always the default for a dtype that is not routed."""
    return _route(dtype).route if dtype in ROUTED else "default"


def _decide(dtype: torch.dtype) -> Route:
    wanted = os.environ.get("LLMFAST_MATMUL", "auto").strip().lower() or "auto"
    if wanted not in ("auto", *ROUTES):
        known = ("auto", *ROUTES)
        raise UserError(f"LLMFAST_MATMUL: unknown route {wanted!r}{suggest(wanted, known)}; routes: {', '.join(known)}")
    if wanted == "default":
        return Route("default", "LLMFAST_MATMUL=default")
    refusal = _why_not_onednn(dtype)
    if refusal is not None:
        if wanted == "onednn" and dtype is torch.float32:  # bfloat16 is not on every CPU
            raise UserError(f"LLMFAST_MATMUL=onednn cannot serve {ROUTED[dtype]}: {refusal}")
        return Route("default", refusal)
    if wanted == "onednn":
        return Route("onednn", "LLMFAST_MATMUL=onednn")
    with _alone():
        default_us, onednn_us = _measure(dtype)
    faster = default_us >= MIN_GAIN * onednn_us
    reason = f"oneDNN measured {default_us / onednn_us:.2f}x as fast as the default"
    return Route("onednn" if faster else "default", reason, round(default_us, 1), round(onednn_us, 1))


def _why_not_onednn(dtype: torch.dtype) -> str | None:
    """Reason against oneDNN, from what this PyTorch has and from products of random numbers against float64."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "this PyTorch has no oneDNN, or it is switched off"
    if not hasattr(torch._C, "_set_fp32_precision_setter") or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch has no per-call way to oneDNN"
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 on this CPU"
    with _alone():
        operands = _probe(dtype, 256)
        exact = _products(tuple(t.double() for t in operands), False)
        errors = []
        for onednn in (False, True):
            try:
                ours = _products(operands, onednn)
            except RuntimeError as error:
                return f"oneDNN does not run here: {str(error).splitlines()[0]}"
            errors.append(max(float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)))
    if not errors[1] <= 4 * errors[0] + torch.finfo(dtype).eps:
        return f"oneDNN rounds {ROUTED[dtype]} products (error {errors[1]:.1e}, default {errors[0]:.1e})"
    return None


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """No autograd, no autocast, one thread: threads that wait for a preempted one have made the times a coin toss."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)


def _probe(dtype: torch.dtype, size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)  # its own, so that the caller's random numbers do not move
    x, w, dy = (torch.randn(size, size, generator=generator).to(dtype) for _ in range(3))
    return x, w, dy


def _products(operands: tuple[Tensor, ...], onednn: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, w, dy = operands
    return mm_nt(x, w, onednn), mm_nn(dy, w, onednn), mm_tn(dy, x, onednn)


def _measure(dtype: torch.dtype, size: int = 320, rounds: int = 12) -> tuple[float, float]:
    """Microseconds for the three products of the probe by the default and by oneDNN.

    Interleaved, and of each product the fastest round counts: on a busy machine the others tell of its neighbours.
    """
    x, w, dy = _probe(dtype, size)
    operands: dict[Callable[..., Tensor], tuple[Tensor, Tensor]] = {mm_nt: (x, w), mm_nn: (dy, w), mm_tn: (dy, x)}
    fastest = {(onednn, product): float("inf") for onednn in (False, True) for product in operands}
    for _ in range(rounds):
        for onednn, product in fastest:
            start = time.perf_counter()
            product(*operands[product], onednn)
            fastest[onednn, product] = min(fastest[onednn, product], time.perf_counter() - start)
    default, routed = (1e6 * sum(t for (route, _), t in fastest.items() if route == wanted) for wanted in (False, True))
    return default, routed


def matmul_routing() -> dict[str, str]:
    """The route of each dtype on this CPU, e.g. {"float32": "onednn", "bfloat16": "default"}; measures what is open."""
    return {name: _route(dtype).route for dtype, name in ROUTED.items()}


def set_matmul_routing(routing: dict[str, str]) -> None:
    """Repeat a recorded routing. ``ValueError`` for an unknown dtype or route, or one that this CPU cannot take."""
    chosen = {}
    names = {name: dtype for dtype, name in ROUTED.items()}
    for name, route in routing.items():
        if name not in names or route not in ROUTES:
            raise ValueError(
                f"routing: {name!r}: {route!r} is not one of {', '.join(names)} with {' or '.join(ROUTES)}"
            )
        refusal = _why_not_onednn(names[name]) if route == "onednn" else None
        if refusal is not None:
            raise ValueError(f"routing: {name} cannot go to oneDNN here: {refusal}")
        chosen[names[name]] = Route(route, "set by the caller")
    with _lock:
        _routes.update(chosen)


def routing_report() -> dict[str, dict[str, Any]]:
    """Per dtype the route, its reason, and both measured times in microseconds where they were measured."""
    return {name: asdict(_route(dtype)) for dtype, name in ROUTED.items()}


def forget_routing() -> None:
    """Decide afresh at the next product (the environment or the number of threads has changed)."""
    with _lock:
        _routes.clear()
