"""``llmfast evaluate``: how well a checkpoint predicts held-out text, chooses among answers, or classifies."""

from __future__ import annotations

import math
import sys
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmfast.cli.common import FIELD_HELP, JSON_HELP, ModelOptions, OpenModel, note, open_model, print_json, table
from llmfast.cli.corpus import Corpus, check_data, check_ids, check_same, open_corpus, open_prepared
from llmfast.cli.finetune_classify import render_classes
from llmfast.cli.options import load_toml
from llmfast.config import ClassifyConfig, option
from llmfast.errors import UserError

# Flags that only a model that writes text takes, and those that only a classifier takes.
_OF_TEXT = ("split", "block_size", "eval_batches", "baseline")
_OF_LABELS = ("text_column", "label_column", "max_length", "skip_bad")


@dataclass
class Options(ModelOptions):
    """Options of ``llmfast evaluate``."""

    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "shards, token files or text: files, folders or globs; for a classifier one file of labelled texts "
            "(default: the run's own data)"
        },
    )
    multiple_choice: str | None = option(
        None, "answer the questions of this JSON Lines file instead: ctx, endings and label in every line (HellaSwag's)"
    )
    split: Literal["train", "val"] | None = option(None, "part of prepared data (default: val, of text all of it)")
    block_size: int | None = option(None, "tokens in a window (default: the model's block size)")
    batch_size: int = option(8, "windows, endings or labelled texts in one forward pass")
    eval_batches: int = option(0, "batches to take, spread evenly over the data (0: all of it)")
    baseline: bool = option(False, "also the loss of a smoothed bigram model of the training part")
    text_column: str | None = option(None, "a classifier's data: column of the text (default: guessed, and said)")
    label_column: str | None = option(None, "a classifier's data: column of the label (default: guessed, and said)")
    max_length: int | None = option(None, "a classifier's data: cut texts to so many tokens")
    skip_bad: bool = option(False, "a classifier's data: leave out records that cannot be used, and count them")
    json: bool = option(False, JSON_HELP)
    field: str = option("text", FIELD_HELP)


def run(options: Options) -> int:
    from llmfast.evaluation import bigram_loss, evaluate_loss

    for name, least in (("batch_size", 1), ("eval_batches", 0)):
        if getattr(options, name) < least:
            raise UserError(f"{name} must be at least {least}, got {getattr(options, name)}")
    if options.baseline and options.eval_batches:
        raise UserError("--baseline compares over the whole split: leave out --eval-batches")
    if options.multiple_choice is not None:
        return _multiple_choice(options)
    check_data(options.data, [])
    with (
        open_model(options, cast=False, classifier=None) as opened,
        tempfile.TemporaryDirectory(prefix="llmfast-") as scratch,
    ):
        if hasattr(opened.model, "labels"):
            return _classification(options, opened)
        _refuse(options, "no classifier", _OF_LABELS)
        config = opened.model.config
        T = config.block_size if options.block_size is None else options.block_size
        if not 1 <= T <= config.block_size:
            raise UserError(f"block size {T} must lie between 1 and the model's {config.block_size}")
        corpus = _open_data(options, opened, Path(scratch))
        if options.split == "val" and corpus.val is None:
            raise UserError("the data has no validation part: leave out --split, or take --split train")
        source = corpus.train if options.split == "train" or corpus.val is None else corpus.val
        if options.baseline and source is corpus.train:
            raise UserError("--baseline takes prepared data with a training and a validation part")
        for part in (corpus.train, source):
            check_ids(part, config.vocab_size)
        result = evaluate_loss(
            opened.model,
            source,
            T,
            options.batch_size,
            max_batches=options.eval_batches or None,
            tokenizer=opened.tokenizer or corpus.tokenizer,
            autocast=_autocast(opened),
        )
        baseline = bigram_loss(corpus.train, source, config.vocab_size) if options.baseline else None
    facts = result.to_dict() | {"checkpoint": str(opened.path), "block_size": T}
    if baseline is not None:
        facts["bigram_loss"] = baseline
    if options.json:
        print_json(facts)
    else:
        print(render(facts))
    return 0


def _autocast(opened: OpenModel) -> AbstractContextManager[Any]:
    import torch

    device = next(opened.model.parameters()).device
    return torch.autocast(device.type, opened.dtype, enabled=opened.dtype != torch.float32)


