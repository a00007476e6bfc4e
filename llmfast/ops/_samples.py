"""Random inputs that tests, the fuzzer and the benchmarks share."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

# Sizes that break kernels: one, primes, one off a power of two.
AWKWARD = (1, 2, 3, 5, 7, 13, 16, 31, 33, 64, 65, 97, 127, 129)


class Randn:
    """Draws tensors for one input set: the same numbers for every dtype and device."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale + shift
        return values.to(self.dtype).to(self.device)

    def ids(self, high: int, *shape: int) -> Tensor:
        """int64 ids in [0, high)."""
        return torch.randint(high, shape, generator=self.generator).to(self.device)


def pick(rng: random.Random, sizes: tuple[int, ...] = AWKWARD, zero: float = 0.03) -> int:
    """One awkward size; 0 now and then."""
    return 0 if rng.random() < zero else rng.choice(sizes)


def tensor_bytes(*values: Any) -> int:
    """Bytes of the tensors among ``values``."""
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
