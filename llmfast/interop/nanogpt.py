"""nanoGPT's ckpt.pt, with and without biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmfast.config import GPTConfig
from llmfast.errors import UserError
from llmfast.interop.source import Model, Source
from llmfast.interop.target import need, need_default_scale, with_biases

_ALIASES = {name: name for name in ("vocab_size", "block_size", "n_embd", "n_layer", "n_head", "bias", "dropout")}


def read(source: Source) -> Model:
    """A nanoGPT model: {"model": state_dict, "model_args": {...}, ...}, or the state_dict alone.

    Its activation is the erf form of GELU, as nanoGPT has had since February 2023.
    """
    root = "transformer." if "transformer.wte.weight" in source.tensors else ""
    stored = {
        (name if name.startswith("lm_head.") else "transformer." + name.removeprefix(root)): source.take([name])
        for name in source.tensors
        if not (name.endswith(".attn.bias") and source.tensors[name].dim() == 4)  # the causal mask
    }
    vocab_size, n_embd = source.shape(root + "wte.weight")
    tied = "lm_head.weight" not in source.tensors or source.same("lm_head.weight", root + "wte.weight")
    tied = tied or torch.equal(source.tensors["lm_head.weight"], source.tensors[root + "wte.weight"])
    if tied:
        stored.pop("lm_head.weight", None)
    values = dict(
        vocab_size=vocab_size,
        n_embd=n_embd,
        block_size=source.shape(root + "wpe.weight")[0],
        n_layer=source.layers(root + "h."),
        bias=root + "ln_f.bias" in source.tensors,
        activation="gelu",
        tie_embeddings=tied,
    )
    arguments = source.extra.get("model_args", source.config)
    if not isinstance(arguments, dict):
        raise UserError(f"{source.path}: model_args is a {type(arguments).__name__}, not a dictionary")
    return Model(values, stored, arguments, _ALIASES, {"n_head": "the number of heads leaves no trace in weights"})


def write(config: GPTConfig, weights: Mapping[str, Tensor], folder: Path) -> None:
    """ckpt.pt with a fresh optimizer's state: ``sample.py`` and ``train.py --init_from=resume`` take it."""
    options = dict(tie_embeddings=True, lm_head_bias=False, attn_out_proj=True, layer_norm_eps=1e-5)
    need(config, "nanoGPT", activation="gelu", **options)
    need_default_scale(config, "nanoGPT")
    if config.has_qkv_bias and not config.bias:
        raise UserError("nanoGPT cannot hold this model: qkv_bias is True where bias is False")
    state = with_biases(config, weights) if config.bias else {name: t.contiguous() for name, t in weights.items()}
    groups = [[t for t in state.values() if (t.dim() >= 2) is matrices] for matrices in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
        lr=6e-4,
        betas=(0.9, 0.95),
    )
    state["lm_head.weight"] = state["transformer.wte.weight"]
    arguments = {name: getattr(config, name) for name in _ALIASES.values()}
    content = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "model_args": arguments,
        "iter_num": 0,
        "best_val_loss": 1e9,
        "config": {},
    }
    torch.save(content, folder / "ckpt.pt")
