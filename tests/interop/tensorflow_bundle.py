"""TensorFlow's checkpoint files, written without TensorFlow: what OpenAI's reader is tested with.

As tensorflow/core/util/tensor_bundle writes them: a LevelDB table of protocol buffers, and the tensors end to end.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llmfast.interop.crc32c import crc32c

FLOAT = 1
MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)


def checksum(data: bytes) -> bytes:
    crc = crc32c(np.frombuffer(data, np.uint8))
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def varint(number: int) -> bytes:
    parts = []
    while True:
        number, low = number >> 7, number & 0x7F
        parts.append(low | (0x80 if number else 0))
        if not number:
            return bytes(parts)


def tagged(number: int, value: int | bytes) -> bytes:
    """A field of a message: a varint, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def entry(shape: tuple[int, ...], offset: int, data: bytes, /, *, dtype: int = FLOAT, **changed: int) -> bytes:
    """A BundleEntryProto; ``changed`` may lie about shard, offset and size."""
    dims = b"".join(tagged(2, tagged(1, n)) for n in shape)
    numbers = {"shard": 0, "offset": offset, "size": len(data), **changed}
    message = tagged(1, dtype) + tagged(2, dims)
    message += b"".join(tagged(field, numbers[name]) for field, name in ((3, "shard"), (4, "offset"), (5, "size")))
    return message + varint(6 << 3 | 5) + checksum(data)


def block(pairs: list[tuple[bytes, bytes]]) -> bytes:
    """A table's block and its trailer; keys share what they begin with."""
    body, before = b"", b""
    for key, value in pairs:
        shared = next(
            (i for i, (a, b) in enumerate(zip(before, key, strict=False)) if a != b), min(len(before), len(key))
        )
        body += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    body += struct.pack("<II", 0, 1)
    return body + b"\0" + checksum(body + b"\0")


def table(pairs: list[tuple[bytes, bytes]], per_block: int = 7) -> bytes:
    data, index = b"", []
    for start in range(0, len(pairs), per_block):
        part = block(pairs[start : start + per_block])
        index.append((pairs[min(start + per_block, len(pairs)) - 1][0], varint(len(data)) + varint(len(part) - 5)))
        data += part
    handles = b""
    for part in (block([]), block(index)):  # the table of filters, which is empty, and that of blocks
        handles += varint(len(data)) + varint(len(part) - 5)
        data += part
    return data + handles.ljust(40, b"\0") + MAGIC


def header(shards: int = 1) -> bytes:
    return tagged(1, shards) + tagged(3, tagged(1, 1))


def entries(tensors: Mapping[str, np.ndarray]) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """The index's pairs and the data file."""
    pairs, data = [(b"", header())], b""
    for name in sorted(tensors):
        raw = tensors[name].astype("<f4").tobytes()
        pairs.append((name.encode(), entry(tensors[name].shape, len(data), raw)))
        data += raw
    return pairs, data


def write(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """checkpoint, model.ckpt.index and model.ckpt.data-00000-of-00001 of float32 tensors."""
    pairs, data = entries(tensors)
    (folder / "model.ckpt.index").write_bytes(table(pairs))
    (folder / "model.ckpt.data-00000-of-00001").write_bytes(data)
    (folder / "checkpoint").write_text(
        'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n'
    )
