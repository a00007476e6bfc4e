"""Whole models: the loss without logits, and no cache where a training step has no use for one."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmfast import ops
from llmfast.interop.accelerate.attention import check_gpt2, is_gpt2
from llmfast.interop.accelerate.parts import drop, dropout_of, fits, weights_of
from llmfast.interop.accelerate.swap import Decline, Swap, fall_back, original_class
from llmfast.nn.embedding import embed
from llmfast.nn.layers import _is_untouched

# Attribute of an accelerated model: None, logits beside a loss in evaluation mode alone; True, always; False, never.
RETURN_LOGITS = "llmfast_return_logits"


def wants_logits(module: nn.Module) -> bool:
    asked = module.__dict__.get(RETURN_LOGITS)
    return not module.training if asked is None else bool(asked)


class GPT2LossSwap(Swap):
    """Hugging Face's GPT2LMHeadModel: with labels, ``loss`` from the hidden states and ``logits`` None."""

    name, flag = "loss", "loss"

    @classmethod
    def candidate(cls, module: nn.Module) -> bool:
        return is_gpt2(module) and original_class(module).__name__ == "GPT2LMHeadModel"

    @classmethod
    def check(cls, module: nn.Module) -> None:
        check_gpt2(module)
        if weights_of(module.lm_head) is None:  # type: ignore[arg-type]
            raise Decline("lm_head is not a plain linear layer")

    @classmethod
    def note(cls, module: nn.Module) -> str:
        return f"with labels, training mode returns logits=None; set model.{RETURN_LOGITS} = True to have them"

    @classmethod
    def run(cls, module: Any, original: type[nn.Module], args: Any, kwargs: Any) -> Any:
        if kwargs.get("labels") is None and len(args) < _position_of_labels(original):
            return original.forward(module, *args, **kwargs)
        given = inspect.signature(original.forward).bind(module, *args, **kwargs).arguments
        extra = given.pop("kwargs", {})
        inputs = {**given, **extra}
        inputs.pop("self")
        labels, keep = inputs.pop("labels", None), inputs.pop("logits_to_keep", 0)
        weights = weights_of(module.lm_head)
        if labels is None or wants_logits(module):
            return original.forward(module, *args, **kwargs)
        reason = None
        if weights is None:
            reason = "lm_head is not a plain linear layer any more"
        elif module.loss_function.__name__ != "ForCausalLMLoss":
            reason = "the model has a loss function of its own"
        elif not isinstance(keep, int) or keep != 0:
            reason = "logits_to_keep beside labels"
        if weights is None or reason is not None:
            return fall_back(module, original, args, kwargs, reason or "")
        as_dict = inputs.pop("return_dict", None)
        out = module.transformer(**inputs, return_dict=True)
        loss = _causal_loss(out.last_hidden_state, weights, labels, extra)
        result = sys.modules[original.__module__].CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=None,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            cross_attentions=out.cross_attentions,
        )
        return result if (module.config.return_dict if as_dict is None else as_dict) else result.to_tuple()


def _position_of_labels(original: type[nn.Module]) -> int:
    return list(inspect.signature(original.forward).parameters).index("labels")


def _causal_loss(x: Tensor, weights: tuple[Tensor, Tensor | None], labels: Tensor, extra: dict[str, Any]) -> Tensor:
    """transformers' ForCausalLMLoss, from the hidden states x (B, T, C): token t predicts label t + 1."""
    ignore = extra.get("ignore_index", -100)
    count = extra.get("num_items_in_batch")
    target = extra.get("shift_labels")
    if target is None:
        target = F.pad(labels, (0, 1), value=ignore)[..., 1:]
    target = target.to(x.device).reshape(x.shape[:-1])
    loss = ops.linear_cross_entropy(
        x, weights[0], target, bias=weights[1], ignore_index=ignore, reduction="mean" if count is None else "sum"
    )
    if count is not None:
        loss = loss / (count.to(loss.device) if isinstance(count, Tensor) else count)
    return loss


