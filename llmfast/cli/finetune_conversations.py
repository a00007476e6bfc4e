"""``llmfast finetune instruct`` and ``llmfast finetune preference``."""

from __future__ import annotations

import dataclasses
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfast.cli.common import JSON_HELP, check_backend, print_json, table
from llmfast.config import ConversationConfig, InstructConfig, PreferenceConfig, option

if TYPE_CHECKING:
    from llmfast.training import TrainResult


@dataclass
class InstructOptions(InstructConfig):
    """Options of ``llmfast finetune instruct``."""

    json: bool = option(False, JSON_HELP)


@dataclass
class PreferenceOptions(PreferenceConfig):
    """Options of ``llmfast finetune preference``."""

    json: bool = option(False, JSON_HELP)


def run_instruct(options: InstructOptions) -> int:
    from llmfast.finetuning.instruct import finetune_instruct

    return _run("instruct", options, finetune_instruct)


def run_preference(options: PreferenceOptions) -> int:
    from llmfast.finetuning.preference import finetune_preference

    return _run("preference", options, finetune_preference)


def _run(task: str, options: Any, finetune: Any) -> int:
    from llmfast.ranks import is_first, leave
    from llmfast.training.device import choose_device, choose_dtype

    device = choose_device(options.device)
    check_backend(options.backend, device, choose_dtype(options.dtype, device), loss=True)
    result, responses = finetune(dataclasses.replace(options, json=False))
    if is_first():
        if options.json:
            print_json({**result.to_dict(), "responses": None if responses is None else str(responses)})
        else:
            print(table(_rows(task, options, result, responses)))
    leave()
    return 128 + signal.Signals[result.interrupted] if result.interrupted else 0


def _rows(
    task: str, options: ConversationConfig, result: TrainResult, responses: Path | None
) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("steps", f"{result.steps:,} in {result.seconds:,.0f} s")]
    losses = [("training loss", result.train_loss), ("validation loss", result.val_loss)]
    rows += [(name, f"{loss:.4f}") for name, loss in losses if loss is not None]
    if result.best_val_loss is not None and result.best_val_loss != result.val_loss:
        rows.append(("best validation", f"{result.best_val_loss:.4f} in {result.best_checkpoint}"))
    rows += [
        (name.removeprefix("val_").replace("_", " "), f"{value:.4g}")
        for name, value in result.metrics.items()
        if name != "val_loss" and isinstance(value, float)
    ]
    rows += [
        ("checkpoint", result.checkpoint),
        ("plot", result.out / "loss.png"),
        ("metrics", result.out / "metrics.jsonl"),
    ]
    if responses is not None:
        rows += [("responses", responses), ("judge them", f"llmfast judge {responses}")]
    if result.interrupted:
        again = f"llmfast finetune {task} --out {result.out} --resume"
        rows.append(("interrupted", f"{result.interrupted}; go on with {again}"))
    return rows
