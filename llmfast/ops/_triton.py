"""The Triton kernels of ``llmfast.kernels`` as raw ops of PyTorch, with the schemas of the compiled ones.

They are registered under ``llmfast_triton::`` at first need, so that nothing imports Triton before. With
TRITON_INTERPRET=1 they also run on a CPU, slowly: to test them without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "llmfast_triton"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "cpu") if INTERPRET else ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_on_load: list[Callable[..., None]] = []
_library: Any = None


def on_load(register: Callable[..., None]) -> Callable[..., None]:
    """Decorator: ``register(NAMESPACE)`` (fakes, autograd) runs once, when the ops are there."""
    _on_load.append(register)
    return register


def _layer_norm_fwd(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from llmfast.kernels import layer_norm

    y, _, mean, rstd = layer_norm.forward(x, None, weight, bias, eps, 0.0, None)
    return y, mean, rstd


def _layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from llmfast.kernels import layer_norm

    options = (has_bias, 0.0, None, x.dtype, None)
    dx, _, dw, db = layer_norm.backward(dy, None, x, weight, mean, rstd, *options)
    return _or_empty(dx, x), _or_empty(dw, x), _or_empty(db, x)


def _add_layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    from llmfast.kernels import layer_norm

    return layer_norm.forward(x, residual, weight, bias, eps, dropout_p, seed)


def _add_layer_norm_bwd(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool,
    x_dtype: torch.dtype, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    from llmfast.kernels import layer_norm

    own = x_dtype if dropout_p > 0 or x_dtype is not s.dtype else None
    options = (has_bias, dropout_p, seed, own, s.dtype)
    gradients = layer_norm.backward(dy, ds, s, weight, mean, rstd, *options)
    return tuple(_or_empty(g, s) for g in gradients)


def _causal_attention_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    from llmfast.kernels import causal_attention

    return causal_attention.forward(*args)


def _causal_attention_bwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from llmfast.kernels import causal_attention

    return causal_attention.backward(*args)


def _or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if t is None else t


_SCHEMAS: dict[str, tuple[str, Callable[..., Any]]] = {
    "layer_norm_fwd": (
        "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)", _layer_norm_fwd,
    ),
    "layer_norm_bwd": (
        "(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool has_bias) -> (Tensor, Tensor, Tensor)",
        _layer_norm_bwd,
    ),
    "add_layer_norm_fwd": (
        "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float dropout_p, Tensor? seed)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _add_layer_norm_fwd,
    ),
    "add_layer_norm_bwd": (
        "(Tensor dy, Tensor? ds, Tensor s, Tensor? weight, Tensor mean, Tensor rstd, bool has_bias, ScalarType x_dtype,"
        " float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor)",
        _add_layer_norm_bwd,
    ),
    "causal_attention_fwd": (
        "(Tensor q, Tensor k, Tensor v, float scale, float dropout_p, Tensor? seed, Tensor? kv_lens, Tensor? doc_ids)"
        " -> (Tensor, Tensor)",
        _causal_attention_fwd,
    ),
    "causal_attention_bwd": (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, float dropout_p,"
        " Tensor? seed, Tensor? kv_lens, Tensor? doc_ids) -> (Tensor, Tensor, Tensor)",
        _causal_attention_bwd,
    ),
}  # fmt: skip


@functools.lru_cache(maxsize=1)
def why_not_loaded() -> str | None:
    """Register the ops if they are not yet; the reason if they cannot be, else None."""
    global _library
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    _library = torch.library.Library(NAMESPACE, "DEF")
    for name, (schema, function) in _SCHEMAS.items():
        _library.define(name + schema)
        _library.impl(name, function, "CompositeExplicitAutograd")
    for register in _on_load:
        register(NAMESPACE)
    return None


def unavailable(device: torch.device) -> list[str]:
    """Reasons why no Triton kernel runs on ``device``."""
    reason = why_not_loaded()
    if reason is not None:
        return [reason]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return ["the Triton kernels need compute capability 8.0 or newer"]
    return []


def interpreted(dtype: torch.dtype) -> bool:
    """The interpreter is for tests: "auto" never takes it."""
    return INTERPRET
