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
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from llmfast.checkpoint import layout
from llmfast.checkpoint.save import checksums, distinct, optimizer_tensors, publish, remove_stale, write_state
from llmfast.errors import UserError
from llmfast.ranks import Ranks, is_lost


def save_sharded(
    root: str | Path,
    step: int,
    *,
    ranks: Ranks,
    model: Any,
    tokenizer: Any = None,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    best: bool = False,
    keep: int = 2,
) -> Path:
    """As ``save_checkpoint``, of a model whose parameters are DTensors; every rank of ``ranks`` calls it."""
    from llmfast.nn import pretrained

    root = Path(root)
    name = layout.step_name(step)
    building = Path(ranks.gather(str(layout.temporary(root, name)))[0])
    whole = optimizer_tensors(model, optimizer)
    counts = {key: tensor for key, tensor in whole.items() if not tensor.dim()}
    parts = {**distinct(model), **{key: tensor for key, tensor in whole.items() if tensor.dim()}}

    def begin() -> None:
        if ranks.first:
            root.mkdir(parents=True, exist_ok=True)
            remove_stale(root)
            (building / layout.SHARDS).mkdir(parents=True)
            pretrained.write_config(pretrained.describe(model), building)
            save_file(counts, building / layout.OPTIMIZER_FILE)
            if tokenizer is not None:
                tokenizer.save(building)
            write_state(building, step, state)

    def own_checksums() -> dict[str, dict[str, Any]]:
        own = set((building / layout.SHARDS).glob(f"shard-{ranks.rank + 1:05d}-*"))
        rest = set(layout.files_in(building)) - set((building / layout.SHARDS).iterdir()) if ranks.first else set()
        return checksums(building, sorted(own | rest))

    def finish() -> None:
        if ranks.first:
            publish(building, root / name, files, best=best, keep=keep)

    files: dict[str, dict[str, Any]] = {}
    try:
        ranks.succeed(begin)
        writer = HuggingFaceStorageWriter(str(building / layout.SHARDS), save_distributed=True)
        dcp.save(parts, storage_writer=writer)
        for part in ranks.gather(ranks.succeed(own_checksums)):
            files |= part
        ranks.succeed(finish)
    except (OSError, CheckpointException) as error:
        if ranks.first:
            remove_stale(root)
        if is_lost(cause := _cause(error)):
            raise cause from None
        raise UserError(
            f"cannot write the checkpoint {root / name}: {_reason(error)}; make room or choose another --out, then "
            "--resume (earlier checkpoints are intact)"
        ) from error
    return root / name


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
