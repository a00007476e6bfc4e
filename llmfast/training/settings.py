"""Checking a ``TrainConfig`` and making its defaults explicit."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

from llmfast.config import TrainConfig, suggest
from llmfast.errors import UserError

_AT_LEAST_ONE = "max_steps micro_batch_size batch_size block_size stride threads log_every keep patience".split()
_NOT_NEGATIVE = (
    "warmup_steps weight_decay min_learning_rate grad_clip "
    "eval_every eval_batches sample_every sample_tokens save_every"
).split()
_POSITIVE = "learning_rate epochs adam_eps".split()
_BELOW_ONE = "beta1 beta2".split()


def check(config: TrainConfig) -> None:
    """``UserError`` names the first value that cannot train."""
    for name, kind in typing.get_type_hints(TrainConfig).items():
        value, choices = getattr(config, name), typing.get_args(kind)
        if typing.get_origin(kind) is typing.Literal and value not in choices:
            raise UserError(f"unknown {name} {value!r}{suggest(str(value), choices)}: use {', '.join(choices)}")
    _require(config, _AT_LEAST_ONE, lambda value: value >= 1, "at least 1")
    _require(config, _NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "0 or more")
    _require(config, _POSITIVE, lambda value: 0 < value < math.inf, "above 0")
    _require(config, _BELOW_ONE, lambda value: 0 <= value < 1, "in [0, 1)")
    batch = config.batch_size or config.micro_batch_size
    if batch % config.micro_batch_size:
        raise UserError(f"batch_size {batch} is not a multiple of micro_batch_size {config.micro_batch_size}")


def _require(config: TrainConfig, names: list[str], holds: Any, what: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise UserError(f"{name} must be {what}, got {value!r}")


def resolve(config: TrainConfig, *, device: str, dtype: str, block_size: int, samples_per_epoch: int) -> TrainConfig:
    """``config`` with every default that depends on another value or on the machine filled in."""
    batch = config.batch_size or config.micro_batch_size
    steps = config.max_steps
    if config.epochs is not None:
        steps = max(1, int(config.epochs * samples_per_epoch / batch))
    eval_every = _or(config.eval_every, max(1, samples_per_epoch // batch))
    values: dict[str, Any] = dict(
        device=device,
        dtype=dtype,
        max_steps=steps,
        # Told by max_steps from here on, which a resume may then raise; where that is no option, by epochs.
        epochs=config.epochs if "max_steps" in getattr(config, "hidden", ()) else None,
        batch_size=batch,
        block_size=block_size,
        stride=config.stride or block_size,
        min_learning_rate=_or(config.min_learning_rate, config.learning_rate / 10),
        eval_every=eval_every,
        sample_every=_or(config.sample_every, eval_every),
        save_every=_or(config.save_every, eval_every),
    )
    return dataclasses.replace(config, **values)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
