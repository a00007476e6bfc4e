"""A token step of the whole model in one call: csrc/cpu/decode.cpp, for inference on the CPU.

It reads every weight once, holds activations in float32, and costs no Python per layer. Where it cannot run,
``why_not`` says so and the model's own forward pass is taken.
"""

from __future__ import annotations

import ctypes
import sys
import weakref

import torch
from torch import Tensor, nn

from llmfast.nn import GPT, KVCache
from llmfast.nn.gpt import Decoder
from llmfast.nn.int8 import Int8Embedding, Int8GPT, Int8Linear, Int8Matrix
from llmfast.nn.layers import MLP, Block, CausalSelfAttention, LayerNorm, Linear
from llmfast.ops import _library
from llmfast.ops._registry import current_setting

ACTIVATIONS = ("gelu_tanh", "gelu", "relu")  # as enum class Activation of csrc/cpu/activation.h
KNOWN = {
    GPT,
    Int8GPT,
    Decoder,
    Block,
    CausalSelfAttention,
    MLP,
    LayerNorm,
    Linear,
    nn.Embedding,
    Int8Linear,
    Int8Embedding,
}
MAX_ROWS = 8  # measured: about there the model's own forward pass, with its matrix products, draws level
# Tokens of a prompt that are read by steps: measured, as fast as a forward pass, which in int8 converts all weights.
SHORT_PROMPT, SHORT_PROMPT_INT8 = 4, 12
MIN_FOR_HUGE_PAGES = 64  # tokens: below, moving the weights costs more than it saves
_ABSENT = torch.empty(0)


def why_not(model: GPT | None = None) -> list[str]:
    """Reasons against the native step for ``model`` (or any model) in this context; empty where it runs."""
    setting = current_setting()
    for backend in (setting.default, *dict(setting.per_op).values()):
        if backend not in ("auto", "cpp"):
            return [f"backend {backend} is asked for"]
    reasons = _library.unavailable(torch.device("cpu"))
    if model is not None:
        reasons = [*reasons, *_library.transforms(), *_model_reasons(model)]
    return reasons


def step_of(model: GPT, rows: int, new_tokens: int) -> NativeStep | None:
    """The native step for ``rows`` texts of ``new_tokens`` each, where it runs and pays.

    Of int8 it takes any batch, since there a forward pass converts all weights at every step.
    """
    if (rows > MAX_ROWS and not isinstance(model, Int8GPT)) or why_not(model):
        return None
    step = NativeStep(model)
    if new_tokens >= MIN_FOR_HUGE_PAGES:
        step.use_huge_pages()
    return step


def _model_reasons(model: GPT) -> list[str]:
    unknown = {type(m).__name__ for m in model.modules() if type(m) not in KNOWN and type(m) is not nn.ModuleList}
    if unknown:
        return [f"modules of other kinds: {', '.join(sorted(unknown))}"]
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return ["forward hooks"]
    weight = model.transformer.wpe.weight
    if weight.device.type != "cpu":
        return [f"the model is on {weight.device}"]
    if torch.is_autocast_enabled("cpu"):
        return ["under autocast"]
    dtypes = {p.dtype for p in model.parameters()}
    if dtypes not in ({torch.float32}, {torch.bfloat16}):
        return [f"weights of {', '.join(sorted(map(str, dtypes)))}"]
    return []


class NativeStep:
    """The next logits of every row. The model's weights are read in place: changes made to them in place count."""

    def __init__(self, model: GPT) -> None:
        config = model.config
        self.short_prompt = SHORT_PROMPT_INT8 if isinstance(model, Int8GPT) else SHORT_PROMPT
        decoder, head = model.transformer, model.lm_head
        wte = decoder.wte
        self.weights = [*_matrix(wte)[:2], decoder.wpe.weight, *_norm(decoder.ln_f), *_matrix(head)]
        for block in decoder.h:
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            self.weights += [*_norm(block.ln_1), *_matrix(attn.c_attn), *_matrix(attn.c_proj)]
            self.weights += [*_norm(block.ln_2), *_matrix(mlp.c_fc), *_matrix(mlp.c_proj)]
        self.weights = [weight.detach().contiguous() for weight in self.weights]
        activation = ACTIVATIONS.index(config.activation)
        self.plan = _library.raw("decode_prepare")(
            self.weights, config.n_head, config.softmax_scale, config.layer_norm_eps, activation
        )
        weakref.finalize(self, _library.raw("decode_release"), self.plan)
        self.run = _library.raw("decode_step")

    def __call__(self, tokens: list[int], cache: KVCache) -> Tensor:
        """float32 logits (B, V) after one more token in each row, whose keys and values are added to ``cache``."""
        logits = self.run(self.plan, tokens, cache.lengths, cache.storage)
        cache.advance(1)
        return logits  # type: ignore[return-value]

    def use_huge_pages(self) -> None:
        """Move the weights to pages of 2 MiB where the system has them: a walk over them then misses no page table."""
        if not sys.platform.startswith("linux"):
            return
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for weight in self.weights:
            if weight.numel() * weight.element_size() >= _HUGE_PAGE:
                start = weight.data_ptr() // _HUGE_PAGE * _HUGE_PAGE
                end = -(-(weight.data_ptr() + weight.numel() * weight.element_size()) // _HUGE_PAGE) * _HUGE_PAGE
                madvise(start, end - start, _MADV_COLLAPSE)  # refused by Linux before 6.1: then nothing changes


_HUGE_PAGE = 2 << 20
_MADV_COLLAPSE = 25


def _norm(norm: LayerNorm) -> list[Tensor]:
    return [norm.weight.float(), _ABSENT if norm.bias is None else norm.bias.float()]


def _matrix(module: nn.Module | None) -> list[Tensor]:
    """[weight, scales, bias]"""
    if module is None:
        return [_ABSENT] * 3
    bias = getattr(module, "bias", None)
    bias = _ABSENT if bias is None else bias.float()
    if isinstance(module, Int8Matrix):
        return [module.quantized, module.scale, bias]
    return [module.weight, _ABSENT, bias]  # type: ignore[list-item]
