"""Providers of other packages, where they are installed. Each adapter is as its package's users call it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmfast.bench.providers import Call, CannotRun, Inputs, Provider, plain_causal
from llmfast.ops._registry import Op


def _package(module: str, inputs: Inputs, *, gpu: bool = True) -> Any:
    """The imported module; ``CannotRun`` where it is not installed, or wants a GPU."""
    device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise CannotRun("not installed")
    if gpu and device.type != "cuda":
        raise CannotRun("runs on GPUs alone")
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package built for another torch fails in any way it likes
        raise CannotRun(f"its import fails: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _heads_third(*tensors: Tensor) -> list[Tensor]:
    """(B, H, T, D) as (B, T, H, D)."""
    return [t.transpose(1, 2) for t in tensors]


def _bind(module: nn.Module, **tensors: Tensor | None) -> None:
    """Make ``tensors`` themselves the module's parameters, so that gradients flow to them."""
    for name, tensor in tensors.items():
        module._parameters.pop(name, None)
        setattr(module, name, tensor)


def _plain_loss(inputs: Inputs) -> None:
    if inputs.get("label_smoothing") or inputs.get("reduction", "mean") != "mean":
        raise CannotRun("compared for the plain mean alone")


# ---- Liger-Kernel ----------------------------------------------------------------------------------------------------


def _liger(op: Op, inputs: Inputs) -> Call:
    functional = _package("liger_kernel.transformers.functional", inputs)
    x, weight, bias = inputs["x"], inputs["weight"], inputs.get("bias")
    if op.name == "layer_norm":
        if weight is None or bias is None:
            raise CannotRun("its LayerNorm needs weight and bias")
        return lambda: functional.liger_layer_norm(x, weight, bias, inputs["eps"])
    _plain_loss(inputs)
    target, ignore = inputs["target"].flatten(), inputs.get("ignore_index", -100)
    call = functional.liger_fused_linear_cross_entropy
    return lambda: call(_rows(x), weight, target, bias, ignore_index=ignore)


# ---- flash-attn ------------------------------------------------------------------------------------------------------


def _flash_attn(op: Op, inputs: Inputs) -> Call:
    function = _package("flash_attn", inputs).flash_attn_func
    q, k, v, scale = plain_causal(inputs)
    if q.dtype is torch.float32:
        raise CannotRun("takes float16 and bfloat16")
    return lambda: function(*_heads_third(q, k, v), softmax_scale=scale, causal=True).transpose(1, 2)


# ---- QuACK -----------------------------------------------------------------------------------------------------------


def _quack(op: Op, inputs: Inputs) -> Call:
    function = _package("quack.linear_cross_entropy", inputs).chunked_linear_cross_entropy
    _plain_loss(inputs)
    if inputs.get("bias") is not None:
        raise CannotRun("takes no bias")
    x, weight, target = inputs["x"], inputs["weight"], inputs["target"].flatten()
    ignore = inputs.get("ignore_index", -100)
    return lambda: function(_rows(x), weight, target, ignore_index=ignore)


# ---- xFormers --------------------------------------------------------------------------------------------------------


def _xformers(op: Op, inputs: Inputs) -> Call:
    fmha = _package("xformers.ops", inputs)
    q, k, v, scale = plain_causal(inputs)
    mask = fmha.LowerTriangularMask()
    function = fmha.memory_efficient_attention
    return lambda: function(*_heads_third(q, k, v), attn_bias=mask, scale=scale).transpose(1, 2)


# ---- Transformer Engine ----------------------------------------------------------------------------------------------


def _transformer_engine(op: Op, inputs: Inputs) -> Call:
    te = _package("transformer_engine.pytorch", inputs)
    if op.name == "layer_norm":
        x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
        if weight is None or bias is None:
            raise CannotRun("its LayerNorm needs weight and bias")
        norm = te.LayerNorm(x.shape[-1], eps=inputs["eps"], params_dtype=x.dtype, device=x.device)
        _bind(norm, weight=weight, bias=bias)
        return lambda: norm(x)
    q, k, v, scale = plain_causal(inputs)
    B, H, T, D = q.shape
    attention = te.DotProductAttention(
        H, D, attention_dropout=0.0, attn_mask_type="causal", qkv_format="bshd", softmax_scale=scale
    )
    return lambda: attention(*_heads_third(q, k, v)).view(B, T, H, D).transpose(1, 2)


# ---- PEFT ------------------------------------------------------------------------------------------------------------


def _peft(op: Op, inputs: Inputs) -> Call:
    lora = _package("peft.tuners.lora", inputs, gpu=False)
    x, weight, bias, lora_A, lora_B = (inputs[name] for name in ("x", "weight", "bias", "lora_A", "lora_B"))
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    r = lora_A.shape[0]
    config = importlib.import_module("peft").LoraConfig(r=r, lora_alpha=1)
    try:
        layer = lora.Linear(base, "default", config=config, r=r, lora_alpha=1)
    except TypeError:  # before PEFT 0.18 the layer took no config
        layer = lora.Linear(base, "default", r=r, lora_alpha=1)
    _bind(base, weight=weight, bias=bias)
    _bind(layer.lora_A["default"], weight=lora_A)
    _bind(layer.lora_B["default"], weight=lora_B)
    layer.scaling["default"] = inputs["scaling"]
    return lambda: layer(x)


def _adapter(name: str, make: Callable[[Op, Inputs], Call], *ops: str) -> Provider:
    return Provider(name, make, lambda op: op.name in ops)


PACKAGES = [
    _adapter("Liger-Kernel", _liger, "layer_norm", "linear_cross_entropy"),
    _adapter("flash-attn", _flash_attn, "causal_attention"),
    _adapter("QuACK", _quack, "linear_cross_entropy"),
    _adapter("xFormers", _xformers, "causal_attention"),
    _adapter("Transformer Engine", _transformer_engine, "layer_norm", "causal_attention"),
    _adapter("PEFT", _peft, "lora_linear"),
]
