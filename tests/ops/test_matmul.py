"""The CPU's own matrix product (csrc/cpu/gemm.cpp) against float64."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch

from llmfast.ops import _library

pytestmark = pytest.mark.skipif(_library.why_not_loaded() is not None, reason=str(_library.why_not_loaded()))

SIZES = (1, 2, 3, 5, 6, 7, 16, 17, 31, 64, 65, 97, 128, 200)
FLOAT, BFLOAT = torch.float32, torch.bfloat16


def matrix(rng: random.Random, rows: int, columns: int) -> torch.Tensor:
    """A matrix of either dtype and layout inside a larger one, whose other elements are NaN."""
    transposed, padding = rng.random() < 0.5, rng.choice((0, 1, 3))
    shape = (columns, rows + padding) if transposed else (rows, columns + padding)
    whole = torch.full(shape, torch.nan)
    view = whole[:, :rows].t() if transposed else whole[:, :columns]
    view.copy_(torch.randn(rows, columns))
    whole = whole.to(rng.choice((FLOAT, BFLOAT)))
    return whole[:, :rows].t() if transposed else whole[:, :columns]


def check(M: int, N: int, K: int, rng: random.Random) -> None:
    a, b = matrix(rng, M, K), matrix(rng, K, N)
    bias = torch.randn(N) if rng.random() < 0.5 else None
    bf16, bf16_out = rng.random() < 0.5, rng.random() < 0.5
    exact = [(t.to(BFLOAT) if bf16 else t).double() for t in (a, b)]
    want = exact[0] @ exact[1] + (0 if bias is None else bias.double())
    scale = exact[0].abs() @ exact[1].abs() + 1
    got = torch.ops.llmfast.mm(a, b, bias, bf16, bf16_out)
    assert got.dtype is (BFLOAT if bf16_out else FLOAT)
    error = (got.double() - want).abs()
    what = (M, N, K, a.dtype, b.dtype, bf16, bf16_out)
    assert bool((error <= 1e-6 * scale + (want.abs() / 256 if bf16_out else 0)).all()), what
    total = torch.randn(M, N)
    sums = total.double() + exact[0] @ exact[1]
    torch.ops.llmfast.add_mm_(total, a, b, bf16)
    assert bool(((total.double() - sums).abs() <= 1e-6 * (scale + sums.abs())).all()), what


def test_random_products_equal_float64():
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(150):
        check(*(rng.choice(SIZES) for _ in range(3)), rng)


def test_products_with_int8_rows_equal_float64():
    rng = random.Random(1)
    torch.manual_seed(1)
    for _ in range(60):
        M, N, K = rng.choice((0, *SIZES)), rng.choice((0, *SIZES)), rng.choice((0, *SIZES, 1025, 2049))
        a, scales = torch.randn(K, M).t(), torch.rand(2 * N)[::2]
        weight = torch.randint(-128, 128, (N, K + rng.randrange(2)), dtype=torch.int8)[:, :K]
        bias = torch.randn(N) if rng.random() < 0.5 else None
        exact = weight.double() * scales.double()[:, None]
        want = a.double() @ exact.t() + (0 if bias is None else bias.double())
        got = torch.ops.llmfast.mm_int8(a, weight, scales, bias)
        assert got.dtype is FLOAT
        assert bool(((got.double() - want).abs() <= 1e-6 * (a.double().abs() @ exact.abs().t() + 1)).all()), (M, N, K)


def test_int8_rows_that_do_not_fit_are_refused():
    a, weight, scales = torch.empty(2, 3), torch.empty(5, 3, dtype=torch.int8), torch.empty(5)
    with pytest.raises(RuntimeError, match=r"a \(M, K\) must be float32 and weight \(N, K\) int8"):
        torch.ops.llmfast.mm_int8(a, weight.float(), scales, None)
    with pytest.raises(RuntimeError, match=r"scales must be float32 of shape \(N,\)"):
        torch.ops.llmfast.mm_int8(a, weight, scales[:3], None)
    with pytest.raises(RuntimeError, match=r"a \(M, K\) must be float32"):
        torch.ops.llmfast.mm_int8(a[None], weight, scales, None)


@pytest.mark.parametrize("K", [0, 1023, 1025, 2049, 4500])
def test_products_of_no_or_several_blocks_along_k(K):
    rng = random.Random(K)
    torch.manual_seed(K)
    for _ in range(4):
        check(rng.choice((7, 65)), rng.choice((3, 129)), K, rng)


def test_products_of_nothing_are_empty():
    for M, N in ((0, 3), (3, 0)):
        assert torch.ops.llmfast.mm(torch.empty(M, 5), torch.empty(5, N), None, False, False).shape == (M, N)


def test_what_does_not_fit_is_refused():
    with pytest.raises(RuntimeError, match=r"a \(M, K\) and b \(K, N\) do not fit"):
        torch.ops.llmfast.mm(torch.empty(2, 3), torch.empty(4, 5), None, False, False)
    with pytest.raises(RuntimeError, match="a must be float32 or bfloat16 on a CPU, got Double"):
        torch.ops.llmfast.mm(torch.empty(2, 3).double(), torch.empty(3, 5), None, False, False)


def test_threads_do_not_change_a_bit():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    for M, N, K in ((300, 40, 1500), (40, 900, 300), (130, 130, 130), (2100, 40, 64)):
        x, weight = torch.randn(M, K), torch.randn(N, K)
        int8, scales = torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(N)
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            try:
                results.append(torch.ops.llmfast.mm(x, weight.t(), None, False, False))
                results.append(torch.ops.llmfast.mm(weight, x.t(), None, False, False).t())
                results.append(torch.ops.llmfast.mm_int8(x, int8, scales, None))
            finally:
                torch.set_num_threads(threads)
        for i, other in enumerate(results):
            assert torch.equal(other, results[i % 3])


@pytest.mark.skipif("LLMFAST_CPU_ISA" in os.environ, reason="the instruction set is given")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_the_lesser_instruction_sets_pass_these_tests_too(isa):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "LLMFAST_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
