"""Dropout masks by counter: Philox4x32-10 against its published vectors, and the kernel against it word for word."""

from __future__ import annotations

import pytest
import torch

from llmfast import ops
from llmfast.ops import _library

needs_library = pytest.mark.skipif(_library.why_not_loaded() is not None, reason=str(_library.why_not_loaded()))
LOW = (1 << 32) - 1


def philox(counter, key):
    """Salmon et al. 2011, ten rounds."""
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ key0, p1 & LOW, (p0 >> 32) ^ c3 ^ key1, p0 & LOW
        key0, key1 = (key0 + 0x9E3779B9) & LOW, (key1 + 0xBB67AE85) & LOW
    return [c0, c1, c2, c3]


def word(seed, row, column):
    """The layout of csrc/cpu/philox.h."""
    key = (seed & LOW, (seed >> 32) & LOW)
    group = column // 4
    return philox((group & LOW, row & LOW, row >> 32, group >> 32), key)[column % 4]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((LOW,) * 4, (LOW, LOW), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_generator_of_these_tests_gives_the_published_vectors(counter, key, words):
    assert " ".join(f"{w:08x}" for w in philox(counter, key)) == words


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 3, 4, 7, 17, 31, 33, 64, 101])
def test_the_kernel_drops_what_the_layout_says(columns, dtype):
    seed = -1234567890123456789
    words = torch.tensor([[word(seed, row, column) for column in range(columns)] for row in range(5)])
    for p in (0.1, 0.5, 0.999):
        y = torch.ops.llmfast.dropout(torch.ones(5, columns, dtype=dtype), torch.tensor(seed), p)
        drop = round(p * 2**32)
        expected = torch.where(words < drop, 0.0, 2**32 / (2**32 - drop))
        torch.testing.assert_close(y, expected.to(dtype), rtol=0, atol=0)


@needs_library
def test_the_kernel_compares_all_32_bits_of_a_word():
    x, seed = torch.ones(3, 45), torch.tensor(99)
    for row, column in ((0, 0), (1, 2), (2, 31), (2, 44)):
        value = word(99, row, column)
        assert torch.ops.llmfast.dropout(x, seed, value / 2**32)[row, column] > 0
        assert torch.ops.llmfast.dropout(x, seed, (value + 1) / 2**32)[row, column] == 0


@needs_library
def test_a_raw_dropout_refuses_what_it_cannot_take():
    raw, seed = torch.ops.llmfast.dropout, torch.tensor(1)
    with pytest.raises(RuntimeError, match=r"p must lie in \[0, 1\), got 1"):
        raw(torch.ones(2), seed, 1.0)
    with pytest.raises(RuntimeError, match="seed must be one int64"):
        raw(torch.ones(2), torch.tensor(1.0), 0.5)
    with pytest.raises(RuntimeError, match="x must be float32 or bfloat16 on a CPU, got Double"):
        raw(torch.ones(2, dtype=torch.float64), seed, 0.5)


@needs_library
def test_opcheck_of_dropout():
    torch.library.opcheck(torch.ops.llmfast.dropout.default, (torch.randn(3, 5), torch.tensor(7), 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_gradient_of_dropout_has_its_mask(dtype):
    x = torch.rand(7, 33, dtype=dtype).add_(0.5).requires_grad_()
    y = ops.dropout(x, 0.4)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, (y / x).detach())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_right_share_and_rows_are_independent(p):
    kept = ops.dropout(torch.ones(401, 1003), p) > 0
    n = kept.numel()
    assert abs(float(kept.float().mean()) - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    both = (kept[1:] & kept[:-1]).float().mean()
    assert abs(float(both) - (1 - p) ** 2) < 5 / n**0.5
