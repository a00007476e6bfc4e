"""Splits and the order of the examples."""

from __future__ import annotations

import pytest
import torch

from llmfast.config import FinetuneConfig
from llmfast.errors import UserError
from llmfast.finetuning.base import Examples, check_before, read_splits, split, write_splits


def config(**options):
    return FinetuneConfig(checkpoint="base", data="data", **options)


def test_a_split_is_fixed_by_its_seed_and_takes_everything_once():
    parts = split(1494, config())
    assert {name: len(part) for name, part in parts.items()} == {"train": 1045, "validation": 149, "test": 300}
    assert sorted(i for part in parts.values() for i in part) == list(range(1494))
    assert parts == split(1494, config(seed=5))
    assert parts != split(1494, config(split_seed=5))


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        (dict(test_fraction=0.0), (9, 1, 0)),
        (dict(val_fraction=0.0, test_fraction=0.0), (10, 0, 0)),
        (dict(val_data="v"), (8, 0, 2)),
        (dict(val_data="v", test_data="t"), (10, 0, 0)),
    ],
)
def test_a_split_that_is_given_takes_none(options, sizes):
    assert tuple(map(len, split(10, config(**options)).values())) == sizes


def test_splits_survive_the_disk(tmp_path):
    splits = {"train": [{"text": 'a "b"\n\u2028é'}], "validation": [], "test": [{"text": "c", "line": 3}]}
    write_splits(tmp_path / "data", splits)
    assert read_splits(tmp_path / "data") == splits


def collate(examples):
    return (torch.tensor(examples),)


def test_every_epoch_has_its_own_order_and_whole_steps():
    examples = Examples(list(range(11)), collate, 2, batch_size=4, seed=3)
    assert examples.samples_per_epoch == 8
    epochs = [[i for p in range(e * 8, e * 8 + 8, 2) for i in examples.batch(p)[0].tolist()] for e in range(3)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert Examples(list(range(11)), collate, 2, batch_size=4, seed=3).batch(10)[0].tolist() == epochs[1][2:4]


def test_without_a_seed_all_come_in_order():
    examples = Examples(list(range(5)), collate, 2)
    assert [examples.batch(p)[0].tolist() for p in (0, 2, 4)] == [[0, 1], [2, 3], [4, 0]]
    assert examples.samples_per_epoch == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(val_fraction=0.5, test_fraction=0.5), "leave some for training"),
        (dict(val_fraction=-0.1), "val_fraction"),
        (dict(max_length=0), "max_length must be at least 1"),
        (dict(lora_r=0), "lora_r"),
        (dict(dropout=2.0), r"^dropout must lie in \[0, 1\), got 2.0"),
        (dict(patience=0), "patience must be at least 1"),
        (dict(out="nowhere", resume=True), "nothing to resume"),
    ],
)
def test_mistakes_are_found_before_any_work(options, says):
    with pytest.raises(UserError, match=says):
        check_before(config(**options))
