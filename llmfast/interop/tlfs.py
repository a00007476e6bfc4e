"""train-llm-from-scratch's transformer.pt in its three generations.

Today's has an output projection after attention, 2025's has none, and the earliest, which has none either, scales
attention scores by 1/sqrt(n_embd) instead of 1/sqrt(head size): of that the file itself shows nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmfast.config import GPTConfig
from llmfast.errors import UserError
from llmfast.interop.source import Model, Source
from llmfast.interop.target import need, need_default_scale, with_biases, write_json
from llmfast.nn.weights import Stored

_LAYER = {
    "ln1": "ln_1", "ln2": "ln_2", "attn.proj": "attn.c_proj", "mlp.hidden": "mlp.c_fc", "mlp.proj": "mlp.c_proj"
}  # fmt: skip
_REST = {
    "token_embed": "transformer.wte", "position_embed": "transformer.wpe", "layer_norm": "transformer.ln_f",
    "lm_head": "lm_head",
}  # fmt: skip
PARTS = ("query", "key", "value")
_ALIASES = {
    "n_head": "n_head", "n_embed": "n_embd", "context_length": "block_size", "vocab_size": "vocab_size",
    "n_blocks": "n_layer", "attn_scale": "attn_scale",
}  # fmt: skip
_EARLY_NOTE = re.compile(r"sqrt\(n_embe?d\)")


def read(source: Source) -> Model:
    """A Transformer: {"model_state_dict": ...} or the state_dict alone."""
    n_layer, n_head = source.layers("attn_blocks."), source.layers("attn_blocks.0.attn.heads.")
    stored: dict[str, Stored] = {}
    for name in source.tensors:
        if ".attn.heads." not in name and name != "pos_idxs":
            stored[_translated(name)] = source.take([name])
    for layer in range(n_layer):
        heads = f"attn_blocks.{layer}.attn.heads."
        names = [f"{heads}{head}.{part}.weight" for part in PARTS for head in range(n_head)]
        stored[f"transformer.h.{layer}.attn.c_attn.weight"] = source.take(names)
        known = {*names, *(f"{heads}{head}.tril" for head in range(n_head))}
        if unknown := [name for name in source.tensors if name.startswith(heads) and name not in known]:
            raise UserError(f"{source.path} holds {unknown[0]}, which its model has no place for")
    vocab_size, n_embd = source.shape("token_embed.weight")
    values = dict(
        vocab_size=vocab_size,
        n_embd=n_embd,
        block_size=source.shape("position_embed.weight")[0],
        n_layer=n_layer,
        n_head=n_head,
        qkv_bias=False,
        activation="relu",
        tie_embeddings=False,
        lm_head_bias=True,
        attn_out_proj="attn_blocks.0.attn.proj.weight" in source.tensors,
        init="pytorch",
    )
    own = source.extra.get("cfg")
    settings = own if isinstance(own, dict) else source.config
    asks = {}
    if not values["attn_out_proj"] and not settings:
        asks["attn_scale"] = (
            "without an output projection it is of 2025, attn_scale=none, or of the earliest kind, attn_scale=n_embd"
        )
    elif not values["attn_out_proj"] and _EARLY_NOTE.search(str(settings.get("note", ""))):
        values["attn_scale"] = "n_embd"
    return Model(values, stored, settings, _ALIASES, asks)


def _translated(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in _REST:
        return f"{_REST[module]}.{kind}"
    found = re.fullmatch(r"attn_blocks\.(\d+)\.(.+)", module)
    return f"transformer.h.{found[1]}.{_LAYER[found[2]]}.{kind}" if found and found[2] in _LAYER else name


def write(config: GPTConfig, weights: Mapping[str, Tensor], folder: Path) -> None:
    """transformer.pt of the generation that the model belongs to, and its configuration in config.json."""
    program = "train-llm-from-scratch"
    need(config, program, layer_norm_eps=1e-5, activation="relu")
    if config.has_qkv_bias:
        raise UserError(f"{program} cannot hold this model: qkv_bias is True, and it has False only")
    if config.attn_out_proj or config.softmax_scale != config.n_embd**-0.5:
        need_default_scale(config, program)
    state = with_biases(config, weights, qkv=False)
    state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    state.setdefault("lm_head.bias", torch.zeros(config.vocab_size, dtype=state["lm_head.weight"].dtype))
    modules = {ours: theirs for theirs, ours in _REST.items()}
    parts = {ours: theirs for theirs, ours in _LAYER.items()}
    triangle = torch.ones(config.block_size, config.block_size).tril()
    content: dict[str, Tensor] = {"pos_idxs": torch.arange(config.block_size)}
    for name, t in state.items():
        module, _, kind = name.rpartition(".")
        if module in modules:
            content[f"{modules[module]}.{kind}"] = t
            continue
        layer, part = module.removeprefix("transformer.h.").split(".", 1)
        if part == "attn.c_attn":
            for number, head in enumerate(t.view(3, config.n_head, config.head_size, config.n_embd).unbind(1)):
                prefix = f"attn_blocks.{layer}.attn.heads.{number}."
                content[f"{prefix}tril"] = triangle
                content |= {f"{prefix}{kind}.weight": w.clone() for kind, w in zip(PARTS, head, strict=True)}
        else:
            content[f"attn_blocks.{layer}.{parts[part]}.{kind}"] = t
    torch.save({"model_state_dict": content}, folder / "transformer.pt")
    options = {theirs: getattr(config, ours) for theirs, ours in _ALIASES.items()}
    if config.attn_scale is None:
        del options["attn_scale"]
    write_json(folder / "config.json", options)
