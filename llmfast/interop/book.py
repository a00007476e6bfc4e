"""GPTModel of "Build a Large Language Model (From Scratch)": a state_dict in model.pth, with and without QKV bias."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmfast.config import GPTConfig
from llmfast.interop.source import Model, Source
from llmfast.interop.target import need, need_default_scale, with_biases, write_json
from llmfast.nn.weights import Stored

_LAYER = {
    "norm1.scale": "ln_1.weight", "norm1.shift": "ln_1.bias", "norm2.scale": "ln_2.weight", "norm2.shift": "ln_2.bias",
    "att.out_proj.weight": "attn.c_proj.weight", "att.out_proj.bias": "attn.c_proj.bias",
    "ff.layers.0.weight": "mlp.c_fc.weight", "ff.layers.0.bias": "mlp.c_fc.bias",
    "ff.layers.2.weight": "mlp.c_proj.weight", "ff.layers.2.bias": "mlp.c_proj.bias",
}  # fmt: skip
_FAST = {  # GPTModelFast
    "norm1.weight": "ln_1.weight", "norm1.bias": "ln_1.bias", "norm2.weight": "ln_2.weight", "norm2.bias": "ln_2.bias",
    "att.qkv.weight": "attn.c_attn.weight", "att.qkv.bias": "attn.c_attn.bias",
    "att.proj.weight": "attn.c_proj.weight", "att.proj.bias": "attn.c_proj.bias",
}  # fmt: skip
_REST = {
    "tok_emb.weight": "transformer.wte.weight", "pos_emb.weight": "transformer.wpe.weight",
    "final_norm.scale": "transformer.ln_f.weight", "final_norm.shift": "transformer.ln_f.bias",
    "final_norm.weight": "transformer.ln_f.weight", "final_norm.bias": "transformer.ln_f.bias",
    "out_head.weight": "lm_head.weight",
}  # fmt: skip
QUERY, KEY, VALUE = "att.W_query.", "att.W_key.", "att.W_value."
_ALIASES = {
    "vocab_size": "vocab_size", "context_length": "block_size", "emb_dim": "n_embd", "n_heads": "n_head",
    "n_layers": "n_layer", "drop_rate": "dropout", "qkv_bias": "qkv_bias", "n_head": "n_head",
}  # fmt: skip


def read(source: Source) -> Model:
    """A GPTModel or GPTModelFast. The number of heads stands in the config.json beside it, or must be told."""
    stored: dict[str, Stored] = {}
    has_qkv_bias = False
    for name in source.tensors:
        layer, part = _split(name)
        ours = f"transformer.h.{layer}."
        if part.startswith(QUERY):
            kind = part.removeprefix(QUERY)
            names = [name.replace(QUERY, other) for other in (QUERY, KEY, VALUE)]
            stored[f"{ours}attn.c_attn.{kind}"] = source.take(names)
            has_qkv_bias |= kind == "bias"
        elif part.startswith((KEY, VALUE)):
            source.take([name.replace(KEY, QUERY).replace(VALUE, QUERY)])
        elif part != "att.mask":
            has_qkv_bias |= part == "att.qkv.bias"
            known = _LAYER.get(part) or _FAST.get(part)
            stored[ours + known if layer and known else _REST.get(name, name)] = source.take([name])
    vocab_size, n_embd = source.shape("tok_emb.weight")
    source.shape("out_head.weight")
    tied = source.same("tok_emb.weight", "out_head.weight")
    if tied:
        del stored["lm_head.weight"]
    values = dict(
        vocab_size=vocab_size,
        n_embd=n_embd,
        block_size=source.shape("pos_emb.weight")[0],
        n_layer=source.layers("trf_blocks."),
        qkv_bias=has_qkv_bias,
        activation="gelu_tanh",
        tie_embeddings=tied,
        init="pytorch",
    )
    asks = {"n_head": "the number of heads leaves no trace in weights; the book has 12 for GPT-2 124M, 25 for 1558M"}
    return Model(values, stored, source.config, _ALIASES, asks)


def _split(name: str) -> tuple[str, str]:
    """(layer number, the rest) of a layer's tensor; ("", name) of another."""
    if not name.startswith("trf_blocks."):
        return "", name
    _, layer, rest = (*name.split(".", 2), "", "")[:3]
    return layer, rest


def write(config: GPTConfig, weights: Mapping[str, Tensor], folder: Path) -> None:
    """model.pth, a state_dict that ``GPTModel(config).load_state_dict`` takes, and its configuration in config.json."""
    options = dict(lm_head_bias=False, attn_out_proj=True, layer_norm_eps=1e-5)
    need(config, "the book's GPTModel", activation="gelu_tanh", **options)
    need_default_scale(config, "the book's GPTModel")
    state = with_biases(config, weights, qkv=config.has_qkv_bias)
    mask = torch.ones(config.block_size, config.block_size).triu(1)
    names = {ours: theirs for theirs, ours in reversed(_REST.items())}
    parts = {ours: theirs for theirs, ours in _LAYER.items()}
    content: dict[str, Tensor] = {}
    for name, t in state.items():
        if name in names:
            content[names[name]] = t
            continue
        layer, part = name.removeprefix("transformer.h.").split(".", 1)
        prefix, kind = f"trf_blocks.{layer}.", part.rpartition(".")[2]
        if part.startswith("attn.c_attn."):
            content[f"{prefix}att.mask"] = mask
            for theirs, third in zip((QUERY, KEY, VALUE), t.chunk(3), strict=True):
                content[f"{prefix}{theirs}{kind}"] = third.clone()
        else:
            content[prefix + parts[part]] = t
    content.setdefault("out_head.weight", content["tok_emb.weight"])
    torch.save(content, folder / "model.pth")
    settings = {theirs: getattr(config, ours) for theirs, ours in _ALIASES.items() if theirs != "n_head"}
    write_json(folder / "config.json", {**settings, "qkv_bias": config.has_qkv_bias})
