"""The training loop: one for everything that llmfast trains."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmfast import ops
from llmfast.checkpoint import read_pointer, save_checkpoint
from llmfast.config import TrainConfig
from llmfast.errors import UserError
from llmfast.training.device import choose_device, choose_dtype, dtype_note, flops_per_token, peak_flops
from llmfast.training.diagnose import first_bad
from llmfast.training.errors import NotFiniteError, TrainingError, is_out_of_memory
from llmfast.training.feed import EvalBatches, training_batches
from llmfast.training.interrupt import StopRequest
from llmfast.training.metrics import MetricsFunction, Sums, add_sums, means
from llmfast.training.optimizer import build_optimizer
from llmfast.training.report import Report, Speed
from llmfast.training.resume import Progress, identity, resume, training_state
from llmfast.training.rundir import RunDirectory
from llmfast.training.schedule import learning_rate_at
from llmfast.training.settings import check, resolve
from llmfast.training.update import Update

IGNORE_INDEX = -100
SAMPLE_TEMPERATURE = 0.8

Batch = tuple[Tensor, ...]
# (mean loss, count), or (mean loss, count, sums of what else is measured)
LossFunction = Callable[[Any, Batch], tuple[Any, ...]]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. Losses are nats a token; None where nothing was evaluated."""

    out: Path
    steps: int
    tokens: int
    seconds: float  # of this process, from the first step to the last file
    train_loss: float | None  # at the end, without dropout, on as many batches as the validation loss
    val_loss: float | None  # at the end
    best_val_loss: float | None
    tokens_per_second: float | None  # while training, without evaluations, samples and checkpoints
    checkpoint: Path | None  # the newest
    best_checkpoint: Path | None
    interrupted: str | None  # SIGINT or SIGTERM, where one ended the run early
    stopped_early: bool = False  # the validation loss did not fall for ``patience`` evaluations
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)  # what else the last evaluation measured

    def to_dict(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


def language_model_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """Next-token loss of a ``GPT`` on (inputs, targets): (mean loss, number of targets that count)."""
    inputs, targets = batch
    count = int((targets != IGNORE_INDEX).sum())
    return (model(inputs, targets)[1], count) if count else (torch.zeros(()), 0)


def _unmasked_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """``language_model_loss`` where every target counts, which spares the host a look at the device."""
    inputs, targets = batch
    return model(inputs, targets)[1], targets.numel()


class Trainer:
    """Trains ``model`` as ``config`` says and writes the run directory ``config.out``.

    ``train_data`` and ``val_data`` are ``llmfast.data.TokenSource``s, of which the loop cuts its windows, or any
    objects with ``batch(position) -> tuple of CPU tensors`` (samples position .. position + micro_batch_size - 1) and
    ``samples_per_epoch``. ``loss_fn(model, batch) -> (mean loss, count)`` gives the mean over ``count`` tokens; micro
    batches are weighted by their counts, so that an accumulated step equals the full batch. Default: the loss of
    ``model(inputs, targets)``, targets of -100 left out. ``tokenizer`` is saved with every checkpoint and reads and
    writes the samples; ``progress=False`` keeps standard error silent.

    A loss function may return a third value, a dict of tensors: sums over its ``count`` tokens of what else is to be
    measured. ``metrics_fn(sums, count)`` makes metrics of them (default: each sum divided by the count) for the lines
    of metrics.jsonl: of the training batches since the last line under their own names, of an evaluation with
    ``val_`` before them. ``unit`` names what ``count`` counts. Only parameters that require gradients are trained.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        train_data: Any,
        val_data: Any = None,
        *,
        tokenizer: Any = None,
        loss_fn: LossFunction | None = None,
        metrics_fn: MetricsFunction = means,
        unit: str = "token",
        progress: bool = True,
    ) -> None:
        check(config)
        self.model = model
        self.tokenizer = tokenizer
        self.progress = progress
        self.metrics_fn = metrics_fn
        self.unit = unit
        self.train_data = train_data
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(config.dtype, self.device)
        self.loss_fn = loss_fn or (language_model_loss if hasattr(train_data, "batch") else _unmasked_loss)
        self.block_size = self._fit_to_model(config)
        self.batches = training_batches(train_data, config, self.block_size)
        self.config = resolve(
            config,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            block_size=self.block_size,
            samples_per_epoch=self.batches.samples_per_epoch,
        )
        self.batch_size = self.config.batch_size or 0
        self.val_batches = self._eval_batches(val_data, config.eval_batches) if val_data is not None else None
        # As many of the training data.
        self.train_batches = self._eval_batches(train_data, self.val_batches.count) if self.val_batches else None
        if tokenizer is not None and self.config.sample_every:
            self._check_prompt()

    def _fit_to_model(self, config: TrainConfig) -> int:
        """The block size; ``UserError`` where the model cannot hold it, or the data's token ids."""
        shape: Any = getattr(self.model, "config", None)
        if config.activation_checkpointing and not hasattr(self.model, "activation_checkpointing"):
            raise UserError(f"{type(self.model).__name__} offers no activation checkpointing: leave it off")
        if shape is None:
            return config.block_size or 1
        if (config.block_size or 0) > shape.block_size:
            raise UserError(f"block size {config.block_size} is above the model's {shape.block_size}")
        known = getattr(self.train_data, "vocab_size", None)
        if known is not None and known > shape.vocab_size:
            raise UserError(
                f"the training data has {known} token ids, the model has {shape.vocab_size}: raise vocab_size"
            )
        return config.block_size or shape.block_size

    def fit(self) -> TrainResult:
        """Train to ``max_steps``, or until SIGINT or SIGTERM, and return how it went.

        Raises ``UserError`` for what the user can mend and ``TrainingError`` where a loss or gradient is not finite
        or memory runs out.
        """
        config = self.config
        with (
            RunDirectory(config.out, resume=config.resume) as run,
            StopRequest() as stop,
            ops.use_backend(config.backend),
        ):
            try:
                return self._train(run, stop)
            except NotFiniteError as error:
                raise TrainingError(self._not_finite(error, run)) from None
            except Exception as error:
                if is_out_of_memory(error):
                    raise TrainingError(self._out_of_memory()) from error
                raise
            finally:
                self.model.eval()

    def _train(self, run: RunDirectory, stop: StopRequest) -> TrainResult:
        config, model = self.config, self.model
        ops.tune_process(config.threads)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(config.seed)
        model.to(self.device).train()
        model.activation_checkpointing = config.activation_checkpointing  # type: ignore[assignment]
        runs = torch.compile(model) if config.compile else model
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError("nothing to train: no parameter of the model requires a gradient")
        optimizer = build_optimizer(model, config)
        update = Update(optimizer, config.grad_clip, self.device, self.dtype)
        who = identity(model, config, self.train_data)
        done, saved, notes = Progress(), None, list[str]()
        if config.resume:
            done, saved, notes = resume(run.checkpoints, who, model, update)
        run.write_config(config)

        began = time.perf_counter()
        flops = flops_per_token(model, self.block_size) if self.unit == "token" else None
        speed = Speed(flops, peak_flops(self.device, self.dtype), self.metrics_fn, self.unit)
        train_loss, metrics = None, dict[str, Any]()
        stopping = False
        with Report(run.path, done=done.step, total=config.max_steps, unit=self.unit, progress=self.progress) as report:
            for note in (*notes, dtype_note(self.device, self.dtype)):
                if note:
                    report.say(note)
            while done.step < config.max_steps and not stopping and not _has_enough(done, config):
                lr = learning_rate_at(done.step, config, config.max_steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr

                # The gradients of one optimizer step, over as many micro batches as it takes.
                loss, tokens, divisor, sums = self._gradients(runs, update, done.position)
                norm = update.apply(done.step, loss, divisor)  # raises before it changes a weight
                optimizer.zero_grad(set_to_none=True)

                done.step += 1
                done.position += self.batch_size
                done.tokens += tokens
                speed.add(loss, tokens, sums)
                report.advance()

                stopping = stop.requested is not None
                last = done.step == config.max_steps
                evaluates = self.val_batches is not None and not stopping and _due(config.eval_every, done.step, last)
                samples = self.tokenizer is not None and not stopping
                samples = samples and config.sample_every != 0 and _due(config.sample_every, done.step, last)
                saves = stopping or _due(config.save_every, done.step, last)
                if not (evaluates or samples or saves or _due(config.log_every, done.step, done.step == 1)):
                    continue

                update.check(done.step)  # here the host waits for the device
                line = {"step": done.step, f"{self.unit}s": done.tokens, "lr": lr, "grad_norm": norm.item()}
                line |= speed.read()
                if evaluates and config.eval_train:
                    line |= self._evaluate(runs, self.train_batches, stop, "train_")
                    train_loss = line.get("train_loss")
                improves = False
                if evaluates and (metrics := self._evaluate(runs, self.val_batches, stop, "val_")):
                    line |= metrics
                    done.val_loss = value = metrics["val_loss"]
                    improves = done.best_val_loss is None or value < done.best_val_loss
                    done.best_val_loss = value if improves else done.best_val_loss
                    done.stale = 0 if improves else done.stale + 1
                    saves = saves or _has_enough(done, config)
                report.metrics(line)
                if samples:
                    report.sample(done.step, self._sample())
                if saves or (improves and config.save_every):
                    saved = save_checkpoint(
                        run.checkpoints,
                        done.step,
                        model=model,
                        tokenizer=self.tokenizer,
                        optimizer=optimizer,
                        state=training_state(done, who, update),
                        best=improves,
                        keep=config.keep,
                    )
                if evaluates:
                    report.plot()
                speed.restart()

            if stopping:
                train_loss = None  # of an earlier step
            elif train_loss is None:
                train_loss = self._evaluate(runs, self.train_batches, stop).get("loss")
            if enough := _has_enough(done, config):
                report.say(f"stopped early: {done.stale} evaluations without a lower validation loss")
            report.plot(now=True)

        return TrainResult(
            out=run.path,
            steps=done.step,
            tokens=done.tokens,
            seconds=time.perf_counter() - began,
            train_loss=train_loss,
            val_loss=done.val_loss,
            best_val_loss=done.best_val_loss,
            tokens_per_second=speed.overall,
            checkpoint=saved,
            best_checkpoint=read_pointer(run.checkpoints, "best"),
            interrupted=stop.requested,
            stopped_early=enough,
            metrics=metrics,
        )

    def _gradients(self, model: Any, update: Update, position: int) -> tuple[Tensor, int, float, Sums]:
        """Leave ``divisor`` times the step's gradients in ``.grad``: (mean loss, tokens, divisor, sums).

        Each micro batch is weighted by its share of the tokens. That share is known only after the last one, so the
        weights are relative to the first, and what is missing is the divisor: 1 where no target is masked.
        """
        config = self.config
        total: Tensor | float = 0.0
        sums: Sums = {}
        tokens = unit = 0
        for start in range(position, position + self.batch_size, config.micro_batch_size):
            with self._autocast():
                loss, count, *measured = self.loss_fn(model, self._to_device(self.batches.batch(start)))
            if count == 0:
                continue
            add_sums(sums, *measured)
            unit = unit or count * (self.batch_size // config.micro_batch_size)
            weighted = loss if count == unit else loss * (count / unit)
            update.backward(weighted)
            total = total + weighted.detach()
            tokens += count
        if not isinstance(total, Tensor):
            raise TrainingError(f"every target of the samples from {position} on is masked: nothing to learn from")
        divisor = tokens / unit
        return (total if divisor == 1.0 else total / divisor), tokens, divisor, sums

    @torch.no_grad()
    def _evaluate(self, model: Any, batches: EvalBatches | None, stop: StopRequest, prefix: str = "") -> dict[str, Any]:
        """Mean loss and metrics over ``batches`` without dropout; nothing where a stop is requested meanwhile."""
        total, tokens, sums = 0.0, 0, dict[str, Tensor]()
        self.model.eval()
        for batch in batches or ():
            with self._autocast():
                loss, count, *measured = self.loss_fn(model, self._to_device(batch))
            total += loss.item() * count
            tokens += count
            add_sums(sums, *measured)
            if stop.requested:
                break
        self.model.train()
        if stop.requested or not tokens:
            return {}
        return {f"{prefix}{k}": v for k, v in {"loss": total / tokens, **self.metrics_fn(sums, tokens)}.items()}

    def _sample(self) -> str:
        """A continuation of ``sample_prompt``; the random state of the training stays as it is."""
        from llmfast.generation import generate

        config = self.config
        devices = [self.device] if self.device.type == "cuda" else []
        self.model.eval()
        with torch.random.fork_rng(devices):
            text = generate(
                self.model,  # type: ignore[arg-type]
                self.tokenizer,
                config.sample_prompt,
                max_new_tokens=config.sample_tokens,
                temperature=SAMPLE_TEMPERATURE,
                seed=config.seed,
            )
        self.model.train()
        return config.sample_prompt + text

    def evaluate(self, data: Any) -> dict[str, Any]:
        """Mean loss and metrics of the model over all of ``data``, which is what ``train_data`` may be."""
        self.model.to(self.device)
        with ops.use_backend(self.config.backend):
            found = self._evaluate(self.model, self._eval_batches(data, 0), StopRequest())
        self.model.eval()
        return found

    def _check_prompt(self) -> None:
        try:
            self.tokenizer.encode(self.config.sample_prompt)
        except ValueError as error:
            raise UserError(f"--sample-prompt {self.config.sample_prompt!r}: {error}") from None

    def _eval_batches(self, data: Any, count: int) -> EvalBatches:
        return EvalBatches(data, self.block_size, self.config.micro_batch_size, count)

    def _to_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        if self.device.type == "cuda":  # the copy runs beside the work that the GPU still has
            batch = tuple(tensor.pin_memory() for tensor in batch)
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def _not_finite(self, error: NotFiniteError, run: RunDirectory) -> str:
        first = error.step * self.batch_size
        starts = range(first, first + self.batch_size, self.config.micro_batch_size)

        def backward(batch: Batch) -> None:
            with self._autocast():
                loss, count, *_ = self.loss_fn(self.model, self._to_device(batch))
            if count:
                loss.backward()

        self.model.train()
        where = first_bad(self.model, (self.batches.batch(start) for start in starts), backward)
        saved = read_pointer(run.checkpoints, "latest")
        kept = f"the last checkpoint is {saved}" if saved else "there is no checkpoint yet"
        return (
            f"step {error.step + 1}: {error}; {where}. No weight was changed, {kept}. Try a lower --learning-rate, "
            "more --warmup-steps, or --dtype float32"
        )

    def _out_of_memory(self) -> str:
        config = self.config
        micro = config.micro_batch_size
        smaller = f"--micro-batch-size {micro // 2} --batch-size {config.batch_size} (the same updates)"
        options = [smaller] if micro > 1 else [f"a --block-size below {self.block_size}"]
        if not config.activation_checkpointing:
            options.append("--activation-checkpointing")
        return (
            f"out of memory on {self.device} with micro batches of {micro} x {self.block_size} tokens: "
            f"try {' or '.join(options)}"
        )


def _has_enough(done: Progress, config: TrainConfig) -> bool:
    return config.patience is not None and done.stale >= config.patience


def _due(every: int | None, step: int, always: bool) -> bool:
    return always or (bool(every) and step % (every or 1) == 0)
