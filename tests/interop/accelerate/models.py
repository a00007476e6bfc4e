"""Small models of other codebases, with weights large enough that a wrong layer shows."""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

V, T, C, HEADS, LAYERS = 97, 128, 48, 3, 2


@functools.cache
def peer(path: str, module: str) -> Any:
    """A module from the checkout of a peer; skips where there is none."""
    if "LLMFAST_PEERS" not in os.environ:
        pytest.skip("LLMFAST_PEERS is not set")
    folder = Path(os.environ["LLMFAST_PEERS"]) / path
    if not (folder / f"{module}.py").exists():
        pytest.skip(f"no {path}/{module}.py under LLMFAST_PEERS")
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(folder))


def notebook_classes(path: str, *needed: str) -> dict[str, Any]:
    """The classes that a notebook of the book defines."""
    if "LLMFAST_PEERS" not in os.environ:
        pytest.skip("LLMFAST_PEERS is not set")
    file = Path(os.environ["LLMFAST_PEERS"]) / "LLMs-from-scratch" / path
    if not file.exists():
        pytest.skip(f"no {path} under LLMFAST_PEERS")
    found: dict[str, Any] = {"torch": torch, "nn": nn}
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and any(f"class {name}(" in source for name in needed):
            kept = source.split("\nmha_")[0].split("\ntorch.manual_seed")[0]
            exec(compile("\n".join(kept.splitlines()), path, "exec"), found)
    return {name: found[name] for name in needed}


def spread(model: nn.Module) -> nn.Module:
    """Every parameter random, so that no layer passes its input through."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(0.15 * noise if p.dim() > 1 else 1 + 0.3 * noise)
    return model.train()


def hugging_face(kind: str = "GPT2LMHeadModel", dropout: float = 0.0, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pdrop = {name: dropout for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    sizes = dict(vocab_size=V, n_positions=T, n_embd=C, n_layer=LAYERS, n_head=HEADS, bos_token_id=0, eos_token_id=0)
    config = transformers.GPT2Config(**{**sizes, **pdrop, "pad_token_id": 0, **options})
    return spread(getattr(transformers, kind)(config))


def nanogpt(dropout: float = 0.0, bias: bool = True) -> Any:
    module = peer("nanoGPT", "model")
    sizes = dict(block_size=T, vocab_size=V, n_layer=LAYERS, n_head=HEADS, n_embd=C)
    return spread(module.GPT(module.GPTConfig(**sizes, dropout=dropout, bias=bias)))


BOOK = {
    "ch04": ("LLMs-from-scratch/ch04/01_main-chapter-code", "gpt", "GPTModel"),
    "kv cache": ("LLMs-from-scratch/ch04/03_kv-cache", "gpt_with_kv_cache", "GPTModel"),
    "kv cache, optimized": ("LLMs-from-scratch/ch04/03_kv-cache", "gpt_with_kv_cache_optimized", "GPTModel"),
    "gqa": ("LLMs-from-scratch/ch04/04_gqa", "gpt_with_kv_gqa", "GPTModel"),
    "mla": ("LLMs-from-scratch/ch04/05_mla", "gpt_with_kv_mla", "GPTModel"),
    "swa": ("LLMs-from-scratch/ch04/06_swa", "gpt_with_kv_swa", "GPTModel"),
    "moe": ("LLMs-from-scratch/ch04/07_moe", "gpt_with_kv_moe", "GPTModel"),
    "fast": ("LLMs-from-scratch/ch05/10_llm-training-speed", "01_opt_single_gpu", "GPTModel"),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "gqa": dict(n_kv_groups=1),
    "mla": dict(latent_dim=16),
    "swa": dict(sliding_window_size=16, sliding_window_stride=2, swa_ratio=1),
    "moe": dict(hidden_dim=64, num_experts=4, num_experts_per_tok=2),
}


def book(which: str = "ch04", dropout: float = 0.0, qkv_bias: bool = False) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = peer(*BOOK[which][:2])
    sizes = dict(vocab_size=V, context_length=T, emb_dim=C, n_heads=HEADS, n_layers=LAYERS)
    settings = dict(sizes, drop_rate=dropout, qkv_bias=qkv_bias, kv_window_size=T, **OPTIONS.get(which, {}))
    return spread(getattr(module, BOOK[which][2])(settings))


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """The training loss as the users of each codebase take it."""
    y = x if y is None else y
    name = type(model).__name__
    if "GPT2" in name:
        return model(x, labels=y).loss
    if name == "GPT":
        return model(x, y)[1]
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


MODELS = {
    "hugging face": hugging_face,
    "hugging face, erf": lambda: hugging_face(activation_function="gelu", scale_attn_by_inverse_layer_idx=True),
    "nanogpt": nanogpt,
    "nanogpt without bias": lambda: nanogpt(bias=False),
    "book": book,
    "book with qkv bias": lambda: book(qkv_bias=True),
    "book with cache": lambda: book("kv cache"),
    "book with cache, optimized": lambda: book("kv cache, optimized"),
    "book, fast": lambda: book("fast"),
}
