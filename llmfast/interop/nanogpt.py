"""nanoGPT's ckpt.pt, with and without biases."""

from __future__ import annotations

import torch

from llmfast.errors import UserError
from llmfast.interop.source import Model, Source

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
        raise UserError(f"{source.path}: model_args is {arguments!r}")
    return Model(values, stored, arguments, _ALIASES, {"n_head": "the number of heads leaves no trace in weights"})
