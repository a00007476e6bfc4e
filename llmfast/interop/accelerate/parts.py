"""Reading the parts that foreign layers are made of: products, dropouts, activations, norms.

Whatever is hooked, parametrized, or of a class of its own is not read here but called, as its owner means it to be.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from llmfast import ops
from llmfast.interop.accelerate.swap import original_class
from llmfast.nn.layers import _is_untouched
from llmfast.ops import _checks
from llmfast.ops.mlp import ACTIVATIONS, activate

# Where an activation of a class of its own keeps what it was found to compute.
ACTIVATION = "_llmfast_activation"
_LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear)

Weights = tuple[Tensor, Tensor | None]


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer whose weight is (in, out)."""
    cls = original_class(module)
    return cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")


def is_linear(module: nn.Module | None) -> bool:
    return module is not None and (original_class(module) in _LINEARS or is_conv1d(module))


def weights_of(module: nn.Module) -> Weights | None:
    """Weight (out, in) and bias of a plain linear layer; None for anything else."""
    if not (is_linear(module) and _is_untouched(module)):
        return None
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None:
        return None
    return (weight.t() if is_conv1d(module) else weight), bias


def project(source: nn.Module | Weights, x: Tensor) -> Tensor:
    """x through a linear layer: by our product where it is a plain one."""
    weights = weights_of(source) if isinstance(source, nn.Module) else source
    if weights is not None and fits(x, *weights):
        return ops.linear(x, *weights)
    if isinstance(source, nn.Module):
        return source(x)
    return torch.nn.functional.linear(x, *source)


def fits(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the ops take them together: one dtype, or autocast, and one device."""
    if _checks.autocast_dtype(x) is not None and x.dtype is not torch.float64:
        return all(p is None or p.device == x.device for p in parameters)
    return all(p is None or (p.dtype is x.dtype and p.device == x.device) for p in parameters)


def dropout_of(module: nn.Module | float | None, training: bool) -> float | None:
    """The probability that acts now; None where it is no plain dropout. A float acts in training mode."""
    if module is None:
        return 0.0
    if isinstance(module, (int, float)):
        return float(module) if training else 0.0
    if type(module) is nn.Identity:
        return 0.0
    if type(module) is not nn.Dropout or not _is_untouched(module):
        return None
    p = float(module.p) if module.training else 0.0
    return p if p < 1.0 else None


def drop(x: Tensor, p: float) -> Tensor:
    return ops.dropout(x, p) if p > 0 else x


def activation_of(module: nn.Module | None) -> str | None:
    """The op's name for what an activation module computes, or None. Unknown classes are tried on numbers."""
    if module is None or not _is_untouched(module):
        return None
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    if type(module) is nn.ReLU:
        return "relu"
    if ACTIVATION not in module.__dict__:
        module.__dict__[ACTIVATION] = _tried(module)
    return module.__dict__[ACTIVATION]


def _tried(module: nn.Module) -> str | None:
    if any(True for _ in module.children()) or any(True for _ in module.parameters()) or any(module.buffers()):
        return None
    x = torch.cat([torch.linspace(-6, 6, 97), torch.tensor([-60.0, -17.0, 13.0, 60.0])]).double()
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            y = module(x)
    except Exception:  # whatever a stranger's code raises: it is none of ours
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    return next((name for name in ACTIVATIONS if float((y.cpu() - activate(x, name)).abs().max()) < 1e-6), None)


def norm_of(module: nn.Module) -> tuple[Tensor | None, Tensor | None, float] | None:
    """Weight, bias and eps of a layer norm over the last dimension, or None for anything else.

    The names are those of nn.LayerNorm, of nanoGPT (eps 1e-5 in its code) and of the book (scale, shift).
    """
    cls, own, eps = original_class(module), module._parameters, module.__dict__.get("eps", 1e-5)
    if not _is_untouched(module) or module._modules:
        return None
    if cls is nn.LayerNorm:
        return (own["weight"], own["bias"], eps) if len(module.__dict__["normalized_shape"]) == 1 else None
    weight, bias = ("scale", "shift") if "scale" in own else ("weight", "bias")
    scale = own.get(weight)
    if cls.__name__ != "LayerNorm" or not set(own) <= {weight, bias} or scale is None or scale.dim() != 1:
        return None
    return scale, own.get(bias), eps
