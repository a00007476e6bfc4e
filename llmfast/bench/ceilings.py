"""What the machine can do at best, measured in the same run as what is compared with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from llmfast.bench.timing import Clock, Task
from llmfast.ops import matmul


def _nothing(*_: Any) -> None:
    """Nothing to prepare, nothing to touch."""


@dataclass(frozen=True)
class Ceilings:
    """copy: bytes a second of a large copy, read plus written; matmul: FLOP/s of a large product, by dtype."""

    copy: float
    matmul: dict[str, float]

    def floor(self, bytes: int, flops: int, dtype: str) -> tuple[float, str]:
        """The least seconds for so many bytes and FLOPs, and which of the two it is: "copy" or "matmul"."""
        by_bytes, by_flops = bytes / self.copy, flops / self.matmul[dtype]
        return (by_bytes, "copy") if by_bytes >= by_flops else (by_flops, "matmul")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_ceilings(device: torch.device, dtypes: list[torch.dtype]) -> Ceilings:
    """A copy far beyond the caches, and square products of random numbers, each library's best."""
    gpu = device.type == "cuda"
    clock, samples = Clock(device), 10 if gpu else 9

    def seconds(run: Callable[[Any], Any]) -> float:
        task = Task(_nothing, run, _nothing)
        clock.sample(task, 2)
        return min(clock.sample(task, 1) for _ in range(samples))

    source = torch.empty((512 if gpu else 96) << 20, dtype=torch.uint8, device=device).random_()
    copy = 2 * source.numel() / seconds(partial(_copy, torch.empty_like(source), source))
    del source
    rates = {}
    for dtype in dtypes:
        n = (8192 if dtype.itemsize < 4 else 4096) if gpu else 1024
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        # On a CPU the products of llmfast.ops may go to another library than PyTorch's own.
        own = device.type == "cpu" and dtype in matmul.ROUTED
        products: list[Any] = [torch.matmul, matmul.linear] if own else [torch.matmul]
        with torch.no_grad():
            best = min(seconds(partial(_product, product, a, b)) for product in products)
        rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / best
    return Ceilings(copy, rates)


def measure_read(device: torch.device) -> float:
    """Bytes a second of reading alone: a sum over far more than the caches hold."""
    clock = Clock(device)
    source = torch.ones((512 if device.type == "cuda" else 64) << 20, dtype=torch.float32, device=device)
    task = Task(_nothing, partial(_sum, source), _nothing)
    return source.nbytes / min(clock.sample(task, 1) for _ in range(7))


def _sum(source: torch.Tensor, _: Any) -> torch.Tensor:
    return source.sum()


def _copy(target: torch.Tensor, source: torch.Tensor, _: Any) -> None:
    target.copy_(source)


def _product(product: Callable[..., torch.Tensor], a: torch.Tensor, b: torch.Tensor, _: Any) -> torch.Tensor:
    return product(a, b)
