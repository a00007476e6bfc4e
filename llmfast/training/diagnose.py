"""Where a value that is not finite comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def first_bad(model: nn.Module, batches: Iterable[Any], backward: Callable[[Any], None]) -> str | None:
    """Names the first module or parameter of ``model`` that is or gives a value that is not finite, if one does.

    ``backward`` runs forward and backward of one micro batch. First the weights are looked at, then every module's
    output in the order of execution, then the gradients from the loss downwards, where the first bad one is nearest
    to the cause. Weights are not changed; gradients are.
    """
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"the weights of {name} are not finite"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and not all(_finite(tensor) for tensor in _tensors(output)):
                found.append(f"the first output that is not finite is that of {name or 'the whole model'}")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        for batch in batches:
            model.zero_grad(set_to_none=True)
            backward(batch)
            if found:
                return found[0]
            for name, parameter in reversed(list(model.named_parameters())):
                if parameter.grad is not None and not _finite(parameter.grad):
                    return f"the first gradient that is not finite, seen from the loss, is that of {name}"
    finally:
        for handle in handles:
            handle.remove()
    return None


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
