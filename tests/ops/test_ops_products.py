"""The native mlp and lora_linear beyond the tests of the registry: autocast, frozen parameters, dropout, threads."""

from __future__ import annotations

import pytest
import torch

from llmfast.ops import _library, _verify
from llmfast.ops._registry import OPS, BackendError, use_backend

pytestmark = pytest.mark.skipif(_library.why_not_loaded() is not None, reason=str(_library.why_not_loaded()))
CASES = [
    ("mlp", {"rows": (5, 7), "C": 31, "M": 97, "activation": activation})
    for activation in ("gelu_tanh", "gelu", "relu")
] + [("lora_linear", {"rows": (5, 7), "K": 31, "N": 97, "r": 3})]


def _native(op, inputs):
    with use_backend(f"{op.name}=cpp"):
        return _verify.outputs_and_gradients(op.function, inputs)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_autocast_computes_in_bfloat16_from_float32_parameters(name, shape, x_dtype):
    op = OPS[name]
    inputs = op.inputs(shape, torch.float32, "cpu")
    inputs["x"] = inputs["x"].bfloat16().to(x_dtype)
    doubles = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    exact = _verify.outputs_and_gradients(op.reference, doubles)
    with torch.autocast("cpu", torch.bfloat16):
        eager, ours = _verify.outputs_and_gradients(op.eager, inputs), _native(op, inputs)
    for key, value in ours.items():
        assert value.dtype is (x_dtype if key == "d x" else torch.bfloat16 if key == "y0" else torch.float32), key
        error, allowed = (float((t.double() - exact[key]).abs().max()) for t in (value, eager[key]))
        assert error <= 2 * allowed + 3 * torch.finfo(torch.bfloat16).eps * float(exact[key].abs().max()), key


@pytest.mark.parametrize(("name", "shape"), [CASES[1], CASES[3]])
def test_only_the_gradients_asked_for_are_made(name, shape):
    op = OPS[name]
    inputs = op.inputs(shape, torch.float32, "cpu")
    everything = _native(op, inputs)
    leaves = [key for key, value in inputs.items() if isinstance(value, torch.Tensor)]
    for wanted in [{key} for key in leaves] + [set(leaves) - {key} for key in leaves]:
        tracked = {k: v.detach().requires_grad_(k in wanted) if k in leaves else v for k, v in inputs.items()}
        with use_backend(f"{name}=cpp"):
            y = op.function(**tracked)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        for key in leaves:
            if key in wanted:
                torch.testing.assert_close(tracked[key].grad, everything[f"d {key}"], rtol=0, atol=0)
            else:
                assert tracked[key].grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_dropout_is_that_of_plain_pytorch(dtype):
    op, shape = OPS["lora_linear"], {"rows": (9, 7), "K": 33, "N": 20, "r": 4}
    inputs = {**op.inputs(shape, dtype, "cpu"), "dropout_p": 0.4}
    results = {}
    for backend in ("cpp", "torch"):
        torch.manual_seed(5)
        with use_backend(f"lora_linear={backend}"):
            results[backend] = _verify.outputs_and_gradients(op.function, inputs)
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    for key, value in results["cpp"].items():
        assert float((value - results["torch"][key]).abs().max()) <= tolerance * float(value.abs().max()), key
    assert not torch.equal(results["cpp"]["y0"], _native(op, {**inputs, "dropout_p": 0.0})["y0"])


@pytest.mark.parametrize(("name", "shape"), [CASES[0], CASES[3]])
def test_the_number_of_threads_changes_no_bit(name, shape):
    op, threads = OPS[name], torch.get_num_threads()
    inputs = op.inputs({**shape, "rows": (300,)}, torch.float32, "cpu")
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(_native(op, inputs))
    finally:
        torch.set_num_threads(threads)
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


@pytest.mark.parametrize(("name", "shape"), [CASES[0], CASES[3]])
def test_a_second_derivative_and_other_dtypes_are_refused(name, shape):
    op = OPS[name]
    inputs = op.inputs(shape, torch.float32, "cpu")
    x = inputs["x"].requires_grad_()
    with use_backend(f"{name}=cpp"):
        y = op.function(**inputs)
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(y.sum(), x, create_graph=True)
        with torch.autocast("cpu", torch.float16), pytest.raises(BackendError, match=r"not torch\.float16"):
            op.function(**inputs)


def test_activations_at_their_ends():
    """Large, infinite and NaN pre-activations, through weights that pass them on."""
    one = torch.ones(1, 1)
    h = torch.tensor([-1e30, -88.0, -9.0, -0.0, 1e-40, 9.0, 1e30, float("inf"), float("nan")]).view(-1, 1)
    for activation in ("gelu_tanh", "gelu", "relu"):
        x = h.clone().requires_grad_()
        with use_backend("mlp=cpp"):
            y = torch.cat([OPS["mlp"].function(row, one, None, one, None, activation=activation) for row in x])
        (dx,) = torch.autograd.grad(y.sum(), x)
        limit = h.clamp(min=0)
        torch.testing.assert_close(y.detach().view(-1, 1), limit, rtol=0, atol=1e-6, equal_nan=True)
        assert torch.isnan(dx[-1]) or activation == "relu"
        torch.testing.assert_close(dx[:3], torch.zeros(3, 1), rtol=0, atol=1e-6)
        torch.testing.assert_close(dx[5:8], torch.ones(3, 1), rtol=0, atol=1e-6)
