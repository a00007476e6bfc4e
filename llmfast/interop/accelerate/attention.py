"""Causal self-attentions as other codebases write them.

B batch, T sequence, C width, H heads, D head size. However queries, keys and values are projected (one matrix, three,
one for each head), the rows of the joint matrix are the queries of all heads, then the keys, then the values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmfast import ops
from llmfast.interop.accelerate.layers import probe
from llmfast.interop.accelerate.parts import Weights, drop, dropout_of, project, weights_of
from llmfast.interop.accelerate.swap import Decline, Swap, fall_back, original_class
from llmfast.nn.layers import _is_untouched
from llmfast.ops.causal_attention import visible

Source = nn.Module | Weights


@dataclass
class Attention:
    """How an attention module computes now."""

    heads: int
    scale: float
    sources: list[Source]  # one for queries, keys and values together, or 3 n of them
    outs: list[nn.Module]  # what the heads go through, one after the other
    attention_p: float  # dropout on the weights
    out_p: float = 0.0  # dropout behind the last projection
    longest: int | None = None  # tokens that its mask serves

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (B, H, T, D)."""
        ys = [project(source, x) for source in self.sources]
        if len(ys) == 1:
            q, k, v = ys[0].unflatten(-1, (3, self.heads, ys[0].shape[-1] // (3 * self.heads))).unbind(2)
        else:
            n = len(ys) // 3
            thirds = [ys[i * n] if n == 1 else torch.cat(ys[i * n : (i + 1) * n], -1) for i in range(3)]
            q, k, v = (y.unflatten(-1, (self.heads, y.shape[-1] // self.heads)) for y in thirds)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def finish(self, y: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, T, C)"""
        B, H, T, D = y.shape
        y = y.transpose(1, 2).reshape(B, T, H * D)
        for out in self.outs:
            y = project(out, y)
        return drop(y, self.out_p)

    def plain(self) -> tuple[Tensor | None, ...] | None:
        """Weights and biases of the joint projection (3 C, C) and of the output, where all of them are plain."""
        weights = [weights_of(s) if isinstance(s, nn.Module) else s for s in self.sources]
        outs = [weights_of(out) for out in self.outs]
        if len(outs) > 1 or any(w is None for w in (*weights, *outs)):
            return None
        found = [w for w in weights if w is not None]
        biased = [b for _, b in found if b is not None]
        if len(biased) not in (0, len(found)):
            return None
        weight, bias = found[0]
        if len(found) > 1:
            weight, bias = torch.cat([w for w, _ in found]), torch.cat(biased) if biased else None
        return weight, bias, *(outs[0] if outs and outs[0] is not None else (None, None))


def _float(value: Any) -> float:
    return -1.0 if value is None else float(value)


def _longest(module: nn.Module) -> int | None:
    mask = module._buffers.get("mask")
    return None if mask is None else int(mask.shape[-1])


def _gpt2(m: Any) -> Attention:
    p, out_p = dropout_of(m.attn_dropout, m.training), dropout_of(m.resid_dropout, m.training)
    return Attention(m.num_heads, float(m.scaling), [m.c_attn], [m.c_proj], _float(p), _float(out_p))


def _nanogpt(m: Any) -> Attention:
    out_p = dropout_of(m.resid_dropout, m.training)
    p = dropout_of(m.dropout if m.flash else m.attn_dropout, m.training)
    scale = (m.n_embd // m.n_head) ** -0.5
    bias = m._buffers.get("bias")
    return Attention(m.n_head, scale, [m.c_attn], [m.c_proj], _float(p), _float(out_p),
                     None if bias is None else int(bias.shape[-1]))  # fmt: skip


def _three(m: Any) -> Attention:
    p = dropout_of(m.dropout, m.training)
    sources = [m.W_query, m.W_key, m.W_value]
    return Attention(m.num_heads, m.head_dim**-0.5, sources, [m.out_proj], _float(p), longest=_longest(m))


def _einsum(m: Any) -> Attention:
    p = dropout_of(m.dropout, m.training)
    names = ("query", "key", "value")
    sources: list[Source] = [(getattr(m, f"W_{n}").t(), getattr(m, f"bias_{n[0]}")) for n in names]
    return Attention(m.num_heads, m.head_dim**-0.5, sources, [m.out_proj], _float(p), longest=_longest(m))


def _joint(m: Any) -> Attention:
    p = dropout_of(m.dropout, m.training)
    return Attention(m.num_heads, m.head_dim**-0.5, [m.qkv], [m.proj], _float(p), longest=_longest(m))


def _single(m: Any) -> Attention:
    p = dropout_of(m.dropout, m.training)
    scale = m.W_key.weight.shape[0] ** -0.5
    return Attention(1, scale, [m.W_query, m.W_key, m.W_value], [], _float(p), longest=_longest(m))


def _wrapper(m: Any) -> Attention:
    heads = list(m.heads)
    ps = {_float(dropout_of(h.dropout, h.training)) for h in heads}
    alike = all(
        original_class(h).__name__ == "CausalAttention" and _is_untouched(h) and _has(h, _FAMILIES["CausalAttention"])
        for h in heads
    )
    p = ps.pop() if len(ps) == 1 and alike else -1.0
    sources = [getattr(h, f"W_{n}") for n in ("query", "key", "value") for h in heads]
    outs = [m.out_proj] if "out_proj" in m._modules else []
    return Attention(len(heads), heads[0].W_key.weight.shape[0] ** -0.5, sources, outs, p, longest=_longest(heads[0]))


def _torch_class(m: Any) -> Attention:
    inner = m.multihead_attn
    plain = inner.in_proj_weight is not None and inner.bias_k is None and not inner.add_zero_attn and inner.batch_first
    p = dropout_of(inner.dropout, inner.training) if plain and _is_untouched(inner) else None
    sources: list[Source] = [(inner.in_proj_weight, inner.in_proj_bias)]
    scale = inner.head_dim**-0.5
    return Attention(inner.num_heads, scale, sources, [inner.out_proj, m.proj], _float(p), longest=_longest(m))


@dataclass(frozen=True)
class Family:
    read: Callable[[Any], Attention]
    parts: frozenset[str]  # children and parameters; those that end in ? may be missing
    buffers: frozenset[str] = frozenset()


def _family(read: Callable[[Any], Attention], parts: str, buffers: str = "") -> Family:
    return Family(read, frozenset(parts.split()), frozenset(buffers.split()))


# Class name -> how it is read. nanoGPT's, Hugging Face's, and those of "Build a Large Language Model (From Scratch)".
_FAMILIES = {
    "GPT2Attention": _family(_gpt2, "c_attn c_proj attn_dropout resid_dropout", "bias masked_bias"),
    "CausalSelfAttention": _family(_nanogpt, "c_attn c_proj attn_dropout resid_dropout", "bias"),
    "MultiHeadAttention": _family(_three, "W_query W_key W_value out_proj dropout", "mask cache_k cache_v"),
    "MultiHeadAttentionCombinedQKV": _family(_joint, "qkv proj dropout?", "mask"),
    "MHAEinsum": _family(_einsum, "W_query W_key W_value bias_q? bias_k? bias_v? out_proj dropout", "mask"),
    "MHAPyTorchScaledDotProduct": _family(_joint, "qkv proj"),
    "MHAPyTorchSDPAWithoutFlash": _family(_joint, "qkv proj", "mask"),
    "MHAPyTorchClass": _family(_torch_class, "multihead_attn proj", "mask"),
    "MultiHeadAttentionWrapper": _family(_wrapper, "heads out_proj?"),
    "CausalAttention": _family(_single, "W_query W_key W_value dropout", "mask"),
}
_FAMILIES["PyTorchMultiHeadAttention"] = _FAMILIES["MHAPyTorchScaledDotProduct"]
_FAMILIES["Ch03_MHA"] = _FAMILIES["MultiHeadAttention"]
_FAMILIES["Ch03_MHA_Wrapper"] = _FAMILIES["MultiHeadAttentionWrapper"]


def _has(module: nn.Module, family: Family) -> bool:
    found = {*module._modules, *module._parameters}
    needed = {part for part in family.parts if not part.endswith("?")}
    return needed <= found <= {part.rstrip("?") for part in family.parts} and set(module._buffers) <= family.buffers


def _width(source: Any) -> int:
    """Of what a projection reads."""
    if not isinstance(source, nn.Module):
        return int(source[0].shape[1])
    return int(source.nx if hasattr(source, "nx") else source.in_features)  # type: ignore[arg-type]


def attention_of(module: nn.Module) -> Attention | None:
    """How the module is read now, or None where it is not one of the known ones."""
    family = _FAMILIES.get(original_class(module).__name__)
    if family is None or not _has(module, family):
        return None
    try:
        read = family.read(module)
    except (AttributeError, TypeError, IndexError):
        return None
    return read if read.attention_p >= 0 and read.out_p >= 0 else None


def is_gpt2(module: nn.Module) -> bool:
    return original_class(module).__module__ == "transformers.models.gpt2.modeling_gpt2"


def is_harmless(name: str, value: Any) -> bool:
    """Whether a keyword argument of Hugging Face's layers changes nothing that they compute."""
    return value is None or value is False or name in _HARMLESS


_HARMLESS = {"use_cache", "position_ids", "cache_position", "num_items_in_batch", "ignore_index", "shift_labels"}


class AttentionSwap(Swap):
    name, flag, owns_children = "attention", "attention", True

    @classmethod
    def candidate(cls, module: nn.Module) -> bool:
        return original_class(module).__name__ in _FAMILIES

    @classmethod
    def check(cls, module: nn.Module) -> None:
        read = attention_of(module)
        if read is None:
            raise Decline("it has parts or dropouts that the known ones of its name have not")
        if is_gpt2(module):
            check_gpt2(module)

    @classmethod
    def example(cls, module: nn.Module) -> Any:
        read = attention_of(module)
        return None if read is None else probe(_width(read.sources[0]))

    @classmethod
    def run(cls, module: nn.Module, original: type[nn.Module], args: Any, kwargs: Any) -> Any:
        read = attention_of(module)
        if read is None:
            return fall_back(module, original, args, kwargs, "its parts are not those that were swapped any more")
        if is_gpt2(module):
            return _run_gpt2(module, original, read, *args, **kwargs)
        if len(args) + len(kwargs) != 1 and any((*args[1:], *kwargs.values())):
            return fall_back(module, original, args, kwargs, "it is called with a cache or other arguments")
        x = args[0] if args else kwargs.get("x")
        if not isinstance(x, Tensor) or x.dim() != 3 or (read.longest is not None and x.shape[1] > read.longest):
            return original.forward(module, *args, **kwargs)
        q, k, v = read.project(x)
        return read.finish(ops.causal_attention(q, k, v, scale=read.scale, dropout_p=read.attention_p))


# ---- Hugging Face's GPT-2 --------------------------------------------------------------------------------------------


def check_gpt2(module: Any) -> None:
    """Of an attention or a block: what this transformers' GPT-2 must be like."""
    version = str(getattr(sys.modules.get("transformers"), "__version__", "unknown"))
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) < 5:
        raise Decline(f"transformers {version} calls it in another way; 5.0 and later are known")
    if getattr(module, "is_cross_attention", False):
        raise Decline("cross-attention")


def _run_gpt2(
    module: Any,
    original: type[nn.Module],
    read: Attention,
    hidden_states: Tensor,
    past_key_values: Any = None,
    attention_mask: Any = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    output_attentions: Any = False,
    **kwargs: Any,
) -> Any:
    """(attention output, None), as its sdpa gives it."""
    reason = None
    kv_lens = None
    cached = past_key_values.get_seq_length(module.layer_idx) if past_key_values is not None else 0
    implementation = module.config._attn_implementation
    if encoder_hidden_states is not None:
        reason = "cross-attention"
    elif implementation != "sdpa":
        reason = f"attn_implementation={implementation!r} has results of its own"
    elif output_attentions or not all(is_harmless(name, value) for name, value in kwargs.items()):
        asked = [name for name, value in kwargs.items() if not is_harmless(name, value)]
        reason = f"it was asked for {', '.join(asked) or 'attention weights'}"
    elif past_key_values is not None and type(past_key_values).__name__ != "DynamicCache":
        reason = f"{type(past_key_values).__name__} is not a DynamicCache"
    elif attention_mask is not None:
        kv_lens = _kv_lens(attention_mask)
        if kv_lens is None:
            reason = "an attention mask that hides more than the future and the end of each row (left padding)"
    elif cached and hidden_states.shape[1] > 1:
        reason = "several tokens at once behind a cache"
    if reason is not None:
        args = (hidden_states, past_key_values, attention_mask, encoder_hidden_states, encoder_attention_mask)
        return fall_back(module, original, args, {"output_attentions": output_attentions, **kwargs}, reason)
    q, k, v = read.project(hidden_states)
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, module.layer_idx)
    y = ops.causal_attention(q, k, v, scale=read.scale, dropout_p=read.attention_p, kv_lens=kv_lens)
    return read.finish(y), None


def _kv_lens(mask: Any) -> Tensor | None:
    """Valid keys of each row of a causal bool mask (B, 1, T, T) of right-padded rows; None for any other mask.

    Every layer gets the same mask, so the answer is kept on it.
    """
    if torch.compiler.is_compiling() or not isinstance(mask, Tensor) or not mask.is_cpu:
        return None
    if not hasattr(mask, "_llmfast_kv_lens"):
        lens = None
        if mask.dtype is torch.bool and mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2] == mask.shape[3]:
            T = mask.shape[-1]
            lens = mask[:, 0, -1].sum(-1)
            if not torch.equal(mask, visible(T, T, lens, None, mask.device)):
                lens = None
        mask._llmfast_kv_lens = lens  # type: ignore[attr-defined]
    return mask._llmfast_kv_lens  # type: ignore[attr-defined]
