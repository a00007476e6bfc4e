"""Preference tuning: DPO and ORPO on pairs of a chosen and a rejected response, KTO on single labelled ones.

Shapes: B pairs or labelled examples, each of two rows of T tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llmfast import ops
from llmfast.config import PreferenceConfig
from llmfast.errors import UserError
from llmfast.finetuning import preference_losses as losses
from llmfast.finetuning.base import Examples, choose_trained
from llmfast.finetuning.conversations import Split, begin, fit_and_answer, read_splits_of, with_sample_prompt
from llmfast.finetuning.preference_data import Example, judged_of, pair_of, with_mismatches
from llmfast.finetuning.prompts import end_of_text
from llmfast.finetuning.rows import pad
from llmfast.generation.decoding import evaluating
from llmfast.nn import lora_disabled
from llmfast.training import Trainer, TrainResult
from llmfast.training.device import choose_device, choose_dtype

Reference = Callable[[Any, Tensor, Tensor], Tensor]  # (model, inputs, targets) -> log-probabilities
Measured = tuple[Tensor, int, dict[str, Tensor]]


def finetune_preference(config: PreferenceConfig, *, progress: bool = True) -> tuple[TrainResult, Path | None]:
    """Tune ``config.checkpoint`` on the preferences of ``config.data``; returns how it went and the response file.

    The run directory is as ``finetune_instruct`` has it. Raises ``UserError`` for what the user can mend.
    """
    check_options(config)
    config, base, rows = begin(config)
    kto = config.method == "kto"
    make: Callable[..., list[Any]] = judged_of
    if not kto:
        make = functools.partial(pair_of, allow_equal=not config.skip_bad)
    splits, notes = read_splits_of(config, functools.partial(make, rows=rows))
    check_training_examples(splits["train"], notes, config)
    prompts = {name: [example.prompt for example, *_ in split.examples] for name, split in splits.items()}
    examples: dict[str, list[Example]] = {}
    for name in ("train", "validation"):
        whole = [one for made in splits[name].examples for one in made]
        examples[name] = with_mismatches(whole, rows) if kto else whole

    model = choose_trained(base.model, config, base)
    pad_id = end_of_text(base.tokenizer)
    reference = None
    if config.precompute_reference:
        examples = {name: with_reference(part, model, config, pad_id, progress) for name, part in examples.items()}
    elif config.method != "orpo":
        reference = reference_of(model, config)

    def batches(name: str, seed: int | None) -> Examples[Example]:
        collate = functools.partial(collated, pad_id=pad_id)
        return Examples(
            examples[name], collate, config.micro_batch_size, batch_size=config.batch_size, seed=seed, length=len
        )

    trainer = Trainer(
        model,
        with_sample_prompt(config, rows.style, prompts["validation"]),
        batches("train", config.seed),
        batches("validation", None) if examples["validation"] else None,
        tokenizer=base.tokenizer,
        loss_fn=KTOLoss(config, reference) if kto else PairLoss(config, reference),
        metrics_fn=kto_metrics if kto else pair_metrics,
        unit="example" if kto else "pair",
        progress=progress,
    )
    return fit_and_answer(trainer, rows, splits, prompts["test"], notes)


def check_options(config: PreferenceConfig) -> None:
    """``UserError`` for options that make no sense."""
    if not config.beta > 0:
        raise UserError(f"beta must be above 0, got {config.beta}")
    if config.method == "orpo" and config.precompute_reference:
        raise UserError("orpo has no reference model: leave --precompute-reference out")
    weights = (config.desirable_weight, config.undesirable_weight)
    if min(weights) < 0 or not any(weights):
        raise UserError(f"desirable_weight and undesirable_weight must be 0 or more, not both 0, got {weights}")


def check_training_examples(split: Split[Any], notes: list[str], config: PreferenceConfig) -> None:
    """``UserError`` where KTO has but one kind of examples; a note of pairs that prefer nothing."""
    if config.method == "kto":
        if len(kinds := {one.desirable for made in split.examples for one in made}) == 1:
            kind = "desirable" if kinds.pop() else "undesirable"
            raise UserError(f"{config.data}: all examples for training are {kind}, and KTO learns from both kinds")
    elif same := sum(pair.rows[0] == pair.rows[1] for (pair,) in split.examples):
        if same == len(split):
            raise UserError(f"{config.data}: every pair for training has one response as chosen and as rejected")
        notes.append(f"{same:,} training pairs have one response as chosen and as rejected: --skip-bad leaves them out")


def collated(examples: Sequence[Example], pad_id: int) -> tuple[Tensor, ...]:
    """(inputs, targets), int64 (B, 2, T); of labelled examples also desirable, bool (B,); and, where it was computed
    ahead, the reference's log-probabilities (B, 2)."""
    batch = [tensor.unflatten(0, (-1, 2)) for tensor in pad([row for one in examples for row in one.rows], pad_id)]
    if examples[0].desirable is not None:
        batch.append(torch.tensor([one.desirable for one in examples]))
    if examples[0].reference is not None:
        batch.append(torch.tensor([one.reference for one in examples]))
    return tuple(batch)


# ---- Reference -------------------------------------------------------------------------------------------------------