class GPT2CacheSwap(Swap):
    """Hugging Face's GPT2Model fills a key-value cache even in training; here only where the caller says so."""

    name, flag = "no cache in training", "attention"

    @classmethod
    def candidate(cls, module: nn.Module) -> bool:
        return is_gpt2(module) and original_class(module).__name__ == "GPT2Model"

    @classmethod
    def check(cls, module: nn.Module) -> None:
        check_gpt2(module)

    @classmethod
    def note(cls, module: nn.Module) -> str:
        return "training mode returns past_key_values=None unless use_cache=True is given"

    @classmethod
    def run(cls, module: nn.Module, original: type[nn.Module], args: Any, kwargs: Any) -> Any:
        if (
            module.training
            and torch.is_grad_enabled()
            and len(args) < 2
            and kwargs.get("use_cache") is None
            and kwargs.get("past_key_values") is None
        ):
            kwargs = {**kwargs, "use_cache": False}
        return original.forward(module, *args, **kwargs)


class NanoGPTSwap(Swap):
    """nanoGPT's GPT: with targets, (None, loss)."""

    name, flag = "nanoGPT loss", "loss"

    @classmethod
    def candidate(cls, module: nn.Module) -> bool:
        return original_class(module).__name__ == "GPT" and {"transformer", "lm_head"} == set(module._modules)

    @classmethod
    def check(cls, module: Any) -> None:
        if set(module.transformer._modules) != {"wte", "wpe", "drop", "h", "ln_f"}:
            raise Decline("its transformer does not have nanoGPT's parts")
        if weights_of(module.lm_head) is None or not hasattr(module.config, "block_size"):
            raise Decline("lm_head is not a plain linear layer, or config has no block_size")

    @classmethod
    def example(cls, module: Any) -> Any:
        ids = torch.tensor([[1, 0, 2, 1, 1, 2], [0, 0, 1, 2, 0, 1]]) % module.lm_head.weight.shape[0]
        return ids, ids.roll(-1, 1).masked_fill(torch.tensor([0, 0, 1, 0, 0, 1]).bool(), -1)

    @classmethod
    def note(cls, module: nn.Module) -> str:
        return f"with targets, training mode returns (None, loss); set model.{RETURN_LOGITS} = True to have logits"

    @classmethod
    def run(cls, module: Any, original: type[nn.Module], args: Any, kwargs: Any) -> Any:
        given = dict(zip(("idx", "targets"), args, strict=False)) | kwargs
        idx, targets = given.get("idx"), given.get("targets")
        if targets is None or idx is None or len(given) != 2 or wants_logits(module):
            return original.forward(module, *args, **kwargs)
        parts = module.transformer._modules
        wte, wpe, weights = parts["wte"], parts["wpe"], weights_of(module.lm_head)
        p = dropout_of(parts["drop"], module.training)
        plain = all(type(e) is nn.Embedding and _is_untouched(e) and e.max_norm is None for e in (wte, wpe))
        if weights is None or p is None or not plain or wte.padding_idx is not None:
            return fall_back(
                module, original, args, kwargs, "its embeddings, dropout or lm_head are not plain any more"
            )
        if idx.shape[1] > module.config.block_size or not fits(wte.weight, wpe.weight, *weights):
            return original.forward(module, *args, **kwargs)
        x, head = embed(idx, wte.weight, wpe.weight, weights[0])
        x = drop(x, p)
        for block in parts["h"]:
            x = block(x)
        x = parts["ln_f"](x)
        return None, ops.linear_cross_entropy(x, head, targets.view(idx.shape), bias=weights[1], ignore_index=-1)


# The output heads of models that return logits, whose loss is taken outside of them.
HEADS = {"GPTModel": "out_head", "GPTModelFast": "out_head", "GPT2LMHeadModel": "lm_head", "GPT": "lm_head"}


def heads_of(module: nn.Module) -> list[str]:
    """Names of the output heads right under a model."""
    name = HEADS.get(original_class(module).__name__)
    return [name] if name is not None and name in module._modules else []
