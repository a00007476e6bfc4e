"""The decoder again, written plainly with torch's own functions: what ``llmfast.nn.GPT`` is compared with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "relu": lambda x: x.clamp(min=0),
}


def plain_logits(
    p: dict[str, torch.Tensor], idx: torch.Tensor, *, n_head: int, activation="gelu_tanh", scale=None, eps=1e-5
):
    """Logits (B, T, V) of ids (B, T), from parameters ``p`` under GPT-2's names, weights (out, in)."""

    def linear(x, name):
        y = x @ p[f"{name}.weight"].T
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    def norm(x, name):
        y = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + eps)
        y = y * p[f"{name}.weight"]
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    T = idx.shape[1]
    x = p["transformer.wte.weight"][idx] + p["transformer.wpe.weight"][:T]
    layer = 0
    while f"transformer.h.{layer}.ln_1.weight" in p:
        name = f"transformer.h.{layer}"
        heads = []
        size = x.shape[-1] // n_head
        q, k, v = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").split(x.shape[-1], dim=-1)
        for head in range(n_head):
            part = slice(head * size, (head + 1) * size)
            scores = q[..., part] @ k[..., part].transpose(1, 2) * (size**-0.5 if scale is None else scale)
            future = torch.ones(T, T, dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[..., part])
        attended = torch.cat(heads, -1)
        x = x + (linear(attended, f"{name}.attn.c_proj") if f"{name}.attn.c_proj.weight" in p else attended)
        hidden = ACTIVATIONS[activation](linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc"))
        x = x + linear(hidden, f"{name}.mlp.c_proj")
        layer += 1
    return linear(norm(x, "transformer.ln_f"), "lm_head")


def plain_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the targets that are not -100."""
    kept = targets != -100
    return -F.log_softmax(logits, -1)[kept].gather(1, targets[kept][:, None]).mean()
