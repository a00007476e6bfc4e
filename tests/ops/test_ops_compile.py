"""torch.compile without a graph break, opcheck of the raw ops, vmap."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from llmfast import ops
from llmfast.ops import _library, _verify
from llmfast.ops._registry import OPS, use_backend

needs_library = pytest.mark.skipif(_library.why_not_loaded() is not None, reason=str(_library.why_not_loaded()))
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
BACKENDS = [
    pytest.param(name, implementation.backend, device, id=f"{name}-{implementation.backend}-{device}")
    for name, op in OPS.items()
    for implementation in op.implementations
    for device in DEVICES
    if not implementation.why_not_on(torch.device(device), torch.float32)
]


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("name", "backend", "device"), BACKENDS)
def test_compiles_whole_with_the_same_results_and_gradients(name, backend, device):
    op = OPS[name]
    inputs = op.inputs(op.samples[0], torch.float32, device)
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
    with use_backend(f"{name}={backend}"):
        exact = _verify.outputs_and_gradients(op.function, inputs)
        ours = _verify.outputs_and_gradients(compiled, inputs)
    for key, value in ours.items():
        torch.testing.assert_close(value, exact[key], rtol=1e-4, atol=1e-5)


def test_compiled_code_follows_use_backend():
    compiled = torch.compile(ops.layer_norm, fullgraph=True, backend="aot_eager")
    x, weight = torch.randn(3, 8), torch.ones(8)
    with use_backend("torch"):
        compiled(x, weight)
    with use_backend("cuda"), pytest.raises(Exception, match="runs on cuda, not on cpu"):
        compiled(x, weight)


def test_inductor_takes_a_step_of_several_ops():
    def step(x, weight, bias, target):
        y, residual = ops.add_layer_norm(x, x, weight[0], bias)
        return ops.linear_cross_entropy(ops.linear(y, weight) + residual, weight, target)

    inputs = (torch.randn(9, 16), torch.randn(16, 16), torch.randn(16))
    exact = [t.clone().requires_grad_() for t in inputs]
    ours = [t.clone().requires_grad_() for t in inputs]
    target = torch.arange(9)
    expected = step(*exact, target)
    expected.backward()
    loss = torch.compile(step, fullgraph=True)(*ours, target)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_a_compiled_loss_is_nan_for_a_target_out_of_range():
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(11, 8)
    assert torch.isnan(compiled(x, weight, torch.tensor([0, 11, 2])))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, False)])
def test_opcheck_of_the_native_layer_norm(dtype, weight, bias):
    x = torch.randn(3, 5, 17).to(dtype).requires_grad_()
    w = torch.randn(17, requires_grad=True) if weight else None
    b = torch.randn(17, requires_grad=True) if bias else None
    raw = torch.ops.llmfast
    torch.library.opcheck(raw.layer_norm_fwd.default, (x, w, b, 1e-5), **_tolerance(dtype))
    _, mean, rstd = raw.layer_norm_fwd(x.detach(), w, b, 1e-5)
    arguments = (torch.randn(3, 5, 17).to(dtype), x.detach(), None if w is None else w.detach(), mean, rstd, bias)
    torch.library.opcheck(raw.layer_norm_bwd.default, tuple(a.detach() if torch.is_tensor(a) else a for a in arguments))


@needs_library
def test_opcheck_of_the_update():
    p, g, m, v = ([torch.rand(3, 5), torch.rand(7)] for _ in range(4))
    torch.library.opcheck(torch.ops.llmfast.adamw_.default, (p, g, m, v, 2.0, 0.1, 0.9, 0.99, 0.1, 1e-8, 1.5))
    torch.library.opcheck(torch.ops.llmfast.total_norm.default, (g,))


@needs_library
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck_of_the_native_add_layer_norm(dtypes, weight, bias, p):
    x, residual = (torch.randn(3, 5, 17).to(dtype).requires_grad_() for dtype in dtypes)
    w = torch.randn(17, requires_grad=True) if weight else None
    b = torch.randn(17, requires_grad=True) if bias else None
    raw, seed = torch.ops.llmfast, torch.tensor(3) if p else None
    torch.library.opcheck(raw.add_layer_norm_fwd.default, (x, residual, w, b, 1e-5, p, seed), **_tolerance(dtypes[0]))
    with torch.no_grad():
        y, s, mean, rstd = raw.add_layer_norm_fwd(x, residual, w, b, 1e-5, p, seed)
        arguments = (y, s, s, None if w is None else w.detach(), mean, rstd, bias, dtypes[0], p, seed)
        torch.library.opcheck(raw.add_layer_norm_bwd.default, arguments)


def _tolerance(dtype):
    return {} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masks", [True, False])
def test_opcheck_of_the_native_attention(dtype, masks):
    q, k, v = (torch.randn(2, 3, T, 8).to(dtype).requires_grad_() for T in (5, 7, 7))
    rest = (torch.tensor([4, 7]), torch.arange(14).view(2, 7) // 3) if masks else (None, None)
    options = (0.3, 0.2 if masks else 0.0, torch.tensor(5) if masks else None, *rest)
    raw = torch.ops.llmfast
    torch.library.opcheck(raw.causal_attention_fwd.default, (q, k, v, *options), **_tolerance(dtype))
    q, k, v = (t.detach() for t in (q, k, v))
    out, lse = raw.causal_attention_fwd(q, k, v, *options)
    torch.library.opcheck(raw.causal_attention_bwd.default, (torch.randn_like(out), q, k, v, out, lse, *options))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_of_the_native_mlp(dtype, bias):
    x, w1, b1, w2, b2 = (torch.randn(*s).to(dtype).requires_grad_() for s in ((2, 3, 5), (7, 5), (7,), (4, 7), (4,)))
    raw, b1, b2 = torch.ops.llmfast, b1 if bias else None, b2 if bias else None
    torch.library.opcheck(raw.mlp_fwd.default, (x, w1, b1, w2, b2, "gelu", dtype, True), **_tolerance(dtype))
    x, w1, w2 = (t.detach() for t in (x, w1, w2))
    _, h = raw.mlp_fwd(x, w1, None, w2, None, "gelu", dtype, True)
    torch.library.opcheck(
        raw.mlp_bwd.default, (torch.randn(2, 3, 4), x, h, w1, w2, "gelu", 0b11111 if bias else 0b01010)
    )


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck_of_the_native_lora(dtype, dropout_p):
    sizes = ((2, 3, 5), (7, 5), (7,), (2, 5), (7, 2))
    x, w, b, A, B = (torch.randn(*s).to(dtype).requires_grad_() for s in sizes)
    raw, options = torch.ops.llmfast, (0.5, dropout_p, torch.tensor(3), dtype)
    torch.library.opcheck(raw.lora_linear_fwd.default, (x, w, b, A, B, *options), **_tolerance(dtype))
    x, w, A, B = (t.detach() for t in (x, w, A, B))
    _, low = raw.lora_linear_fwd(x, w, None, A, B, *options)
    torch.library.opcheck(raw.lora_linear_bwd.default, (torch.randn(2, 3, 7), x, low, w, A, B, *options, 0b11111))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_the_native_products(dtype):
    a, b, bias = torch.randn(5, 7).to(dtype), torch.randn(3, 7).to(dtype).t(), torch.randn(3).to(dtype)
    raw, low = torch.ops.llmfast, dtype is torch.bfloat16
    torch.library.opcheck(raw.mm.default, (a, b, bias, low, low))
    torch.library.opcheck(raw.add_mm_.default, (torch.zeros(5, 3), a, b, low))
    torch.library.opcheck(raw.column_sums.default, (a,))
    weight = torch.randint(-127, 128, (3, 7), dtype=torch.int8)
    torch.library.opcheck(raw.mm_int8.default, (a.float(), weight, torch.rand(3), bias))


@pytest.mark.parametrize("kernel", [pytest.param("llmfast.linear_cross_entropy", marks=needs_library), ""])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_of_the_chunked_losses(bias, kernel):
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    b = torch.randn(11, requires_grad=True) if bias else None
    target, counts = torch.arange(6), torch.tensor([1.0, 0, 1, 1, 0, 1])
    raw = torch.ops.llmfast
    torch.library.opcheck(raw.chunked_rows.default, (x, weight, b, target, counts, 0.1, torch.float32, kernel))
    wants = [True, True, bias]
    arguments = (x, weight, b, target, counts, counts / 4, 0.1, torch.float32, kernel, wants)
    torch.library.opcheck(raw.chunked_sum.default, arguments)
    if kernel:
        arguments = (*(None if t is None else t.detach() for t in (x, weight, b)), target, counts, 0.1, False, *wants)
        torch.library.opcheck(raw.linear_cross_entropy.default, arguments)


@pytest.mark.parametrize("name", ["layer_norm", "mlp", "causal_attention", "lora_linear", "linear_cross_entropy"])
def test_vmap_goes_through_plain_pytorch(name):
    op = OPS[name]
    inputs = op.inputs(op.samples[0], torch.float32, "cpu")
    first = next(iter(inputs))
    rest = {k: v for k, v in inputs.items() if k != first}
    expected = torch.stack([op.function(**{first: s * inputs[first]}, **rest) for s in (1.0, 2.0)])
    stacked = torch.stack([inputs[first], 2 * inputs[first]])
    batched = torch.func.vmap(lambda x: op.function(**{first: x}, **rest))(stacked)
    torch.testing.assert_close(batched, expected, rtol=1e-4, atol=1e-5)


def test_eager_use_does_not_import_the_compiler():
    program = (
        "import sys, torch; from llmfast import ops; x = torch.randn(4, 8, requires_grad=True)\n"
        "assert not hasattr(torch.ops.llmfast, 'layer_norm_fwd')\n"
        "y = ops.layer_norm(ops.mlp(x, torch.randn(16, 8), None, torch.randn(8, 16), None), torch.ones(8))\n"
        "ops.linear_cross_entropy(y, torch.randn(9, 8), torch.arange(4)).backward()\n"
        "sys.exit(1 if 'torch._dynamo' in sys.modules else 0)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
