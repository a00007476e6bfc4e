"""``llmfast pretrain``: from text or tokens to a trained model, in one command."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfast.cli.common import FIELD_HELP, JSON_HELP, check_backend, note, print_json, table
from llmfast.config import MODEL_OVERRIDES, GPTConfig, PretrainConfig, option
from llmfast.errors import UserError

if TYPE_CHECKING:
    from llmfast.cli.corpus import Corpus
    from llmfast.nn import GPT
    from llmfast.tokenizer import Tokenizer
    from llmfast.training import Trainer, TrainResult

PADDING = 1.01  # a preset's vocabulary is kept where it is the tokenizer's, padded by less than this


@dataclass
class Options(PretrainConfig):
    """Options of ``llmfast pretrain``."""

    field: str = option("text", FIELD_HELP)
    json: bool = option(False, JSON_HELP)


def default_config(given: dict[str, Any]) -> Path | None:
    """The file whose options a resume repeats: the run's own."""
    path = Path(given.get("out", PretrainConfig.out), "config.toml")
    return path if given.get("resume") and path.exists() else None


def run(options: Options) -> int:
    from llmfast.cli.corpus import check_data, resolve_tokenizer
    from llmfast.ranks import join, leave
    from llmfast.training.device import choose_device, choose_dtype
    from llmfast.training.rundir import CONFIG_FILE, RunDirectory, goes_on
    from llmfast.training.settings import check

    # What can be told before any work is done and anything is written.
    check(options)
    options.resume = goes_on(options)
    check_preparing(options)
    if not options.checkpoint:
        shape(options)
    device = choose_device(options.device)
    check_backend(options.backend, device, choose_dtype(options.dtype, device), loss=True)
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file is in the way of the run directory")
    if options.resume and not out.exists():
        raise UserError(f"nothing to resume: there is no {out}")
    start = starting_checkpoint(options)
    if options.resume and not (out / CONFIG_FILE).exists() and not any(out.glob("checkpoints/step-*")):
        # Without its config.toml, the run's data and model are not known.
        raise UserError(f"nothing to resume: {out} holds no run that has begun; repeat its command without --resume")
    resumes = options.resume and start is not None  # with its own tokenizer, however that was made
    tokenizer = None if resumes else resolve_tokenizer(options.tokenizer)
    if not holds_data(options):
        check_data(options.data, options.val_data)
    if out.exists():
        with RunDirectory(out, resume=options.resume):
            pass  # complains of another run, and of one in progress

    ranks = join()
    with ranks.in_turn("data"):
        trainer = make_trainer(options, start, tokenizer)
    result = trainer.fit()
    if ranks.first:
        report(options, result)
    leave()
    return 128 + signal.Signals[result.interrupted] if result.interrupted else 0


def check_preparing(options: PretrainConfig) -> None:
    """``UserError`` for an option that text cannot be prepared with."""
    if not 0 <= options.val_fraction < 1:
        raise UserError(f"val_fraction must lie in [0, 1), got {options.val_fraction}")
    if options.tokenizer_size < 257:
        raise UserError(f"tokenizer_size must be at least 257 (bytes and end-of-text), got {options.tokenizer_size}")


def shape(options: PretrainConfig) -> GPTConfig:
    """The model of ``--model`` and the model options; the vocabulary is still the preset's."""
    config = GPTConfig.preset(options.model, **_overrides(options))
    if options.block_size is None:
        return config
    _check_block_size(options, config, f"--model {options.model}")
    # No position beyond the block size: it would never be trained.
    return dataclasses.replace(config, block_size=options.block_size)


def starting_checkpoint(options: PretrainConfig) -> Path | None:
    """The checkpoint that gives the model: the run's own at a resume, else ``--checkpoint``'s."""
    from llmfast.checkpoint import find_checkpoint

    if options.resume and any(Path(options.out, "checkpoints").glob("step-*")):
        return find_checkpoint(options.out, prefer="latest")
    return find_checkpoint(options.checkpoint) if options.checkpoint else None


def holds_data(options: PretrainConfig) -> bool:
    """Whether the text of the run to resume is prepared already."""
    return options.resume and Path(options.out, "data", "meta.json").exists()


def make_trainer(options: Options, start: Path | None, tokenizer: Tokenizer | str | None) -> Trainer:
    """Data, model and loop. Where they do not fit each other, what was prepared is taken away again."""
    from llmfast.cli.corpus import check_ids
    from llmfast.training import Trainer

    folder = Path(options.out, "data")
    existed = folder.exists()
    model = None
    if start is not None:
        model, tokenizer = model_of(options, start), tokenizer_of(options, start, tokenizer)
    corpus = read_data(options, folder, tokenizer)
    try:
        notes: list[str] = []
        if model is None:
            model = new_model(options, corpus, notes)
        for source in (corpus.train, corpus.val):
            if source is not None:
                check_ids(source, model.config.vocab_size)
        if corpus.val is None:
            notes.append("no validation data: the last checkpoint counts as the best")
        config = dataclasses.replace(options, json=False)
        trainer = Trainer(model, config, corpus.train, corpus.val, tokenizer=corpus.tokenizer)
    except UserError:
        if not existed and folder.exists():
            shutil.rmtree(folder)
            with contextlib.suppress(OSError):
                folder.parent.rmdir()
        raise
    for line in notes:
        note(line)
    return trainer


