"""OpenAI's GPT-2 as TensorFlow wrote it (hparams.json, checkpoint, model.ckpt.*), read without TensorFlow.

An index file is a LevelDB table of protocol buffers: tensor name -> type, shape, and where in which data file its
bytes are, with a CRC-32C of them. Sources: tensorflow/core/lib/io/format.cc (table), tensor_bundle.proto (entries).
"""

from __future__ import annotations

import logging
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llmfast.errors import UserError
from llmfast.interop.crc32c import crc32c, unmask
from llmfast.interop.source import Model, Source, read_json
from llmfast.nn.weights import SHOWN, Stored, Weights, map_file, typed

logger = logging.getLogger("llmfast")

MOST_INDEX = 64 << 20  # bytes
_FOOTER, _TRAILER = 48, 5
_TABLE_MAGIC = 0xDB4775248B80FB57
_DTYPES = {1: torch.float32, 2: torch.float64, 14: torch.bfloat16, 19: torch.float16}
_NAMES = {
    "ln_1/g": "ln_1.weight", "ln_1/b": "ln_1.bias", "ln_2/g": "ln_2.weight", "ln_2/b": "ln_2.bias",
    "attn/c_attn/w": "attn.c_attn.weight", "attn/c_attn/b": "attn.c_attn.bias",
    "attn/c_proj/w": "attn.c_proj.weight", "attn/c_proj/b": "attn.c_proj.bias",
    "mlp/c_fc/w": "mlp.c_fc.weight", "mlp/c_fc/b": "mlp.c_fc.bias",
    "mlp/c_proj/w": "mlp.c_proj.weight", "mlp/c_proj/b": "mlp.c_proj.bias",
}  # fmt: skip
_REST = {
    "wte": "transformer.wte.weight", "wpe": "transformer.wpe.weight",
    "ln_f/g": "transformer.ln_f.weight", "ln_f/b": "transformer.ln_f.bias",
}  # fmt: skip
_ALIASES = {
    "n_vocab": "vocab_size",
    "n_ctx": "block_size",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}


