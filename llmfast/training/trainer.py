"""The training loop: one for everything that llmfast trains."""

from __future__ import annotations

import dataclasses
import random
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmfast import ops
from llmfast.checkpoint import read_pointer
from llmfast.config import TrainConfig
from llmfast.errors import UserError
from llmfast.ranks import is_lost, join
from llmfast.training import failures
from llmfast.training.device import choose_device, choose_dtype, dtype_note, flops_per_token, peak_flops
from llmfast.training.diagnose import first_bad
from llmfast.training.errors import NotFiniteError, TrainingError, is_out_of_memory
from llmfast.training.feed import EvalBatches, RankBatches, training_batches
from llmfast.training.interrupt import StopRequest
from llmfast.training.losses import Batch, LossFunction, language_model_loss, unmasked_loss
from llmfast.training.metrics import MetricsFunction, Sums, add_sums, means, over_ranks
from llmfast.training.optimizer import build_optimizer
from llmfast.training.parallel import Alone, parallelize
from llmfast.training.report import Report, Silent, Speed
from llmfast.training.resume import Progress, identity, resume, training_state
from llmfast.training.rundir import RunDirectory
from llmfast.training.saving import Saver
from llmfast.training.schedule import learning_rate_at
from llmfast.training.settings import check, resolve
from llmfast.training.update import Update
from llmfast.training.watchdog import Watchdog

