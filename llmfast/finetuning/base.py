"""What every fine-tuning shares: the base model, what of it is trained, the split of the examples, and their order."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from llmfast.checkpoint import find_checkpoint, load_model, load_tokenizer_of
from llmfast.config import FinetuneConfig
from llmfast.errors import UserError
from llmfast.files import write_whole
from llmfast.nn import GPT, GPTForClassification, add_lora
from llmfast.nn.adapter import weights_sha256
from llmfast.ranks import is_first
from llmfast.tokenizer import Tokenizer, load_tokenizer
from llmfast.tokenizer.base import replace_surrogates
from llmfast.training.rundir import RunDirectory, goes_on
from llmfast.training.settings import check

T = TypeVar("T")
SPLITS = ("train", "validation", "test")


def check_before(config: FinetuneConfig) -> None:
    """``UserError`` for what can be told before any work is done and anything is written."""
    check(config)
    config.lora  # noqa: B018  raises for values that make no adapter
    if config.dropout is not None and not 0 <= config.dropout < 1:
        raise UserError(f"dropout must lie in [0, 1), got {config.dropout}")
    fractions = (config.val_fraction, config.test_fraction)
    if not all(0 <= f < 1 for f in fractions) or sum(fractions) >= 1:
        raise UserError(
            f"val_fraction and test_fraction must lie in [0, 1) and leave some for training, got {fractions}"
        )
    if config.max_length is not None and config.max_length < 1:
        raise UserError(f"max_length must be at least 1, got {config.max_length}")
    out = Path(config.out)
    config.resume = goes_on(config)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file is in the way of the run directory")
    if config.resume and not out.exists():
        raise UserError(f"nothing to resume: there is no {out}")
    if out.exists():
        with RunDirectory(out, resume=config.resume):
            pass  # complains of another run, and of one in progress


@dataclass(frozen=True)
class Base:
    """A base model, in evaluation mode, and its tokenizer."""

    path: Path
    model: GPT
    tokenizer: Tokenizer

    @functools.cached_property
    def sha256(self) -> str:
        """Of the weights, as they are when first asked."""
        return weights_sha256(self.model)


def open_base(config: FinetuneConfig) -> Base:
    """The model and tokenizer of ``config.checkpoint``, with ``config.dropout``."""
    path = find_checkpoint(config.checkpoint)
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else load_tokenizer_of(path)
    if tokenizer is None:
        raise UserError(f"{path} holds no tokenizer: name the one that it was trained with by --tokenizer")
    changed: dict[str, Any] = {} if config.dropout is None else {"dropout": config.dropout}
    model = load_model(path, **changed)
    if isinstance(model, GPTForClassification):
        raise UserError(f"{path} is a classifier, and the base must be a model that writes text")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens and {path} only {model.config.vocab_size:,}: "
            "it is another model's"
        )
    return Base(path, model, tokenizer)


def choose_trained(model: GPT, config: FinetuneConfig, base: Base) -> GPT:
    """Let ``config.train`` decide which parameters of ``model`` require gradients; returns it.

    ``lora`` adds the adapters, drawn by ``config.seed``; ``model`` has ``base``'s weights, and perhaps another head.
    """
    if config.train != "lora":
        return model.requires_grad_(True)
    # The path as it will be found from anywhere, and the weights that the adapters belong to.
    model.lora_base = {"path": str(base.path.resolve()), "sha256": base.sha256}  # type: ignore[assignment]
    torch.manual_seed(config.seed)
    return add_lora(model, config.lora)  # type: ignore[return-value]


def split(count: int, config: FinetuneConfig) -> dict[str, list[int]]:
    """Numbers 0 .. count - 1 in an order that ``split_seed`` decides, cut into train, validation and test.

    The fractions are rounded down, what is left over goes to the test split where there is one (Raschka's rule), else
    to the training split. A split whose examples come from a file of its own takes none.
    """
    order = np.random.RandomState(config.split_seed).permutation(count).tolist()
    val = int(count * config.val_fraction) if config.val_data is None else 0
    test = config.test_fraction if config.test_data is None else 0.0
    train = count - val
    if test:
        kept = 1 - test - (config.val_fraction if config.val_data is None else 0.0)
        train = min(train, int(count * kept + 1e-9))
    return {"train": order[:train], "validation": order[train : train + val], "test": order[train + val :]}


def write_splits(folder: Path, splits: dict[str, list[dict[str, Any]]], *, resume: bool = False) -> None:
    """Write ``folder/train.jsonl`` and so on, one example a line; each file appears whole or not at all.

    With ``resume`` what is there must be the same: ``UserError``, and nothing changes, where it is not. Of several
    ranks the first one writes.
    """
    if not is_first():
        return
    texts = {
        folder / f"{name}.jsonl": "".join(
            replace_surrogates(json.dumps(example, ensure_ascii=False)) + "\n" for example in examples
        ).encode()
        for name, examples in splits.items()
    }
    if resume:
        for file, text in texts.items():
            if file.exists() and file.read_bytes() != text:
                raise UserError(
                    f"cannot resume, this is another run: {file} holds other examples. Repeat its data and split, or "
                    "choose another --out"
                )
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        write_whole(file, text)


def read_splits(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What ``write_splits`` wrote."""
    splits = {}
    for name in SPLITS:
        try:
            text = (folder / f"{name}.jsonl").read_text(encoding="utf-8")
            splits[name] = [json.loads(line) for line in text.split("\n") if line]
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / f'{name}.jsonl'} is not readable: {error}") from None
    return splits


