"""Runs of several ranks on this machine, over Gloo on loopback: forked from one process that has imported everything.

``torchrun`` itself and real kills are the business of ``tests/ranks/kills.py``, which takes minutes.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import worker

from llmfast import interop
from llmfast.checkpoint import find_checkpoint

LIMIT = 240  # seconds, on a busy machine
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    "pytest llmfast.training llmfast.finetuning.classify llmfast.finetuning.instruct llmfast.finetuning.preference "
    "llmfast.interop llmfast.checkpoint.shards torch.distributed.fsdp torch._dynamo "
    "matplotlib.figure matplotlib.backends.backend_agg".split()
)
ENVIRONMENT: dict[str, str] = {}  # of every rank


@dataclass
class Done:
    codes: list[int]  # of each rank; negative: the signal that ended it
    said: list[str]  # by each
    seconds: float


def weights(folder: Path, step: str = "") -> dict[str, torch.Tensor]:
    """Of the newest checkpoint, or that of ``step``, in the type in which they were trained."""
    checkpoints = folder / "run" / "checkpoints"
    return dict(interop.load(checkpoints / step if step else find_checkpoint(checkpoints, prefer="latest"))[1])


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]


def launch(
    folder: Path, size: int, call: Callable[..., int] = worker.train, *, check: bool = True, **options: Any
) -> Done:
    """``call(folder / "run", **options)`` on ``size`` ranks."""
    folder.mkdir(exist_ok=True)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    where = {
        **ENVIRONMENT,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    logs = [folder / f"rank-{rank}.txt" for rank in range(size)]
    began = time.monotonic()
    ranks = [
        CONTEXT.Process(
            target=worker.start,
            args=({**where, "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}, logs[rank]),
            kwargs={"call": call, "out": folder / "run", "options": options},
            daemon=True,
        )
        for rank in range(size)
    ]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout=max(0.1, began + LIMIT - time.monotonic()))
        codes = [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    said = [log.read_text() for log in logs]
    assert None not in codes, f"still running after {LIMIT} s: {codes}, {said}"
    assert not check or not any(codes), said
    return Done(codes, said, time.monotonic() - began)
