"""Multiple choice in the manner of HellaSwag (Zellers et al. 2019): which ending does the model find likeliest?

Two accuracies, as lm-evaluation-harness defines them: ``acc`` takes the ending with the highest log-likelihood,
``acc_norm`` the one with the highest log-likelihood per character of the ending.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfast.errors import UserError
from llmfast.evaluation.likelihood import encode_pair, log_likelihoods

if TYPE_CHECKING:
    from llmfast.nn import GPT
    from llmfast.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """A context, its possible endings, and which of them is right."""

    context: str
    endings: list[str]
    label: int
    where: str  # file and line, for errors


@dataclass(frozen=True)
class MultipleChoice:
    """The result over all questions; accuracies from 0 to 1."""

    questions: int
    acc: float
    acc_norm: float
    chance: float  # the accuracy of guessing
    truncated: int  # endings whose context had to be shortened to fit the model

    @property
    def acc_stderr(self) -> float:
        return _stderr(self.acc, self.questions)

    @property
    def acc_norm_stderr(self) -> float:
        return _stderr(self.acc_norm, self.questions)

    def to_dict(self) -> dict[str, Any]:
        errors = {"acc_stderr": self.acc_stderr, "acc_norm_stderr": self.acc_norm_stderr}
        # JSON has no NaN, which the standard error of one question is.
        return asdict(self) | {name: None if math.isnan(value) else value for name, value in errors.items()}


def _stderr(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan


def evaluate_multiple_choice(
    model: GPT,
    tokenizer: Tokenizer,
    questions: list[Question],
    batch_size: int = 8,
    *,
    autocast: AbstractContextManager[Any] | None = None,
    progress: Callable[[int], Any] = lambda rows: None,
) -> MultipleChoice:
    """Answer every question with ``model``; an ending follows its context after one space.

    Raises ``UserError`` for an ending that makes no token, or more than the model reads at once.
    """
    pairs, truncated = [], 0
    for question in questions:
        for number, ending in enumerate(question.endings):
            context, continuation = encode_pair(tokenizer, question.context, f" {ending}")
            if not 1 <= len(continuation) <= model.config.block_size:
                raise UserError(
                    f"{question.where}: ending {number} has {len(continuation)} tokens, "
                    f"the model reads 1 to {model.config.block_size}"
                )
            pairs.append((context, continuation))
            truncated += len(context) + len(continuation) > model.config.block_size + 1
    scores = iter(log_likelihoods(model, pairs, batch_size, autocast=autocast, progress=progress))
    right = right_norm = 0
    for question in questions:
        summed = [next(scores).log_likelihood for _ in question.endings]
        normed = [score / len(ending) for score, ending in zip(summed, question.endings, strict=True)]
        right += summed.index(max(summed)) == question.label
        right_norm += normed.index(max(normed)) == question.label
    return MultipleChoice(
        questions=len(questions),
        acc=right / len(questions),
        acc_norm=right_norm / len(questions),
        chance=sum(1 / len(question.endings) for question in questions) / len(questions),
        truncated=truncated,
    )


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a JSON Lines file: {"ctx", "endings", "label"} in every line.

    A record of HellaSwag itself (with "activity_label", "ctx_a", "ctx_b") is put together as lm-evaluation-harness does
    it. Raises ``UserError`` with file and line.
    """
    path = Path(path)
    questions = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                questions.append(_question(json.loads(line.decode("utf-8")), f"{path}, line {number}"))
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8 text (byte {error.start} of the line)") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not valid JSON: {error.msg}") from None
    if not questions:
        raise UserError(f"{path} holds no question")
    return questions


def _question(record: Any, where: str) -> Question:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with ctx, endings and label, got {type(record).__name__}")
    missing = [key for key in ("ctx", "endings", "label") if key not in record]
    if missing:
        raise UserError(f"{where}: no {missing[0]!r}; a question has ctx, endings and label")
    context, endings, label = record["ctx"], record["endings"], record["label"]
    if not isinstance(context, str):
        raise UserError(f"{where}: ctx must be text, got {json.dumps(context)[:40]}")
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(e, str) and e.strip() for e in endings):
        raise UserError(f"{where}: endings must be a list of two or more texts, none of them empty")
    if isinstance(label, str) and re.fullmatch("[0-9]+", label):  # as in HellaSwag on the Hugging Face hub
        label = int(label)
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(endings):
        raise UserError(f"{where}: label must lie in 0 .. {len(endings) - 1}, got {json.dumps(label)[:40]}")
    parts = [part for key in ("activity_label", "ctx_a", "ctx_b") if isinstance(part := record.get(key), str)]
    if len(parts) == 3:
        context = _clean(f"{parts[0]}: {parts[1]} {parts[2].capitalize()}")
        endings = [_clean(ending) for ending in endings]
    return Question(context, endings, label, where)


def _clean(text: str) -> str:
    """Without the marks that WikiHow's pages left in HellaSwag."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
