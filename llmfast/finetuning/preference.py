"""Preference tuning: DPO and ORPO on pairs of a chosen and a rejected response, KTO on single labelled ones.

Shapes: B pairs or examples, T tokens.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmfast import ops
from llmfast.config import PreferenceConfig
from llmfast.errors import UserError
from llmfast.finetuning import preference_losses as losses
from llmfast.finetuning.base import Examples, check_before, choose_trained, open_base, write_splits
from llmfast.finetuning.conversations import Rows, Split, answer_test_split, read_splits_of, say, with_sample_prompt
from llmfast.finetuning.preference_data import Judged, Labelled, Pair, judged_of, pair_of, with_mismatches
from llmfast.finetuning.prompts import Conversation, end_of_text, prompt_style
from llmfast.finetuning.rows import pad
from llmfast.generation.decoding import evaluating
from llmfast.nn import lora_disabled
from llmfast.training import Trainer, TrainResult
from llmfast.training.device import choose_device, choose_dtype

Reference = Callable[[Any, Tensor, Tensor], Tensor]  # (model, inputs, targets) -> log-probabilities (B,)
Measured = tuple[Tensor, int, dict[str, Tensor]]
Numbered = tuple[int, Any]  # place in the split, Pair or Labelled


def finetune_preference(config: PreferenceConfig, *, progress: bool = True) -> tuple[TrainResult, Path | None]:
    """Tune ``config.checkpoint`` on the preferences of ``config.data``; returns how it went and the response file.

    The run directory is as ``finetune_instruct`` has it. Raises ``UserError`` for what the user can mend.
    """
    check_before(config)
    if not config.beta > 0:
        raise UserError(f"beta must be above 0, got {config.beta}")
    if config.method == "orpo" and config.precompute_reference:
        raise UserError("orpo has no reference model: leave --precompute-reference out")
    style = prompt_style(config.prompt_style)
    base = open_base(config)
    rows = Rows.of(config, base.model, base.tokenizer, style)
    pairs = config.method != "kto"
    splits, notes = read_splits_of(config, lambda record: pair_of(record, rows) if pairs else judged_of(record, rows))
    if same := sum(isinstance(one, Pair) and one.chosen == one.rejected for one in splits["train"].examples):
        notes.append(f"{same:,} training pairs teach nothing: chosen and rejected are the same")

    model = choose_trained(base.model, config, base)
    reference = None if config.method == "orpo" else reference_of(model, config)
    numbered = {name: list(enumerate(_examples(split, rows))) for name, split in splits.items() if name != "test"}
    tables: dict[str, Tensor] = {}
    if config.precompute_reference and reference is not None:
        for name, examples in numbered.items():
            if examples:
                tables[name] = reference_table(model, reference, examples, config, end_of_text(base.tokenizer))
        reference = None  # and with it the second model

    def batches(name: str, seed: int | None) -> Examples[Numbered]:
        collate = functools.partial(collated, pad_id=end_of_text(base.tokenizer), table=tables.get(name))
        return Examples(
            numbered[name],
            collate,
            config.micro_batch_size,
            batch_size=config.batch_size,
            seed=seed,
            length=lambda numbered: len(numbered[1]),
        )

    prompts = {name: [_prompt(example) for example in split.examples] for name, split in splits.items()}
    trainer = Trainer(
        model,
        with_sample_prompt(config, style, prompts["validation"]),
        batches("train", config.seed),
        batches("validation", None) if numbered["validation"] else None,
        tokenizer=base.tokenizer,
        loss_fn=PairLoss(config, reference) if pairs else KTOLoss(config, reference),
        metrics_fn=pair_metrics if pairs else kto_metrics,
        unit="pair" if pairs else "example",
        progress=progress,
    )
    say(progress, *notes, rows.note())
    write_splits(Path(config.out, "data"), {name: split.records for name, split in splits.items()})
    result = trainer.fit()
    if result.interrupted:
        return result, None
    return result, answer_test_split(config, base.tokenizer, style, splits["test"], prompts["test"], progress)


def _examples(split: Split[Any], rows: Rows) -> list[Pair] | list[Labelled]:
    if split.examples and isinstance(split.examples[0], list):
        return with_mismatches([one for judged in split.examples for one in judged], rows)
    return split.examples


def _prompt(example: Pair | list[Judged]) -> Conversation:
    return example.prompt if isinstance(example, Pair) else example[0].conversation.prompt


# ---- Batches ---------------------------------------------------------------------------------------------------------


def collated(examples: Sequence[Numbered], pad_id: int, table: Tensor | None = None) -> tuple[Tensor, ...]:
    """The tensors of a batch; ``table`` (N, 2) holds the reference's log-probabilities, appended as (B, 2).

    Of pairs: chosen inputs and targets, rejected inputs and targets, all (B, T). Of labelled examples: inputs and
    targets, mismatched inputs and targets, and desirable (B,) bool.
    """
    numbers, items = [number for number, _ in examples], [item for _, item in examples]
    width = max(map(len, items))
    known = () if table is None else (table[numbers],)
    if isinstance(items[0], Pair):
        return (
            *pad([pair.chosen for pair in items], pad_id, width),
            *pad([pair.rejected for pair in items], pad_id, width),
            *known,
        )
    return (
        *pad([one.row for one in items], pad_id, width),
        *pad([one.mismatched for one in items], pad_id, width),
        torch.tensor([one.desirable for one in items]),
        *known,
    )


# ---- Reference -------------------------------------------------------------------------------------------------------


def reference_of(model: nn.Module, config: PreferenceConfig) -> Reference:
    """The model as it is now: without its adapters where only these are trained, else a frozen copy."""
    average = config.average_log_probs
    if config.train == "lora":

        def without_adapters(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
            with torch.no_grad(), evaluating(model), lora_disabled(model):
                return log_probs(model, inputs, targets, average)

        return without_adapters
    frozen = frozen_copy(model)

    def of_copy(_: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            return log_probs(frozen.to(inputs.device), inputs, targets, average)

    return of_copy


def frozen_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False).eval()


def log_probs(model: Any, inputs: Tensor, targets: Tensor, average: bool) -> Tensor:
    """(B,) log-probabilities of the responses, or their means over the tokens."""
    total, count = losses.response_log_probs(model, inputs, targets)
    return total / count.clamp(min=1) if average else total


def reference_table(
    model: nn.Module, reference: Reference, examples: Sequence[Numbered], config: PreferenceConfig, pad_id: int
) -> Tensor:
    """The reference's log-probabilities of every example's two rows, (N, 2) on the CPU."""
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    ops.tune_process(config.threads)
    model.to(device)
    table = torch.zeros(len(examples), 2)
    ordered = sorted(examples, key=lambda numbered: len(numbered[1]))
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    with ops.use_backend(config.backend), autocast:
        for start in range(0, len(ordered), config.micro_batch_size):
            part = ordered[start : start + config.micro_batch_size]
            batch = [tensor.to(device) for tensor in collated(part, pad_id)]
            both = reference(model, torch.cat([batch[0], batch[2]]), torch.cat([batch[1], batch[3]]))
            table[[number for number, _ in part]] = both.view(2, -1).T.float().cpu()
    return table


# ---- Losses ----------------------------------------------------------------------------------------------------------


class PairLoss:
    """DPO or ORPO of a batch of pairs, with the sums that ``pair_metrics`` reads."""

    def __init__(self, config: PreferenceConfig, reference: Reference | None) -> None:
        self.config, self.reference = config, reference

    def __call__(self, model: Any, batch: tuple[Tensor, ...]) -> Measured:
        config = self.config
        inputs, targets = torch.cat([batch[0], batch[2]]), torch.cat([batch[1], batch[3]])
        orpo = config.method == "orpo"
        chosen, rejected = log_probs(model, inputs, targets, orpo or config.average_log_probs).chunk(2)
        if orpo:
            result = losses.orpo(chosen, rejected, weight=config.beta)
        else:
            if self.reference is None:
                ref_chosen, ref_rejected = batch[4].unbind(1)
            else:
                ref_chosen, ref_rejected = self.reference(model, inputs, targets).chunk(2)
            result = losses.dpo(chosen, rejected, ref_chosen, ref_rejected, beta=config.beta)
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
        config = self.config
        inputs, targets, other_inputs, other_targets, desirable = batch[:5]
        if self.reference is None:
            ref, ref_other = batch[5].unbind(1)
        else:
            both = torch.cat([inputs, other_inputs]), torch.cat([targets, other_targets])
            ref, ref_other = self.reference(model, *both).chunk(2)
        with torch.no_grad(), evaluating(model):
            other = log_probs(model, other_inputs, other_targets, config.average_log_probs)
        kl = (other - ref_other).mean().clamp(min=0)
        values, rewards = losses.kto(
            log_probs(model, inputs, targets, config.average_log_probs),
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
