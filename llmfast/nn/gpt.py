"""GPT: a pre-norm decoder with learned positions (Radford et al. 2019), configured by ``GPTConfig``.

Shapes: B batch, T sequence, C width (n_embd), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmfast import ops
from llmfast.config import GPTConfig
from llmfast.nn import pretrained
from llmfast.nn.embedding import document_positions, embed, token_rows
from llmfast.nn.kv_cache import KVCache
from llmfast.nn.layers import Block, LayerNorm, Linear
from llmfast.nn.lora import LoRALinear
from llmfast.nn.weights import Weights, fill


class Decoder(nn.Module):
    """Everything but the output head, under the names that nanoGPT and Hugging Face give it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte, self.wpe = _table(config.vocab_size, config.n_embd), _table(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, bias=config.bias, eps=config.layer_norm_eps)


def _table(rows: int, width: int) -> nn.Embedding:
    """An embedding that nobody has filled: ``normal_`` on the meta device would load PyTorch's compiler, which takes
    seconds and 70 MB."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class GPT(nn.Module):
    """A GPT-2-style language model.

    Parameter names are nanoGPT's and Hugging Face's (``transformer.h.0.attn.c_attn.weight``), weights (out, in).
    ``torch.manual_seed`` alone decides the initial weights. Set ``activation_checkpointing`` to recompute each
    block's activations in backward instead of keeping them; gradients stay the same, dropout included.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        device = torch.get_default_device()
        with torch.device("meta"):  # where what the parts draw for themselves costs nothing
            self.transformer = Decoder(config)
            self._add_head()
        self.to_empty(device=device)
        self._tie()
        self.init_weights()

    def _add_head(self) -> None:
        config = self.config
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=config.lm_head_bias)

    @property
    def head_weight(self) -> Tensor:
        """The weight of the output head, (outputs, C)."""
        return self.lm_head.weight

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> GPT:
        # As nn.Module has it, but for empty_like, which on the meta device loads sympy (see _table).
        return self._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), recurse)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> GPT:
        # Moves that make new parameters (to_empty from the meta device) would part the tied pair.
        super()._apply(fn, recurse)
        self._tie()
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all parameters anew from torch's default generator.

        ``gpt2``: N(0, 0.02), the projections into the residual stream N(0, 0.02 / sqrt(2 n_layer)), biases 0
        (Radford et al. 2019, positions as in nanoGPT and Hugging Face).
        ``pytorch``: the defaults of nn.Embedding, N(0, 1), and nn.Linear, weights and biases uniform in
        +-1 / sqrt(inputs); a tied matrix takes the Linear's.
        """
        if self.transformer.wte.weight.is_meta:
            return
        gpt2 = self.config.init == "gpt2"
        residual_std = 0.02 * (2 * self.config.n_layer) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, LayerNorm):
                module.weight.fill_(1.0)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding) and module.weight is not self.head_weight:
                module.weight.normal_(0.0, 0.02 if gpt2 else 1.0)
            elif isinstance(module, Linear):
                bound = module.in_features**-0.5
                if gpt2:
                    module.weight.normal_(0.0, residual_std if name.endswith("c_proj") else 0.02)
                else:
                    module.weight.uniform_(-bound, bound)
                if module.bias is not None:
                    module.bias.zero_() if gpt2 else module.bias.uniform_(-bound, bound)

    def num_parameters(self) -> int:
        """Number of parameters, a tied matrix counted once."""
        return sum(p.numel() for p in self.parameters())

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        doc_ids: Tensor | None = None,
        reduction: str = "mean",
        return_logits: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(logits, loss) of token ids.

        ``idx`` (B, T) int64 or int32; ``targets`` (B, T) int64, -100 is ignored. Without targets: logits (B, T, V)
        and None. With targets: the cross-entropy in nats, and logits only with ``return_logits``; ``reduction`` is
        "mean" or "sum", a scalar, or "none", losses (B, T) with 0 where ignored.
        With ``cache``, ``idx`` continues the cached tokens and is added to them.
        ``doc_ids`` (B, T) int keeps the documents packed into a row apart: each run of equal ids is read as if it
        stood alone, with positions of its own from 0 on. A row must not use an id twice.
        Raises ``ValueError`` for a bad shape or dtype, a context longer than block_size, and, on the CPU, for ids
        outside the vocabulary.
        """
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets must have idx's shape {tuple(idx.shape)}, got {tuple(targets.shape)}")
        x, head_weight = self._read(idx, cache, doc_ids)
        head = self.lm_head
        if targets is not None and isinstance(head, LoRALinear):  # its product is none that the fused loss knows
            scores = head(x)
            losses = F.cross_entropy(scores.float().transpose(1, 2), targets, reduction="none")
            total = losses if reduction == "none" else losses.sum()
            loss = total / (targets != -100).sum().clamp(min=1) if reduction == "mean" else total
            return scores if return_logits else None, loss
        logits = head(x) if targets is None or return_logits else None
        if targets is None:
            return logits, None
        head_weight = self.head_weight if head_weight is None else head_weight
        return logits, ops.linear_cross_entropy(x, head_weight, targets, bias=head.bias, reduction=reduction)

    def hidden_states(self, idx: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """What the output head reads: the normalised last hidden states (B, T, C) of ``idx`` (B, T).

        With a cache no gradient is recorded.
        """
        return self._read(idx, cache)[0]

    def _read(self, idx: Tensor, cache: KVCache | None, doc_ids: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(hidden states, weight of the output head as the loss has to use it; None: as it is)."""
        if cache is not None and torch.is_grad_enabled():
            with torch.no_grad():
                return self._read(idx, cache, doc_ids)
        T = self._check(idx)
        if doc_ids is not None and (doc_ids.shape != idx.shape or cache is not None):
            got = "a cache" if cache is not None else f"shape {tuple(doc_ids.shape)}"
            raise ValueError(f"doc_ids must have idx's shape {tuple(idx.shape)} and no cache beside it, got {got}")
        x, head_weight = self._embed(idx, cache, doc_ids)
        branch: Any = None  # the first block has none
        if cache is not None:
            for block, layer in zip(self.transformer.h, cache.layers(T), strict=True):
                x, branch = block(x, branch, layer)
            cache.advance(T)
        elif self.activation_checkpointing and torch.is_grad_enabled():
            for block in self.transformer.h:
                x, branch = checkpoint(block, x, branch, None, doc_ids, use_reentrant=False)
        else:
            for block in self.transformer.h:
                x, branch = block(x, branch, None, doc_ids)
        return self.transformer.ln_f.add(branch, x, self.config.dropout if self.training else 0.0)[0], head_weight

    def _check(self, idx: Tensor) -> int:
        if idx.dim() != 2 or idx.numel() == 0:
            raise ValueError(f"idx must be (batch, sequence) and not empty, got shape {tuple(idx.shape)}")
        if idx.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"idx must hold int64 or int32 token ids, got {idx.dtype}")
        if idx.shape[1] > self.config.block_size:
            raise ValueError(f"idx holds {idx.shape[1]} tokens, block_size is {self.config.block_size}")
        return idx.shape[1]

    def _embed(self, idx: Tensor, cache: KVCache | None, doc_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wpe: Tensor = self.transformer.wpe.weight
        head_weight = None
        if doc_ids is not None:
            x = self._token_rows(idx) + F.embedding(document_positions(doc_ids), wpe)
        elif cache is not None:
            x = self._token_rows(idx) + wpe[cache.positions(*idx.shape)]
        else:
            x, head_weight = embed(idx, self.transformer.wte.weight, wpe, self.head_weight)
        return ops.dropout(x, self.config.dropout if self.training else 0.0), head_weight

    def _token_rows(self, idx: Tensor) -> Tensor:
        return token_rows(idx, self.transformer.wte.weight)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``directory`` (made if missing).

        Of a model with adapters these alone are written, in PEFT's format (``llmfast.nn.adapter``).
        """
        pretrained.save(self, Path(directory))

    @classmethod
    def from_pretrained(cls, path: str | Path, **overrides: Any) -> GPT:
        """The model at ``path``, in float32 on the CPU: a directory that ``save_pretrained`` wrote, or another
        program's checkpoint (docs/interop.md); or one of GPT-2's names, "gpt2" to "gpt2-xl", which are fetched.

        ``overrides`` replace ``dropout``, ``attn_scale`` and ``activation``, and tell what a file cannot, such as
        ``n_head``. Raises ``UserError`` where ``path`` holds no such model, or where something must be told.
        """
        config, weights = _open(Path(path), overrides)
        weights.bound(config)
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        fill(model, weights)
        return model


def _open(path: Path, overrides: dict[str, Any]) -> tuple[GPTConfig, Weights]:
    if pretrained.is_saved(path):
        return pretrained.load(path, overrides)
    from llmfast import interop  # a door upwards (docs/architecture.md): only for files of other programs

    return interop.load(path, **overrides)
