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

from llmfast.ops import _checks, _library
from llmfast.ops._registry import Implementation

NAMESPACE = "llmfast_triton"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "cpu") if INTERPRET else ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_on_load: list[Callable[..., None]] = []
_registered: Any = None


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


def _linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, row_weight: Tensor, label_smoothing: float,
    dtype: torch.dtype, want_dx: bool, want_dweight: bool, want_dbias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    from llmfast.kernels import linear_cross_entropy

    wants = zip((x, weight, bias), (want_dx, want_dweight, want_dbias), strict=True)
    gradients = [_library.gradient_like(t) if t is not None and want else None for t, want in wants]
    inputs = (x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    losses = linear_cross_entropy.forward(*inputs, target, row_weight.float(), label_smoothing, *gradients)
    return losses, *(_or_empty(g, t) for g, t in zip(gradients, (x, weight, x), strict=True))


def _mlp_fwd(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None,
    activation: str, dtype: torch.dtype, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from llmfast.kernels import mlp

    casts = [t if t is None else t.to(dtype) for t in (fc_weight, fc_bias, proj_weight, proj_bias)]
    rest: Any = [*casts, activation, keep]
    y, h = mlp.forward(_rows(x, dtype), *rest)
    return y.view(*x.shape[:-1], proj_weight.shape[0]), _or_empty(h, y)


def _mlp_bwd(
    dy: Tensor, x: Tensor, h: Tensor, fc_weight: Tensor, proj_weight: Tensor, activation: str, wanted: int
) -> tuple[Tensor, ...]:
    from llmfast.kernels import mlp

    gradients = _gradients((x, fc_weight, fc_weight[:, 0], proj_weight, proj_weight[:, 0]), wanted)
    weights = (fc_weight.to(h.dtype), proj_weight.to(h.dtype))
    mlp.backward(_rows(dy, h.dtype), _rows(x, h.dtype), h, *weights, activation, _by_rows(gradients, wanted))
    return tuple(gradients)


def _lora_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float,
    seed: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from llmfast.kernels import lora_linear

    casts = [t if t is None else t.to(dtype) for t in (weight, bias, lora_A, lora_B)]
    rest: Any = [*casts, scaling, dropout_p, seed]
    y, low = lora_linear.forward(_rows(x, dtype), *rest)
    return y.view(*x.shape[:-1], weight.shape[0]), low


def _lora_linear_bwd(
    dy: Tensor, x: Tensor, low: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float,
    dropout_p: float, seed: Tensor | None, dtype: torch.dtype, wanted: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    from llmfast.kernels import lora_linear

    gradients = _gradients((x, weight, weight[:, 0], lora_A, lora_B), wanted)
    W, A, B = (t.to(dtype) for t in (weight, lora_A, lora_B))
    options = (scaling, dropout_p, seed, _by_rows(gradients, wanted))
    lora_linear.backward(_rows(dy, dtype), _rows(x, dtype), low, W, A, B, *options)
    return tuple(gradients)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


def _gradients(likes: tuple[Tensor, ...], wanted: int) -> list[Tensor]:
    """Bit i of ``wanted``: room for the gradient of number i; else an empty tensor."""
    return [_library.gradient_like(t, bool(wanted >> i & 1)) for i, t in enumerate(likes)]


def _by_rows(gradients: list[Tensor], wanted: int) -> list[Tensor | None]:
    """What a kernel fills: the first as rows, None where nothing is wanted."""
    first = gradients[0].view(-1, gradients[0].shape[-1]) if wanted & 1 else None
    return [first, *(g if wanted >> i & 1 else None for i, g in enumerate(gradients[1:], 1))]


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
    "linear_cross_entropy": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor row_weight, float label_smoothing,"
        " ScalarType dtype, bool want_dx, bool want_dweight, bool want_dbias) -> (Tensor, Tensor, Tensor, Tensor)",
        _linear_cross_entropy,
    ),
    "mlp_fwd": (
        "(Tensor x, Tensor fc_weight, Tensor? fc_bias, Tensor proj_weight, Tensor? proj_bias, str activation,"
        " ScalarType dtype, bool keep) -> (Tensor, Tensor)",
        _mlp_fwd,
    ),
    "mlp_bwd": (
        "(Tensor dy, Tensor x, Tensor h, Tensor fc_weight, Tensor proj_weight, str activation, int wanted)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _mlp_bwd,
    ),
    "lora_linear_fwd": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, float dropout_p,"
        " Tensor? seed, ScalarType dtype) -> (Tensor, Tensor)",
        _lora_linear_fwd,
    ),
    "lora_linear_bwd": (
        "(Tensor dy, Tensor x, Tensor low, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, float dropout_p,"
        " Tensor? seed, ScalarType dtype, int wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _lora_linear_bwd,
    ),
}  # fmt: skip


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current GPU, which need not be that of the tensors."""

    @functools.wraps(function)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return function(first, *args, **kwargs)
        return function(first, *args, **kwargs)

    return run


@functools.lru_cache(maxsize=1)
def why_not_loaded() -> str | None:
    """Register the ops if they are not yet; the reason if they cannot be, else None."""
    global _registered
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    _registered = torch.library.Library(NAMESPACE, "DEF")
    for name, (schema, function) in _SCHEMAS.items():
        _registered.define(name + schema)
        _registered.impl(name, _on_its_device(function), "CompositeExplicitAutograd")
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


def declines(*args: Any) -> list[str]:
    """Reasons of every Triton kernel against these arguments."""
    tensors = [t for t in args if isinstance(t, Tensor) and t.is_floating_point()]
    reasons = _library.transforms()
    if (cast := _checks.autocast_dtype(tensors[0])) not in (None, *DTYPES):
        reasons = [*reasons, f"autocast to {cast}"]
    if any(t.dtype not in DTYPES for t in tensors):
        reasons = [*reasons, "a parameter is float64"]
    if any(0 in t.shape[-1:] for t in tensors):
        reasons = [*reasons, "a width of 0"]
    return reasons


def interpreted(dtype: torch.dtype) -> bool:
    """The interpreter is for tests: "auto" never takes it."""
    return INTERPRET


def implementation(run: Callable[..., Any], declines: Callable[..., list[str]]) -> Implementation:
    """A kernel of kernels/ behind ``run``."""
    return Implementation("triton", run, "ours", DEVICES, DTYPES, unavailable, declines, interpreted)
