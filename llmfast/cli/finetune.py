"""``llmfast finetune TASK``: a trained model and a file of examples to a model for a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmfast.cli.finetune_classify import ClassifyOptions, run_classify
from llmfast.cli.finetune_conversations import InstructOptions, PreferenceOptions, run_instruct, run_preference
from llmfast.cli.options import Action
from llmfast.config import FinetuneConfig
from llmfast.errors import UserError


def default_config(given: dict[str, Any]) -> Path | None:
    """The file whose options a resume repeats: the run's own."""
    out = given.get("out", FinetuneConfig.out)
    path = Path(out, "config.toml")
    if not given.get("resume"):
        return None
    if path.exists():
        return path
    if "checkpoint" not in given:
        raise UserError(f"--resume: there is no run in {out} to go on with; name the folder of the run by --out")
    return None


ACTIONS: dict[str, Action] = {
    "classify": ("to name the label of a text", ClassifyOptions, run_classify),
    "instruct": ("to follow instructions", InstructOptions, run_instruct),
    "preference": ("to prefer chosen responses to rejected ones: DPO, ORPO, KTO", PreferenceOptions, run_preference),
}
