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


DTYPES = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]


@needs_library
@pytest.mark.parametrize(("x_dtype", "dtype"), DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(70, 33), (3, 5, 769), (4, 1), (0, 5)])
def test_add_layer_norm_and_its_gradients_with_the_mask_of_the_seed(shape, x_dtype, dtype, p):
    torch.manual_seed(0)
    width = shape[-1]
    x, residual = torch.randn(shape).to(x_dtype), torch.randn(shape).to(dtype)
    inputs = [t.requires_grad_() for t in (x, residual, torch.randn(width), torch.randn(width))]
    seed = torch.tensor(77) if p else None
    y, s, *_ = torch.ops.llmfast.add_layer_norm_fwd(*inputs, 1e-2, p, seed)
    upstream = [torch.randn(shape).to(dtype) for _ in range(2)]
    ours = (y, s, *torch.autograd.grad((y, s), inputs, upstream))

    exact = [t.detach().double().requires_grad_() for t in inputs]
    mask = torch.ops.llmfast.dropout(torch.ones(shape), seed, p).double() if p else 1.0
    total = exact[1] + exact[0] * mask
    normal = torch.nn.functional.layer_norm(total, (width,), *exact[2:], 1e-2)
    truth = (normal, total, *torch.autograd.grad((normal, total), exact, [t.double() for t in upstream]))
    for a, b in zip(ours, truth, strict=True):
        tolerance = 2e-2 if torch.bfloat16 in (a.dtype, dtype) else 2e-5
        assert float((a - b).detach().norm()) <= tolerance * float(b.detach().norm())
    assert [t.dtype for t in ours[2:]] == [x_dtype, dtype, torch.float32, torch.float32]


@needs_library
def test_add_layer_norm_follows_the_generator():
    x, weight = torch.randn(9, 70), torch.ones(70)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        with ops.use_backend("add_layer_norm=cpp"):
            draws.append(ops.add_layer_norm(x, x, weight, dropout_p=0.5)[1])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@needs_library
def test_the_last_residual_needs_no_gradient():
    x, weight = torch.randn(9, 70, requires_grad=True), torch.rand(70)
    with ops.use_backend("add_layer_norm=cpp"):
        y, s = ops.add_layer_norm(x, x.detach(), weight)
        (of_y,) = torch.autograd.grad(y.square().sum(), x)
        y, s = ops.add_layer_norm(x, x.detach(), weight)
        (of_s,) = torch.autograd.grad(s.sum(), x)
    leaf = x.detach().clone().requires_grad_()
    expected = torch.nn.functional.layer_norm(leaf + x.detach(), (70,), weight).square().sum()
    torch.testing.assert_close(of_y, torch.autograd.grad(expected, leaf)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(of_s, torch.ones_like(x))
