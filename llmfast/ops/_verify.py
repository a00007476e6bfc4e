"""Sets one implementation of an op against its float64 reference; tests, the fuzzer and benchmarks share it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmfast.ops._registry import BackendError, Implementation, Op, use_backend


def why_not(
    op: Op, implementation: Implementation, shape: dict[str, Any], dtype: torch.dtype, device: Any
) -> list[str]:
    """Reasons why ``implementation`` does not run ``shape``; empty if it does."""
    inputs = op.inputs(shape, dtype, device)
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    reasons = implementation.why_not_on(tensors[0].device, dtype)
    if not reasons:
        with use_backend(f"{op.name}={implementation.backend}"):
            try:
                op.function(**inputs)
            except BackendError as error:
                reasons = [str(error)]
    return reasons


def worst_ratio(
    op: Op,
    backend: str,
    shape: dict[str, Any],
    dtype: torch.dtype,
    device: Any = "cpu",
    arrange: Callable[[Tensor], Tensor] = lambda t: t,
) -> tuple[float, str]:
    """Largest error over allowed error, and where: "y0" for an output, "d x" for the gradient by x; at most 1 is right.

    Allowed is ``ratio`` times the error of eager PyTorch in the same dtype, plus ``floor`` eps of the largest value
    among the inputs and this output. ``arrange`` puts each input into another memory layout.
    """
    inputs = op.inputs(shape, dtype, device)
    doubles = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    inputs = {k: arrange(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    exact = _outputs_and_gradients(op.reference, doubles)
    eager = _outputs_and_gradients(op.eager, inputs)
    with use_backend(f"{op.name}={backend}"):
        ours = _outputs_and_gradients(op.function, inputs)
    floats = [v for v in doubles.values() if isinstance(v, Tensor) and v.is_floating_point()]
    size = max((float(v.abs().max()) for v in floats if v.numel()), default=0.0)
    worst, where = 0.0, ""
    for name, value in ours.items():
        if value.shape != exact[name].shape:
            return float("inf"), f"{name} has shape {tuple(value.shape)}, not {tuple(exact[name].shape)}"
        if not value.numel():
            continue
        scale = max(size, float(exact[name].abs().max()))
        allowed = op.tolerance.ratio * float((eager[name].double() - exact[name]).abs().max())
        floor = op.tolerance.floor * (16 if dtype is torch.float64 else 1)  # the reference itself rounds to float64
        allowed += floor * torch.finfo(dtype).eps * scale + torch.finfo(dtype).tiny
        ratio = float((value.double() - exact[name]).abs().max()) / allowed
        if not ratio <= worst:  # a NaN is the worst of all
            worst, where = ratio if ratio == ratio else float("inf"), name
    return worst, where


def _outputs_and_gradients(function: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs "y0", "y1", ... and, for one fixed random cotangent, the gradients "d <input>"."""
    leaves = {k: v.detach() for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    outputs = function(**{**inputs, **leaves})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    named = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    return {**named, **{f"d {name}": g for name, g in zip(leaves, gradients, strict=True)}}
