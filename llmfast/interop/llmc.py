"""llm.c's model files: 256 int32 of header, then the tensors layer by layer, in float32 (version 3) or bfloat16 (5)."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmfast.config import GPTConfig
from llmfast.errors import UserError
from llmfast.interop.source import Model, Source
from llmfast.interop.target import need, need_default_scale, with_biases
from llmfast.nn.weights import Stored, map_file, typed
from llmfast.tokenizer import Tokenizer

MAGIC = 20240326
TOKENIZER_MAGIC = 20240328
OTHER_FILES = {
    20240327: "llm.c's debug state",
    TOKENIZER_MAGIC: "llm.c's tokenizer",
    20240520: "llm.c's tokens",
}
DTYPES = {3: torch.float32, 5: torch.bfloat16}
HEADER = struct.Struct("<256i")


def tensors_of(n_layer: int, C: int, V: int, T: int) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor, in the file's order; "{}" in a name is the layer, for all layers in turn."""
    layer: list[tuple[str, tuple[int, ...]]] = [
        ("ln_1.weight", (C,)), ("ln_1.bias", (C,)),
        ("attn.c_attn.weight", (3 * C, C)), ("attn.c_attn.bias", (3 * C,)),
        ("attn.c_proj.weight", (C, C)), ("attn.c_proj.bias", (C,)),
        ("ln_2.weight", (C,)), ("ln_2.bias", (C,)),
        ("mlp.c_fc.weight", (4 * C, C)), ("mlp.c_fc.bias", (4 * C,)),
        ("mlp.c_proj.weight", (C, 4 * C)), ("mlp.c_proj.bias", (C,)),
    ]  # fmt: skip
    return [
        ("transformer.wte.weight", (V, C)),
        ("transformer.wpe.weight", (T, C)),
        *((f"transformer.h.{i}.{name}", shape) for name, shape in layer for i in range(n_layer)),
        ("transformer.ln_f.weight", (C,)),
        ("transformer.ln_f.bias", (C,)),
    ]


def read(path: Path) -> tuple[Source, Model]:
    """A model file, its vocabulary without the padding."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size:
        raise UserError(f"{path} is damaged: {size:,} bytes are no llm.c model")
    magic, version, T, V, n_layer, n_head, C, padded, *_ = HEADER.unpack(head)
    if magic != MAGIC or version not in DTYPES:
        raise UserError(f"{path} has version {version} of llm.c's format; llmfast reads 3 (float32) and 5 (bfloat16)")
    numbers = dict(block_size=T, vocab_size=V, n_layer=n_layer, n_head=n_head, n_embd=C, padded_vocab_size=padded)
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"{path} is damaged: {name} is {number}")
    dtype = DTYPES[version]
    wanted = HEADER.size + dtype.itemsize * (C * (padded + T + 2) + n_layer * (12 * C * C + 13 * C))
    if size != wanted or padded < V:
        raise UserError(f"{path} is damaged: {size:,} bytes where its header wants {wanted:,}")
    data, offset = map_file(path), HEADER.size
    tensors = {}
    for name, shape in tensors_of(n_layer, C, padded, T):
        tensors[name] = typed(data, offset, shape, dtype)
        offset += math.prod(shape) * dtype.itemsize
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:V]
    del numbers["padded_vocab_size"]
    stored = {name: Stored((name,), (tensor,)) for name, tensor in tensors.items()}
    return Source(path, tensors, True), Model({**numbers, "activation": "gelu_tanh"}, stored)


def write(config: GPTConfig, weights: Mapping[str, Tensor], folder: Path, tokenizer: Tokenizer | None) -> None:
    """model.bin, float32 or bfloat16 as the weights are, its vocabulary padded to a multiple of 128; and
    gpt2_tokenizer.bin, which llm.c writes its samples with."""
    options = dict(tie_embeddings=True, lm_head_bias=False, attn_out_proj=True, layer_norm_eps=1e-5)
    need(config, "llm.c", activation="gelu_tanh", **options)
    need_default_scale(config, "llm.c")
    state = with_biases(config, weights)
    dtype = state["transformer.wte.weight"].dtype
    if dtype not in DTYPES.values():
        raise UserError(f"llm.c has float32 and bfloat16, not {str(dtype).removeprefix('torch.')}: choose with --dtype")
    version = next(number for number, kind in DTYPES.items() if kind == dtype)
    V, C = config.vocab_size, config.n_embd
    padded = -(-V // 128) * 128
    with (folder / "model.bin").open("wb") as file:
        numbers = (MAGIC, version, config.block_size, V, config.n_layer, config.n_head, C, padded)
        file.write(HEADER.pack(*numbers, *[0] * (256 - len(numbers))))
        for name, _ in tensors_of(config.n_layer, C, V, config.block_size):
            state[name].view(torch.uint8).numpy().tofile(file)
            if name == "transformer.wte.weight":
                file.write(bytes((padded - V) * C * dtype.itemsize))
    if tokenizer is not None and tokenizer.eot_id is not None:
        tokens = tokenizer.token_bytes()
        if all(0 < len(token) < 256 for token in tokens):
            header = HEADER.pack(TOKENIZER_MAGIC, 2, len(tokens), tokenizer.eot_id, *[0] * 252)
            lines = b"".join(bytes([len(token)]) + token for token in tokens)
            (folder / "gpt2_tokenizer.bin").write_bytes(header + lines)
