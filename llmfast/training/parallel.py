"""One model on several ranks: a copy on each (DDP), or parameters, gradients and optimizer state in shards (FSDP2)."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmfast.errors import UserError
from llmfast.ranks import Ranks


@dataclass(frozen=True)
class Sharing:
    """How ``world_size`` ranks share a model: ``copies`` of it, each in ``shards``."""

    mode: str
    world_size: int
    copies: int
    shards: int


def sharing(mode: str, world_size: int, ranks_per_machine: int) -> Sharing:
    """What ``--parallel`` makes of so many ranks; ``UserError`` where it cannot."""
    if world_size < 1 or ranks_per_machine < 1:
        raise UserError("world_size and ranks_per_machine must be at least 1")
    if mode == "fsdp":
        return Sharing(mode, world_size, 1, world_size)
    if mode == "hsdp":
        shards = min(ranks_per_machine, world_size)
        if world_size % shards:
            raise UserError(f"hsdp shards inside each machine, and {world_size} ranks are no multiple of {shards}")
        return Sharing(mode, world_size, world_size // shards, shards)
    return Sharing("ddp", world_size, world_size, 1)


class Alone:
    """One process. ``runs`` is the model to call; gradients come out divided by ``mean_of``."""

    mean_of = 1
    shards = False  # whether a forward pass takes all ranks
    note: str | None = None  # for the user

    def __init__(self, model: nn.Module) -> None:
        self.runs: Any = model

    def backward(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward pass of a micro batch; ``last`` of its optimizer step, which sums up."""
        return nullcontext()

    def whole_norm(self, norm: Tensor) -> Tensor:
        """The norm of all gradients, of the norm of those that this rank holds."""
        return norm

    def rest(self) -> None:
        """Leave each rank with its part of the parameters, as the optimizer knows them."""


class Copies(Alone):
    """DistributedDataParallel: gradients are averaged while the last micro batch's backward pass goes on."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        super().__init__(nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True))
        self.mean_of = ranks.size
        self.note = f"{ranks.size} ranks, the whole model on each (ddp)"

    def backward(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.runs.no_sync()


class Shards(Alone):
    """FSDP2: every block is gathered for its forward and its backward pass, and lies in shards otherwise.

    Gradients are summed into shards after every micro batch, for whole ones would take more than all that is saved;
    copies of the shards (hsdp) are averaged once a step.
    """

    shards = True

    def __init__(self, model: nn.Module, ranks: Ranks, device: torch.device, copies: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if not all(p.requires_grad for p in model.parameters()):
            raise UserError(
                "fsdp shards models that are trained whole: use --parallel ddp where parts are frozen (LoRA)"
            )
        shape = (ranks.size,) if copies == 1 else (copies, ranks.size // copies)
        names = ("shard",) if copies == 1 else ("replicate", "shard")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        # Nothing writes into what a block returns.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        super().__init__(model)
        self.mean_of = ranks.size
        self.note = f"{ranks.size} ranks, {copies} x the model in {ranks.size // copies} shards (fsdp)"
        self._group = mesh.get_group("shard")

    def backward(self, *, last: bool) -> AbstractContextManager[Any]:
        self.runs.set_requires_all_reduce(last)
        return nullcontext()

    def rest(self) -> None:
        for module in self.runs.modules():
            if hasattr(module, "reshard"):
                module.reshard()

    def whole_norm(self, norm: Tensor) -> Tensor:
        squared = norm.double().square()
        dist.all_reduce(squared, group=self._group)
        return squared.sqrt().to(norm.dtype)


def parallelize(model: nn.Module, mode: str, ranks: Ranks, device: torch.device) -> Alone:
    """``model``, on ``device``, for all ranks. ``mode``: auto, ddp, fsdp or hsdp; of one rank none matters."""
    if ranks.size == 1:
        return Alone(model)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"several ranks take CPUs or NVIDIA GPUs, not {device.type}: use --device cpu")
    shared = sharing(mode, ranks.size, int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size)))
    return Copies(model, ranks) if shared.shards == 1 else Shards(model, ranks, device, shared.copies)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: what is gathered, and given back, one at a time."""
    return [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard, which shares its memory, or all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
