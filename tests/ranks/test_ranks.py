"""The same run on one rank and on several: losses, weights, checkpoints."""

from __future__ import annotations

import json

import pytest
from launching import weights

from llmfast.checkpoint import verify_checkpoint
from llmfast.ranks import Ranks, share


def difference(left, right):
    """The largest difference of two runs' losses and norms, step by step."""
    assert [line["step"] for line in left] == [line["step"] for line in right]
    keys = ("loss", "grad_norm", "val_loss")
    return max(abs(a[key] - b[key]) for a, b in zip(left, right, strict=True) for key in keys if key in a)


@pytest.mark.parametrize(("size", "mode"), [(2, "ddp"), (3, "fsdp")])
def test_several_ranks_make_the_same_run(launch, metrics, tmp_path, size, mode):
    options = dict(weights="float64", max_steps=20, eval_every=10)
    launch(1, "one", **options)
    launch(size, "several", parallel=mode, **options)
    assert difference(metrics("one"), metrics("several")) < 1e-9
    one, several = weights(tmp_path / "one"), weights(tmp_path / "several")
    assert max((one[name] - several[name]).abs().max() for name in one) < 1e-9
    verify_checkpoint(tmp_path / "several" / "run" / "checkpoints" / "step-000020")


def test_masked_targets_and_uneven_shares(launch, metrics):
    options = dict(weights="float64", masked=True, batch_size=7, micro_batch_size=7, max_steps=10)
    launch(1, "one", **options)
    launch(3, "three", parallel="fsdp", activation_checkpointing=True, **options)
    assert difference(metrics("one"), metrics("three")) < 1e-9


def test_a_run_moves_between_ranks_and_modes(launch, metrics):
    options = dict(weights="float64", schedule="constant", save_every=3, eval_every=3)
    launch(1, "whole", max_steps=12, **options)
    launch(3, "moved", max_steps=3, parallel="fsdp", **options)
    launch(2, "moved", max_steps=6, parallel="fsdp", resume=True, **options)
    launch(2, "moved", max_steps=9, parallel="ddp", resume=True, **options)
    launch(1, "moved", max_steps=12, resume=True, **options)
    assert difference(metrics("whole"), metrics("moved")) < 1e-9


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


def test_result_is_of_all_ranks(launch):
    done = launch(2, "run", max_steps=4, parallel="ddp")
    assert json.loads(done.said[0].splitlines()[-1])["tokens"] == 4 * 12 * 16