class _Damaged(ValueError):
    """Bytes that are not what the format wants."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int


def read(index: Path) -> tuple[Source, Model]:
    """The checkpoint whose index file is ``index``; hparams.json beside it tells the number of heads."""
    hparams = index.parent / "hparams.json"
    tensors = read_bundle(index)
    source = Source(index, tensors, True, config=read_json(hparams) if hparams.is_file() else {})
    stored: dict[str, Stored] = {}
    for name in tensors:
        head, _, rest = name.removeprefix("model/").partition("/")
        layer = head[1:] if head[:1] == "h" and head[1:].isdecimal() and rest in _NAMES else None
        if name.startswith("model/") and layer is not None:
            stored[f"transformer.h.{layer}.{_NAMES[rest]}"] = source.take([name], transposed=rest.endswith("w"))
        else:
            stored[_REST.get(name.removeprefix("model/"), name)] = source.take([name])
    has_qkv_bias = any(name.endswith("/attn/c_attn/b") for name in tensors)
    if not has_qkv_bias:
        logger.warning("%s has no c_attn/b, as OpenAI's models do: loaded without a query/key/value bias", index)
    vocab_size, n_embd = source.shape("model/wte")
    values = dict(
        vocab_size=vocab_size,
        n_embd=n_embd,
        block_size=source.shape("model/wpe")[0],
        n_layer=len({name.split(".")[2] for name in stored if name.startswith("transformer.h.")}),
        activation="gelu_tanh",
        qkv_bias=has_qkv_bias,
    )
    asks = {"n_head": "the number of heads stands in hparams.json, which is not beside it"}
    return source, Model(values, stored, source.config, _ALIASES, asks)


def read_bundle(index: Path) -> dict[str, Tensor]:
    """Every floating point tensor of a bundle, as views of its mapped data files, checked against their CRC-32C."""
    if index.stat().st_size > MOST_INDEX:
        raise UserError(f"{index} is no index of a GPT-2 checkpoint: it has {index.stat().st_size:,} bytes")
    try:
        entries = dict(_table(index.read_bytes()))
        shards, parsed = _header(entries.pop(b"", b"")), {}
        for key, value in entries.items():
            parsed[key.decode("utf-8")] = _entry(value)
    except (_Damaged, IndexError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{index} is damaged: {error}") from None
    data: dict[int, tuple[Path, torch.UntypedStorage]] = {}
    tensors = {}
    quiet = sum(entry.size for entry in parsed.values()) < SHOWN or not sys.stderr.isatty()
    for name, entry in tqdm(parsed.items(), desc="checking", unit=" tensors", leave=False, disable=quiet):
        if entry.dtype not in _DTYPES:
            if name.startswith("model/"):
                raise UserError(f"{index}: {name} has TensorFlow's type {entry.dtype}, which no model has")
            continue
        if entry.shard not in data:
            if not 0 <= entry.shard < shards:
                raise UserError(f"{index} is damaged: {name} lies in part {entry.shard} of {shards}")
            file = index.with_name(f"{index.stem}.data-{entry.shard:05d}-of-{shards:05d}")
            if not file.is_file():
                raise UserError(f"{file} is missing: it holds {name}")
            data[entry.shard] = file, map_file(file)
        tensors[name] = _tensor(name, entry, *data[entry.shard])
    return tensors


def _tensor(name: str, entry: Entry, file: Path, data: torch.UntypedStorage) -> Tensor:
    dtype = _DTYPES[entry.dtype]
    size = dtype.itemsize
    for n in entry.shape:
        size *= n
    if size != entry.size or not 0 < entry.size <= data.nbytes() - entry.offset:
        raise UserError(f"{file} is damaged: {name} of shape {entry.shape} does not lie in it")
    tensor = typed(data, entry.offset, entry.shape, dtype)
    raw = typed(data, entry.offset, (entry.size,), torch.uint8)
    if crc32c(raw.numpy()) != unmask(entry.crc):
        raise UserError(f"{file} is damaged: the checksum of {name} differs; fetch the file again")
    Weights({}, file, mapped=True).release(raw)
    # OpenAI's matrices are kernels of a convolution of width 1.
    return tensor[0] if len(entry.shape) == 3 and entry.shape[0] == 1 else tensor


# The table: blocks of prefix-compressed keys, found through an index block, found through the footer.


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(data) < _FOOTER or struct.unpack("<Q", data[-8:])[0] != _TABLE_MAGIC:
        raise _Damaged("it does not end as a TensorFlow index does")
    footer = data[-_FOOTER:]
    _, at = _handle(footer, 0)
    (offset, size), _ = _handle(footer, at)
    last = None
    for _, pointer in _block(data, offset, size):
        for key, value in _block(data, *_handle(pointer, 0)[0]):
            if last is not None and key <= last:
                raise _Damaged("its keys are not in order")
            last = key
            yield key, value


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) pairs; a key shares its first bytes with the one before."""
    end = offset + size
    if end + _TRAILER > len(data):
        raise _Damaged("a block lies outside of it")
    kind, crc = struct.unpack("<BI", data[end : end + _TRAILER])
    if crc32c(np.frombuffer(data, np.uint8, size + 1, offset)) != unmask(crc):
        raise _Damaged("the checksum of a block differs")
    if kind != 0:
        raise _Damaged(f"a block is compressed (kind {kind})")
    (restarts,) = struct.unpack("<I", data[end - 4 : end]) if size >= 4 else (0,)
    limit, at, key = end - 4 - 4 * restarts, offset, b""
    if limit < offset:
        raise _Damaged("a block is shorter than its own list")
    while at < limit:
        shared, at = _varint(data, at)
        unshared, at = _varint(data, at)
        length, at = _varint(data, at)
        if shared > len(key) or at + unshared + length > limit:
            raise _Damaged("an entry lies outside of its block")
        key = key[:shared] + data[at : at + unshared]
        yield key, data[at + unshared : at + unshared + length]
        at += unshared + length


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise _Damaged("a number has no end")


# The protocol buffers of the values.


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: numbers of varint and fixed fields, bytes of the others."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        value: int | bytes
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = int.from_bytes(data[at : at + size], "little"), at + size
        elif kind == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            raise _Damaged(f"a field has the wire type {kind}")
        if at > len(data):
            raise _Damaged("a field lies outside of its message")
        yield tag >> 3, value


def _message(value: int | bytes) -> Iterator[tuple[int, int | bytes]]:
    if not isinstance(value, bytes):
        raise _Damaged("a message is a number")
    return _fields(value)


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise _Damaged("a number is a message")
    return value


def _header(data: bytes) -> int:
    """The number of data files of a BundleHeaderProto."""
    fields = dict(_fields(data))
    shards, endianness = _number(fields.get(1, 0)), _number(fields.get(2, 0))
    if shards < 1:
        raise _Damaged("it names no data file")
    if endianness:
        raise _Damaged("its tensors are big-endian")
    return shards


def _entry(data: bytes) -> Entry:
    """A BundleEntryProto."""
    numbers, shape = {1: 0, 3: 0, 4: 0, 5: 0, 6: 0}, []
    for number, value in _fields(data):
        if number == 2:
            for inner, dim in _message(value):
                if inner == 2:
                    shape.append(_number(dict(_message(dim)).get(1, 0)))
        elif number == 7:
            raise _Damaged("a tensor is cut into slices, which GPT-2's are not")
        elif number in numbers:
            numbers[number] = _number(value)
    return Entry(numbers[1], tuple(shape), numbers[3], numbers[4], numbers[5], numbers[6])
