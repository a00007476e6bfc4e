"""``linear`` and the matrix products under it: PyTorch's default on the CPU, oneDNN, or our own.

PyTorch sends float32 products to MKL, which on AMD CPUs reaches about half of what oneDNN does; csrc/cpu/gemm.cpp is as
fast as oneDNN and needs no copies of weights or outputs around it. Which of the three runs is decided once per process
and dtype, by one short interleaved measurement of a forward product and both its gradients, and only after a numeric
self-test (on AMX machines oneDNN's fast mode really rounds to bfloat16; then it is refused). Where our own is chosen,
the kernels built on it (mlp, loss, decoder layers) are too; what they decline falls back to the faster library.

Shapes: x (..., K), weight (N, K), y (..., N); M = rows of x.
- y = x W^T and dX = dY W take ``mkldnn::_linear_pointwise``, which reads a transposed view as it is.
- dW = dY^T X takes ``mm`` with oneDNN switched on for that one call, which reads the transposed dY as it is.
- Ours are all three ``llmfast::mm``, which reads transposed views, rounds float32 to bfloat16 where that is asked for,
  and writes either.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from llmfast.config import suggest
from llmfast.errors import UserError
from llmfast.ops import _checks, _library
from llmfast.ops._registry import current_setting

ROUTED = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
ROUTES = ("default", "onednn", "ours")
# Below this many multiply-adds the calls cost as much as the product (measured: 32 x 128 x 512 is even with oneDNN).
MIN_MACS = 1 << 21
MIN_OWN_MACS = 1 << 17
# oneDNN must win by this much, or the default stays; ours may lose by as much, since it needs no copies around it.
MIN_GAIN = 1.1

_PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Route:
    """The decision for one dtype, and what it rests on (microseconds for forward, dX and dW of the probe).

    library: "default" or "onednn", the faster one of PyTorch's own; it is the route too, unless that is "ours".
    """

    route: str
    reason: str
    library: str
    default_us: float | None = None
    onednn_us: float | None = None
    ours_us: float | None = None


@_library.on_load
def _register() -> None:
    @torch.library.register_fake("llmfast::mm")
    def _(a: Tensor, b: Tensor, bias: Tensor | None, bf16: bool, bf16_out: bool) -> Tensor:
        return a.new_empty(a.shape[0], b.shape[1], dtype=torch.bfloat16 if bf16_out else torch.float32)

    @torch.library.register_fake("llmfast::mm_int8")
    def _(a: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        return a.new_empty(a.shape[0], weight.shape[0])

    @torch.library.register_fake("llmfast::add_mm_")
    def _(c: Tensor, a: Tensor, b: Tensor, bf16: bool) -> None:
        return None

    @torch.library.register_fake("llmfast::column_sums")
    def _(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[1], dtype=torch.float32)


_routes: dict[torch.dtype, Route] = {}
_lock = threading.RLock()
_switch_lock = threading.Lock()
_switched = 0  # threads inside with_onednn
_found = "none"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, as ``torch.nn.functional.linear``, through the faster matrix product of this CPU.

    x: (..., K); weight: (N, K); bias: (N,) or None; all of one dtype. Returns (..., N).
    Off the CPU, under torch.compile or functorch, and for small products it is ``F.linear`` itself. Under autocast to
    bfloat16 our own product takes float32 weights as they are, and their gradients stay float32.
    Raises ``ValueError`` if the sizes do not fit.
    """
    if weight.dim() != 2 or x.size(-1) != weight.size(1):
        raise ValueError(f"linear: weight must be (N, K) for x (..., K) = {tuple(x.shape)}, got {tuple(weight.shape)}")
    if uses_ours(x, weight) and (bias is None or (bias.dtype in ROUTED and bias.shape == weight.shape[:1])):
        bf16 = (_checks.autocast_dtype(x) or x.dtype) is torch.bfloat16
        if torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return _OwnLinear.apply(x, weight, bias, bf16)
        return _own(x, weight.t(), bias, bf16)
    if not uses_onednn(x, weight) or not (bias is None or (bias.dtype is x.dtype and bias.shape == weight.shape[:1])):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Linear.apply(x, weight, bias)
    return mm_nt(x, weight, True, bias)


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's products of x (..., K) and weight (N, K) take oneDNN: by type, shape and route alone."""
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
        and _route(x.dtype).library == "onednn"
    )


