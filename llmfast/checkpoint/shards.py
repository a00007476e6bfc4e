"""Checkpoints in shards: every rank writes the part that it holds, through ``torch.distributed.checkpoint``.

step-NNNNNN/shards/ has one safetensors file a rank, with weights under their names and the optimizer's state as
``KEY/PARAMETER``; each file's metadata says where its parts begin. What is not a part (the optimizer's counts) stands
in ``optimizer.safetensors`` as always. Nothing is pickled.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from llmfast.checkpoint import layout
from llmfast.checkpoint.save import Saving, checksums, distinct, optimizer_tensors
from llmfast.errors import UserError


class ShardSaving(Saving):
    """``Saving`` of a model whose parameters are DTensors: every rank writes the part that it holds."""

    def _begin(self) -> None:
        super()._begin()
        (self._building / layout.SHARDS).mkdir()

    def _capture(self) -> None:
        from llmfast.nn import pretrained

        whole = optimizer_tensors(self._model, self._optimizer) if self._optimizer is not None else {}
        self._tensors = {key: tensor for key, tensor in whole.items() if not tensor.dim()}
        parts = {**distinct(self._model), **{key: tensor for key, tensor in whole.items() if tensor.dim()}}
        self._description = pretrained.describe(self._model)
        self._writer = _Writer(str(self._building / layout.SHARDS), copies=self._beside)
        try:
            dcp.save(parts, storage_writer=self._writer)
        except CheckpointException as error:
            raise _cause(error) from None

    def _write(self) -> dict[str, dict[str, Any]]:
        from llmfast.nn import pretrained

        self._writer.write()
        files = set((self._building / layout.SHARDS).glob(f"shard-{self._ranks.rank + 1:05d}-*"))
        if self._ranks.first:
            pretrained.write_config(self._description, self._building)
            save_file(self._tensors, self._building / layout.OPTIMIZER_FILE)
            self._write_rest()
            files |= {path for path in self._building.iterdir() if path.is_file()}
        return checksums(self._building, sorted(files))


class _Writer(HuggingFaceStorageWriter):
    """Keeps what ``dcp.save`` has it write, as copies in the CPU's memory or as it is, until ``write``."""

    def __init__(self, path: str, *, copies: bool) -> None:
        super().__init__(path, save_distributed=True)
        self._copies = copies

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors: dict[MetadataIndex, Any] = {item.index: planner.resolve_data(item) for item in plan.items}
        if self._copies:
            tensors = {index: tensor.detach().to("cpu", copy=True) for index, tensor in tensors.items()}
        self._kept = plan, _Kept(tensors)
        nothing: Future[list[WriteResult]] = Future()
        nothing.set_result([])
        return nothing

    def write(self) -> None:
        super().write_data(*self._kept).wait()


class _Kept(DefaultSavePlanner):
    """Has the data of a plan that is made."""

    def __init__(self, tensors: dict[MetadataIndex, Any]) -> None:
        super().__init__()
        self._tensors = tensors

    def resolve_data(self, item: WriteItem) -> Any:
        return self._tensors[item.index]


def load_into(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors``, whole ones or DTensors (then every rank calls it), from a checkpoint, in shards or not."""
    reader = _reader(path)
    try:
        known = _sizes(reader)
        for name, tensor in tensors.items():
            if name not in known:
                raise UserError(f"{path} has no {name}: it is another model's checkpoint")
            if (found := known[name]) != tuple(tensor.shape):
                raise UserError(f"{path}: {name} is {found}, the model wants {tuple(tensor.shape)}")
        sharded = any(hasattr(tensor, "to_local") for tensor in tensors.values())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist says so
            dcp.load(dict(tensors), storage_reader=reader, no_dist=not sharded)
    except (OSError, CheckpointException) as error:
        raise UserError(f"{path} is not readable: {_reason(error)}") from None


@torch.no_grad()
def load_training_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Weights and optimizer state of a checkpoint, where it or ``model`` is in shards."""
    load_into(path, {name: tensor.detach() for name, tensor in distinct(model).items()})
    if optimizer is None:
        return
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    moments: dict[str, Tensor] = {}
    for key in _sizes(_reader(path)):
        entry, slash, name = key.partition("/")
        if slash and name in parameters and entry != "step":
            moments[key] = optimizer.state[parameters[name]][entry] = torch.zeros_like(parameters[name])
    load_into(path, moments)
    for key, count in load_file(path / layout.OPTIMIZER_FILE).items():
        entry, _, name = key.partition("/")
        if entry == "step" and name in parameters:
            optimizer.state[parameters[name]][entry] = count.to(parameters[name].device)


def _reader(path: Path) -> HuggingFaceStorageReader:
    folder = path / layout.SHARDS
    return HuggingFaceStorageReader(str(folder if folder.is_dir() else path))


def _sizes(reader: HuggingFaceStorageReader) -> dict[str, tuple[int, ...]]:
    known: dict[str, Any] = reader.read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in known.items()}


def _cause(error: BaseException) -> BaseException:
    """What failed first on a rank."""
    if isinstance(error, CheckpointException):
        return next((cause[0] for cause in error.failures.values()), error)
    return error


def _reason(error: BaseException) -> str:
    error = _cause(error)
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
