"""Cheap activations that backward makes again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def remade(tensor: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[None]:
    """A context in which autograd saves no reference to ``tensor``: backward calls ``make``, which returns it again.

    Contexts nest. Where others decide what becomes of saved tensors (activation checkpointing, offloading,
    torch.compile) they keep their say, and nothing is done.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not tensor.is_contiguous():
        return nullcontext()
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if outer is not None and not isinstance(outer[0], _Pack):
        return nullcontext()
    return saved_tensors_hooks(_Pack(tensor, make, None if outer is None else outer[0]), _unpack)


class _Pack:
    """What is kept of a saved tensor: how to make it, or else the tensor itself."""

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor], outer: _Pack | None) -> None:
        self._is, self._make, self._outer = _identity(tensor), make, outer

    def __call__(self, saved: Tensor) -> Any:
        if saved.is_contiguous() and _identity(saved) == self._is:
            return self._make, saved.shape
        return saved if self._outer is None else self._outer(saved)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.numel(), tensor.dtype


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    make, shape = kept
    return make().view(shape)
