"""Batches against slices taken one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmfast.data import Batches, TokenSource
from llmfast.data.batches import _key, _permute
from llmfast.errors import UserError


def source(size: int, parts: int = 1) -> TokenSource:
    """Token i is i: a window tells where it began."""
    return TokenSource(np.array_split(np.arange(size, dtype=np.uint16), parts), "numbers")


def starts(batches: Batches, samples: int) -> list[int]:
    found = []
    for position in range(0, samples, batches.batch_size):
        x, y = batches.batch(position)
        assert x.shape == y.shape == (batches.batch_size, batches.block_size)
        assert x.dtype == y.dtype == torch.int64
        expected = x[:, :1] + torch.arange(batches.block_size)
        assert torch.equal(x, expected)
        assert torch.equal(y, expected + 1)
        found += x[:, 0].tolist()
    return found[:samples]


@pytest.mark.parametrize(("size", "block", "stride"), [(4612, 256, 256), (101, 10, 3), (12, 10, 1), (11, 10, None)])
def test_unshuffled_windows_are_the_books(size, block, stride):
    batches = Batches(source(size), block, 1, stride=stride, shuffle=False)
    expected = list(range(0, size - block, stride or block))
    assert batches.samples_per_epoch == len(expected)
    assert starts(batches, 2 * len(expected)) == expected * 2


@pytest.mark.parametrize("windows", [1, 2, 3, 5, 64, 1009, 5000])
def test_every_epoch_visits_every_window_once_in_another_order(windows):
    batches = Batches(source(windows + 4, parts=3), 4, 1 if windows < 3 else 3, stride=1, seed=5)
    assert batches.samples_per_epoch == windows
    found = np.array(starts(batches, 3 * windows)).reshape(3, windows)
    assert (np.sort(found) == np.arange(windows)).all()
    if windows > 5:
        assert (found[0] != found[1]).mean() > 0.5
        assert (found[1] != found[2]).mean() > 0.5
        other = starts(Batches(source(windows + 4), 4, 3, stride=1, seed=6), windows)
        assert (found[0] != other).mean() > 0.5


@pytest.mark.parametrize("sampling", ["sliding", "random"])
def test_a_batch_depends_on_its_position_alone(sampling):
    def make(size: int) -> Batches:
        return Batches(source(9000, parts=2), 6, size, stride=2, sampling=sampling, seed=3)

    batches = make(7)
    in_order = [batches.batch(position)[0] for position in range(0, 14_000, 7)]
    for index in (1999, 0, 585, 586, 1170, 3):
        assert torch.equal(make(7).batch(index * 7)[0], in_order[index])
        assert torch.equal(batches.batch(index * 7)[0], in_order[index])
    samples = torch.cat(in_order)
    assert torch.equal(torch.cat([make(1).batch(i)[0] for i in range(4090, 4100)]), samples[4090:4100])
    assert torch.equal(make(9999).batch(1)[0], samples[1:10_000])


def test_random_windows_are_spread_evenly_and_differ_by_seed():
    def draw(seed: int) -> np.ndarray:
        return np.array(starts(Batches(source(968), 4, 1000, sampling="random", seed=seed), 50_000))

    first = draw(1)
    assert first.min() == 0
    assert first.max() == 963
    counts = np.bincount(first, minlength=964)
    chi_square = ((counts - 50_000 / 964) ** 2 / (50_000 / 964)).sum()
    assert abs(chi_square - 963) < 6 * (2 * 963) ** 0.5
    assert (first == draw(2)).mean() < 0.01
    assert Batches(source(1000), 36, 1, sampling="random").samples_per_epoch == 999 // 36


def test_shuffled_order_looks_random():
    size = 4096
    order = _permute(np.arange(size, dtype=np.uint64), size, np.repeat(_key(1, 0), size)).astype(np.int64)
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.07
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.07
    assert (np.diff(order) == 1).sum() < 8


def test_permutation_of_a_huge_range_needs_no_memory_of_its_size():
    size = 10**12 + 39
    values = np.arange(1000, dtype=np.uint64) * np.uint64(10**9)
    found = _permute(values, size, np.repeat(_key(1, 0), 1000))
    assert len(np.unique(found)) == 1000
    assert found.max() < size


def test_batches_can_be_changed_by_their_owner():
    batches = Batches(source(100), 10, 2)
    before = batches.batch(0)[0].clone()
    batches.batch(0)[0].zero_()
    assert torch.equal(batches.batch(0)[0], before)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (10, {}, "numbers: 10 tokens hold no window of block_size 10 and its targets .11 tokens."),
        (0, {}, "0 tokens hold no window"),
        (99, dict(stride=0), "stride must be at least 1"),
        (99, dict(sampling="sorted"), "sampling must be sliding or random"),
    ],
)
def test_mistakes_are_one_clear_line(size, options, message):
    with pytest.raises(UserError, match=message):
        Batches(source(size), 10, 2, **options)
