"""AdamW (Loshchilov and Hutter 2019) in as few calls and passes over memory a step as its kernels allow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llmfast.config import TrainConfig
from llmfast.ops import _update
from llmfast.training.parallel import local


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
    """AdamW through csrc/cpu/adamw.cpp on a CPU, through PyTorch's fused kernel elsewhere.

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
        self._native = False

    def _prepare(self) -> None:
        """Make the state where it is missing, and the lists that the kernel takes (of shards, this rank's): one set a
        group, and the parameters whose they are."""
        self._counts, self._lists = {}, []
        for group in self.param_groups:
            lists: tuple[list[Tensor], ...] = ([], [], [], [], [])
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["step"] = self._counts.setdefault(p.device, state["step"])
                parts = map(local, (p, state["exp_avg"], state["exp_avg_sq"], state["step"]))
                for column, tensor in zip(lists, (*parts, p), strict=True):
                    column.append(tensor)
            self._lists.append(lists)
        tensors = [t for parameters, averages, squares, *_ in self._lists for t in (*parameters, *averages, *squares)]
        self._native = _update.takes(tensors)

    def state_changed(self) -> None:
        """Say that ``state`` was replaced, as loading a checkpoint does."""
        self._lists = None

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The 2-norm of all gradients that this rank holds, float32 ()."""
        if self._lists is None:
            self._prepare()
        grads = [grad for *_, owners in self._lists or () for grad in _grads(owners)]
        if self._native and grads:
            return torch.ops.llmfast.total_norm.default(grads)
        return torch.nn.utils.get_total_norm(grads)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: None = None, *, grad_scale: Tensor | float | None = None, found_inf: Tensor | None = None
    ) -> None:
        """One update from ``grad / grad_scale``; none at all where ``found_inf`` (float32, 0 or 1) is 1.

        As tensors, the two spare a host that must not wait for its GPU (CUDA only). ``.grad`` itself may be divided.
        """
        if self._lists is None:
            self._prepare()
        grad_scale = getattr(self, "grad_scale", grad_scale)  # what torch.amp.GradScaler sets
        found_inf = getattr(self, "found_inf", found_inf)
        for count in self._counts.values():
            count += 1 if found_inf is None else 1 - found_inf
        for group, lists in zip(self.param_groups, self._lists or (), strict=True):
            parameters, averages, squares, counts, owners = lists
            if not parameters:
                continue
            beta1, beta2 = group["betas"]
            lr, weight_decay, eps = group["lr"], group["weight_decay"], group["eps"]
            grads = _grads(owners)
            if self._native and found_inf is None and not isinstance(grad_scale, Tensor):
                torch.ops.llmfast.adamw_.default(
                    parameters, grads, averages, squares, counts[0].item(), lr, beta1, beta2, weight_decay, eps,
                    1.0 if grad_scale is None else grad_scale,
                )  # fmt: skip
                continue
            scale = grad_scale
            if isinstance(scale, float):
                if scale != 1.0:
                    torch._foreach_div_(grads, scale)
                scale = None
            torch._fused_adamw_(
                parameters,
                grads,
                averages,
                squares,
                [],
                counts,
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=weight_decay,
                eps=eps,
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
                found_inf=found_inf,
            )

    _step_supports_amp_scaling = True


def _grads(parameters: list[Tensor]) -> list[Tensor]:
    return [local(p.grad) for p in parameters if p.grad is not None]
