"""Token files as they are: our shards, nanoGPT, llm.c, Megatron and HDF5, memory-mapped behind one class."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.data.readers import optional_module
from llmfast.data.shards import FORMAT, FORMAT_VERSION, META_FILE
from llmfast.errors import UserError
from llmfast.files import hash_file
from llmfast.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

# llm.c's header: 256 int32, of which magic, version and number of tokens; uint16 for GPT-2, uint32 for Llama 3.
_LLMC_HEADER_BYTES = 1024
_LLMC_DTYPES: dict[int, str] = {20240520: "<u2", 20240801: "<u4"}
# Megatron-LM's indexed data set: magic, version 1, a code of the type, sequences, documents; then the index proper.
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_SCAN_TOKENS = 1 << 22


class TokenSource:
    """A sequence of tokens in one or more parts (memory maps or HDF5 data sets), read as if it were one array.

    ``tokenizer`` and ``vocab_size`` are None where the files do not tell.
    """

    def __init__(self, parts: Sequence[Any], name: str, tokenizer_path: Path | None = None) -> None:
        self._parts = [part for part in parts if len(part)]
        self.name = name
        self.dtype = np.dtype(parts[0].dtype if len(parts) else np.uint16)
        self._tokenizer_path = tokenizer_path
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return load_tokenizer(self._tokenizer_path) if self._tokenizer_path else None

    @cached_property
    def vocab_size(self) -> int | None:
        return self.tokenizer.vocab_size if self.tokenizer else None

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens ``start`` to ``start + length - 1``: (length,) of ``dtype``."""
        if not 0 <= start <= start + length <= len(self):
            raise IndexError(f"window {start} to {start + length} lies outside the {len(self)} tokens of {self.name}")
        pieces = []
        while length > 0:
            part = int(np.searchsorted(self._ends, start, side="right"))
            inside = start - (int(self._ends[part - 1]) if part else 0)
            piece = np.asarray(self._parts[part][inside : inside + length])
            pieces.append(piece)
            start, length = start + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, self.dtype)])

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The windows of ``length`` tokens at ``starts`` (n,): (n, length) int64."""
        starts = np.asarray(starts, np.int64)
        if len(starts) and not (starts.min() >= 0 and starts.max() + length <= len(self)):
            raise IndexError(f"windows of {length} at {starts} leave the {len(self)} tokens of {self.name}")
        if len(self._parts) == 1 and isinstance(self._parts[0], np.ndarray):
            return self._parts[0][starts[:, None] + np.arange(length)].astype(np.int64)
        # Several parts: copying slice by slice costs about a microsecond a row, less than a gather for every part.
        out = np.empty((len(starts), length), np.int64)
        first = np.searchsorted(self._ends, starts, side="right")
        inside = starts - np.where(first > 0, self._ends[first - 1], 0)
        for row, (part, start) in enumerate(zip(first.tolist(), inside.tolist(), strict=True)):
            piece = self._parts[part][start : start + length]
            out[row] = piece if len(piece) == length else self.window(int(starts[row]), length)
        return out

    def check_ids(self, vocab_size: int) -> None:
        """Read every token once; an id that is not below ``vocab_size`` is a ``UserError`` that says where."""
        place = 0
        for part in self._parts:
            for start in range(0, len(part), _SCAN_TOKENS):
                block = np.asarray(part[start : start + _SCAN_TOKENS])
                if block.max() >= vocab_size or block.min() < 0:
                    bad = int(np.flatnonzero((block >= vocab_size) | (block < 0))[0])
                    raise UserError(
                        f"{self.name}: token {place + start + bad:,} is id {block[bad]}, but the model's vocab_size is "
                        f"{vocab_size}; use the tokenizer of this data, or a larger vocab_size"
                    )
            place += len(part)


def open_tokens(
    path: str | Path, split: str = "train", *, dtype: str | None = None, verify: bool = False
) -> TokenSource:
    """Open tokens on disk without reading them; the format is recognised by looking.

    Args:
        path: a prepared folder; a folder with train.bin and val.bin (nanoGPT) or *_train_*.bin and *_val_*.bin
            (llm.c); one .bin file of either; a Megatron .bin or .idx file or their common prefix; an HDF5 file with
            one data set ``tokens``.
        split: "train" or "val"; which part of a folder. A single file is its own split.
        dtype: "uint16" or "uint32", for a raw file (nanoGPT writes uint16; told apart by looking if not given).
        verify: also compare the SHA-256 of every shard of a prepared folder.

    Raises ``UserError`` for files that are missing, of another format, cut off or changed.
    """
    path = Path(path).expanduser()
    if split not in ("train", "val"):
        raise UserError(f"split must be train or val, got {split!r}")
    if dtype not in (None, "uint16", "uint32"):
        raise UserError(f"dtype must be uint16 or uint32, got {dtype!r}")
    if path.is_dir():
        if (path / META_FILE).exists():
            return _prepared(path, split, verify)
        files = [path / f"{split}.bin"] if (path / f"{split}.bin").exists() else sorted(path.glob(f"*_{split}_*.bin"))
        if not files:
            raise UserError(
                f"{path}: no {META_FILE} and no {split}.bin in it; prepare the data first, or name a token file"
            )
        tokenizer = path / TOKENIZER_FILE
        return TokenSource([_bin(file, dtype) for file in files], str(path), tokenizer if tokenizer.exists() else None)
    index = path.with_suffix(".idx") if path.suffix in (".bin", ".idx") else Path(f"{path}.idx")
    if index.exists():
        return TokenSource([_megatron(index)], str(path))
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix.lower() in (".h5", ".hdf5"):
        return TokenSource([_hdf5(path)], str(path))
    return TokenSource([_bin(path, dtype)], str(path))


def is_token_data(path: str | Path) -> bool:
    """Whether ``path`` looks like something for ``open_tokens``, rather than text for ``prepare``."""
    path = Path(path).expanduser()
    if path.is_dir():
        return (path / META_FILE).exists() or any(path.glob("*.bin"))
    return path.suffix.lower() in (".bin", ".idx", ".h5", ".hdf5") or Path(f"{path}.idx").exists()


def export_hdf5(source: TokenSource, path: str | Path) -> None:
    """Write ``source`` as one int32 data set ``tokens``, as train-llm-from-scratch reads it."""
    h5py = optional_module("h5py", f"{path}: writing HDF5")
    try:
        with h5py.File(path, "w") as file:
            data = file.create_dataset("tokens", (len(source),), dtype="<i4")
            for start in range(0, len(source), _SCAN_TOKENS):
                block = source.window(start, min(_SCAN_TOKENS, len(source) - start))
                data[start : start + len(block)] = block
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error


# ---- formats


def _map(path: Path, dtype: np.dtype | str, offset: int = 0, count: int | None = None) -> np.ndarray:
    dtype = np.dtype(dtype)
    size = path.stat().st_size - offset
    if count is None and size % dtype.itemsize:
        raise UserError(f"{path}: {size} bytes are no whole number of {dtype} tokens; is it cut off, or another type?")
    count = size // dtype.itemsize if count is None else count
    if count < 0:
        raise UserError(f"{path}: damaged: its header counts {count:,} tokens")
    if size < count * dtype.itemsize:
        raise UserError(f"{path}: cut off: {count:,} tokens expected, {size // dtype.itemsize:,} are there")
    if not count:
        return np.empty(0, dtype)
    # A plain array over the map: indexing a memmap itself costs several times as much.
    return np.memmap(path, dtype, "r", offset, (count,)).view(np.ndarray)


def _prepared(folder: Path, split: str, verify: bool) -> TokenSource:
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        shards, dtype = meta["splits"][split]["shards"], meta["dtype"]
        if meta["format"] != FORMAT or meta["version"] > FORMAT_VERSION:
            raise ValueError(f"format {meta['format']} version {meta['version']} is unknown to this llmfast")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / META_FILE}: not the record of a prepared folder ({error})") from error
    parts = []
    for shard in shards:
        file = folder / shard["file"]
        if not file.exists():
            raise UserError(f"{file}: the shard is missing; prepare the data again")
        part = _map(file, np.dtype(dtype).newbyteorder("<"))
        if len(part) != shard["tokens"]:
            raise UserError(f"{file}: {len(part):,} tokens instead of {shard['tokens']:,}; prepare the data again")
        if verify and hash_file(file).hexdigest() != shard["sha256"]:
            raise UserError(f"{file}: changed since it was prepared (SHA-256 differs); prepare the data again")
        parts.append(part)
    return TokenSource(parts, f"{folder} ({split})", folder / TOKENIZER_FILE)


def _bin(path: Path, dtype: str | None) -> np.ndarray:
    """llm.c (by its magic number) or raw tokens (nanoGPT)."""
    with open(path, "rb") as file:
        head = file.read(_LLMC_HEADER_BYTES)
    if not head:
        raise UserError(f"{path}: the file is empty")
    magic = struct.unpack("<i", head[:4])[0] if len(head) >= 4 else 0
    if magic in _LLMC_DTYPES:
        if len(head) < _LLMC_HEADER_BYTES:
            raise UserError(f"{path}: cut off in the header of an llm.c token file")
        return _map(path, _LLMC_DTYPES[magic], _LLMC_HEADER_BYTES, struct.unpack("<i", head[8:12])[0])
    return _map(path, dtype or _raw_dtype(head))


def _raw_dtype(head: bytes) -> str:
    """uint32 ids are below 2^18, so that every other uint16 is below 4; in 64 uint16 tokens of text that cannot be."""
    halves = np.frombuffer(head[: len(head) // 4 * 4], "<u2").reshape(-1, 2)
    return "uint32" if len(halves) >= 64 and halves[:, 1].max() < 4 and halves[:, 0].max() >= 4 else "uint16"


def _megatron(index: Path) -> np.ndarray:
    tokens = index.with_suffix(".bin")
    if not tokens.exists():
        raise UserError(f"{tokens}: missing beside {index.name}")
    with open(index, "rb") as file:
        head = file.read(34)
    if head[:9] != _MEGATRON_MAGIC or len(head) < 34:
        raise UserError(f"{index}: not a Megatron index (MMIDIDX)")
    version, code, sequences, _ = struct.unpack("<QBQQ", head[9:34])
    if version != 1 or code not in _MEGATRON_DTYPES:
        raise UserError(f"{index}: Megatron index of version {version}, type code {code} is not supported")
    lengths = _map(index, "<i4", 34, sequences)
    return _map(tokens, _MEGATRON_DTYPES[code], 0, int(lengths.sum(dtype=np.int64)))


def _hdf5(path: Path) -> Any:
    h5py = optional_module("h5py", f"{path}: reading HDF5")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path}: not an HDF5 file, or cut off ({error})") from error
    tokens = file.get("tokens")
    if not isinstance(tokens, h5py.Dataset) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        names = ", ".join(file) or "nothing"
        raise UserError(f"{path}: no flat data set of whole numbers called tokens (it holds {names})")
    if tokens.id.get_offset() is None:  # in chunks: read through h5py
        return tokens
    mapped = _map(path, tokens.dtype, tokens.id.get_offset(), len(tokens))
    file.close()
    return mapped
