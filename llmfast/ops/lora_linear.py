"""A linear layer with a low-rank update (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021).

y = x W^T + bias + scaling * (dropout(x) A^T) B^T          A (r, in), B (out, r), named and laid out as PEFT does
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast.ops import _checks
from llmfast.ops._dropout import dropout
from llmfast.ops._registry import Cost, Implementation, Op
from llmfast.ops._samples import Randn, pick, tensor_bytes
from llmfast.ops.matmul import linear


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, *, scaling: float
) -> Tensor:
    y = x @ (weight + scaling * (lora_B @ lora_A)).T
    return y if bias is None else y + bias


def _eager(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, *, scaling: float) -> Tensor:
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, lora_A), lora_B)


def _torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    base = linear(rows, weight, bias)
    low = linear(dropout(rows, dropout_p), lora_A)
    # The update is added by the product itself: no tensor of the output's size comes and goes.
    y = torch.addmm(base, low.to(base.dtype), lora_B.to(base.dtype).t(), alpha=scaling)
    return y.view(*x.shape[:-1], weight.shape[0])


def _inputs(shape: dict[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, Any]:
    randn, K, N, r = Randn(dtype, device), shape["K"], shape["N"], shape["r"]
    return {
        "x": randn(*shape["rows"], K),
        "weight": randn(N, K, scale=K**-0.5),
        "bias": randn(N) if shape.get("bias", True) else None,
        "lora_A": randn(r, K, scale=K**-0.5),
        "lora_B": randn(N, r, scale=0.5),
        "scaling": shape.get("scaling", 2.0),
    }


def _random_shape(rng: random.Random) -> dict[str, Any]:
    rows = tuple(pick(rng) for _ in range(rng.randint(0, 2)))
    sizes = {"K": rng.choice((1, 7, 32, 97)), "N": rng.choice((1, 13, 128, 257)), "r": rng.choice((1, 3, 8, 16))}
    return {"rows": rows, **sizes, "bias": rng.random() < 0.6, "scaling": rng.choice((0.25, 1.0, 2.0))}


def _cost(x: Tensor, weight: Tensor, bias: Any, lora_A: Tensor, lora_B: Tensor, **_: Any) -> Cost:
    rows = x.shape[:-1].numel()
    flops = 2 * rows * (weight.numel() + lora_A.numel() + lora_B.numel())
    out = rows * weight.shape[0] * x.element_size()
    return Cost(bytes=tensor_bytes(x, weight, bias, lora_A, lora_B) + out, flops=flops)


_op = Op(
    name="lora_linear",
    reference=_reference,
    eager=_eager,
    samples=[
        {"rows": (2, 37), "K": 48, "N": 96, "r": 8},
        {"rows": (65,), "K": 257, "N": 131, "r": 3, "bias": False, "scaling": 0.5},
        {"rows": (), "K": 5, "N": 3, "r": 1},
        {"rows": (0, 3), "K": 5, "N": 7, "r": 2},
    ],
    gpu_samples=[{"rows": (16, 1024), "K": C, "N": 3 * C, "r": r} for C in (768, 1600) for r in (8, 64)],
    random_shape=_random_shape,
    inputs=_inputs,
    cost=_cost,
    implementations=[Implementation("torch", _torch, "PyTorch")],
)


@_op.public
def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """A linear layer plus its scaled low-rank update.

    x: (..., in); weight: (out, in); bias: (out,) or None; lora_A: (r, in); lora_B: (out, r); one dtype (under autocast:
    any). scaling: alpha / r. dropout_p in [0, 1): dropout on x in front of lora_A, from the default torch generator.
    Returns (..., out). Raises ``ValueError``/``TypeError`` for arguments that do not fit.
    """
    _checks.floating("lora_linear", "x", x)
    _checks.floating("lora_linear", "weight", weight, 2)
    _checks.floating("lora_linear", "lora_A", lora_A, 2)
    K, N, r = x.shape[-1], weight.shape[0], lora_A.shape[0]
    _checks.parameter("lora_linear", "weight", weight, (N, K), x)
    _checks.parameter("lora_linear", "lora_A", lora_A, (r, K), x)
    _checks.parameter("lora_linear", "lora_B", lora_B, (N, r), x)
    if bias is not None:
        _checks.parameter("lora_linear", "bias", bias, (N,), x)
    _checks.probability("lora_linear", "dropout_p", dropout_p)
    return _op(x, weight, bias, lora_A, lora_B, scaling, dropout_p)
