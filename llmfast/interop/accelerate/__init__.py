"""``accelerate(model)``: the hot paths of somebody else's model, in place, and ``restore(model)``.

swap.py        how an instance is swapped, and the proof on random numbers that it may be
parts.py       reading linear layers, norms, dropouts and activations
layers.py, attention.py, blocks.py, models.py       the swaps, from the smallest to the largest
report.py      what was done
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from llmfast import ops
from llmfast.interop.accelerate.attention import AttentionSwap
from llmfast.interop.accelerate.blocks import LayerSwap
from llmfast.interop.accelerate.layers import HeadSwap, LoraSwap, NormSwap, PerceptronSwap
from llmfast.interop.accelerate.models import RETURN_LOGITS, GPT2CacheSwap, GPT2LossSwap, NanoGPTSwap, heads_of
from llmfast.interop.accelerate.parts import ACTIVATION, is_linear, weights_of
from llmfast.interop.accelerate.report import Entry, Report
from llmfast.interop.accelerate.swap import (
    SWAPS,
    TOLD,
    Decline,
    Swap,
    disagreement,
    original_class,
    put_in,
    swap_of,
    take_out,
)  # fmt: skip

__all__ = ["Entry", "Report", "accelerate", "restore"]

# From the smallest to the largest: a larger one reads what the smaller ones are.
_ORDER: list[type[Swap]] = [
    NormSwap, PerceptronSwap, LoraSwap, AttentionSwap, LayerSwap, GPT2CacheSwap, GPT2LossSwap, NanoGPTSwap,
]  # fmt: skip
_PARTS_OF_LAYER = ("attention", "layer_norm", "mlp")


def accelerate(
    model: nn.Module,
    *,
    attention: bool = True,
    layer_norm: bool = True,
    mlp: bool = True,
    loss: bool = True,
    lora: bool = True,
    tune_process: bool = True,
) -> Report:
    """Swap the hot paths of this model instance for llmfast's, in place, and report what was swapped and what not.

    Knows Hugging Face's GPT-2 models, nanoGPT's GPT, the book's GPTModel with all its attentions, PEFT's LoRA layers,
    and any tree with nn.LayerNorm or nn.Sequential(Linear, GELU, Linear). Parameters stay the same tensors under the
    same names; hooks stay; nothing global is patched. A module is swapped only where the swap gives the same numbers on
    random parameters, and at each call what the fast way cannot do takes the module's own forward, with a warning said
    once. Each of the first five flags switches a kind of swap; whole decoder layers need the first three. With
    ``loss``, a model that computes its loss itself returns logits beside it only in evaluation mode, or where
    ``model.llmfast_return_logits`` is True. Modules that are swapped already stay so: a second call does nothing to
    them. With ``tune_process``, and where parameters are on the CPU, ``llmfast.tune_process()`` is called too, which
    makes the allocator keep the pages of large tensors: it concerns the whole process, and ``restore`` leaves it so.

    Raises ``TypeError`` where ``model`` is no module. See docs/accelerate.md.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    flags = dict(attention=attention, layer_norm=layer_norm, mlp=mlp, loss=loss, lora=lora)
    modules = {module: name for name, module in model.named_modules() if not _is_ours(module)}
    told: set[str] = next((m.__dict__[TOLD] for m in modules if TOLD in m.__dict__), set())
    reasons: dict[nn.Module, str | None] = {}  # of every module that looked like something; None where it is swapped
    seen: dict[Any, str | None] = {}
    for swap in _ORDER:
        off = [flag for flag in (_PARTS_OF_LAYER if swap is LayerSwap else (swap.flag,)) if not flags[flag]]
        for module in modules:
            if swap_of(module) == swap.name:
                reasons[module] = None
            elif swap_of(module) is None and swap.candidate(module):
                reasons[module] = f"{off[0]}=False" if off else _reason_against(module, swap, seen)
                if reasons[module] is None:
                    put_in(module, swap.name, told)
    for module in list(modules):
        for name in heads_of(module) if loss else []:
            head = module._modules[name]
            if head is not None and swap_of(head) is None and weights_of(head) is not None:
                put_in(head, HeadSwap.name, told)
            if head is not None and swap_of(head) == HeadSwap.name:
                reasons[head] = None
    for module, reason in list(_not_looked_at(modules, reasons)):
        reasons[module] = reason
    report = Report(original_class(model).__name__)
    if tune_process and any(parameter.device.type == "cpu" for parameter in model.parameters()):
        report.process = str(ops.tune_process())
    for module, name in modules.items():
        if module in reasons:
            kind, found = original_class(module).__name__, swap_of(module)
            note = SWAPS[found].note(module) if found else ""
            report.entries.append(Entry(name, kind, found, reasons[module] or "", note))
    return report


def restore(model: nn.Module) -> nn.Module:
    """Undo ``accelerate`` in place: every module computes as its own class does again. Returns the model.

    Raises ``TypeError`` where ``model`` is no module, and ``ValueError`` where another library has put a class of its
    own on a swapped module since (FSDP's fully_shard).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if swap_of(module) is not None and "_llmfast_swap" not in type(module).__dict__:
            raise ValueError(f"restore: {name or 'the model'} has become a {type(module).__name__} since accelerate()")
    for module in model.modules():
        if swap_of(module) is not None:
            take_out(module)
        for attribute in (ACTIVATION, RETURN_LOGITS):
            module.__dict__.pop(attribute, None)
    return model


def _is_ours(module: nn.Module) -> bool:
    return original_class(module).__module__.startswith("llmfast.")


def _reason_against(module: nn.Module, swap: type[Swap], seen: dict[Any, str | None]) -> str | None:
    if "forward" in module.__dict__:
        return "it was given a forward of its own"
    if any(not p.is_floating_point() for p in module.parameters()):
        return "it has parameters that are not floating point"
    try:
        swap.check(module)
    except Decline as decline:
        return str(decline)
    return disagreement(module, swap, seen)


def _not_looked_at(modules: Iterable[nn.Module], looked_at: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    """Modules with parameters of their own that belong to nothing that was looked at, and what they are."""
    kinds = [swap for swap in SWAPS.values() if swap.owns_children]
    owners = [m for m in looked_at if any(kind.candidate(m) or swap_of(m) == kind.name for kind in kinds)]
    covered = {child for owner in owners for child in owner.modules()}.union(looked_at)
    for module in modules:
        if module in covered or all(p is None for p in module._parameters.values()):
            continue
        if is_linear(module):
            yield module, "a linear layer outside of the attentions, MLPs and heads that are known"
        elif original_class(module) is nn.Embedding:
            yield module, "llmfast has nothing faster for an embedding"
        else:
            yield module, "llmfast knows nothing of its kind"
