"""AdamW (Loshchilov and Hutter 2019) with as few calls a step as PyTorch's fused kernel allows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llmfast.config import TrainConfig


def decay_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Parameters that decay and those that do not.

    ``config.decay == "matrices"``: what has two or more dimensions decays, embeddings included, as in nanoGPT; biases
    and norms do not. ``"all"``: everything decays, as with PyTorch's AdamW over all parameters.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() >= 2 or config.decay == "all"]
    others = [p for p in trained if p.dim() < 2 and config.decay != "all"]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    return AdamW(decay_groups(model, config), config.learning_rate, (config.beta1, config.beta2), config.adam_eps)


class AdamW(torch.optim.Optimizer):
    """AdamW through PyTorch's fused kernel.

    ``torch.optim.AdamW(fused=True)`` sorts its tensors into lists and counts a step for each of them at every call,
    which for a model of 50 small tensors takes longer than the kernel. Here the lists are made once, and the tensors
    of a device share one count. A parameter that has no gradient at the first step is left alone;
    the others must have one at every step.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))
        self._lists: list[tuple[list[Tensor], ...]] | None = None
        self._counts: dict[torch.device, Tensor] = {}

    def _prepare(self) -> None:
        """Make the state where it is missing, and the lists that the kernel takes: one set a group."""
        self._counts, self._lists = {}, []
        for group in self.param_groups:
            lists: tuple[list[Tensor], ...] = ([], [], [], [])
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["step"] = self._counts.setdefault(p.device, state["step"])
                for column, tensor in zip(
                    lists, (p, state["exp_avg"], state["exp_avg_sq"], state["step"]), strict=True
                ):
                    column.append(tensor)
            self._lists.append(lists)

    def state_changed(self) -> None:
        """Say that ``state`` was replaced, as loading a checkpoint does."""
        self._lists = None

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: None = None, *, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        """One update from ``grad / grad_scale``; none at all where ``found_inf`` (float32, 0 or 1) is 1.

        The two tensors spare a host that must not wait for its GPU (CUDA only).
        """
        if self._lists is None:
            self._prepare()
        grad_scale = getattr(self, "grad_scale", grad_scale)  # what torch.amp.GradScaler sets
        found_inf = getattr(self, "found_inf", found_inf)
        for count in self._counts.values():
            count += 1 if found_inf is None else 1 - found_inf
        for group, (parameters, averages, squares, counts) in zip(self.param_groups, self._lists or (), strict=True):
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                parameters,
                [p.grad for p in parameters if p.grad is not None],
                averages,
                squares,
                [],
                counts,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=grad_scale,
                found_inf=found_inf,
            )

    _step_supports_amp_scaling = True
