"""The optimizer's raw ops of csrc/cpu/adamw.cpp: ``llmfast::adamw_`` and ``llmfast::total_norm``."""

from __future__ import annotations

import torch
from torch import Tensor

from llmfast.ops import _library
from llmfast.ops._registry import current_setting


def takes(tensors: list[Tensor]) -> bool:
    """Whether the ops take these parameters and averages, and no other backend is asked for."""
    return (
        all(t.is_cpu and t.dtype is torch.float32 and t.is_contiguous() for t in tensors)
        and current_setting().default in ("auto", "cpp")
        and _library.why_not_loaded() is None
    )


@_library.on_load
def _register() -> None:
    @torch.library.register_fake("llmfast::adamw_")
    def _adamw(
        parameters: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], step: float,
        lr: float, beta1: float, beta2: float, weight_decay: float, eps: float, divisor: float,
    ) -> None:  # fmt: skip
        return None

    @torch.library.register_fake("llmfast::total_norm")
    def _total_norm(tensors: list[Tensor]) -> Tensor:
        return tensors[0].new_empty(())
