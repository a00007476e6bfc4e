"""Whole pre-norm decoder layers: one native call each way where every part is plain, else their own forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from llmfast.interop.accelerate.attention import Attention, attention_of, check_gpt2, is_gpt2, is_harmless
from llmfast.interop.accelerate.layers import Perceptron, perceptron_of, probe
from llmfast.interop.accelerate.parts import drop, dropout_of, norm_of, weights_of
from llmfast.interop.accelerate.swap import Decline, Swap, original_class
from llmfast.nn.layers import _is_untouched
from llmfast.ops import decoder_layer as fused


@dataclass
class Layer:
    """x = x + drop(attention(norm1(x))), x = x + drop(mlp(norm2(x)))"""

    norms: list[tuple[Tensor | None, Tensor | None, float]]
    attention: Attention
    mlp: Perceptron
    attention_out_p: float
    mlp_out_p: float


# Class name -> names of its norm, attention, norm, MLP and residual dropout.
_FAMILIES = {
    "GPT2Block": ("ln_1", "attn", "ln_2", "mlp", None),
    "Block": ("ln_1", "attn", "ln_2", "mlp", None),
    "TransformerBlock": ("norm1", "att", "norm2", "ff", "drop_shortcut"),
    "TransformerBlockFast": ("norm1", "att", "norm2", "ff", "drop_shortcut"),
}


def layer_of(module: nn.Module) -> Layer | None:
    """How the module is read now, or None where a part is hooked, replaced or not known."""
    names = _FAMILIES.get(original_class(module).__name__)
    parts = module._modules
    if names is None or set(parts) != {name for name in names if name} or module._parameters or module._buffers:
        return None
    norm1, attn, norm2, mlp = (parts[name] for name in names[:4] if name)
    if norm1 is None or attn is None or norm2 is None or mlp is None:
        return None
    if not (_is_untouched(attn) and _is_untouched(mlp)):
        return None
    norms, attention, perceptron = [norm_of(norm1), norm_of(norm2)], attention_of(attn), perceptron_of(mlp)
    p = dropout_of(parts[names[4]] if names[4] else 0.0, module.training)
    if norms[0] is None or norms[1] is None or attention is None or perceptron is None or p is None:
        return None
    if p and (attention.out_p or perceptron.dropout_p):
        return None
    found = [norm for norm in norms if norm is not None]
    return Layer(found, attention, perceptron, p or attention.out_p, p or perceptron.dropout_p)


def run_fused(layer: Layer, x: Tensor) -> Tensor | None:
    """The layer's output by one native call; None where that does not stand in for its parts here."""
    (w1, b1, eps), (w2, b2, eps2) = layer.norms
    attention, fc, proj = layer.attention.plain(), weights_of(layer.mlp.fc), weights_of(layer.mlp.proj)
    if attention is None or fc is None or proj is None or w1 is None or w2 is None or eps != eps2:
        return None
    parameters = (w1, b1, *attention, w2, b2, *fc, *proj)
    if fused.why_not(x, parameters) is not None:
        return None
    options = fused.LayerOptions(layer.attention.heads, layer.mlp.activation, layer.attention.scale, eps)
    stream, branch = fused.decoder_layer(
        x, None, parameters, options, layer.attention_out_p, layer.attention.attention_p
    )
    return stream + drop(branch, layer.mlp_out_p)


class LayerSwap(Swap):
    name, flag, residual = "decoder layer", "attention", True

    @classmethod
    def candidate(cls, module: nn.Module) -> bool:
        kind = original_class(module).__name__
        return kind in _FAMILIES and {n for n in _FAMILIES[kind] if n} <= set(module._modules)

    @classmethod
    def check(cls, module: nn.Module) -> None:
        if "crossattention" in module._modules:
            raise Decline("cross-attention; its parts are swapped one by one")
        layer = layer_of(module)
        if layer is None:
            raise Decline("a part of it is hooked, replaced or not known; its other parts are swapped one by one")
        if is_gpt2(module):
            check_gpt2(module)

    @classmethod
    def example(cls, module: nn.Module) -> Any:
        layer = layer_of(module)
        weight = layer.norms[0][0] if layer is not None else None
        return None if weight is None else probe(len(weight))

    @classmethod
    def run(cls, module: nn.Module, original: type[nn.Module], args: Any, kwargs: Any) -> Any:
        # A cache, a mask, an encoder: what any further argument brings.
        alone = len(args) > 0 and all(a is None or a is False for a in args[1:])
        if alone and not torch.compiler.is_compiling() and not _has_any_global_hook():
            gpt2 = is_gpt2(module)
            if all(is_harmless(name, value) if gpt2 else not value for name, value in kwargs.items()):
                layer, x = layer_of(module), args[0]
                longest = layer.attention.longest if layer is not None else None
                if layer is not None and x.dim() == 3 and (longest is None or x.shape[1] <= longest):
                    y = run_fused(layer, x)
                    if y is not None:
                        return y
        return original.forward(module, *args, **kwargs)
