"""The same run on one rank and on several: losses, weights, checkpoints."""

from __future__ import annotations

import json

import pytest
from launching import metrics_of, weights

from llmfast.checkpoint import verify_checkpoint
from llmfast.ranks import Ranks, share


def difference(left, right):
    """The largest difference of two runs' losses and norms, step by step."""
    assert [line["step"] for line in left] == [line["step"] for line in right]
    keys = ("loss", "grad_norm", "val_loss")
    return max(abs(a[key] - b[key]) for a, b in zip(left, right, strict=True) for key in keys if key in a)


# Checkpoints are written for longer than a step takes: what is saved must not be what later steps made of it.
BESIDE = dict(async_save="on", slow=0.15, save_every=4, keep=9)
SAME = dict(weights="float64", max_steps=20, eval_every=10)
MASKED = dict(weights="float64", masked=True, batch_size=7, micro_batch_size=7, max_steps=10)
MOVED = dict(weights="float64", schedule="constant", save_every=3, eval_every=3)
RUNS = {
    "three": (3, dict(**SAME, **BESIDE, parallel="fsdp")),
    "masked three": (3, dict(**MASKED, parallel="fsdp", activation_checkpointing=True)),
    "two": (2, dict(**SAME, **BESIDE, parallel="ddp")),
    "one": (1, dict(**SAME, save_every=4, keep=9)),
    "masked one": (1, MASKED),
    "whole": (1, dict(**MOVED, max_steps=12)),
}


@pytest.fixture(scope="module")
def runs(beside):
    """runs(name) -> Done, metrics and folder of a run. All begin at once."""
    started = {name: beside(name, size, **options) for name, (size, options) in RUNS.items()}
    return lambda name: (started[name].result(), metrics_of(beside.folder / name), beside.folder / name)


@pytest.mark.parametrize("several", ["two", "three"])
def test_several_ranks_make_the_same_run(runs, several):
    (_, curve, folder), (done, others, other) = runs("one"), runs(several)
    assert difference(curve, others) < 1e-9
    assert json.loads(done.said[0].splitlines()[-1])["tokens"] == 20 * 12 * 16
    for step in ("step-000004", "step-000008", "step-000012", "step-000016", "step-000020"):
        left, right = (weights(path, step) for path in (folder, other))
        assert max((left[name] - right[name]).abs().max() for name in left) < 1e-9, step
        verify_checkpoint(other / "run" / "checkpoints" / step)


def test_masked_targets_and_uneven_shares(runs):
    assert difference(runs("masked one")[1], runs("masked three")[1]) < 1e-9


def test_a_run_moves_between_ranks_and_modes(runs, launch, metrics):
    launch(3, "moved", max_steps=3, parallel="fsdp", async_save="on", **MOVED)
    launch(2, "moved", max_steps=6, parallel="fsdp", resume=True, **MOVED)
    launch(2, "moved", max_steps=9, parallel="ddp", async_save="on", resume=True, **MOVED)
    launch(1, "moved", max_steps=12, resume=True, **MOVED)
    assert difference(runs("whole")[1], metrics("moved")) < 1e-9


def test_share():
    for count in range(20):
        for size in range(1, 7):
            parts = [share(count, rank, size) for rank in range(size)]
            assert [i for part in parts for i in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_is_free():
    ranks = Ranks()
    assert (ranks.first, ranks.sum(1.0, 2), ranks.gather("x"), ranks.any(False)) == (True, [1.0, 2], ["x"], False)
    with ranks.in_turn("x"):
        pass
