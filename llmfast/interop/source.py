"""What every reader takes and gives: a source on the disk, and a configuration with weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfast.errors import UserError
from llmfast.nn.weights import Stored

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WRAPPERS = ("_orig_mod.", "module.")  # torch.compile's and DistributedDataParallel's


@dataclass
class Source:
    """A checkpoint of another program.

    ``tensors``: everything in it, by its own names. ``extra``: what else stands in the file. ``config``: the
    ``config.json`` beside it, {} where there is none.
    """

    path: Path
    tensors: dict[str, Tensor]
    mapped: bool
    extra: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config_file(self) -> Path:
        return (self.path if self.path.is_dir() else self.path.parent) / "config.json"

    def shape(self, name: str, dims: int = 2) -> tuple[int, ...]:
        """The shape of a tensor that must be there."""
        if name not in self.tensors:
            raise UserError(f"{self.path} lacks {name}")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != dims:
            raise UserError(f"{self.path}: {name} has shape {shape}, and should have {dims} dimensions")
        return shape

    def layers(self, prefix: str) -> int:
        """How many layers ``prefix``0, ``prefix``1, ... there are."""
        found = {name[len(prefix) :].split(".")[0] for name in self.tensors if name.startswith(prefix)}
        count = len(found)
        if count == 0 or found != {str(i) for i in range(count)}:
            raise UserError(f"{self.path}: its layers are not numbered {prefix}0, {prefix}1, ...")
        return count

    def take(self, names: Iterable[str], *, transposed: bool = False) -> Stored:
        """One parameter out of these tensors, end to end."""
        names = tuple(names)
        for name in names:
            if name not in self.tensors:
                raise UserError(f"{self.path} lacks {name}")
        return Stored(names, tuple(self.tensors[name] for name in names), transposed)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are one and the same in the file."""
        a, b = self.tensors[one], self.tensors[other]
        return a.shape == b.shape and a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


@dataclass
class Model:
    """What a reader found: values of ``GPTConfig`` that the tensors tell, and the weights.

    ``settings``: values of ``GPTConfig`` that stand beside the tensors, by the name that they have there (which
    ``aliases`` turns into ours). ``asks``: options that nothing may tell, with the reason why they are needed.
    """

    values: dict[str, Any]
    stored: dict[str, Stored]
    settings: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    asks: Mapping[str, str] = field(default_factory=dict)


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object")
    return values


def state_dict(values: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state_dict, wrappers' prefixes taken off. ``UserError`` where it is none."""
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not a state_dict")
    tensors: dict[str, Tensor] = {}
    for name, tensor in values.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            key = repr(name[:80]) if isinstance(name, str) else f"a {type(name).__name__}"
            raise UserError(f"{path} is no state_dict: under {key} stands a {type(tensor).__name__}")
        while name.startswith(WRAPPERS):
            name = name.partition(".")[2]
        tensors[name] = tensor
    return tensors


def check_tensors(tensors: Mapping[str, Tensor], names: Iterable[str], path: Path) -> None:
    """``UserError`` for a tensor that no parameter can be filled from."""
    for name in names:
        t = tensors[name]
        if t.layout != torch.strided or t.device.type != "cpu" or t.dtype not in FLOATING:
            kind = str(t.dtype).removeprefix("torch.")
            raise UserError(f"{path}: {name} is of type {kind} ({t.layout}, {t.device}), not of floating point numbers")
        if t.numel() * t.element_size() > t.untyped_storage().nbytes():
            raise UserError(f"{path} is damaged: {name} is larger than what is stored of it")
