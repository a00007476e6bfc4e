"""Norms, perceptrons, LoRA layers and output heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmfast import ops
from llmfast.interop.accelerate.parts import (
    Weights,
    activation_of,
    drop,
    dropout_of,
    fits,
    is_linear,
    norm_of,
    project,
    weights_of,
)  # fmt: skip
from llmfast.interop.accelerate.swap import Decline, Swap, fall_back, original_class
from llmfast.nn.layers import _is_untouched
from llmfast.ops import _checks
from llmfast.ops.mlp import activate


def probe(width: int, seed: int = 1) -> tuple[Tensor]:
    """Random (2, 9, width), rows of several sizes: the small ones tell the eps of a norm."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1.0, 0.3, 0.003, 2.0, 1.0, 0.1, 1.0, 0.01, 1.0])[:, None]
    return (torch.randn(2, 9, width, generator=generator) * sizes,)


class NormSwap(Swap):
    name, flag, owns_children = "layer norm", "layer_norm", True

    @classmethod
    def candidate(cls, module: nn.Module) -> bool:
        return original_class(module).__name__ == "LayerNorm"

    @classmethod
    def check(cls, module: nn.Module) -> None:
        if norm_of(module) is None:
            raise Decline("it does not normalise the last dimension alone, or not with the parameters that are known")

    @classmethod
    def example(cls, module: nn.Module) -> Any:
        weight = norm_of(module)[0]  # type: ignore[index]
        return None if type(module) is nn.LayerNorm else probe(len(weight))  # type: ignore[arg-type]

    @classmethod
    def run(cls, module: nn.Module, original: type[nn.Module], args: Any, kwargs: Any) -> Any:
        read = norm_of(module) if len(args) == 1 and not kwargs else None
        if read is None or not fits(args[0], *read[:2]) or _autocast_widens(args[0]):
            return original.forward(module, *args, **kwargs)
        return ops.layer_norm(args[0], *read)


def _autocast_widens(x: Tensor) -> bool:
    """Whether autocast gives float32 for a 16-bit input of a norm, which the op does not."""
    return _checks.autocast_dtype(x) is not None and x.dtype is not torch.float32


# ---- Perceptrons -----------------------------------------------------------------------------------------------------


@dataclass
class Perceptron:
    """drop(proj(activation(fc(x))))"""

    fc: nn.Module
    activation: str
    proj: nn.Module
    dropout_p: float


def perceptron_of(module: nn.Module) -> Perceptron | None:
    """How the module is read now: Linear, activation, Linear and perhaps Dropout, or the MLP of nanoGPT or GPT-2."""
    parts = module._modules
    if len(parts) == 1 and "layers" in parts and original_class(module).__name__ == "FeedForward":
        inner = parts["layers"]
        same = inner is not None and original_class(inner) is nn.Sequential and _is_untouched(inner)
        return perceptron_of(inner) if same else None  # type: ignore[arg-type]
    if isinstance(module, nn.Sequential):
        names = list(parts)
    else:
        act_name = "act" if "act" in parts else "gelu"
        names = ["c_fc", act_name, "c_proj", "dropout"]
        if set(parts) != set(names):
            return None
    if len(names) not in (3, 4):
        return None
    fc, act, proj, dropout = (parts[name] if name else None for name in [*names, None][:4])
    activation = activation_of(act)
    p = dropout_of(dropout, module.training)
    if fc is None or proj is None or activation is None or p is None:
        return None
    return Perceptron(fc, activation, proj, p)


def run_perceptron(read: Perceptron, x: Tensor) -> Tensor:
    fc, proj = weights_of(read.fc), weights_of(read.proj)
    if fc is not None and proj is not None and fits(x, *fc, *proj):
        y = ops.mlp(x, *fc, *proj, activation=read.activation)
    else:
        y = project(read.proj, activate(project(read.fc, x), read.activation))
    return drop(y, read.dropout_p)


