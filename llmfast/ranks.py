"""The processes that train together: ``torchrun`` starts them, ``torch.distributed`` connects them.

A process that was started alone is the first and only rank; everything here is then free.
"""

from __future__ import annotations

import functools
import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llmfast.errors import UserError

T = TypeVar("T")
FOREVER = timedelta(days=365)
CONNECT = timedelta(seconds=60)
BRIEFLY = timedelta(seconds=3)


class Ranks:
    """``rank`` of ``size`` processes, the ``local`` th on its machine. Every rank calls the same methods in turn."""

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0, start: str = "") -> None:
        self.rank, self.size, self.local = rank, size, local
        self.start = start  # under which this start of them is known in the store
        self.store = client(start) if size > 1 else None

    @property
    def first(self) -> bool:
        """Whether this process writes the run's files and talks to the user."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The sums over all ranks; between the hosts, so that no device is waited for."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        return self.sum(float(flag))[0] > 0

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on the tensor's device."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def succeed(self, do: Callable[[], T]) -> T:
        """What ``do`` returns, once it has succeeded on every rank; the first failure is raised on all of them.

        Failures are ``UserError`` and ``OSError``; the others would wait for a rank that left.
        """
        result = problem = None
        try:
            result = do()
        except (UserError, OSError) as error:
            problem = error
        failed = next((p for p in self.gather(problem) if p is not None), None)
        if failed is not None:
            raise failed
        return result  # type: ignore[return-value]

    def agree(self, value: Any, what: str) -> None:
        """``UserError`` where the ranks' values differ."""
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise UserError(f"the ranks differ in {what} (rank 0 has {values[0]}, rank {self.rank} {value})")

    @contextmanager
    def in_turn(self, name: str) -> Iterator[None]:
        """The first rank runs the body, however long that takes, then all others do. ``name`` must not repeat."""
        key = f"done/{name}"
        if not self.first and self.store is not None:
            self.store.wait([key], FOREVER)
        yield
        if self.first and self.store is not None:
            self.store.set(key, "")


def started() -> tuple[int, int, int] | None:
    """(rank, size, local rank) that ``torchrun`` gave this process by its environment; None for one started alone."""
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return rank, size, int(os.environ.get("LOCAL_RANK", 0))
    except (KeyError, ValueError):
        return None


def is_first() -> bool:
    """``Ranks.first``, before anything is connected."""
    return (started() or (0, 1, 0))[0] == 0


def starter() -> str | None:
    """The ``torchrun`` that started this process, and starts it again where a rank fails; None for any other."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    pid, began = os.getppid(), "?"
    with suppress(OSError):  # Linux: numbers of processes repeat
        began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()} {pid} {began}"


@functools.cache
def join() -> Ranks:
    """Connect to the other ranks, once a process. ``UserError`` where they are not found."""
    found = started()
    if found is None or found[1] == 1:
        return Ranks()
    rank, size, local = found
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local % torch.cuda.device_count())
    if not dist.is_initialized():
        try:
            # The CPU's backend carries what hosts tell each other, also where gradients travel between GPUs.
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, store=_meeting_place(), rank=rank, world_size=size)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"rank {rank} does not reach the others: {error}") from None
    starts: list[Any] = [None] * size
    dist.all_gather_object(starts, f"{os.getpid()} {time.time()}")
    return Ranks(rank, size, local, starts[0])


def _meeting_place() -> dist.Store | None:
    """Where the ranks of one machine meet that ``torchrun`` has started again; None: where PyTorch has them meet.

    PyTorch 2.13 has them meet in the same place every time, where the addresses of the dead are still written. Several
    machines count their starts differently (docs/scaling.md).
    """
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    if not alone or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return client(f"meeting {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", timedelta(minutes=5))


def client(prefix: str, timeout: timedelta = CONNECT) -> dist.Store:
    """A connection of its own to the store where the ranks find each other, which may outlive their restarts."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"llmfast/{prefix}", store)


def speaks(message: str) -> bool:
    """Whether this rank is the first to say ``message``; true where the others cannot be asked."""
    found = started()
    if found is None or found[1] == 1:
        return True
    try:
        store = client(f"said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", BRIEFLY)
        return store.add(hashlib.sha256(message.encode()).hexdigest(), 1) == 1
    except (RuntimeError, KeyError, ValueError):
        return True


def is_lost(error: BaseException) -> bool:
    """Whether ``error`` says that another rank does not answer any more."""
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def exchanges() -> int:
    """How many collective operations this rank has begun: of ranks that wait for one, it has begun fewer."""
    try:
        groups = dist.distributed_c10d._world.pg_map  # torch tells it nowhere else
        return sum(group._get_sequence_number_for_group() for group in list(groups))  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return 0


def share(count: int, rank: int, size: int) -> range:
    """The numbers of 0 .. count - 1 that are ``rank``'s: one run of them, as long as the others' or one longer."""
    return range(rank * count // size, (rank + 1) * count // size)


def leave() -> None:
    """End the connection, so that no rank waits for this one."""
    if dist.is_available() and dist.is_initialized():
        # Gloo's thread may still wait for the interpreter to let go of the last tensors: to destroy it meanwhile, which
        # waits for it and keeps the interpreter, would never end.
        time.sleep(0.5)
        dist.destroy_process_group()
