"""Classification: a base model, texts and their labels to a model that names the label of a text.

Shapes: B batch, T sequence, K classes.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast.checkpoint import load_training_state
from llmfast.config import ClassifyConfig
from llmfast.files import write_whole
from llmfast.finetuning.base import (
    Base,
    Examples,
    check_before,
    choose_trained,
    open_base,
    read_splits,
    write_splits,
)
from llmfast.finetuning.classify_data import Example, class_weights, read_splits_of, restored, stored
from llmfast.nn import GPTForClassification, LoRALinear
from llmfast.ranks import is_first
from llmfast.training import Trainer, TrainResult
from llmfast.training.metrics import Sums

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class ClassifyResult:
    """How a fine-tuning went: the loop's result, and what the best checkpoint scores on the held-out splits."""

    training: TrainResult
    labels: list[str]
    trained_parameters: int
    validation: dict[str, Any] | None
    test: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "training": self.training.to_dict()}


def say(text: str) -> None:
    if is_first():
        print(text, file=sys.stderr, flush=True)


def finetune_classify(config: ClassifyConfig, *, progress: bool = True) -> ClassifyResult:
    """Train a classifier as ``config`` says and write the run directory ``config.out``.

    Beside the loop's files there are the splits in ``data/`` and, at the end, ``results.json``: accuracy, loss,
    confusion matrix and scores of each class on the validation and test splits. Raises ``UserError`` for what the
    user can mend, before anything is written where that can be told.
    """
    check_before(config)
    tell: Callable[[str], None] = say if progress else lambda text: None
    base = open_base(config)
    folder = Path(config.out, "data")
    resumes = config.resume and (folder / "train.jsonl").exists()
    if resumes:
        splits = restored(read_splits(folder), base.tokenizer, config)
    else:
        splits = read_splits_of(config, base.tokenizer, base.model.config.block_size, tell)
    weights = class_weights(config, splits)
    model = build(base, splits.labels, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tell(f"training {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters ({config.train})")

    collate = Collate(splits.labels, base.tokenizer.eot_id or 0, config)
    rows = config.micro_batch_size
    train = Examples(splits.train, collate, rows, batch_size=config.batch_size, seed=config.seed, length=len)
    held_out = {name: Examples(part, collate, rows, length=len) if part else None for name, part in splits.items()[1:]}
    trainer = Trainer(
        model,
        config,
        train,
        held_out["validation"],
        tokenizer=base.tokenizer,
        loss_fn=ClassificationLoss(weights),
        metrics_fn=Scores(splits.labels),
        unit="example",
        progress=progress,
    )
    if not resumes:
        write_splits(folder, {name: stored(part) for name, part in splits.items()})
    result = trainer.fit()
    if result.interrupted:
        return ClassifyResult(result, splits.labels, trained, None, None)
    best = result.best_checkpoint or result.checkpoint
    if best is not None:
        load_training_state(best, model)
    scores = {name: trainer.evaluate(data) if data else None for name, data in held_out.items()}
    found = ClassifyResult(result, splits.labels, trained, scores["validation"], scores["test"])
    text = json.dumps(found.to_dict(), indent=2, ensure_ascii=False) + "\n"
    if is_first():
        write_whole(Path(config.out, RESULTS_FILE), text)
    return found


def build(base: Base, labels: list[str], config: ClassifyConfig) -> GPTForClassification:
    """A classifier on ``base``, of which what ``config.train`` says requires gradients."""
    torch.manual_seed(config.seed)
    model = GPTForClassification.from_gpt(base.model, labels)
    if config.train in ("all", "lora"):
        choose_trained(model, config, base)
    else:
        model.requires_grad_(False)
        if config.train == "last-block":
            model.transformer.h[-1].requires_grad_(True)
            model.transformer.ln_f.requires_grad_(True)
    if not isinstance(model.score, LoRALinear):
        model.score.requires_grad_(True)  # a new head is trained whole, unless it has an adapter of its own
    return model


class Collate:
    """Examples to (ids (B, T), lengths (B,), labels (B,)), all int64; T is the longest of them, or ``pad_to``."""

    def __init__(self, labels: list[str], pad_id: int, config: ClassifyConfig) -> None:
        self._numbers = {label: number for number, label in enumerate(labels)}
        self._pad_id, self._width = pad_id, config.pad_to

    def __call__(self, examples: list[Example]) -> tuple[Tensor, ...]:
        width = self._width or max(len(example.ids) for example in examples)
        rows = [example.ids + [self._pad_id] * (width - len(example.ids)) for example in examples]
        lengths = [len(example.ids) for example in examples]
        labels = [self._numbers[example.label] for example in examples]
        return torch.tensor(rows), torch.tensor(lengths), torch.tensor(labels)


class ClassificationLoss:
    """Cross-entropy of the labels, each weighted by its class, and the confusion matrix (K, K), truth by row."""

    def __init__(self, weights: list[float] | None) -> None:
        self._weights = weights

    def __call__(self, model: Any, batch: tuple[Tensor, ...]) -> tuple[Tensor, int, Sums]:
        ids, lengths, labels = batch
        logits = model(ids, lengths).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        if self._weights is not None:
            losses = losses * torch.tensor(self._weights, device=losses.device)[labels]
        K = logits.shape[1]
        confusion = torch.bincount(labels * K + logits.detach().argmax(1), minlength=K * K).view(K, K)
        return losses.mean(), len(labels), {"confusion": confusion}


class Scores:
    """Accuracy, macro-averaged F1, and precision, recall and F1 of each class, from a confusion matrix."""

    def __init__(self, labels: list[str]) -> None:
        self._labels = labels

    def __call__(self, sums: Sums, count: int) -> dict[str, Any]:
        confusion = sums["confusion"].double().cpu()
        right, truth, said = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        recall, precision = right / truth.clamp(min=1), right / said.clamp(min=1)
        f1 = 2 * right / (truth + said).clamp(min=1)
        present = truth > 0
        classes = {
            label: {"precision": p, "recall": r, "f1": f, "count": int(n)}
            for label, p, r, f, n in zip(
                self._labels, precision.tolist(), recall.tolist(), f1.tolist(), truth.tolist(), strict=True
            )
        }
        return {
            "accuracy": (right.sum() / count).item(),
            "macro_f1": f1[present].mean().item(),
            "classes": classes,
            "confusion": sums["confusion"].tolist(),
        }


@torch.no_grad()
def score_examples(
    model: GPTForClassification,
    examples: list[Example],
    config: ClassifyConfig,
    *,
    autocast: AbstractContextManager[Any] | None = None,
) -> dict[str, Any]:
    """Mean loss over ``examples`` (of the model's labels, none empty), and the figures of ``Scores``."""
    collate, loss_fn = Collate(model.labels, 0, config), ClassificationLoss(None)
    device, rows, total = model.head_weight.device, config.micro_batch_size, 0.0
    confusion = torch.zeros(len(model.labels), len(model.labels), dtype=torch.int64)
    ordered = sorted(examples, key=len)
    for start in range(0, len(ordered), rows):
        batch = tuple(tensor.to(device) for tensor in collate(ordered[start : start + rows]))
        with autocast or nullcontext():
            loss, count, sums = loss_fn(model, batch)
        total += float(loss) * count
        confusion += sums["confusion"].cpu()
    scores = Scores(model.labels)({"confusion": confusion}, len(examples))
    return {"loss": total / len(examples), "examples": len(examples), **scores}


@torch.no_grad()
def class_probabilities(model: GPTForClassification, ids: list[list[int]], *, batch_size: int = 32) -> Tensor:
    """Probabilities (N, K) float32 of N texts' token ids, in the order given.

    Raises ``ValueError`` for a text without tokens.
    """
    if not all(ids):
        raise ValueError(f"text {next(i for i, text in enumerate(ids) if not text)} has no token")
    device = model.head_weight.device
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found = torch.empty(len(ids), len(model.labels))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = len(ids[rows[-1]])
        padded = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in rows], device=device)
        lengths = torch.tensor([len(ids[i]) for i in rows], device=device)
        found[rows] = model(padded, lengths).float().softmax(1).cpu()
    return found
