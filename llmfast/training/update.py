"""The update of one step: check, clip, apply."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmfast.training.errors import NotFiniteError
from llmfast.training.optimizer import AdamW
from llmfast.training.parallel import Alone


class Update:
    """Applies gradients, unless the loss or a gradient is not finite.

    On a CUDA device the host must not wait for the GPU at every step: there, a flag on the device keeps the optimizer
    from changing anything from the first bad step on, and ``check``, called where the host waits anyway, reads it.
    Elsewhere ``apply`` raises at once. With float16 gradients that overflow are ordinary (``GradScaler`` skips the
    step and lowers its scale); a loss that is not finite is not.
    """

    def __init__(
        self, optimizer: AdamW, clip: float, device: torch.device, dtype: torch.dtype, parallel: Alone | None = None
    ) -> None:
        self.optimizer = optimizer
        self.parallel = parallel
        self.clip = clip
        self.scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._on_device = device.type == "cuda" and self.scaler is None
        self._stopped = torch.zeros((), device=device)
        self._done = torch.zeros((), device=device)  # updates since the last check
        self._asked = 0  # and how many there should be

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def apply(self, step: int, loss: Tensor, divisor: float) -> Tensor:
        """Update from the gradients divided by ``divisor``; returns their norm before clipping."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = self.optimizer.gradient_norm()
        if self.parallel is not None:
            norm = self.parallel.whole_norm(norm)
        if divisor != 1.0:
            norm = norm / divisor
        if self._on_device:
            self._stopped = torch.maximum(self._stopped, (~torch.isfinite(norm + loss)).float())
            self._done += 1 - self._stopped
            self._asked += 1
            factor = (norm / self.clip).clamp(min=1.0) * divisor if self.clip else norm.new_full((), divisor)
            self.optimizer.step(grad_scale=factor, found_inf=self._stopped)
        elif self.scaler is not None:
            if not math.isfinite(loss.item()):
                raise NotFiniteError(step, f"the loss is {loss.item()}")
            if self.scaler.get_scale() < 1.0:
                raise NotFiniteError(step, "the gradients overflow float16 at every scale")
            torch._foreach_div_([p.grad for p in self._parameters if p.grad is not None], self._factor(norm, divisor))
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            if not math.isfinite(loss.item()):
                raise NotFiniteError(step, f"the loss is {loss.item()}")
            if not math.isfinite(norm.item()):
                raise NotFiniteError(step, f"the gradient norm is {norm.item()}")
            self.optimizer.step(grad_scale=self._factor(norm, divisor))
        return norm

    def check(self, steps: int) -> None:
        """Raise where an update since the last check was held back; the run has asked for ``steps`` so far."""
        if self._on_device:
            if self._stopped.item():
                first_bad = steps - self._asked + int(self._done.item())
                raise NotFiniteError(first_bad, "the loss or the gradient norm is not finite")
            self._asked = 0
            self._done.zero_()

    def _factor(self, norm: Tensor, divisor: float) -> float:
        """What to divide the gradients by."""
        return divisor * max(1.0, norm.item() / self.clip) if self.clip else divisor