def _refuse(options: Options, kind: str, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(options, name):
            raise UserError(f"{options.checkpoint} is {kind}: leave out --{name.replace('_', '-')}")


def _classification(options: Options, opened: OpenModel) -> int:
    from llmfast.finetuning.classify import score_examples
    from llmfast.finetuning.classify_data import check_length, read_examples

    _refuse(options, "a classifier", _OF_TEXT)
    if len(options.data) > 1:
        raise UserError(f"a classifier takes one file of texts and labels, got {len(options.data)}")
    max_length = options.max_length
    if options.data:
        path = Path(options.data[0])
    else:
        path = _run_of(opened) / "data" / "test.jsonl"
        if not path.is_file():
            raise UserError(f"{_run_of(opened)} has no test split of its own: name labelled texts with --data")
        max_length = max_length or _trained_length(_run_of(opened))
    config = ClassifyConfig(
        checkpoint=options.checkpoint,
        data=str(path),
        text_column=options.text_column,
        label_column=options.label_column,
        max_length=max_length,
        skip_bad=options.skip_bad,
        micro_batch_size=options.batch_size,
    )
    model: Any = opened.model
    limit = check_length(config, model.config.block_size)
    columns = (config.text_column, config.label_column)
    examples, _ = read_examples(config.data, columns, config, opened.need_tokenizer(), limit, note, model.labels)
    scores = score_examples(model, examples, config, autocast=_autocast(opened))
    facts = {**scores, "labels": model.labels, "checkpoint": str(opened.path), "data": str(path)}
    if options.json:
        print_json(facts)
        return 0
    rows: list[tuple[str, object]] = [
        ("checkpoint", facts["checkpoint"]),
        ("texts", f"{scores['examples']:,}"),
        ("accuracy", f"{scores['accuracy']:.2%}"),
        ("macro F1", f"{scores['macro_f1']:.4f}"),
        ("loss", f"{scores['loss']:.4f}"),
    ]
    print(table(rows) + "\n\n" + render_classes(scores, model.labels))
    return 0


def _trained_length(run: Path) -> int | None:
    """What the texts of a run's own splits were cut to."""
    file = run / "config.toml"
    length = load_toml(file).get("max_length") if file.is_file() else None
    return length if isinstance(length, int) else None


def _run_of(opened: OpenModel) -> Path:
    """The run that a checkpoint belongs to, or the checkpoint itself."""
    return opened.path.parent.parent if opened.path.parent.name == "checkpoints" else opened.path


def _multiple_choice(options: Options) -> int:
    from tqdm import tqdm

    from llmfast.evaluation import evaluate_multiple_choice, read_questions

    for name in ("data", *_OF_TEXT, *_OF_LABELS):
        if getattr(options, name):
            raise UserError(f"--multiple-choice does not go with --{name.replace('_', '-')}")
    questions = read_questions(options.multiple_choice or "")
    with (
        open_model(options, cast=False) as opened,
        tqdm(
            total=sum(len(question.endings) for question in questions),
            desc="endings",
            disable=not sys.stderr.isatty(),
            leave=False,
        ) as bar,
    ):
        result = evaluate_multiple_choice(
            opened.model,
            opened.need_tokenizer(),
            questions,
            options.batch_size,
            autocast=_autocast(opened),
            progress=bar.update,
        )
    facts = result.to_dict() | {"checkpoint": str(opened.path), "multiple_choice": options.multiple_choice}
    if options.json:
        print_json(facts)
        return 0
    rows: list[tuple[str, object]] = [
        ("checkpoint", facts["checkpoint"]),
        ("questions", f"{result.questions:,}; guessing would get {result.chance:.2%} right"),
        ("acc", f"{result.acc:.2%} +- {result.acc_stderr:.2%}, by log-likelihood"),
        ("acc_norm", f"{result.acc_norm:.2%} +- {result.acc_norm_stderr:.2%}, by log-likelihood per character"),
    ]
    if result.truncated:
        rows.append(("shortened", f"{result.truncated:,} endings' contexts lost their beginning to fit the model"))
    print(table(rows))
    return 0


def render(facts: dict[str, Any]) -> str:
    """An evaluation for people."""
    rows: list[tuple[str, object]] = [
        ("checkpoint", facts["checkpoint"]),
        ("tokens", f"{facts['tokens']:,} predicted, {facts['block_size']} at a time"),
        ("loss", f"{facts['loss']:.4f} nats a token"),
        ("perplexity", f"{facts['perplexity']:,.2f}"),
    ]
    if facts["bits_per_byte"] is not None:
        rows.append(("bits per byte", f"{facts['bits_per_byte']:.4f}"))
    if "bigram_loss" in facts:
        bigram = facts["bigram_loss"]
        better = bigram - facts["loss"]
        side = "below" if better > 0 else "above"
        rows.append(("bigram loss", f"{bigram:.4f} nats a token, perplexity {math.exp(bigram):,.2f}"))
        rows.append(("", f"the model is {abs(better):.4f} nats {side} the bigram model"))
    return table(rows)


def _open_data(options: Options, opened: OpenModel, scratch: Path) -> Corpus:
    """The tokens that ``--data`` names, or those of the run that the checkpoint belongs to."""
    from llmfast.data.tokens import is_token_data

    if options.data:
        tokenizer = opened.tokenizer if is_token_data(options.data[0]) else opened.need_tokenizer()
        preparing: dict[str, Any] = dict(val_fraction=0.0, field=options.field, progress=sys.stderr.isatty())
        return open_corpus(options.data, scratch, tokenizer=tokenizer, val_data=[], **preparing)
    run = _run_of(opened)
    if not (run / "data").is_dir():
        raise UserError(f"{run} has no data of its own, as runs on text have: name some with --data")
    corpus = open_prepared(run / "data")
    if corpus.tokenizer is not None and opened.tokenizer is not None:
        check_same(corpus.tokenizer, opened.tokenizer, str(run / "data"))
    return corpus
