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


class Standard:
    """What the outputs and gradients of an op are on some inputs, and how far off an implementation may be.

    Allowed is ``ratio`` times the error of eager PyTorch in the same dtype, plus ``floor`` eps of the largest value
    among the inputs and this output. Where an output has few elements, eager's one error is a matter of luck: if it
    does not suffice, the largest of its errors on ``REDRAWS`` further draws (the same elements in another order)
    counts. ``cotangents``: the gradients by the outputs (default: random, always the same).
    """

    def __init__(
        self,
        op: Op,
        inputs: dict[str, Any],
        dtype: torch.dtype,
        arrange: Callable[[Tensor], Tensor] = lambda t: t,
        cotangents: list[Tensor] | None = None,
    ) -> None:
        self._op, self._inputs, self._dtype, self._arrange = op, inputs, dtype, arrange
        self._cotangents = cotangents
        self._redrawn = False
        self.exact, self._eager = self._errors_of_eager(inputs)
        floats = [v for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point()]
        self._size = max((float(v.abs().max()) for v in floats if v.numel()), default=0.0)

    def worst(self, got: dict[str, Tensor]) -> tuple[float, str]:
        """Largest error over allowed error, and where: "y0" for an output, "d x" for the gradient by x.

        ``got``: as ``outputs_and_gradients`` gives them; all outputs, and any of the gradients. At most 1 is right.
        """
        missing = [name for name in self.exact if name.startswith("y") and name not in got]
        if missing:
            return float("inf"), f"{missing[0]} is missing"
        found = self._worst(got)
        if 1 < found[0] < float("inf") and not self._redrawn:
            self._redrawn = True
            generator = torch.Generator().manual_seed(2)
            for _ in range(REDRAWS):
                for name, error in self._errors_of_eager(_shuffled(self._inputs, generator))[1].items():
                    self._eager[name] = max(self._eager[name], error)
            found = self._worst(got)
        return found

    def _worst(self, got: dict[str, Tensor]) -> tuple[float, str]:
        worst, where, limits = 0.0, "", torch.finfo(self._dtype)
        floor = self._op.tolerance.floor * (16 if self._dtype is torch.float64 else 1)  # the reference rounds as well
        for name, value in got.items():
            exact = self.exact[name]
            if value.shape != exact.shape:
                return float("inf"), f"{name} has shape {tuple(value.shape)}, not {tuple(exact.shape)}"
            if not value.numel():
                continue
            scale = max(self._size, float(exact.abs().max()))
            allowed = self._op.tolerance.ratio * self._eager[name] + floor * limits.eps * scale + limits.tiny
            ratio = float((value.double() - exact).abs().max()) / allowed
            if not ratio <= worst:  # a NaN is the worst of all
                worst, where = ratio if ratio == ratio else float("inf"), name
        return worst, where

    def _errors_of_eager(self, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The float64 outputs and gradients, and the largest error of eager PyTorch in each."""
        doubles = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
        exact = outputs_and_gradients(self._op.reference, doubles, self._cotangents)
        eager = outputs_and_gradients(self._op.eager, _arranged(inputs, self._arrange), self._cotangents)
        return exact, {k: float((eager[k].double() - v).abs().max()) if v.numel() else 0.0 for k, v in exact.items()}


def worst_ratio(
    op: Op,
    backend: str,
    shape: dict[str, Any],
    dtype: torch.dtype,
    device: Any = "cpu",
    arrange: Callable[[Tensor], Tensor] = lambda t: t,
) -> tuple[float, str]:
    """``Standard.worst`` of a backend on a shape; ``arrange`` puts each input into another memory layout."""
    inputs = op.inputs(shape, dtype, device)
    standard = Standard(op, inputs, dtype, arrange)
    with use_backend(f"{op.name}={backend}"):
        return standard.worst(outputs_and_gradients(op.function, _arranged(inputs, arrange)))


def _arranged(inputs: dict[str, Any], arrange: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {k: arrange(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _shuffled(inputs: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """The elements of every floating-point tensor in another order."""

    def shuffle(t: Tensor) -> Tensor:
        return t.detach().flatten()[torch.randperm(t.numel(), generator=generator).to(t.device)].view(t.shape)

    return {k: shuffle(v) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def outputs_and_gradients(
    function: Any, inputs: dict[str, Any], cotangents: list[Tensor] | None = None
) -> dict[str, Tensor]:
    """Outputs "y0", "y1", ... and, for the cotangents (default: random, always the same), gradients "d <input>"."""
    leaves = {k: v.detach() for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    outputs = function(**{**inputs, **leaves})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if cotangents is None:
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(y.shape, generator=generator) for y in outputs]
    given = [c.to(y.device, y.dtype) for c, y in zip(cotangents, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), given)
    named = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    return {**named, **{f"d {name}": g for name, g in zip(leaves, gradients, strict=True)}}
