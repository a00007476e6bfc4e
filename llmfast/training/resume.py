"""How far a run is, as it stands in ``trainer.json``, and how a resume takes it up."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmfast import __version__, ops
from llmfast.checkpoint import capture_rng, find_checkpoint, load_training_state, read_state, restore_rng
from llmfast.config import TrainConfig
from llmfast.errors import UserError
from llmfast.training.feed import fingerprint
from llmfast.training.update import Update

# These decide every update.
FIXED = (
    "seed batch_size block_size stride sampling shuffle learning_rate min_learning_rate schedule warmup_steps "
    "weight_decay decay beta1 beta2 adam_eps grad_clip "
    "checkpoint train lora_r lora_alpha lora_dropout lora_targets lora_split_qkv max_length "
    "prompt_style mask_instruction packing method beta average_log_probs desirable_weight undesirable_weight "
    "class_weights pad_to"
).split()
# These change rounding, or how dropout draws.
ROUNDING = "device dtype backend compile micro_batch_size activation_checkpointing".split()


@dataclass
class Progress:
    """What a run has done. ``position`` is the next sample of the data; losses are nats a token."""

    step: int = 0
    position: int = 0
    tokens: int = 0
    val_loss: float | None = None
    best_val_loss: float | None = None
    stale: int = 0  # evaluations since the best one


def identity(model: nn.Module, config: TrainConfig, train_data: Any) -> dict[str, Any]:
    """What makes this run this run."""
    model_config: Any = getattr(model, "config", None)
    return {
        "config": dataclasses.asdict(config),
        "model": model_config.to_dict() if hasattr(model_config, "to_dict") else {},
        "data": fingerprint(train_data),
    }


def training_state(progress: Progress, who: dict[str, Any], update: Update) -> dict[str, Any]:
    """The content of ``trainer.json``."""
    return {
        **dataclasses.asdict(progress),
        **who,
        "rng": capture_rng(),
        "threads": torch.get_num_threads(),
        "matmul_routing": ops.matmul_routing(),
        "grad_scaler": None if update.scaler is None else update.scaler.state_dict(),
        "versions": _versions(),
    }


def resume(
    checkpoints: Path, who: dict[str, Any], model: nn.Module, update: Update
) -> tuple[Progress, Path | None, list[str]]:
    """Bring everything to where the newest checkpoint that verifies left it.

    Returns the progress, that checkpoint (None where there is none yet) and what the user should know. ``UserError``
    where the run is another one, or none of its checkpoints verifies.
    """
    if not any(checkpoints.glob("step-*")):
        return Progress(), None, [f"no checkpoint in {checkpoints} yet: starting from the beginning"]
    path = find_checkpoint(checkpoints, prefer="latest")
    saved = read_state(path)
    changed = check_same_run(saved, who)
    load_training_state(path, model, update.optimizer)
    update.optimizer.state_changed()
    if update.scaler is not None and saved["grad_scaler"]:
        update.scaler.load_state_dict(saved["grad_scaler"])
    # The same sums in the same order: as many threads and the same matrix products as before.
    if torch.get_num_threads() != saved["threads"]:
        if who["config"]["threads"] is None:
            torch.set_num_threads(saved["threads"])
        else:
            changed.append(f"threads were {saved['threads']}, now {torch.get_num_threads()}")
    ops.set_matmul_routing(saved["matmul_routing"])
    restore_rng(saved["rng"])
    if saved["versions"] != _versions():
        changed.append(f"versions were {saved['versions']}")
    notes = [f"resuming from {path} (step {saved['step']:,})"]
    if changed:
        notes.append(f"the run goes on, but not bit for bit: {'; '.join(changed)}")
    # An earlier version's checkpoint lacks what was added since.
    known = {field.name: saved[field.name] for field in dataclasses.fields(Progress) if field.name in saved}
    return Progress(**known), path, notes


def check_same_run(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Compare ``identity`` of a checkpoint and of this run.

    Returns the differences that only mean another rounding. ``UserError`` names those that make it another run.
    """
    changes = [
        *_differences(saved["config"], now["config"], FIXED),
        *_differences(saved["model"], now["model"], sorted({*saved["model"], *now["model"]})),
        *(f"training data: {change}" for change in _differences(saved["data"], now["data"], sorted(now["data"]))),
    ]
    if changes:
        raise UserError(
            f"cannot resume, this is another run: {'; '.join(changes)}. Repeat its settings (its config.toml), or "
            "choose another --out; --checkpoint starts from its weights alone"
        )
    return list(_differences(saved["config"], now["config"], ROUNDING))


def _differences(saved: dict[str, Any], now: dict[str, Any], keys: Iterable[str]) -> Iterator[str]:
    for key in keys:
        if saved.get(key) != now.get(key):
            yield f"{key} was {saved.get(key)!r}, now {now.get(key)!r}"


def _versions() -> dict[str, str]:
    return {"llmfast": __version__, "torch": torch.__version__}