SAMPLE_TEMPERATURE = 0.8


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
        self.ranks = join()
        self.watchdog = Watchdog(self.ranks, compiles=config.compile)
        self.model = model
        self.tokenizer = tokenizer
        self.progress = progress and self.ranks.first
        self.metrics_fn = metrics_fn
        self.unit = unit
        self.train_data = train_data
        self.device = choose_device(config.device)
        self.parallel = Alone(model)
        self.dtype = choose_dtype(config.dtype, self.device)
        self.loss_fn = loss_fn or (language_model_loss if hasattr(train_data, "batch") else unmasked_loss)
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
        self.own = RankBatches(self.batches, self.batch_size, config.micro_batch_size, self.ranks)
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
            self.watchdog,
            ops.use_backend(config.backend),
        ):
            beside = config.async_save == "on" or (config.async_save == "auto" and self.device.type == "cuda")
            content = dict(model=self.model, tokenizer=self.tokenizer, keep=config.keep, beside=beside)
            saver = Saver(run.checkpoints, self.ranks, self.watchdog, **content)
            try:
                return self._train(run, stop, saver)
            except NotFiniteError as error:
                with suppress(UserError):  # the disk is full as well
                    saver.finish()
                raise TrainingError(self._not_finite(error, run)) from None
            except Exception as error:
                if self.ranks.size == 1:
                    with suppress(UserError):
                        saver.finish()
                if is_out_of_memory(error):
                    micro = min(config.micro_batch_size, self.own.most)
                    raise TrainingError(failures.out_of_memory(config, self.device, micro, self.block_size)) from error
                if is_lost(error):
                    self.watchdog.lost()
                raise
            finally:
                saver.leave()
                self.parallel.rest()
                self.model.eval()

    def _train(self, run: RunDirectory, stop: StopRequest, saver: Saver) -> TrainResult:
        config, model, ranks = self.config, self.model, self.ranks
        ops.tune_process(config.threads)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(config.seed)
        model.to(self.device).train()
        model.activation_checkpointing = config.activation_checkpointing  # type: ignore[assignment]
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError("nothing to train: no parameter of the model requires a gradient")
        self.parallel = parallel = parallelize(model, config.parallel, ranks, self.device)
        runs = torch.compile(parallel.runs) if config.compile else parallel.runs
        optimizer = build_optimizer(model, config)
        update = Update(optimizer, config.grad_clip, self.device, self.dtype, parallel)
        who = identity(model, config, self.train_data)
        done, notes = Progress(), list[str]()
        if config.resume:
            done, saver.saved, notes = resume(run.checkpoints, who, model, update)
            ranks.agree(done.step, f"the checkpoints of {run.path}: every machine must see the same --out")
        if ranks.first:
            run.write_config(config)
        if ranks.local == 0:
            run.begin()
        if not ranks.first:  # masks of its own
            torch.manual_seed(hash((config.seed, done.step, ranks.rank)))

        began = time.perf_counter()
        flops = flops_per_token(model, self.block_size) if self.unit == "token" else None
        speed = Speed(flops, peak_flops(self.device, self.dtype), self.metrics_fn, self.unit, ranks)
        train_loss, metrics = None, dict[str, Any]()
        stopping = False
        kind = Report if ranks.first else Silent
        with kind(run.path, done=done.step, total=config.max_steps, unit=self.unit, progress=self.progress) as report:
            for note in (parallel.note, *notes, dtype_note(self.device, self.dtype)):
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
                self.watchdog.begin()

                stops, writes = ranks.sum(stop.requested is not None, saver.writes)
                stopping = stops > 0
                if not writes:
                    saver.finish()
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
                if samples and (ranks.first or self.parallel.shards):
                    with self.watchdog.pause("sampling"):
                        report.sample(done.step, self._sample())
                if saves or (improves and config.save_every):
                    state = training_state(done, who, update)
                    saver.save(done.step, parallel, optimizer=optimizer, state=state, best=improves)
                if evaluates:
                    report.plot()
                speed.restart()

            saver.finish()
            if stopping:
                train_loss = None  # of an earlier step
            elif train_loss is None:
                train_loss = self._evaluate(runs, self.train_batches, stop).get("loss")
            stopped = next((name for name in ranks.gather(stop.requested) if name), None)
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
            checkpoint=saver.saved,
            best_checkpoint=read_pointer(run.checkpoints, "best"),
            interrupted=stopped,
            stopped_early=enough,
            metrics=metrics,
        )

    def _gradients(self, model: Any, update: Update, position: int) -> tuple[Tensor, int, float, Sums]:
        """Leave ``divisor`` times the step's gradients in ``.grad``: (mean loss, tokens, divisor, sums).

        Each micro batch is weighted by its share of the tokens. How many there are is known only after the last one,
        on all ranks, so the weights are relative to as many as there can be, and what is missing is the divisor: 1
        where no target is masked. ``sums`` are this rank's, all else is every rank's.
        """
        total = torch.zeros((), device=self.device)
        sums: Sums = {}
        tokens, unit = 0, self.batch_size * (self.block_size if self.unit == "token" else 1)
        for number, (batch, counts) in enumerate(self.own.of_step(position), 1):
            self.watchdog.progress()
            with self.parallel.backward(last=number == self.own.count):
                with self._autocast():
                    loss, count, *measured = self.loss_fn(model, self._to_device(batch))
                count = count if counts else 0
                if count == 0 and self.ranks.size == 1:
                    continue
                weighted = loss if count == unit else loss * (count / unit)
                update.backward(weighted)
            if count:
                add_sums(sums, *measured)
                total = total + weighted.detach()
                tokens += count
        self._own_loss = total
        tokens = unit if self.loss_fn is unmasked_loss else round(self.ranks.sum(tokens)[0])
        if not tokens:
            raise TrainingError(f"every target of the samples from {position} on is masked: nothing to learn from")
        whole = tokens / unit
        total = self.ranks.sum_tensor(total.to(loss.dtype))  # of the same type on a rank that had no token
        return (total if whole == 1.0 else total / whole), tokens, whole / self.parallel.mean_of, sums

    @torch.no_grad()
    def _evaluate(self, model: Any, batches: EvalBatches | None, stop: StopRequest, prefix: str = "") -> dict[str, Any]:
        """Mean loss and metrics over ``batches`` without dropout; nothing where a stop is requested meanwhile."""
        total, tokens, sums = 0.0, 0, dict[str, Tensor]()
        stopping = False
        self.model.eval()
        for batch, counts in batches.of(self.ranks) if batches else ():
            self.watchdog.progress()
            with self._autocast():
                loss, count, *measured = self.loss_fn(model, self._to_device(batch))
            if counts and count:
                total += loss.item() * count
                tokens += count
                add_sums(sums, *measured)
            if stopping := self.ranks.any(stop.requested is not None):
                break
        self.model.train()
        total, whole = self.ranks.sum(total, tokens)
        if stopping or not whole:
            return {}
        values = {"loss": total / whole, **self.metrics_fn(over_ranks(self.ranks, sums), round(whole))}
        return {f"{prefix}{name}": value for name, value in values.items()}

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
        def backward(batch: Batch) -> None:
            with self._autocast():
                loss, count, *_ = self.loss_fn(self.model, self._to_device(batch))
            if count:
                loss.backward()

        self.model.train()
        finite, where = bool(torch.isfinite(self._own_loss)), None
        if not self.parallel.shards:
            batches = (batch for batch, _ in self.own.of_step(error.step * self.batch_size))
            where = first_bad(self.model, batches, backward)
        elif not finite:  # and the step can be repeated by all ranks together only
            where = "the loss is not finite"
        return failures.not_finite(error, self.ranks, finite, where, run.checkpoints)


def _has_enough(done: Progress, config: TrainConfig) -> bool:
    return config.patience is not None and done.stale >= config.patience


def _due(every: int | None, step: int, always: bool) -> bool:
    return always or (bool(every) and step % (every or 1) == 0)
