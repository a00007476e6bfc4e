"""Checkpoints that are written beside training, in a run of one process."""

from __future__ import annotations

import errno
import time

import pytest

from llmfast.checkpoint import find_checkpoint
from llmfast.checkpoint.save import Saving
from llmfast.errors import UserError
from llmfast.training import TrainingError

BESIDE = dict(async_save="on", save_every=5, max_steps=1000, val=False, keep=9)


@pytest.fixture
def slow(monkeypatch):
    """Every checkpoint takes half a second, and the numbers of those that were begun and ended come in turn."""
    order, write = [], Saving._write

    def slowly(saving):
        order.append(saving.path.name)
        time.sleep(0.5)
        files = write(saving)
        order.append(saving.path.name)
        return files

    monkeypatch.setattr(Saving, "_write", slowly)
    return order


def test_one_checkpoint_waits_for_the_other_and_the_run_for_both(train, slow, tmp_path):
    result, _ = train(**{**BESIDE, "max_steps": 10})
    assert slow == ["step-000005"] * 2 + ["step-000010"] * 2
    assert result.checkpoint == find_checkpoint(tmp_path / "run", prefer="latest")
    assert result.checkpoint.name == "step-000010"


@pytest.mark.parametrize("problem", ["nan", "error"])
def test_what_ends_the_run_leaves_the_checkpoint_that_was_begun(train, slow, tmp_path, problem):
    steps = []

    def loss_fn(model, batch):
        steps.append(None)
        if len(steps) == 7 and problem == "error":
            raise RuntimeError("no such thing")
        loss = model(*batch)[1]
        return (loss * float("nan") if len(steps) >= 7 else loss), batch[1].numel()

    with pytest.raises(RuntimeError if problem == "error" else TrainingError) as raised:
        train(loss_fn=loss_fn, **BESIDE)
    saved = find_checkpoint(tmp_path / "run", prefer="latest")
    assert saved.name == "step-000005"
    assert problem == "error" or f"the last checkpoint is {saved}" in str(raised.value)


def test_a_full_disk_ends_the_run_at_its_next_step(train, tmp_path, monkeypatch):
    steps = []

    def full(saving):
        raise OSError(errno.ENOSPC, "No space left on device")

    def loss_fn(model, batch):
        steps.append(None)
        time.sleep(0.05)
        return model(*batch)[1], batch[1].numel()

    monkeypatch.setattr(Saving, "_write", full)
    with pytest.raises(UserError, match=r"step-000005: No space left on device"):
        train(loss_fn=loss_fn, **BESIDE)
    assert len(steps) < 15
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
