"""Weight-only int8: a GPT whose matrices take a quarter of the memory.

Each row of a matrix is q * scale with whole numbers q in [-127, 127] and scale = max |row| / 127 (symmetric, no zero
point). Matrices are the weights of linear layers, the token embedding and the output head; biases, norms and positions
stay float32, and so do the activations.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from llmfast.config import GPTConfig
from llmfast.errors import UserError
from llmfast.nn.embedding import token_rows
from llmfast.nn.gpt import GPT
from llmfast.nn.layers import Linear
from llmfast.ops.matmul import floats, linear_int8


class Int8Matrix(nn.Module):
    """A matrix (N, K) as ``quantized`` int8 (N, K) and ``scale`` float32 (N,)."""

    quantized: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        quantized, scale = quantize_rows(weight.detach())
        self.register_buffer("quantized", quantized)
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        """The matrix as float, made anew at each access, for who cannot read it as it is."""
        return floats(self.quantized, self.scale)


class Int8Linear(Int8Matrix):
    """``Linear`` with an int8 weight (out, in)."""

    def __init__(self, linear: Linear) -> None:
        super().__init__(linear.weight)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear_int8(x, self.quantized, self.scale, self.bias)


class Int8Embedding(Int8Matrix):
    """``Embedding`` with an int8 weight."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__(embedding.weight)

    def forward(self, idx: Tensor) -> Tensor:
        return token_rows(idx, self.quantized) * self.scale[idx, None]


class Int8GPT(GPT):
    """A GPT for inference with int8 matrices, made by ``quantize_int8``."""

    def __init__(self, config: GPTConfig) -> None:
        with torch.device("meta"):
            super().__init__(config)

    def _tie(self) -> None:
        if self.config.tie_embeddings and isinstance(self.lm_head, Int8Linear):
            wte: Int8Embedding = self.transformer.wte  # type: ignore[assignment]
            self.lm_head.quantized, self.lm_head.scale = wte.quantized, wte.scale

    def _token_rows(self, idx: Tensor) -> Tensor:
        return self.transformer.wte(idx)

    def num_parameters(self) -> int:
        matrices = {m.quantized.data_ptr(): m.quantized.numel() for m in self.modules() if isinstance(m, Int8Matrix)}
        return super().num_parameters() + sum(matrices.values())

    def save_pretrained(self, directory: str | Path) -> None:
        raise UserError("an int8 model is not saved: save the model that it was made from")


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale) of a matrix (N, K): int8 (N, K) and float32 (N,)."""
    weight = weight.float()
    scale = weight.abs().amax(1) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return (weight * inverse[:, None]).round_().to(torch.int8), scale


@torch.no_grad()
def quantize_int8(model: GPT) -> Int8GPT:
    """A copy of ``model`` for inference whose matrices are int8; float32 norms and positions are shared with it.

    It generates, on a CPU at nearly four times the speed of float32, and evaluates; it cannot be trained or saved.
    Raises ``UserError`` for a model that is one already, and for weights that are not finite.
    """
    if isinstance(model, Int8GPT):
        raise UserError("the model is quantized already")
    small = Int8GPT(model.config)
    for name, module in model.named_modules():
        if not list(module.parameters(recurse=False)):
            continue
        if isinstance(module, Linear) or module is model.transformer.wte:
            if not torch.isfinite(module.weight).all():
                raise UserError(f"{name}.weight is not finite: the model is damaged")
            new: nn.Module = Int8Linear(module) if isinstance(module, Linear) else Int8Embedding(module)
        else:
            new = module if next(module.parameters()).dtype is torch.float32 else copy.deepcopy(module).float()
        small.set_submodule(name, new)
    small._tie()
    return small.train(model.training)


def weight_bytes(model: GPT) -> int:
    """Bytes of all weights, a tied matrix counted once."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())
