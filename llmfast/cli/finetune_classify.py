"""``llmfast finetune classify``: labelled texts to a classifier."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmfast.cli.common import JSON_HELP, check_backend, print_json, table
from llmfast.config import ClassifyConfig, option

if TYPE_CHECKING:
    from llmfast.finetuning.classify import ClassifyResult


@dataclass
class ClassifyOptions(ClassifyConfig):
    """Options of ``llmfast finetune classify``."""

    json: bool = option(False, JSON_HELP)


def run_classify(options: ClassifyOptions) -> int:
    from llmfast.finetuning.classify import finetune_classify
    from llmfast.ranks import is_first, leave
    from llmfast.training.device import choose_device, choose_dtype

    device = choose_device(options.device)
    check_backend(options.backend, device, choose_dtype(options.dtype, device), loss=False)
    result = finetune_classify(options)
    if is_first():
        if options.json:
            print_json(result.to_dict())
        else:
            print(render(result))
    leave()
    interrupted = result.training.interrupted
    return 128 + signal.Signals[interrupted] if interrupted else 0


def render(result: ClassifyResult) -> str:
    """How a fine-tuning went, for people."""
    training = result.training
    early = ", stopped early" if training.stopped_early else ""
    rows: list[tuple[str, object]] = [("steps", f"{training.steps:,} in {training.seconds:,.0f} s{early}")]
    if training.interrupted:
        go_on = f"llmfast finetune classify --out {training.out} --resume"
        return table([*rows, ("interrupted", f"{training.interrupted}; go on with {go_on}")])
    for name, scores in (("validation", result.validation), ("test", result.test)):
        if scores is not None:
            rows.append((name, f"accuracy {scores['accuracy']:.2%}, loss {scores['loss']:.4f}"))
    rows.append(("checkpoint", training.best_checkpoint or training.checkpoint))
    rows.append(("files", f"{training.out}/: results.json, metrics.jsonl, loss.png, data/"))
    rows.append(("use it", f"llmfast classify --checkpoint {training.out} TEXT"))
    shown = result.test or result.validation
    return table(rows) + ("\n\n" + render_classes(shown, result.labels) if shown else "")


def render_classes(scores: dict[str, Any], labels: list[str], most: int = 20) -> str:
    """Scores of each class, and of so many classes the confusion matrix."""
    width = max(9, *(len(label) for label in labels)) + 2
    lines = [f"{'label':<{width}}{'precision':>10}{'recall':>10}{'f1':>10}{'count':>8}"]
    for label in labels:
        c = scores["classes"][label]
        lines.append(f"{label:<{width}}{c['precision']:>10.3f}{c['recall']:>10.3f}{c['f1']:>10.3f}{c['count']:>8,}")
    if len(labels) <= most:
        lines += ["", f"{'is, said:':<{width}}" + "".join(f"{label:>{width}}" for label in labels)]
        for label, row in zip(labels, scores["confusion"], strict=True):
            lines.append(f"{label:<{width}}" + "".join(f"{n:>{width},}" for n in row))
    return "\n".join(lines)