class Examples(Generic[T]):
    """Batches of ``examples`` as a pure function of one global sample index, for ``Trainer``.

    ``collate`` makes a batch's tensors of a list of examples. With ``seed``, every epoch has an order of its own, and
    the few samples that fill no whole optimizer step of ``batch_size`` are left out of it, other ones in each epoch;
    without, the order is that of ``examples``, all of them. ``rows`` is the size of a (micro) batch.

    With ``length``, examples of similar length share a micro batch, which wastes little on padding: with ``seed`` the
    samples of each optimizer step are sorted by it, which leaves the step's gradient as it is; else all of them.
    """

    def __init__(
        self,
        examples: Sequence[T],
        collate: Callable[[list[T]], tuple[Tensor, ...]],
        rows: int,
        *,
        batch_size: int | None = None,
        seed: int | None = None,
        length: Callable[[T], int] | None = None,
    ) -> None:
        if not examples:
            raise UserError("there is no example to learn from")
        self.examples, self.collate, self.rows, self._seed = examples, collate, rows, seed
        self._lengths = None if length is None else np.array([length(example) for example in examples])
        step = batch_size or rows
        whole = len(examples) // step * step
        self.samples_per_epoch = whole if seed is not None and whole else len(examples)
        # Of a data set smaller than a step, a step's samples are of several epochs.
        self._step = self.samples_per_epoch if seed is None else step if whole else 1
        self.sha256 = hashlib.sha256(repr(list(examples)).encode()).hexdigest()
        self._order = functools.lru_cache(maxsize=2)(self._order_of)

    def batch(self, position: int) -> tuple[Tensor, ...]:
        places = (divmod(i, self.samples_per_epoch) for i in range(position, position + self.rows))
        return self.collate([self.examples[self._order(epoch)[i]] for epoch, i in places])

    def _order_of(self, epoch: int) -> np.ndarray:
        count = len(self.examples)
        if self._seed is None:
            order = np.arange(count)
        else:
            order = np.random.RandomState([self._seed % 2**32, epoch]).permutation(count)
        if self._lengths is None:
            return order
        steps = order[: self.samples_per_epoch].reshape(-1, self._step)
        return np.take_along_axis(steps, self._lengths[steps].argsort(1, kind="stable"), 1).ravel()
