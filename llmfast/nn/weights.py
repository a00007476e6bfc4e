"""Parameters as a file holds them: mapped, not read, until a model takes them.

A model that is as large as the memory must not be there twice. So a reader gives views of the mapped file, ``fill``
copies them a piece at a time into the parameters, and the pages of what was copied are given back on the way.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import mmap
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from llmfast.config import GPTConfig
from llmfast.errors import UserError
from llmfast.ops import release_freed_memory

PIECE = 16 << 20  # bytes copied before their pages are given back
SHOWN = 200 << 20  # a bar for what takes a moment


@dataclass(frozen=True)
class Stored:
    """One parameter in a file: ``tensors``, which the file calls ``names``, end to end along dimension 0.

    ``transposed``: the file has (in, out) where the parameter is (out, in). ``even``: all have as many rows.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    transposed: bool = False
    even: bool = True

    @property
    def views(self) -> tuple[Tensor, ...]:
        return tuple(t.T for t in self.tensors) if self.transposed else self.tensors


class Weights(Mapping[str, Tensor]):
    """Name -> parameter, weights (out, in). ``weights[name]`` is a view of the file where that can be, else a copy.

    ``where`` is the file or folder, for error messages; ``mapped`` says that every tensor is a view of a mapped file.
    """

    def __init__(self, stored: Mapping[str, Stored], where: object, *, mapped: bool) -> None:
        self.stored, self.where, self.mapped = dict(stored), where, mapped

    def __getitem__(self, name: str) -> Tensor:
        views = self.stored[name].views
        return views[0] if len(views) == 1 else torch.cat(views)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def bound(self, config: GPTConfig) -> None:
        """``UserError`` where ``config`` wants a larger model than the file holds, before one of its size is built."""
        layers = {name.split(".")[2] for name in self.stored if name.startswith("transformer.h.")}
        if config.n_layer > len(layers):
            raise UserError(f"{self.where} lacks transformer.h.{len(layers)}: it holds no {config.n_layer} layers")
        for name, rows in (("wte", config.vocab_size), ("wpe", config.block_size)):
            self._check_shape(f"transformer.{name}.weight", (rows, config.n_embd))

    def check(self, model: nn.Module) -> None:
        """``UserError`` where names or shapes are not those of ``model``, which may lie on the meta device."""
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            self._check_shape(name, tuple(parameter.shape))
        if unknown := self.stored.keys() - parameters.keys():
            names = min(self.stored[name].names for name in unknown)
            raise UserError(f"{self.where} holds {names[0]}, which its model has no place for")

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        stored = self.stored.get(name)
        if stored is None:
            raise UserError(f"{self.where} lacks {name}")
        rows = [shape[0] // len(stored.tensors)] * len(stored.tensors)
        if not stored.even and sum(map(len, stored.tensors)) == shape[0]:
            rows = list(map(len, stored.tensors))
        for own_name, tensor, count in zip(stored.names, stored.tensors, rows, strict=True):
            want = (count, *shape[1:])
            want = want[::-1] if stored.transposed else want
            if tuple(tensor.shape) != want:
                raise UserError(f"{self.where}: {own_name} is {tuple(tensor.shape)}, the model wants {want}")

    @torch.no_grad()
    def copy_into(self, name: str, parameter: Tensor) -> None:
        """Copy one parameter, and give back the file's pages, or what was read of it: it can be taken once."""
        start = 0
        for view in self.stored[name].views:
            for piece in pieces(view):
                parameter.narrow(0, start, len(view)).narrow(*piece).copy_(view.narrow(*piece))
                self.release(view.narrow(*piece))
            start += len(view)
        if not self.mapped:
            del self.stored[name]
            if parameter.nbytes >= PIECE // 16:
                release_freed_memory()

    def release(self, view: Tensor) -> None:
        """Give back the pages behind a view, where it is one; its values are read again when they are needed."""
        if self.mapped:
            _release(view)


def fill(model: nn.Module, weights: Weights) -> None:
    """Copy ``weights`` into the parameters of ``model``; every name and shape must fit. Large ones show a bar on a
    terminal."""
    weights.check(model)
    parameters = dict(model.named_parameters())
    size = sum(p.nbytes for p in parameters.values())
    quiet = size < SHOWN or not sys.stderr.isatty()
    with tqdm(total=size, unit="B", unit_scale=True, desc="loading", leave=False, disable=quiet) as bar:
        for name, parameter in parameters.items():
            weights.copy_into(name, parameter)
            bar.update(parameter.nbytes)


def pieces(source: Tensor) -> Iterator[tuple[int, int, int]]:
    """(dimension, start, length) of parts of ``source`` that lie together in memory, about ``PIECE`` bytes each."""
    dim = max(range(source.dim()), key=source.stride)
    rows = source.shape[dim]
    step = max(1, PIECE * rows // max(1, source.nbytes))
    for start in range(0, rows, step):
        yield dim, start, min(step, rows - start)


def _release(view: Tensor) -> None:
    call = _madvise()
    if call is None:
        return
    span = sum((n - 1) * stride for n, stride in zip(view.shape, view.stride(), strict=True)) + 1
    begin = -(-view.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (view.data_ptr() + span * view.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        call(begin, end - begin, mmap.MADV_DONTNEED)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The system's ``madvise``; None where it means something else than Linux's."""
    if sys.platform != "linux":
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return call


def map_file(path: Path) -> torch.UntypedStorage:
    """The bytes of a file, mapped and private to this process."""
    return torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)  # type: ignore[return-value]


def typed(data: torch.UntypedStorage, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A view of mapped bytes, aligned or not, as a tensor."""
    part = data[offset : offset + math.prod(shape) * dtype.itemsize]
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return torch.empty(0, dtype=dtype).set_(part, 0, list(shape), strides)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, as views of its mapped bytes. ``UserError`` where the file is damaged."""
    try:
        with safe_open(path, "pt"), path.open("rb") as file:  # safe_open checks the header and the file's size
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
        data = map_file(path)
        header.pop("__metadata__", None)
        return {
            name: typed(data, start + entry["data_offsets"][0], entry["shape"], _DTYPES[entry["dtype"]])
            for name, entry in header.items()
        }
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} is damaged: {str(error)[:200]}") from None
    except KeyError as error:
        raise UserError(f"{path} holds tensors of type {error}, which no model has") from None


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
