"""What a run says when it cannot go on."""

from __future__ import annotations

from pathlib import Path

import torch

from llmfast.checkpoint import read_pointer
from llmfast.config import TrainConfig
from llmfast.ranks import Ranks
from llmfast.training.errors import NotFiniteError


def not_finite(error: NotFiniteError, ranks: Ranks, finite: bool, where: str | None, checkpoints: Path) -> str:
    """Of a step that met ``error``.

    ``finite``: whether this rank's own loss was; ``where``: what it found to be the cause (``diagnose.first_bad``).
    """
    bad = [rank for rank, fine in enumerate(ranks.gather(finite)) if not fine]
    found = next(((rank, text) for rank, text in enumerate(ranks.gather(where)) if text), None)
    if found is None:
        cause = "repeating the step gave finite values (dropout, or a kernel that is not deterministic)"
        if ranks.size > 1 and bad:
            cause = f"on rank {bad[0]} the loss was not finite; {cause}"
    else:
        cause = f"on rank {found[0]} {found[1]}" if ranks.size > 1 else found[1]
    saved = read_pointer(checkpoints, "latest")
    kept = f"the last checkpoint is {saved}" if saved else "there is no checkpoint yet"
    return (
        f"step {error.step + 1}: {error}; {cause}. No weight was changed, {kept}. Try a lower --learning-rate, "
        "more --warmup-steps, or --dtype float32"
    )


def out_of_memory(config: TrainConfig, device: torch.device, micro: int, block_size: int) -> str:
    """What to do where micro batches of ``micro`` samples do not fit."""
    smaller = f"--micro-batch-size {micro // 2} --batch-size {config.batch_size} (the same updates)"
    options = [smaller] if micro > 1 else [f"a --block-size below {block_size}"]
    if not config.activation_checkpointing:
        options.append("--activation-checkpointing")
    return f"out of memory on {device} with micro batches of {micro} x {block_size} tokens: try {' or '.join(options)}"
