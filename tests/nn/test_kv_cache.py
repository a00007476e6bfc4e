"""KVCache: reading in pieces gives what reading at once gives."""

from __future__ import annotations

import pytest
import torch

from llmfast.config import GPTConfig
from llmfast.nn import GPT, KVCache

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = GPTConfig(vocab_size=53, block_size=16, n_layer=2, n_head=3, n_embd=24, init="pytorch")


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG).eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(53, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("pieces", [[16], [1] * 16, [5, 1, 1, 7, 2], [15, 1]])
def test_pieces_give_the_logits_of_the_whole(model, pieces):
    idx, cache = ids(3, 16), KVCache(CONFIG, 3, 16)
    logits = torch.cat([model(part, cache=cache)[0] for part in idx.split(pieces, dim=1)], 1)
    torch.testing.assert_close(logits, model(idx)[0], rtol=1e-4, atol=1e-5)
    assert cache.lengths == [16, 16, 16]


def test_rows_of_different_length_go_on_at_their_own_positions(model):
    idx, lengths, cache = ids(4, 16), [9, 1, 4, 0], KVCache(CONFIG, 4, 13)
    padded = idx[:, :9].clone()
    for b, n in enumerate(lengths):
        padded[b, n:] = 0
    model(padded, cache=cache)
    cache.set_lengths(lengths)
    whole = model(idx)[0]
    for step in range(4):
        column = torch.stack([idx[b, n + step] for b, n in enumerate(lengths)])[:, None]
        logits = model(column, cache=cache)[0][:, 0]
        expected = torch.stack([whole[b, n + step] for b, n in enumerate(lengths)])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert cache.lengths == [13, 5, 8, 4]


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_a_dropped_row_leaves_the_others_as_they_were(model, dropped):
    idx, lengths, cache = ids(3, 16), [3, 8, 5], KVCache(CONFIG, 3, 16)
    model(idx[:, :8], cache=cache)
    cache.set_lengths(lengths)
    cache.drop(dropped)
    rows = [0, 1, 2]
    rows[dropped] = rows[-1]
    rows.pop()
    assert cache.lengths == [lengths[b] for b in rows]
    logits = model(torch.stack([idx[b, lengths[b]] for b in rows])[:, None], cache=cache)[0][:, 0]
    whole = model(idx)[0]
    torch.testing.assert_close(logits, torch.stack([whole[b, lengths[b]] for b in rows]), rtol=1e-4, atol=1e-5)


def test_a_row_is_read_again_through_its_own_view(model):
    idx, cache = ids(2, 16), KVCache(CONFIG, 2, 16)
    model(ids(2, 11).flip(0), cache=cache)
    model(idx[1:, :4], cache=cache.row(1))
    cache.set_lengths([11, 4])
    logits = model(torch.stack([idx[0, :1], idx[1, 4:5]]), cache=cache)[0]
    torch.testing.assert_close(logits[1, 0], model(idx[1:])[0][0, 4], rtol=1e-4, atol=1e-5)


def test_nothing_is_allocated_after_the_first(model):
    cache = KVCache(CONFIG, 2, 16)
    before = cache.layers(1)[0].slots.untyped_storage().data_ptr()
    for part in ids(2, 16).split(1, dim=1):
        model(part, cache=cache)
    cache.set_lengths([3, 5])
    assert cache.layers(1)[0].slots.untyped_storage().data_ptr() == before


def test_works_while_gradients_are_on_and_records_none(model):
    cache = KVCache(CONFIG, 1, 16)
    assert not model.hidden_states(ids(1, 3), cache=cache).requires_grad


def test_bad_use_is_a_value_error(model):
    cache = KVCache(CONFIG, 2, 8)
    with pytest.raises(ValueError, match=r"1 \.\. block_size 16, got 17"):
        KVCache(CONFIG, 2, 17)
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        KVCache(CONFIG, 0, 8)
    with pytest.raises(ValueError, match="0 of 8 tokens, 9 more do not fit"):
        model(ids(2, 9), cache=cache)
    with pytest.raises(ValueError, match="idx has 3 rows, the cache 2"):
        model(ids(3, 1), cache=cache)
    model(ids(2, 6), cache=cache)
    with pytest.raises(ValueError, match=r"2 numbers in 0 \.\. 8, got \[9, 1\]"):
        cache.set_lengths([9, 1])
    cache.set_lengths([2, 1])
    with pytest.raises(ValueError, match="one token at a time, got 2"):
        model(ids(2, 2), cache=cache)
