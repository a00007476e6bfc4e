"""Every implementation of every op, forward and gradients, against float64; the registry says which there are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmfast import ops
from llmfast.ops import _verify, matmul
from llmfast.ops._registry import FLOATING, OPS

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
CASES = [
    pytest.param(op, implementation, shape, dtype, device, id=f"{name}-{implementation.backend}-{i}-{dtype}-{device}")
    for name, op in OPS.items()
    for implementation in op.implementations
    for i, shape in enumerate(op.samples)
    for dtype in FLOATING
    for device in DEVICES
    if not implementation.why_not_on(torch.device(device), dtype)
]


@pytest.fixture(params=matmul.ROUTES)
def route(request, monkeypatch):
    """Every product of float32 and bfloat16 goes this way, however small it is."""
    ops.matmul_routing()
    monkeypatch.setattr(matmul, "_routes", {})
    monkeypatch.setattr(matmul, "MIN_MACS", 0)
    monkeypatch.setattr(matmul, "MIN_OWN_MACS", 0)
    try:
        ops.set_matmul_routing({"float32": request.param, "bfloat16": request.param})
    except ValueError as refusal:
        pytest.skip(str(refusal))
    return request.param


@pytest.mark.parametrize(("op", "implementation", "shape", "dtype", "device"), CASES)
def test_error_is_at_most_twice_that_of_eager_pytorch(op, implementation, shape, dtype, device):
    reasons = _verify.why_not(op, implementation, shape, dtype, device)
    if reasons:
        pytest.skip("; ".join(reasons))
    worst, where = _verify.worst_ratio(op, implementation.backend, shape, dtype, device)
    assert worst <= 1, f"{where}: {worst:.2f} times the allowed error"


PRODUCTS = ("mlp", "lora_linear", "linear_cross_entropy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "i"), [(name, i) for name in PRODUCTS for i in range(len(OPS[name].samples))])
def test_either_matmul_route_is_as_exact(route, name, i, dtype):
    worst, where = _verify.worst_ratio(OPS[name], "torch", OPS[name].samples[i], dtype)
    assert worst <= 1, f"{where}: {worst:.2f} times the allowed error"


@pytest.mark.parametrize("name", OPS)
def test_gradients_match_finite_differences(name):
    op = OPS[name]
    for shape in op.samples:
        if 0 in (shape.get("B"), shape.get("Tk"), *shape.get("rows", ())):
            continue
        small = {**shape, "rows": tuple(min(n, 3) for n in shape["rows"])} if "rows" in shape else {**shape, "D": 2}
        small |= {key: min(shape[key], 6) for key in ("C", "M", "V", "K", "N", "width", "Tk") if key in shape}
        if "Tq" in small:
            small["Tq"] = max(1, small["Tk"] + min(2, max(-2, shape["Tq"] - shape["Tk"])))
        small["ignore_index"] = -100
        inputs = op.inputs(small, torch.float64, "cpu")
        leaves = {
            k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and v.numel()
        }

        def run(*tensors, inputs=inputs, leaves=leaves):
            return op.function(**{**inputs, **dict(zip(leaves, tensors, strict=True))})

        assert torch.autograd.gradcheck(run, [v.detach().clone().requires_grad_() for v in leaves.values()])


@pytest.mark.parametrize("name", OPS)
def test_strides_do_not_matter(name):
    op = OPS[name]
    inputs = op.inputs(op.samples[0], torch.float32, "cpu")
    strided = {k: v.mT.contiguous().mT if _matrix(v) else v for k, v in inputs.items()}
    assert any(_matrix(v) and not v.is_contiguous() for v in strided.values())
    for a, b in zip(_tuple(op.function(**inputs)), _tuple(op.function(**strided)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def _matrix(value):
    return isinstance(value, torch.Tensor) and value.dim() >= 2 and value.is_floating_point()


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("name", OPS)
def test_no_grad_gives_the_same_numbers_and_no_graph(name):
    op = OPS[name]
    inputs = op.inputs(op.samples[0], torch.float32, "cpu")
    tracked = {k: v.detach().requires_grad_() if _matrix(v) else v for k, v in inputs.items()}
    with torch.no_grad():
        quiet = _tuple(op.function(**tracked))
    for a, b in zip(quiet, _tuple(op.function(**tracked)), strict=True):
        assert not a.requires_grad
        assert b.requires_grad
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPS)
def test_autocast_gives_float32_gradients_close_to_float32(name):
    op = OPS[name]
    inputs = op.inputs(op.samples[0], torch.float32, "cpu")
    exact = _verify.outputs_and_gradients(op.function, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = _verify.outputs_and_gradients(op.function, inputs)
    for key, value in mixed.items():
        if key.startswith("d "):
            assert value.dtype is torch.float32
        assert float((value - exact[key]).norm()) <= 0.02 * float(exact[key].norm()) + 1e-6, key


def test_linear_takes_the_chosen_route_and_keeps_its_gradients(route):
    x = torch.randn(3, 37, 65, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(129, 65, dtype=torch.float64), torch.randn(129, dtype=torch.float64)
    exact = _verify.outputs_and_gradients(F.linear, {"input": x.detach(), "weight": weight, "bias": bias})
    single = {"x": x.detach().float(), "weight": weight.float(), "bias": bias.float()}
    ours = _verify.outputs_and_gradients(ops.linear, single)
    for a, b in zip(ours.values(), exact.values(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)
    leaf = single["x"].requires_grad_()
    graph = ops.linear(leaf, single["weight"]).grad_fn
    name = type(graph).__name__
    assert [name.startswith(own) for own in ("_Linear", "_OwnLinear")] == [route == "onednn", route == "ours"]


def test_linear_can_be_differentiated_twice(route):
    x, weight = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)

    def penalty(linear):
        (gradient,) = torch.autograd.grad(linear(x, weight).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (x, weight))

    for a, b in zip(penalty(ops.linear), penalty(F.linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["every second", "transposed", "expanded", "sliced"])
def test_linear_reads_any_strides(route, layout):
    x = {
        "every second": torch.randn(16, 40)[:, ::2],
        "transposed": torch.randn(20, 16).t(),
        "expanded": torch.randn(1, 20).expand(16, 20),
        "sliced": torch.randn(4, 9, 33)[:, 2:6, 5:25],
    }[layout]
    weight = torch.randn(20, 31).t()
    exact = _verify.outputs_and_gradients(F.linear, {"input": x.double(), "weight": weight.double()})
    ours = _verify.outputs_and_gradients(ops.linear, {"x": x, "weight": weight})
    for a, b in zip(ours.values(), exact.values(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)