class PerceptronSwap(Swap):
    name, flag, owns_children = "mlp", "mlp", True

    @classmethod
    def candidate(cls, module: nn.Module) -> bool:
        kind, parts = original_class(module), list(module._modules.values())
        if kind is nn.Sequential:
            return len(parts) in (3, 4) and is_linear(parts[0]) and is_linear(parts[2]) and not is_linear(parts[1])
        return kind.__name__ in ("MLP", "GPT2MLP") and {"c_fc", "c_proj"} <= set(module._modules)

    @classmethod
    def check(cls, module: nn.Module) -> None:
        read = perceptron_of(module)
        if read is None:
            raise Decline("it is not Linear, GELU (erf or tanh) or ReLU, Linear and perhaps Dropout")

    @classmethod
    def example(cls, module: nn.Module) -> Any:
        weights = weights_of(module._modules["0" if isinstance(module, nn.Sequential) else "c_fc"])  # type: ignore[arg-type]
        if type(module) is nn.Sequential or weights is None:
            return None
        return probe(weights[0].shape[1])

    @classmethod
    def run(cls, module: nn.Module, original: type[nn.Module], args: Any, kwargs: Any) -> Any:
        read = perceptron_of(module) if len(args) == 1 and not kwargs else None
        if read is None:
            return fall_back(module, original, args, kwargs, "its MLP is not the one that was swapped any more")
        return run_perceptron(read, args[0])


# ---- LoRA ------------------------------------------------------------------------------------------------------------


@dataclass
class Adapter:
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float


def adapter_of(module: Any) -> Adapter | None:
    """One active, unmerged, plain adapter of a PEFT layer, or the book's LinearWithLoRA; None for anything else."""
    if original_class(module).__name__ == "LinearWithLoRA":
        base, lora = weights_of(module.linear), module.lora
        if base is None or not _is_untouched(lora) or set(lora._parameters) != {"A", "B"}:
            return None
        return Adapter(*base, lora.A.t(), lora.B.t(), lora.alpha / getattr(lora, "rank", 1), 0.0)
    base = weights_of(module.base_layer)
    active = [name for name in module.active_adapters if name in module.lora_A]
    if base is None or module.disable_adapters or module.merged or len(active) != 1:
        return None
    name = active[0]
    if name in getattr(module, "lora_variant", {}):
        return None
    down, up = weights_of(module.lora_A[name]), weights_of(module.lora_B[name])
    p = dropout_of(module.lora_dropout[name], module.training)
    if down is None or up is None or down[1] is not None or up[1] is not None or p is None:
        return None
    return Adapter(*base, down[0], up[0], float(module.scaling[name]), p)


class LoraSwap(Swap):
    name, flag, owns_children = "lora", "lora", True

    @classmethod
    def candidate(cls, module: nn.Module) -> bool:
        kind = original_class(module)
        return kind.__name__ == "LinearWithLoRA" or (
            kind.__name__ == "Linear" and kind.__module__.startswith("peft.tuners.lora")
        )

    @classmethod
    def check(cls, module: nn.Module) -> None:
        if original_class(module).__name__ == "LinearWithLoRA" and set(module._modules) != {"linear", "lora"}:
            raise Decline("it is not a linear layer and a LoRA layer")
        if adapter_of(module) is None:
            raise Decline("it has no single plain adapter (merged, several, DoRA, bias, or a base that is not linear)")

    @classmethod
    def example(cls, module: nn.Module) -> Any:
        return probe(adapter_of(module).weight.shape[1])  # type: ignore[union-attr]

    @classmethod
    def run(cls, module: nn.Module, original: type[nn.Module], args: Any, kwargs: Any) -> Any:
        a = adapter_of(module) if len(args) == 1 and not kwargs else None
        if a is None or not fits(args[0], a.weight, a.bias, a.lora_A, a.lora_B):
            return original.forward(module, *args, **kwargs)
        return ops.lora_linear(args[0], a.weight, a.bias, a.lora_A, a.lora_B, scaling=a.scaling, dropout_p=a.dropout_p)


# ---- Output heads ----------------------------------------------------------------------------------------------------


class HeadSwap(Swap):
    """The last product of a language model, whose loss its users take themselves."""

    name, flag, owns_children = "head", "loss", True

    @classmethod
    def candidate(cls, module: nn.Module) -> bool:
        return False  # named by the models that have one

    @classmethod
    def run(cls, module: nn.Module, original: type[nn.Module], args: Any, kwargs: Any) -> Any:
        weights: Weights | None = weights_of(module) if len(args) == 1 and not kwargs else None
        if weights is None or not fits(args[0], *weights):
            return original.forward(module, *args, **kwargs)
        return ops.linear(args[0], *weights)
