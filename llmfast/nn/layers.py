"""The parts of a decoder layer: thin modules that hold the parameters and call ``llmfast.ops``.

Shapes: B batch, T sequence, C width (n_embd), H heads, D head size.

Nothing here fills its parameters: ``GPT.init_weights`` does, in one place, so that a model is drawn only once and
costs nothing on the meta device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmfast import ops
from llmfast.config import GPTConfig
from llmfast.nn.kv_cache import LayerCache


class Linear(nn.Linear):
    """``torch.nn.Linear`` through ``ops.linear``; weight (out, in)."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """``torch.nn.Embedding`` without a fill of its own."""

    def reset_parameters(self) -> None:
        pass


class LayerNorm(nn.Module):
    """Layer norm over the last dimension, alone or together with the residual sum before it."""

    def __init__(self, width: int, *, bias: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, branch: Tensor, residual: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
        """(norm(s), s) of the new residual stream s = residual + dropout(branch)."""
        return ops.add_layer_norm(branch, residual, self.weight, self.bias, self.eps, dropout_p)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention (Vaswani et al. 2017); (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.head_size = config.n_head, config.head_size
        self.scale, self.dropout = config.softmax_scale, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.has_qkv_bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias) if config.attn_out_proj else None

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        B, T, C = x.shape
        # Split along dim 2, so that the gradient of the split is written once, in the layout that c_attn wants.
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, self.head_size)
        if cache is None:
            q, k, v = qkv.unbind(2)
            p = self.dropout if self.training else 0.0
            y = ops.causal_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=self.scale, dropout_p=p
            )
        else:
            k, v = cache.append(qkv)
            y = ops.causal_attention(qkv[:, :, 0].transpose(1, 2), k, v, scale=self.scale, kv_lens=cache.kv_lens)
        y = y.transpose(1, 2).reshape(B, T, C)
        return y if self.c_proj is None else self.c_proj(y)


class MLP(nn.Module):
    """C -> 4 C -> C with the configured activation; (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        fc, proj = self.c_fc, self.c_proj
        return ops.mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, activation=self.activation)


class Block(nn.Module):
    """One pre-norm decoder layer.

    The residual stream travels as a pair whose sum is still open, (x, branch), so that every residual sum is fused
    with the norm that follows it, also across blocks: x is the stream, branch the MLP output of the block before,
    both (B, T, C). The first block has no branch.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias, eps=config.layer_norm_eps)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, branch: Tensor | None, cache: LayerCache | None = None) -> tuple[Tensor, Tensor]:
        p = self.dropout if self.training else 0.0
        if branch is None:
            y = self.ln_1(x)
        else:
            y, x = self.ln_1.add(branch, x, p)
        y, x = self.ln_2.add(self.attn(y, cache), x, p)
        return x, self.mlp(y)
