"""Low-rank adapters beside frozen linear layers (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models").

y = x W^T + bias + (alpha / r) dropout(x) A^T B^T          A (r, in), B (out, r), named and laid out as PEFT does
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmfast import ops
from llmfast.config import LoRAConfig, suggest
from llmfast.errors import UserError

QKV = "c_attn"
HEADS = ("lm_head", "score")


class LoRALinear(nn.Module):
    """A linear layer with an adapter, through ``ops.lora_linear``; (..., in) -> (..., out).

    ``weight`` (out, in) and ``bias`` (out,) are the parameters of ``linear`` themselves; ``lora_A`` (r, in) is drawn
    from torch's default generator as PEFT draws it (uniform in +-1 / sqrt(in)), ``lora_B`` (out, r) is zero, so that
    nothing changes at first. With ``splits`` n, each nth part of the outputs has an adapter of its own: lora_A is
    (n r, in), lora_B (out, r). Raises ``ValueError`` for a rank, alpha or dropout out of range.
    """

    def __init__(self, linear: nn.Linear, r: int, alpha: float, dropout: float = 0.0, *, splits: int = 1) -> None:
        super().__init__()
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"r must be a positive integer, got {r!r}")
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0, got {alpha!r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout!r}")
        if linear.out_features % splits:
            raise ValueError(f"splits {splits} must divide the {linear.out_features} outputs")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.r, self.alpha, self.dropout, self.splits = r, float(alpha), float(dropout), splits
        self.enabled = True
        self.weight = linear.weight
        self.bias = linear.bias
        self.lora_A = nn.Parameter(self.weight.new_empty(splits * r, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def scaling(self) -> float:
        return self.alpha / self.r

    def full_B(self) -> Tensor:
        """lora_B as it multiplies all of lora_A's outputs: (out, splits r), block-diagonal."""
        return self.lora_B if self.splits == 1 else torch.block_diag(*self.lora_B.chunk(self.splits))

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, (out, in)."""
        return self.scaling * (self.full_B() @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return ops.linear(x, self.weight, self.bias)
        p = self.dropout if self.training else 0.0
        return ops.lora_linear(x, self.weight, self.bias, self.lora_A, self.full_B(), scaling=self.scaling, dropout_p=p)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, alpha={self.alpha:g}"


def add_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Give the linear layers that ``config.targets`` name an adapter, freeze all other parameters; returns ``model``.

    Raises ``UserError`` for a target that no layer has, a rank above a layer's own, and a model with adapters.
    """
    if lora_layers(model):
        raise UserError("the model has adapters already: merge them first (llmfast.nn.merge_lora)")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen: dict[str, nn.Linear] = {}
    for target in config.targets:
        found = {name: module for name, module in linears.items() if _is_target(name, target)}
        if not found:
            ends = dict.fromkeys([name.rsplit(".", 1)[-1] for name in linears])
            raise UserError(
                f"lora_targets: no linear layer is called {target!r}{suggest(target, ends)}; "
                f"there are {', '.join(ends)}, and all-linear"
            )
        chosen |= found
    shapes = {}
    for name, linear in chosen.items():
        splits = 3 if config.split_qkv and name.rsplit(".", 1)[-1] == QKV else 1
        most = min(linear.in_features, linear.out_features // splits)
        if config.r > most and name != "score":  # of a few classes: the book gives it the rank of the others
            raise UserError(f"lora_r {config.r} is above {most}, the full rank of {name}: choose a smaller one")
        shapes[name] = LoRAShape(config.r, config.alpha, config.dropout, splits)
    return attach(model, shapes)


class LoRAShape(NamedTuple):
    """What the adapter of one layer is: see ``LoRALinear``."""

    r: int
    alpha: float
    dropout: float
    splits: int


def attach(model: nn.Module, shapes: dict[str, LoRAShape]) -> nn.Module:
    """Give the layers called so an adapter, freeze all other parameters; returns ``model``."""
    linears = {name: model.get_submodule(name) for name in shapes}
    model.requires_grad_(False)
    for name, (r, alpha, dropout, splits) in shapes.items():
        _replace(model, name, LoRALinear(linears[name], r, alpha, dropout, splits=splits))  # type: ignore[arg-type]
    return model


def _is_target(name: str, target: str) -> bool:
    if target == "all-linear":
        return name.rsplit(".", 1)[-1] not in HEADS
    return name == target or name.endswith("." + target)


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Turn every adapted layer into a plain one, W + (alpha / r) B A, all of them trainable; returns ``model``.

    The frozen weights themselves are not written to. A tied output head that has an adapter is untied.
    """
    from llmfast.nn.layers import Linear

    for name, layer in lora_layers(model).items():
        merged = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        merged.weight = nn.Parameter(layer.weight + layer.delta().to(layer.weight.dtype))
        merged.bias = layer.bias
        _replace(model, name, merged)
        config: Any = getattr(model, "config", None)
        if name == "lm_head" and getattr(config, "tie_embeddings", False):
            model.config = dataclasses.replace(config, tie_embeddings=False)
    return model.requires_grad_(True)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors under the model's names, ``transformer.h.0.attn.c_attn.lora_A``."""
    return {
        f"{name}.{part}": getattr(layer, part).detach()
        for name, layer in lora_layers(model).items()
        for part in ("lora_A", "lora_B")
    }


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Within the context the model is its frozen base."""
    layers = list(lora_layers(model).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
    module.train(model.training)