def read_data(options: Options, folder: Path, tokenizer: Tokenizer | str | None) -> Corpus:
    """The run's tokens; text becomes tokens in ``folder``, which the first rank does for all."""
    from llmfast.cli.corpus import open_corpus, open_prepared
    from llmfast.ranks import is_first

    if holds_data(options) or (not is_first() and (folder / "meta.json").exists()):
        return open_prepared(folder)
    return open_corpus(
        options.data,
        folder,
        tokenizer=tokenizer,
        tokenizer_size=options.tokenizer_size,
        val_data=options.val_data,
        val_fraction=options.val_fraction,
        split=options.split,
        field=options.field,
        seed=options.seed,
        progress=sys.stderr.isatty(),
    )


def model_of(options: PretrainConfig, start: Path) -> GPT:
    """The model of a checkpoint, which the model options must not contradict."""
    from llmfast.checkpoint import load_model

    changed: dict[str, Any] = {} if options.dropout is None else {"dropout": options.dropout}
    model = load_model(start, **changed)
    if hasattr(model, "labels"):
        raise UserError(f"{start} is a classifier, and pretraining goes on from a model that writes text")
    for name, value in _overrides(options).items():
        if value != getattr(model.config, name):
            raise UserError(f"--{name.replace('_', '-')} {value}: {start} has {name} {getattr(model.config, name)}")
    _check_block_size(options, model.config, str(start))
    return model


def tokenizer_of(options: PretrainConfig, start: Path, given: Tokenizer | str | None) -> Tokenizer | str | None:
    """The tokenizer of a checkpoint, which ``given`` must not contradict."""
    from llmfast.checkpoint import load_tokenizer_of
    from llmfast.cli.corpus import check_same
    from llmfast.data.tokens import is_token_data

    own = load_tokenizer_of(start)
    if own is None:
        if given is None and not (options.data and is_token_data(options.data[0])):
            raise UserError(f"{start} holds no tokenizer: name the one that it was trained with by --tokenizer")
        return given
    if isinstance(given, str):
        raise UserError(f"--tokenizer {given} would train a new one, and {start} has its own: leave it out")
    if given is not None:
        check_same(given, own, f"--tokenizer {options.tokenizer}")
    return own


def new_model(options: PretrainConfig, corpus: Corpus, notes: list[str]) -> GPT:
    """A model with fresh weights, and the vocabulary that the data wants; ``notes`` takes what to say of it."""
    import torch

    from llmfast.nn import GPT

    config = shape(options)
    size = corpus.train.vocab_size
    if size is not None and options.vocab_size is None:
        whole = config.vocab_size
        config = fit_vocabulary(config, size)
        kept = config.vocab_size == whole != size
        whose = f"--model {options.model}'s; the tokenizer has {size:,}" if kept else "the tokenizer's"
        notes.append(f"vocabulary: {config.vocab_size:,} ids, {whose}")
    torch.manual_seed(options.seed)
    model = GPT(config)
    notes.append(
        f"model: {model.num_parameters():,} parameters, {config.n_layer} layers, width {config.n_embd}, "
        f"{config.n_head} heads, context {config.block_size}"
    )
    return model


def fit_vocabulary(config: GPTConfig, size: int) -> GPTConfig:
    """``config`` for ``size`` token ids; a preset's vocabulary stays where it is those, padded a little."""
    if size <= config.vocab_size < PADDING * size:
        return config
    return dataclasses.replace(config, vocab_size=size)


def report(options: Options, result: TrainResult) -> None:
    """How it went, and where everything is."""
    if options.json:
        print_json(result.to_dict())
        return
    speed = f", {result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else ""
    rows: list[tuple[str, object]] = [
        ("steps", f"{result.steps:,} ({result.tokens:,} tokens) in {result.seconds:,.0f} s{speed}")
    ]
    losses = [("training loss", result.train_loss), ("validation loss", result.val_loss)]
    rows += [(name, f"{loss:.4f}") for name, loss in losses if loss is not None]
    if result.best_val_loss is not None and result.best_val_loss != result.val_loss:
        rows.append(("best validation", f"{result.best_val_loss:.4f} in {result.best_checkpoint}"))
    files = {"plot": "loss.png", "metrics": "metrics.jsonl", "samples": "samples.txt"}
    places = [("checkpoint", result.checkpoint), *((name, result.out / file) for name, file in files.items())]
    rows += [(name, path) for name, path in places if path is not None and path.exists()]
    if result.interrupted:
        rows.append(("interrupted", f"{result.interrupted}; go on with llmfast pretrain --out {result.out} --resume"))
    else:
        rows.append(("read it", f"llmfast generate --checkpoint {result.out}"))
    print(table(rows))


def _overrides(options: PretrainConfig) -> dict[str, Any]:
    return {name: getattr(options, name) for name in MODEL_OVERRIDES if getattr(options, name) is not None}


def _check_block_size(options: PretrainConfig, config: GPTConfig, where: str) -> None:
    if options.block_size is not None and options.block_size > config.block_size:
        raise UserError(
            f"block size {options.block_size} is above the {config.block_size} of {where}: lower --block-size"
        )
