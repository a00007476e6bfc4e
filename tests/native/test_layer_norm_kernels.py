"""The native LayerNorm, forward and backward, against float64; also runs against an installed package."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DIRECTORY = Path(importlib.util.find_spec("llmfast").origin).parent
if not (DIRECTORY / "_kernels.so").exists():
    pytest.skip("llmfast is installed without its compiled parts", allow_module_level=True)
torch.ops.load_library(str(DIRECTORY / "_kernels.so"))
ops = torch.ops.llmfast

EPS = 1e-5
HAS_CUDA = torch._C._dispatch_has_kernel_for_dispatch_key("llmfast::layer_norm_fwd", "CUDA")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() and HAS_CUDA else ["cpu"]
SHAPES = [(1, 1), (5, 1), (1, 7), (3, 17), (13, 33), (31, 127), (2, 3, 131), (67, 768), (129, 1025), (7, 1600), (64,)]


def float64_reference(x, weight, bias, dy):
    """(y, mean, rstd, dx, dweight, dbias) by the formulas, in float64."""
    x, dy = x.double(), dy.double()
    mean = x.mean(-1, keepdim=True)
    rstd = ((x - mean).square().mean(-1, keepdim=True) + EPS).rsqrt()
    h = (x - mean) * rstd
    w = torch.ones((), dtype=torch.float64, device=x.device) if weight is None else weight.double()
    g = dy * w
    dx = rstd * (g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True))
    y = h * w if bias is None else h * w + bias.double()
    columns = (dy * h).reshape(-1, x.shape[-1]).sum(0), dy.reshape(-1, x.shape[-1]).sum(0)
    return y, mean.flatten(), rstd.flatten(), dx, *columns


def run(x, weight, bias, dy):
    y, mean, rstd = ops.layer_norm_fwd(x, weight, bias, EPS)
    return y, mean, rstd, *ops.layer_norm_bwd(dy, x, weight, mean, rstd, bias is not None)


def inputs(shape, device="cpu", dtype=torch.float32, parameter_dtype=None, parameters=2, offset=0.5):
    torch.manual_seed(0)
    x, dy = torch.randn(shape, device=device) + offset, torch.randn(shape, device=device)
    made = [torch.randn(shape[-1], device=device).to(parameter_dtype or dtype) for _ in range(parameters)]
    return x.to(dtype), *made, *[None] * (2 - parameters), dy.to(dtype)


def error(got, want):
    """Largest error, in units of the largest value or of 1."""
    assert got.shape == want.shape
    return ((got.double() - want).abs().max() / want.abs().max().clamp_min(1.0)).item() if want.numel() else 0.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parameters", [2, 1, 0])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_equals_float64(shape, parameters, device):
    x, weight, bias, dy = inputs(shape, device, parameters=parameters)
    got = run(x, weight, bias, dy)
    want = float64_reference(x, weight, bias, dy)
    for i, name in enumerate("y mean rstd dx dweight dbias".split()):
        if (name == "dweight" and weight is None) or (name == "dbias" and bias is None):
            assert got[i].shape == (0,)
            continue
        # one element a row: the gradient is rounding alone, and 1 / sqrt(eps) magnifies it
        assert error(got[i], want[i]) < (3e-6 if shape[-1] > 1 else 3e-4), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameter_dtype", [None, torch.float32])
@pytest.mark.parametrize("shape", [(5, 3), (13, 33), (67, 768), (300, 1025)])
def test_low_precision_errs_no_more_than_twice_as_pytorch(shape, parameter_dtype, dtype, device):
    if device == "cpu" and dtype is torch.float16:
        with pytest.raises(RuntimeError, match="x must be float32 or bfloat16 on a CPU, got Half"):
            ops.layer_norm_fwd(torch.zeros(2, 3, dtype=dtype), None, None, EPS)
        return
    x, weight, bias, dy = inputs(shape, device, dtype, parameter_dtype)
    got = run(x, weight, bias, dy)
    want = float64_reference(x, weight, bias, dy)
    y, mean, rstd = torch.native_layer_norm(x, shape[-1:], weight.to(dtype), bias.to(dtype), EPS)
    backward = torch.ops.aten.native_layer_norm_backward
    theirs = y, mean, rstd, *backward(dy, x, shape[-1:], mean, rstd, weight.to(dtype), bias.to(dtype), [True] * 3)
    for i, name in enumerate("y mean rstd dx dweight dbias".split()):
        dtypes = {"y": dtype, "dx": dtype, "dweight": weight.dtype, "dbias": weight.dtype}
        assert got[i].dtype == dtypes.get(name, torch.float32)
        assert error(got[i], want[i]) <= 2 * error(theirs[i].flatten().view_as(want[i]), want[i]) + 1e-5, name


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides_give_what_contiguous_inputs_give(device):
    x, weight, bias, dy = inputs((6, 10, 66), device)
    strided = [x.transpose(0, 1)[::2, 1:, 3:], weight[3:], bias.flip(0)[:63], dy[:, ::2].transpose(0, 1)[:, 1:, :63]]
    wide = torch.empty(126, device=device)
    wide[::2] = strided[1]
    strided[1] = wide[::2]
    assert not any(t.is_contiguous() for t in (strided[0], strided[1], strided[3]))
    got = run(*strided)
    assert all(t.is_contiguous() for t in got)
    for a, b in zip(got, run(*[t.contiguous() for t in strided]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 4, 5), (0,)])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(shape, device):
    x, weight, bias, dy = inputs(shape, device)
    y, mean, rstd, dx, dweight, dbias = run(x, weight, bias, dy)
    assert y.shape == dx.shape == shape
    assert mean.shape == rstd.shape == (0,)
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(bias))


def test_a_large_offset_costs_no_more_precision_than_in_pytorch():
    x, weight, bias, dy = inputs((17, 999), offset=1000.0)
    want = float64_reference(x, weight, bias, dy)
    y, mean, rstd = torch.native_layer_norm(x, (999,), weight, bias, EPS)
    got = run(x, weight, bias, dy)
    for ours, theirs, exact in zip(got, (y, mean, rstd), want, strict=False):
        assert error(ours, exact) <= 2 * error(theirs.view_as(exact), exact) + 1e-7


def test_the_gradient_does_not_depend_on_the_number_of_threads():
    x, weight, bias, dy = inputs((1003, 257))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(x, weight, bias, dy))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_and_infinity_stay_in_their_row():
    x, weight, bias, _ = inputs((5, 70))
    x[1, 3], x[3, 69] = float("nan"), float("inf")
    y = ops.layer_norm_fwd(x, weight, bias, EPS)[0]
    assert y[[1, 3]].isnan().all()
    assert y[[0, 2, 4]].isfinite().all()


def test_the_raw_ops_declare_what_they_do():
    x, weight, bias, dy = inputs((5, 7))
    checks = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(ops.layer_norm_fwd.default, (x, weight, bias, EPS), test_utils=checks)
    _, mean, rstd = ops.layer_norm_fwd(x, weight, bias, EPS)
    torch.library.opcheck(ops.layer_norm_bwd.default, (dy, x, weight, mean, rstd, True), test_utils=checks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, "x must have at least one dimension"),
        ({"x": torch.zeros(3, 7, dtype=torch.float64)}, "x must be float32 or bfloat16 on a CPU, got Double"),
        ({"weight": torch.zeros(8)}, r"weight must have shape \(7,\)"),
        ({"weight": torch.zeros(7, dtype=torch.bfloat16)}, "weight must be float32 or have x's dtype Float, got BFl"),
        ({"weight": None}, "bias needs a weight"),
        ({"bias": torch.zeros(1, 7)}, r"bias must have shape \(7,\)"),
        ({"dy": torch.zeros(7, 3)}, "dy must have x's shape"),
        ({"dy": torch.zeros(3, 7, dtype=torch.bfloat16)}, "dy must have x's dtype Float, got BFloat16"),
        ({"mean": torch.zeros(4)}, r"mean must be a contiguous float32 tensor of shape \(3,\)"),
        ({"rstd": torch.zeros(3, dtype=torch.float64)}, "rstd must be a contiguous float32"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    args = dict(x=torch.zeros(3, 7), weight=torch.ones(7), bias=torch.zeros(7), dy=torch.zeros(3, 7))
    args |= dict(mean=torch.zeros(3), rstd=torch.zeros(3)) | change
    op, names = ops.layer_norm_fwd, ["x", "weight", "bias"]
    if {"dy", "mean", "rstd"} & set(change):
        op, names = ops.layer_norm_bwd, ["dy", "x", "weight", "mean", "rstd"]
    with pytest.raises(RuntimeError, match=message):
        op(*[args[name] for name in names], EPS if op is ops.layer_norm_fwd else True)


def test_ten_training_steps_follow_pytorch():
    class Native(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            y, mean, rstd = ops.layer_norm_fwd(x, weight, bias, EPS)
            ctx.save_for_backward(x, weight, mean, rstd)
            return y

        @staticmethod
        def backward(ctx, dy):
            x, weight, mean, rstd = ctx.saved_tensors
            return ops.layer_norm_bwd(dy, x, weight, mean, rstd, True)

    def train(norm):
        torch.manual_seed(0)
        x, target = torch.randn(64, 33), torch.randn(64, 5)
        first, last = torch.nn.Linear(33, 97), torch.nn.Linear(97, 5)
        weight, bias = torch.nn.Parameter(torch.ones(97)), torch.nn.Parameter(torch.zeros(97))
        optimizer = torch.optim.AdamW([*first.parameters(), *last.parameters(), weight, bias], lr=1e-2)
        losses = []
        for _ in range(10):
            loss = (last(norm(first(x), weight, bias)) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ours = train(Native.apply)
    theirs = train(lambda x, weight, bias: torch.nn.functional.layer_norm(x, (97,), weight, bias, EPS))
    assert ours[-1] < 0.7 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-4)


AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
ISA_FLAGS = {
    "portable": set(),
    "avx2": {"avx2", "fma"},
    "avx512": AVX512,
    "avx512_bf16": AVX512 | {"avx512_bf16", "avx512_vnni"},
}
CPUINFO = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
USABLE = [isa for isa, flags in ISA_FLAGS.items() if flags <= set(CPUINFO)]
FORCED = os.environ.get("LLMFAST_CPU_ISA")


def test_the_best_instruction_set_or_the_one_asked_for_runs():
    assert ops.cpu_isa() == (FORCED or USABLE[-1])


@pytest.mark.skipif(FORCED is not None, reason="the instruction set is given")
@pytest.mark.parametrize("isa", USABLE[:-1])
def test_the_lesser_instruction_sets_pass_these_tests_too(isa):
    names = "equals or twice or strides or threads or infinity or runs"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", names, __file__]
    done = subprocess.run(command, env={**os.environ, "LLMFAST_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_an_unknown_instruction_set_is_refused():
    code = f"import torch; torch.ops.load_library({str(DIRECTORY / '_kernels.so')!r}); torch.ops.llmfast.cpu_isa()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "LLMFAST_CPU_ISA": "sse9"}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "LLMFAST_CPU_ISA must be portable, avx2, avx512 or avx512_bf16, got sse9" in done.stderr
