"""llm.c's model files: 256 int32 of header, then the tensors layer by layer, in float32 (version 3) or bfloat16 (5)."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import torch

from llmfast.errors import UserError
from llmfast.interop.source import Model, Source
from llmfast.nn.weights import Stored, map_file, typed

MAGIC = 20240326
OTHER_FILES = {
    20240327: "llm.c's debug state",
    20240328: "llm.c's tokenizer",
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
    if size != wanted or V > padded:
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
