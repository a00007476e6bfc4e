"""Hugging Face's GPT-2 (transformers.GPT2LMHeadModel): config.json and safetensors or pytorch_model.bin."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmfast.config import GPTConfig
from llmfast.errors import UserError
from llmfast.interop.source import Model, Source
from llmfast.interop.target import GPT2_SIZES, need, need_default_scale, with_biases, write_json
from llmfast.nn.weights import Stored
from llmfast.tokenizer import Tokenizer
from llmfast.tokenizer import hugging_face as tokenizer_files

logger = logging.getLogger("llmfast")

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in, out) there
ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu", "relu": "relu"
}  # fmt: skip
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, in files of older versions
_ALIASES = {
    name: name for name in ("vocab_size", "n_embd", "n_layer", "n_head")
} | {"n_positions": "block_size", "resid_pdrop": "dropout", "layer_norm_epsilon": "layer_norm_eps"}  # fmt: skip


def read(source: Source) -> Model:
    """A GPT2LMHeadModel or GPT2Model, tied or untied; ``source.config`` is its config.json."""
    root = "transformer." if "transformer.wte.weight" in source.tensors else ""
    stored: dict[str, Stored] = {}
    for name in source.tensors:
        if not name.endswith(_BUFFERS):
            ours = name if name.startswith("lm_head.") else "transformer." + name.removeprefix(root)
            stored[ours] = source.take([name], transposed=name.endswith(CONV1D))
    vocab_size, n_embd = source.shape(root + "wte.weight")
    values = dict(
        vocab_size=vocab_size,
        n_embd=n_embd,
        block_size=source.shape(root + "wpe.weight")[0],
        n_layer=source.layers(root + "h."),
        tie_embeddings=_tied(source, root),
        **_options(source),
    )
    if values["tie_embeddings"]:
        stored.pop("lm_head.weight", None)
    return Model(values, stored, source.config, _ALIASES, {"n_head": "the number of heads leaves no trace in weights"})


def _tied(source: Source, root: str) -> bool:
    tied = source.config.get("tie_word_embeddings")
    if tied is None:
        if "lm_head.weight" not in source.tensors:
            return True
        head, table = source.tensors["lm_head.weight"], source.tensors[root + "wte.weight"]
        return source.same("lm_head.weight", root + "wte.weight") or torch.equal(head, table)
    if not isinstance(tied, bool):
        raise UserError(f"{source.config_file}: tie_word_embeddings is {tied!r}")
    return tied


def _options(source: Source) -> dict[str, Any]:
    """What config.json says under names and in values of its own."""
    config, file = source.config, source.config_file
    activation = config.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UserError(f"{file}: activation_function {activation!r} is none of {', '.join(ACTIVATIONS)}")
    inner, n_embd = config.get("n_inner"), config.get("n_embd")
    if inner is not None and inner != (4 * n_embd if isinstance(n_embd, int) else None):
        raise UserError(f"{file}: n_inner is {inner!r}, and llmfast has MLPs of four times the width only")
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if config.get(name, False) is not False:
            raise UserError(f"{file}: {name} is on, which llmfast has not")
    rates = [config[name] for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop") if name in config]
    if any(rate != rates[0] for rate in rates):
        logger.warning("%s: one dropout for all in llmfast: resid_pdrop's %s", file, config.get("resid_pdrop"))
    options: dict[str, Any] = dict(activation=ACTIVATIONS[activation])
    if config.get("scale_attn_weights", True) is False:
        options["attn_scale"] = 1.0
    return options


def write(config: GPTConfig, weights: Mapping[str, Tensor], folder: Path, tokenizer: Tokenizer | None) -> None:
    """config.json, generation_config.json and model.safetensors, which GPT2LMHeadModel.from_pretrained loads."""
    default = config.softmax_scale == config.head_size**-0.5
    if config.softmax_scale != 1.0:
        need_default_scale(config, "Hugging Face's GPT-2")
    need(config, "Hugging Face's GPT-2", activation=config.activation, lm_head_bias=False, attn_out_proj=True)
    state = with_biases(config, weights)
    dtype = str(state["transformer.wte.weight"].dtype).removeprefix("torch.")
    end = tokenizer.eot_id if tokenizer is not None else 50256 if config.vocab_size in GPT2_SIZES else None
    tokens = {"bos_token_id": end, "eos_token_id": end}
    values = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[config.activation],
        **{name: config.dropout for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")},
        "layer_norm_epsilon": config.layer_norm_eps,
        "scale_attn_weights": default,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": dtype,
        "torch_dtype": dtype,  # transformers before 4.56
        **tokens,
    }
    stored = {name: (t.T if name.endswith(CONV1D) else t).contiguous() for name, t in state.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", values)
    write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})
    if tokenizer is not None:
        tokenizer_files.write(tokenizer, folder, config.block_size)