def uses_ours(x: Tensor, weight: Tensor) -> bool:
    """Whether products of x (..., K) and weight (N, K) take our own: by type, shape, backend, autocast and route."""
    known = weight.dtype in ROUTED and (x.dtype is weight.dtype or torch.is_autocast_enabled("cpu"))
    return known and _takes_ours(x, weight)


def linear_int8(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias, W = weight * scales[:, None], for x (..., K), weight (N, K) int8, scales (N,); returns (..., N).

    Our own product reads W as it is; elsewhere, and for a gradient, it is made float first.
    Raises ``ValueError`` if the sizes do not fit.
    """
    if x.size(-1) != weight.size(1):
        raise ValueError(f"linear: weight must be (N, K) for x (..., K) = {tuple(x.shape)}, got {tuple(weight.shape)}")
    by_x_or_bias = x.requires_grad or (bias is not None and bias.requires_grad)
    plain = x.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")
    if (torch.is_grad_enabled() and by_x_or_bias) or not plain or not _takes_ours(x, weight):
        return linear(x, floats(weight, scales), bias)
    with torch._C._AutoDispatchBelowAutograd():
        y = torch.ops.llmfast.mm_int8.default(x.reshape(-1, x.shape[-1]), weight, scales, bias)
    return y.view(*x.shape[:-1], len(weight))


def floats(weight: Tensor, scales: Tensor) -> Tensor:
    """weight (N, K) int8 times scales (N,), float32."""
    return weight.float().mul_(scales[:, None])


def _takes_ours(x: Tensor, weight: Tensor) -> bool:
    return (
        x.is_cpu
        and x.numel() * weight.size(0) >= MIN_OWN_MACS
        and weight.is_cpu
        and not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and x.dtype in ROUTED
        and current_setting().default in ("auto", "cpp")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and route_of(_checks.autocast_dtype(x) or x.dtype) == "ours"
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


class _OwnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, bf16: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.bf16 = bf16
        return _own(x, weight.t(), bias, bf16)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph the gradients must be differentiable themselves
            rows = dy.reshape(-1, dy.shape[-1])
            dx = (rows @ weight.to(rows.dtype)).view(x.shape).to(x.dtype)
            dw = (rows.t() @ x.reshape(-1, x.shape[-1]).to(rows.dtype)).to(weight.dtype)
            return dx, dw, None if bias is None else rows.sum(0).to(bias.dtype), None
        needs = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dw = db = None
        if needs[0]:
            dx = torch.ops.llmfast.mm.default(rows, weight, None, ctx.bf16, x.dtype is torch.bfloat16).view(x.shape)
        if needs[1]:
            flat = x.reshape(-1, x.shape[-1])
            to_bf16 = weight.dtype is torch.bfloat16
            if _library.lies_transposed(weight):  # and so should its gradient, or its owner has to copy it
                dw = torch.ops.llmfast.mm.default(flat.t(), rows, None, ctx.bf16, to_bf16).t()
            else:
                dw = torch.ops.llmfast.mm.default(rows.t(), flat, None, ctx.bf16, to_bf16)
        if needs[2] and bias is not None:
            db = torch.ops.llmfast.column_sums.default(rows).to(bias.dtype)
        return dx, dw, db, None


def _own(x: Tensor, matrix: Tensor, bias: Tensor | None, bf16: bool) -> Tensor:
    """x (..., K) matrix (K, N) + bias; bfloat16 where the product is."""
    with torch._C._AutoDispatchBelowAutograd():
        y = torch.ops.llmfast.mm.default(x.reshape(-1, x.shape[-1]), matrix, bias, bf16, bf16)
    return y.view(*x.shape[:-1], matrix.shape[1])


# ---- PyTorch's three products ----------------------------------------------------------------------------------------


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


def products_go_elsewhere(dtype: torch.dtype) -> bool:
    """Whether products in ``dtype`` are not our own: what is made of them then follows the faster library."""
    return route_of(dtype) != "ours"


def _decide(dtype: torch.dtype) -> Route:
    wanted = os.environ.get("LLMFAST_MATMUL", "auto").strip().lower() or "auto"
    if wanted not in ("auto", *ROUTES):
        known = ("auto", *ROUTES)
        raise UserError(f"LLMFAST_MATMUL: unknown route {wanted!r}{suggest(wanted, known)}; routes: {', '.join(known)}")
    if wanted == "default":
        return Route("default", "LLMFAST_MATMUL=default", "default")
    refusals = {route: _why_not(route, dtype) for route in ROUTES}
    if refusals.get(wanted) is not None and dtype is torch.float32:  # bfloat16 is not on every CPU
        raise UserError(f"LLMFAST_MATMUL={wanted} cannot serve {ROUTED[dtype]}: {refusals[wanted]}")
    able = [route for route in ROUTES if refusals[route] is None]
    if wanted == "onednn" and wanted in able:
        return Route("onednn", "LLMFAST_MATMUL=onednn", "onednn")
    if able == ["default"]:
        return Route("default", "; ".join(str(refusals[route]) for route in ROUTES[1:]), "default")
    with _alone():
        us = _measure(dtype, able)
    library = "onednn" if MIN_GAIN * us.get("onednn", float("inf")) <= us["default"] else "default"
    ours = wanted == "ours" or us.get("ours", float("inf")) <= MIN_GAIN * us[library]
    route = "ours" if ours and "ours" in able else library
    if wanted == route:
        reason = f"LLMFAST_MATMUL={wanted}"
    else:
        names = {"onednn": "oneDNN", "ours": "our own"}
        speeds = [f"{names[r]} measured {us['default'] / us[r]:.2f}x as fast as the default" for r in able[1:]]
        reason = "; ".join(speeds + [why for why in refusals.values() if why])
    return Route(route, reason, library, *(round(us[r], 1) if r in us else None for r in ROUTES))


def _why_not(route: str, dtype: torch.dtype) -> str | None:
    """Reason against a route for ``dtype``: what is missing here, or what the self-test found."""
    if route == "default":
        return None
    if route == "onednn":
        return _why_not_onednn(dtype)
    reason = _library.why_not_loaded()
    return reason if reason is not None else _self_test(dtype, "ours")


def _why_not_onednn(dtype: torch.dtype) -> str | None:
    """Reason against oneDNN, from what this PyTorch has and from products of random numbers against float64."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "this PyTorch has no oneDNN, or it is switched off"
    if not hasattr(torch._C, "_set_fp32_precision_setter") or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch has no per-call way to oneDNN"
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 on this CPU"
    return _self_test(dtype, "onednn")


def _self_test(dtype: torch.dtype, route: str) -> str | None:
    """Why products of random numbers by ``route`` are not good enough, against float64."""
    with _alone():
        operands = _probe(dtype, 256)
        exact = _products(tuple(t.double() for t in operands), "default")
        errors = []
        for one in ("default", route):
            try:
                found = _products(operands, one)
            except RuntimeError as error:
                return f"{route} does not run here: {str(error).splitlines()[0]}"
            errors.append(max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)))
    if not errors[1] <= 4 * errors[0] + torch.finfo(dtype).eps:
        return f"{route} rounds {ROUTED[dtype]} products (error {errors[1]:.1e}, default {errors[0]:.1e})"
    return None


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """No autograd, no autocast, one thread: threads that wait for a preempted one have made the times a coin toss."""
    with _one_thread(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch's operations take one thread, without a trace: OpenMP's and MKL's own settings, of the calling thread.

    After ``torch.set_num_threads`` MKL starts teams of its own inside of PyTorch's parallel loops (20 -> 2,132 futex
    calls for one attention of 48 heads), in every thread and for good.
    """
    folder = Path(torch.__file__).parent / "lib"
    libraries = [ctypes.CDLL(str(path)) for path in folder.glob("libtorch_cpu.*") if path.suffix in (".so", ".dylib")]
    openmp, mkl = (
        next((getattr(library, name) for library in libraries if hasattr(library, name)), None)
        for name in ("omp_set_num_threads", "MKL_Set_Num_Threads_Local")
    )
    threads, set_threads = torch.get_num_threads(), openmp or torch.set_num_threads
    set_threads(1)
    of_mkl = mkl(1) if openmp and mkl else None  # what it was; 0: as many as OpenMP's
    try:
        yield
    finally:
        set_threads(threads)
        if mkl and of_mkl is not None:  # else PyTorch's own switch has set it, too
            mkl(of_mkl)


def _probe(dtype: torch.dtype, size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)  # its own, so that the caller's random numbers do not move
    x, w, dy = (torch.randn(size, size, generator=generator).to(dtype) for _ in range(3))
    return x, w, dy


def _products(operands: tuple[Tensor, ...], route: str) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(product(route) for product in _three(operands))  # type: ignore[return-value]


def _three(operands: tuple[Tensor, ...]) -> list[Callable[[str], Tensor]]:
    """Forward, dX and dW, each to be run by a route."""
    x, w, dy = operands
    bf16 = x.dtype is torch.bfloat16

    def run(pytorch: Callable[..., Tensor], a: Tensor, b: Tensor, left: Tensor, right: Tensor, route: str) -> Tensor:
        if route == "ours":
            return torch.ops.llmfast.mm.default(left, right, None, bf16, bf16)
        return pytorch(a, b, route == "onednn")

    return [
        functools.partial(run, mm_nt, x, w, x, w.t()),
        functools.partial(run, mm_nn, dy, w, dy, w),
        functools.partial(run, mm_tn, dy, x, dy.t(), x),
    ]


def _measure(dtype: torch.dtype, routes: list[str], size: int = 320, rounds: int = 12) -> dict[str, float]:
    """Microseconds for the three products of the probe by each of ``routes``.

    Interleaved, and of each product the fastest round counts: on a busy machine the others tell of its neighbours.
    """
    products = _three(_probe(dtype, size))
    fastest = {(route, index): float("inf") for route in routes for index in range(len(products))}
    for _ in range(rounds):
        for route, index in fastest:
            start = time.perf_counter()
            products[index](route)
            fastest[route, index] = min(fastest[route, index], time.perf_counter() - start)
    return {route: 1e6 * sum(fastest[route, index] for index in range(len(products))) for route in routes}


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
        dtype = names[name]
        refusal = _why_not(route, dtype)
        if refusal is not None:
            raise ValueError(f"routing: {name} cannot take {route} here: {refusal}")
        library = _library_beside_ours(dtype) if route == "ours" else route
        chosen[dtype] = Route(route, "set by the caller", library)
    with _lock:
        _routes.update(chosen)


def _library_beside_ours(dtype: torch.dtype) -> str:
    known = _routes.get(dtype)
    return (known or _decide(dtype)).library


def routing_report() -> dict[str, dict[str, Any]]:
    """Per dtype the route, its reason, and both measured times in microseconds where they were measured."""
    return {name: asdict(_route(dtype)) for dtype, name in ROUTED.items()}


def forget_routing() -> None:
    """Decide afresh at the next product (the environment or the number of threads has changed)."""
    with _lock:
        _routes.clear()
