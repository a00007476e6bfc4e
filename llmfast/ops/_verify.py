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


# Further draws of a shape that tell how large eager PyTorch's error is there.
REDRAWS = 8


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
    among the inputs and this output. Where an output has few elements, eager's one error is a matter of luck: if it
    does not suffice, the largest of its errors on ``REDRAWS`` further draws (the same elements in another order)
    counts. ``arrange`` puts each input into another memory layout.
    """
    inputs = op.inputs(shape, dtype, device)
    exact, eager = _errors_of_eager(op, inputs, arrange)
    with use_backend(f"{op.name}={backend}"):
        ours = _outputs_and_gradients(op.function, _arranged(inputs, arrange))
    floats = [v for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point()]
    size = max((float(v.abs().max()) for v in floats if v.numel()), default=0.0)
    floor = op.tolerance.floor * (16 if dtype is torch.float64 else 1)  # the reference itself rounds to float64

    def ratios() -> tuple[float, str]:
        worst, where = 0.0, ""
        for name, value in ours.items():
            if value.shape != exact[name].shape:
                return float("inf"), f"{name} has shape {tuple(value.shape)}, not {tuple(exact[name].shape)}"
            if not value.numel():
                continue
            scale = max(size, float(exact[name].abs().max()))
            allowed = (
                op.tolerance.ratio * eager[name] + floor * torch.finfo(dtype).eps * scale + torch.finfo(dtype).tiny
            )
            ratio = float((value.double() - exact[name]).abs().max()) / allowed
            if not ratio <= worst:  # a NaN is the worst of all
                worst, where = ratio if ratio == ratio else float("inf"), name
        return worst, where

    found = ratios()
    generator = torch.Generator().manual_seed(2)
    for _ in range(REDRAWS if 1 < found[0] < float("inf") else 0):
        for name, error in _errors_of_eager(op, _shuffled(inputs, generator), arrange)[1].items():
            eager[name] = max(eager[name], error)
    return ratios()


def _errors_of_eager(
    op: Op, inputs: dict[str, Any], arrange: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The float64 outputs and gradients, and the largest error of eager PyTorch in each."""
    doubles = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    exact = _outputs_and_gradients(op.reference, doubles)
    eager = _outputs_and_gradients(op.eager, _arranged(inputs, arrange))
    return exact, {k: float((eager[k].double() - v).abs().max()) if v.numel() else 0.0 for k, v in exact.items()}


def _arranged(inputs: dict[str, Any], arrange: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {k: arrange(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _shuffled(inputs: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """The elements of every floating-point tensor in another order."""

    def shuffle(t: Tensor) -> Tensor:
        return t.detach().flatten()[torch.randperm(t.numel(), generator=generator).to(t.device)].view(t.shape)

    return {k: shuffle(v) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


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