def reference_of(model: nn.Module, config: PreferenceConfig) -> Reference:
    """The model as it is now: without its adapters where only these are trained, else a frozen copy."""
    average = config.average_log_probs
    if config.train == "lora":

        def without_adapters(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
            with torch.no_grad(), evaluating(model), lora_disabled(model):
                return log_probs(model, inputs, targets, average)

        return without_adapters
    frozen = copy.deepcopy(model).requires_grad_(False).eval()

    def of_copy(_: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            return log_probs(frozen.to(inputs.device), inputs, targets, average)

    return of_copy


def log_probs(model: Any, inputs: Tensor, targets: Tensor, average: bool) -> Tensor:
    """Log-probabilities (...) of the responses in rows (..., T), or their means over the tokens."""
    total, count = losses.response_log_probs(model, inputs.flatten(0, -2), targets.flatten(0, -2))
    return (total / count.clamp(min=1) if average else total).view(inputs.shape[:-1])


def with_reference(
    examples: Sequence[Example], model: nn.Module, config: PreferenceConfig, pad_id: int, progress: bool
) -> list[Example]:
    """``examples`` with the log-probabilities of their rows under ``model``, which is still the reference."""
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    ops.tune_process(config.threads)
    model.to(device)
    found = list(examples)
    order = sorted(range(len(found)), key=lambda i: len(found[i]))
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    bar = tqdm(total=len(found), desc="reference", disable=None if progress else True, leave=False)
    with ops.use_backend(config.backend), autocast, torch.no_grad(), evaluating(model), bar:
        for start in range(0, len(order), config.micro_batch_size):
            part = order[start : start + config.micro_batch_size]
            inputs, targets = (t.to(device) for t in collated([found[i] for i in part], pad_id)[:2])
            values = log_probs(model, inputs, targets, config.average_log_probs).tolist()
            for i, both in zip(part, values, strict=True):
                found[i] = dataclasses.replace(found[i], reference=tuple(both))
            bar.update(len(part))
    return found


def reference_log_probs(reference: Reference | None, model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """(B, 2), asked of ``reference`` or, where there is none, computed ahead and part of the batch."""
    return batch[-1] if reference is None else reference(model, *batch[:2])


# ---- Losses ----------------------------------------------------------------------------------------------------------


class PairLoss:
    """DPO or ORPO of a batch of pairs, with the sums that ``pair_metrics`` reads."""

    def __init__(self, config: PreferenceConfig, reference: Reference | None) -> None:
        self.config, self.reference = config, reference

    def __call__(self, model: Any, batch: tuple[Tensor, ...]) -> Measured:
        config = self.config
        inputs, targets = batch[:2]
        orpo = config.method == "orpo"
        chosen, rejected = log_probs(model, inputs, targets, orpo or config.average_log_probs).unbind(1)
        if orpo:
            result = losses.orpo(chosen, rejected, weight=config.beta)
        else:
            known = reference_log_probs(self.reference, model, batch)
            result = losses.dpo(chosen, rejected, *known.unbind(1), beta=config.beta)
        return (
            result.losses.mean(),
            len(chosen),
            {
                "chosen_reward": result.chosen_rewards.sum(),
                "rejected_reward": result.rejected_rewards.sum(),
                "reward_accuracy": (result.chosen_rewards > result.rejected_rewards).sum(),
            },
        )


def pair_metrics(sums: dict[str, Tensor], count: int) -> dict[str, Any]:
    """Mean rewards, their margin, and the share of pairs whose chosen response has the higher reward."""
    means = {name: float(value) / count for name, value in sums.items()}
    return {**means, "reward_margin": means["chosen_reward"] - means["rejected_reward"]} if means else {}


class KTOLoss:
    """KTO of a batch of labelled examples, with the sums that ``kto_metrics`` reads.

    The distance from the reference is estimated over the (micro) batch, as in the paper: here alone a step in several
    micro batches is not the same as one in a single batch.
    """

    def __init__(self, config: PreferenceConfig, reference: Reference | None) -> None:
        self.config, self.reference = config, reference

    def __call__(self, model: Any, batch: tuple[Tensor, ...]) -> Measured:
        config, average = self.config, self.config.average_log_probs
        inputs, targets, desirable = batch[:3]
        ref, ref_other = reference_log_probs(self.reference, model, batch).unbind(1)
        with torch.no_grad(), evaluating(model):
            other = log_probs(model, inputs[:, 1], targets[:, 1], average)
        kl = (other - ref_other).mean().clamp(min=0)
        values, rewards = losses.kto(
            log_probs(model, inputs[:, 0], targets[:, 0], average),
            ref,
            desirable,
            kl,
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        return (
            values.mean(),
            len(values),
            {
                "chosen_reward": rewards[desirable].sum(),
                "rejected_reward": rewards[~desirable].sum(),
                "reward_accuracy": ((rewards > config.beta * kl) == desirable).sum(),
                "kl": kl * len(values),
                "desirable": desirable.sum(),
            },
        )


def kto_metrics(sums: dict[str, Tensor], count: int) -> dict[str, Any]:
    """Mean rewards of desirable and undesirable examples, their margin, the share on the right side, and the KL."""
    if not sums:
        return {}
    desirable = float(sums["desirable"])
    chosen = float(sums["chosen_reward"]) / max(1.0, desirable)
    rejected = float(sums["rejected_reward"]) / max(1.0, count - desirable)
    shares = {name: float(sums[name]) / count for name in ("reward_accuracy", "kl")}
    return {"chosen_reward": chosen, "rejected_reward": rejected, "reward_margin": chosen - rejected, **shares}
