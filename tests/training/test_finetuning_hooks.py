"""What fine-tunings ask of the loop: frozen parameters, metrics beside the loss, early stopping."""

from __future__ import annotations

import math

import pytest
import torch
from small_runs import metrics_of

from llmfast.checkpoint import read_state
from llmfast.errors import UserError
from llmfast.training import language_model_loss

pytestmark = pytest.mark.usefixtures("one_thread")


def test_frozen_parameters_keep_their_bits_and_take_no_optimizer_state(train):
    from safetensors.torch import load_file

    from llmfast.config import GPTConfig
    from llmfast.nn import GPT

    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=16))
    model.requires_grad_(False)
    model.transformer.h[1].requires_grad_(True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    result, _ = train(model=model, max_steps=3)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("transformer.h.1."), name
    state = load_file(result.checkpoint / "optimizer.safetensors")
    assert state
    assert all("/transformer.h.1." in key for key in state)


def test_nothing_to_train_is_said(train):
    from llmfast.config import GPTConfig
    from llmfast.nn import GPT

    model = GPT(GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_head=1, n_embd=8)).requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        train(model=model)


def with_accuracy(model, batch):
    inputs, targets = batch
    logits, loss = model(inputs, targets, return_logits=True)
    hits = (logits.argmax(-1) == targets).sum()
    return loss, targets.numel(), {"accuracy": hits, "per_place": (logits.argmax(-1) == targets).sum(0)}


def test_metrics_are_sums_over_what_the_loss_counts(train, tokens):
    result, model = train(
        max_steps=10, batch_size=8, micro_batch_size=4, eval_batches=0, eval_every=5, eval_train=True,
        loss_fn=with_accuracy, learning_rate=1e-2,
    )  # fmt: skip
    lines = metrics_of(result)
    assert all(0 <= line["accuracy"] <= 1 for line in lines)
    assert "per_place" not in lines[0]  # of training batches single numbers alone
    last = lines[-1]
    assert {"train_accuracy", "val_accuracy", "val_per_place"} <= set(last)
    # By hand: every window of the validation split.
    val, T = tokens[1], 16
    windows = torch.from_numpy(val.windows(range(0, (len(val) - 1) // T * T, T), T + 1)).long()
    hits = (model(windows[:, :-1])[0].argmax(-1) == windows[:, 1:]).double()
    assert math.isclose(last["val_accuracy"], hits.mean().item(), rel_tol=1e-6)
    assert last["val_per_place"] == pytest.approx((hits.sum(0) / hits.numel()).tolist())
    assert result.metrics["val_accuracy"] == last["val_accuracy"]


def test_patience_ends_a_run_that_stopped_learning_and_survives_a_resume(train):
    options = dict(max_steps=40, eval_every=2, patience=3, learning_rate=1e-9, warmup_steps=0, weight_decay=0.0)
    rising = iter(range(1, 1000))

    def worse_and_worse(model, batch):
        loss, count = language_model_loss(model, batch)
        return (loss, count) if model.training else (loss + next(rising), count)

    result, _ = train(**options, loss_fn=worse_and_worse)
    assert result.stopped_early
    assert result.steps == 8  # the first evaluation is the best, three more are not
    assert result.checkpoint.name == "step-000008"
    assert read_state(result.checkpoint)["stale"] == 3
    again, _ = train(**options, loss_fn=worse_and_worse, resume=True)
    assert again.steps == 8
    longer, _ = train(**{**options, "patience": 5}, loss_fn=worse_and_worse, resume=True)
    assert longer.steps == 12
