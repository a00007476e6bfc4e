"""GELU and LayerNorm by hand, set against the fused functions that a GPT here trains with.

Follows chapter 4 of Sebastian Raschka, "Build a Large Language Model (From Scratch)".
Run `python gelu_and_layer_norm.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmfast import ops


def gelu(x: Tensor) -> Tensor:
    """x times the share of a standard normal distribution below x: x Phi(x) (Hendrycks and Gimpel 2016)."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    """The same within 5e-4, without erf: what GPT-2 was trained with."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Each row of x (..., C) with mean 0 and variance 1, then scaled and shifted (Ba, Kiros and Hinton 2016)."""
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)  # divided by C, not C - 1
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


def mlp(x: Tensor, fc: Tensor, proj: Tensor, activation=gelu_tanh) -> Tensor:
    """The feed-forward half of a GPT layer: widen fourfold, bend, narrow again. fc (4 C, C), proj (C, 4 C)."""
    return activation(x @ fc.T) @ proj.T


def main() -> None:
    torch.manual_seed(0)
    x = torch.linspace(-4, 4, 9)
    print("    x   gelu   tanh   relu")
    for row in zip(x, gelu(x), gelu_tanh(x), x.relu(), strict=True):
        print(" ".join(f"{value:6.3f}" for value in row))
    fine = torch.linspace(-6, 6, 10_001)
    print(f"The two forms differ by at most {(gelu(fine) - gelu_tanh(fine)).abs().max():.1e}.")
    lowest = gelu(fine).argmin()
    print(f"Unlike ReLU, GELU is smooth and dips to {gelu(fine)[lowest]:.3f} at x = {fine[lowest]:.2f}.\n")

    batch = torch.randn(2, 5) * 3 + 7
    weight, bias = torch.ones(5), torch.zeros(5)
    normal = layer_norm(batch, weight, bias)
    print("rows before:", [f"mean {row.mean():.2f} var {row.var(unbiased=False):.2f}" for row in batch])
    print("rows after: ", [f"mean {abs(row.mean()):.2f} var {row.var(unbiased=False):.2f}" for row in normal])
    fused = ops.layer_norm(batch, weight, bias)
    print(f"llmfast.ops.layer_norm differs by {(normal - fused).abs().max():.1e},")
    fc, proj = torch.randn(20, 5), torch.randn(5, 20)
    fused = ops.mlp(normal, fc, None, proj, None, activation="gelu_tanh")
    print(f"llmfast.ops.mlp by {(mlp(normal, fc, proj) - fused).abs().max():.1e}.")


if __name__ == "__main__":
    main()
