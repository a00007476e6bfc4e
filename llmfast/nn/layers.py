"""The parts of a decoder layer: thin modules that hold the parameters and call ``llmfast.ops``.

Each serves in a model of your own too, and fills its parameters as torch.nn does. ``GPT`` makes them on the meta device
and draws all weights in one place.

Shapes: B batch, T sequence, C width (n_embd), H heads, D head size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from llmfast import ops
from llmfast.config import GPTConfig
from llmfast.nn.kv_cache import LayerCache
from llmfast.nn.lora import LoRALinear
from llmfast.nn.remade import remade
from llmfast.ops import decoder_layer as fused
from llmfast.ops.mlp import ACTIVATIONS, activate


class Linear(nn.Linear):
    """``torch.nn.Linear`` through ``ops.linear``; weight (out, in)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` through ``ops.layer_norm``, alone or together with the residual sum before it.

    Its constructor and state_dict are torch.nn's; normalising more than the last dimension stays PyTorch's.
    """

    def forward(self, x: Tensor) -> Tensor:
        if len(self.normalized_shape) > 1:
            return super().forward(x)
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, branch: Tensor, residual: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
        """(norm(s), s) of the new residual stream s = residual + dropout(branch)."""
        return ops.add_layer_norm(branch, residual, self.weight, self.bias, self.eps, dropout_p)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention (Vaswani et al. 2017); (B, T, C) -> (B, T, C).

    c_attn makes queries, keys and values of ``n_head`` heads, c_proj joins them (``out_proj``; its bias is ``bias``).
    ``qkv_bias`` None: as ``bias``. ``dropout`` acts on the attention weights in training mode. ``scale`` None:
    1 / sqrt(head size). Raises ``ValueError`` where n_head does not divide n_embd.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        qkv_bias: bool | None = None,
        out_proj: bool = True,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if n_head < 1 or n_embd % n_head:
            raise ValueError(f"n_head must divide n_embd {n_embd}, got {n_head}")
        self.n_head, self.head_size, self.dropout = n_head, n_embd // n_head, dropout
        self.scale = self.head_size**-0.5 if scale is None else scale
        self.c_attn = Linear(n_embd, 3 * n_embd, bias if qkv_bias is None else qkv_bias, device, dtype)
        self.c_proj = Linear(n_embd, n_embd, bias, device, dtype) if out_proj else None

    def forward(self, x: Tensor, cache: LayerCache | None = None, doc_ids: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        # Split along dim 2, so that the gradient of the split is written once, in the layout that c_attn wants.
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, self.head_size)
        if cache is None:
            q, k, v = qkv.unbind(2)
            p = self.dropout if self.training else 0.0
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            y = ops.causal_attention(q, k, v, scale=self.scale, dropout_p=p, doc_ids=doc_ids)
        else:
            k, v = cache.append(qkv)
            y = ops.causal_attention(qkv[:, :, 0].transpose(1, 2), k, v, scale=self.scale, kv_lens=cache.kv_lens)
        y = y.transpose(1, 2).reshape(B, T, C)
        return y if self.c_proj is None else self.c_proj(y)


class MLP(nn.Module):
    """Linear, ``activation`` ("gelu_tanh", "gelu", "relu"), linear; (..., C) -> (..., C), ``hidden`` (4 C) between."""

    def __init__(
        self,
        n_embd: int,
        hidden: int | None = None,
        *,
        activation: str = "gelu_tanh",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be {', '.join(ACTIVATIONS)}, got {activation!r}")
        hidden = 4 * n_embd if hidden is None else hidden
        self.activation = activation
        self.c_fc = Linear(n_embd, hidden, bias, device, dtype)
        self.c_proj = Linear(hidden, n_embd, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        fc, proj = self.c_fc, self.c_proj
        if not (type(fc).forward is type(proj).forward is Linear.forward):  # of another kind: adapted, int8
            h = fc(x)
            a, kept = activate(h, self.activation), h.detach()
            with remade(a, lambda: activate(kept, self.activation)):
                return proj(a)
        return ops.mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, activation=self.activation)


class Block(nn.Module):
    """One pre-norm decoder layer.

    The residual stream travels as a pair whose sum is still open, (x, branch), so that every residual sum is fused
    with the norm that follows it, also across blocks: x is the stream, branch the MLP output of the block before,
    both (B, T, C). The first block has no branch.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias, eps=config.layer_norm_eps)
        self.attn = CausalSelfAttention(
            config.n_embd,
            config.n_head,
            dropout=config.dropout,
            bias=config.bias,
            qkv_bias=config.has_qkv_bias,
            out_proj=config.attn_out_proj,
            scale=config.softmax_scale,
        )
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias, eps=config.layer_norm_eps)
        self.mlp = MLP(config.n_embd, activation=config.activation, bias=config.bias)

    def forward(
        self, x: Tensor, branch: Tensor | None, cache: LayerCache | None = None, doc_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        p = self.dropout if self.training else 0.0
        if cache is None and doc_ids is None and not torch.compiler.is_compiling():
            parts = self._plain_parts()
            if parts is not None and fused.why_not(x, *parts) is None:
                return fused.decoder_layer(x, branch, parts[0], self._options(), p, adapters=parts[1])
        if branch is None:
            y = self.ln_1(x)
        else:
            y, x = self.ln_1.add(branch, x, p)
        with _kept_once(self.ln_1, y, x, getattr(self.attn, "c_attn", None)):
            y = self.attn(y, cache, doc_ids)
        y, x = self.ln_2.add(y, x, p)
        with _kept_once(self.ln_2, y, x, getattr(self.mlp, "c_fc", None)):
            return x, self.mlp(y)

    def _options(self) -> fused.LayerOptions:
        attn = self.attn
        return fused.LayerOptions(attn.n_head, self.mlp.activation, attn.scale, self.ln_1.eps)

    def _plain_parts(self) -> tuple[tuple[Tensor | None, ...], fused.Adapters] | None:
        """The parameters, and the adapters of the products, of a layer whose parts are as they were made or adapted,
        which one call may stand in for: none of them replaced, parametrized, hooked or given a forward of its own.
        Else None."""
        ln_1, attn, ln_2, mlp = (self._modules[name] for name in ("ln_1", "attn", "ln_2", "mlp"))
        if not (type(attn) is CausalSelfAttention and type(mlp) is MLP) or _has_any_global_hook():
            return None
        products = attn._modules["c_attn"], attn._modules.get("c_proj"), mlp._modules["c_fc"], mlp._modules["c_proj"]
        norms_and_linears = (ln_1, *products[:2], ln_2, *products[2:])
        found: list[Tensor | None] = []
        for part, kinds in zip(norms_and_linears, _KINDS, strict=True):
            if part is None:
                found += (None, None)
            elif type(part) in kinds and _is_untouched(part) and part._parameters.get("weight") is not None:
                found += (part._parameters["weight"], part._parameters.get("bias"))
            else:
                return None
        same = self.ln_1.eps == self.ln_2.eps and attn.dropout == self.dropout
        if not (same and _is_untouched(attn) and _is_untouched(mlp)):
            return None
        adapted = any(type(part) is LoRALinear for part in products)
        return tuple(found), tuple(map(_adapter, products)) if adapted else fused.NO_ADAPTERS


def _adapter(linear: nn.Module | None) -> fused.LayerAdapter | None:
    if type(linear) is not LoRALinear or not linear.enabled:
        return None
    p = linear.dropout if linear.training else 0.0
    return fused.LayerAdapter(linear.lora_A, linear.full_B(), linear.scaling, p)


def _kept_once(norm: LayerNorm, y: Tensor, x: Tensor, reader: nn.Module | None) -> AbstractContextManager[None]:
    """Beside ``x``, which a norm keeps for its backward, its output ``y`` = norm(x) is not kept for an adapter's."""
    if not isinstance(reader, LoRALinear):
        return nullcontext()
    x, y_dtype = x.detach(), y.dtype
    return remade(y, lambda: ops.layer_norm(x, norm.weight, norm.bias, norm.eps).to(y_dtype))


_NORM, _LINEAR = (LayerNorm,), (Linear, LoRALinear)
_KINDS = (_NORM, _LINEAR, _LINEAR, _NORM, _LINEAR, _LINEAR)


def _is_untouched(module: nn.Module) -> bool:
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )
