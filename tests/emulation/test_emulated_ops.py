"""The CUDA ops as a whole, on CPU tensors: csrc/cuda/*.cpp between torch and the emulated kernels, against float64.

What it cannot show is CUDA itself: streams, devices, and that a real GPU does what the emulator does.
"""

from __future__ import annotations

import random
import shutil
import zlib

import pytest
import torch
from builds import cached_library

from llmfast.ops import _library, _triton, _verify, use_backend
from llmfast.ops._registry import OPS, Implementation, forget_choices

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ not found")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS_HERE = ["layer_norm", "add_layer_norm", "causal_attention", "linear_cross_entropy", "mlp", "lora_linear"]
MORE = {
    "linear_cross_entropy": [{"rows": (3,), "C": 32, "V": 50257, "bias": True}],
    "lora_linear": [{"rows": (70,), "K": 136, "N": 56, "r": 24}],  # a rank of two passes backward
}
SEED = torch.tensor(0x1234_5678_9ABC_DEF1)


@pytest.fixture(scope="module")
def raw():
    """The namespace of the emulated raw ops, with their fakes and autograd."""
    if not hasattr(torch.ops.llmfast_emulated, "layer_norm_fwd"):
        torch.ops.load_library(str(cached_library()))
        for register in _triton._on_load:
            register("llmfast_emulated")
    return torch.ops.llmfast_emulated


@pytest.fixture(autouse=True)
def _emulated(raw, monkeypatch, one_thread):
    """Backend "cuda" of every op runs on CPU tensors."""
    for name in OPS_HERE:
        op = OPS[name]
        cuda = next(i for i in op.implementations if i.backend == "cuda")
        run = cuda.run.func
        keywords = {k: v.replace("llmfast", "llmfast_emulated") for k, v in cuda.run.keywords.items()}
        first = () if keywords else (raw,)

        def emulated(*args, run=run, first=first, keywords=keywords):
            return run(*first, *args, **keywords)

        ours = Implementation("cuda", emulated, "ours", ("cpu",), cuda.dtypes, None, cuda.declines)
        monkeypatch.setattr(op, "implementations", [ours, *(i for i in op.implementations if i.backend != "cuda")])
    forget_choices()
    yield
    forget_choices()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS_HERE)
def test_samples_and_random_shapes_equal_float64(name, dtype):
    op = OPS[name]
    rng = random.Random(zlib.crc32(f"{name} {dtype}".encode()))
    for shape in [*op.samples, *MORE.get(name, []), *(op.random_shape(rng) for _ in range(4))]:
        reasons = _verify.why_not(op, op.implementations[0], shape, dtype, "cpu")
        if reasons:
            assert (name, dtype) == ("lora_linear", torch.float32), reasons
            continue
        ratio, where = _verify.worst_ratio(op, "cuda", shape, dtype)
        assert ratio <= 1, f"{shape}: {where} is {ratio:.2f} times the allowed error off"


def test_the_dropout_mask_is_the_cpu_kernels(raw):
    assert _library.why_not_loaded() is None
    x, zeros = torch.ones(67, 130), torch.zeros(67, 130)
    arguments = (x, zeros, None, None, 1e-5, 0.3, SEED)
    ours, cpu = (ops.add_layer_norm_fwd(*arguments)[1] for ops in (raw, torch.ops.llmfast))
    assert torch.equal(ours, cpu)
    assert 0.2 < (ours == 0).float().mean() < 0.4


def detached(*values):
    return tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in values)


def check(forward, backward, inputs, of_backward):
    """opcheck of ``forward`` with ``inputs``, and of ``backward`` with ``of_backward(inputs, outputs)``."""
    torch.library.opcheck(forward.default, inputs)
    with torch.no_grad():
        outputs = forward(*inputs)
        torch.library.opcheck(backward.default, detached(*of_backward(detached(*inputs), outputs)))


def randn(*shapes, dtype=torch.float32):
    return [torch.randn(*shape).to(dtype).requires_grad_() for shape in shapes]


def test_opcheck_of_the_layer_norms(raw):
    inputs = (*randn((3, 5, 17), (17,), (17,)), 1e-5)
    check(raw.layer_norm_fwd, raw.layer_norm_bwd, inputs, lambda i, o: (o[0], i[0], i[1], o[1], o[2], True))
    x, residual, w, b = randn((3, 5, 17), (3, 5, 17), (17,), (17,))
    check(
        raw.add_layer_norm_fwd,
        raw.add_layer_norm_bwd,
        (x, residual, w, b, 1e-5, 0.3, SEED),
        lambda i, o: (o[0], o[1], o[1], i[2], o[2], o[3], True, torch.float32, 0.3, SEED),
    )


@pytest.mark.parametrize(("D", "p"), [(24, 0.0), (20, 0.3)])
def test_opcheck_of_attention(raw, D, p):
    q, k, v = randn((2, 2, 9, D), (2, 2, 13, D), (2, 2, 13, D))
    masks = torch.tensor([13, 5], dtype=torch.int32), torch.zeros(2, 13, dtype=torch.int64)
    options = (0.3, p, SEED if p else None, *masks)
    check(
        raw.causal_attention_fwd,
        raw.causal_attention_bwd,
        (q, k, v, *options),
        lambda i, o: (o[0], *i[:3], *o, *options),
    )


@pytest.mark.parametrize("D", [64, 128])
def test_attention_drops_what_the_cpu_kernel_drops(raw, D):
    assert _library.why_not_loaded() is None
    zeros, v = torch.zeros(1, 2, 150, D), torch.eye(150)[:, :D].expand(1, 2, 150, D).contiguous()
    options = (1.0, 0.3, SEED, None, None)
    forward = [ops.causal_attention_fwd(zeros, zeros, v, *options) for ops in (raw, torch.ops.llmfast)]
    torch.testing.assert_close(forward[0], forward[1])  # weights of key j in column j
    dout = torch.eye(150)[:, :D].expand(1, 2, 150, D).contiguous()
    dv = [
        ops.causal_attention_bwd(dout, zeros, zeros, v, *out, *options)[2]
        for ops, out in zip((raw, torch.ops.llmfast), forward, strict=True)
    ]
    torch.testing.assert_close(dv[0], dv[1])


def test_opcheck_of_mlp_and_lora(raw):
    inputs = (*randn((2, 3, 5), (7, 5), (7,), (4, 7), (4,)), "gelu", torch.float32, True)
    check(raw.mlp_fwd, raw.mlp_bwd, inputs, lambda i, o: (o[0], i[0], o[1], i[1], i[3], "gelu", 0b11111))
    options = (0.5, 0.3, SEED, torch.bfloat16)
    inputs = (*randn((2, 3, 5), (7, 5), (7,), (2, 5), (7, 2), dtype=torch.bfloat16), *options)
    check(
        raw.lora_linear_fwd,
        raw.lora_linear_bwd,
        inputs,
        lambda i, o: (o[0], i[0], o[1], i[1], i[3], i[4], *options, 0b11111),
    )


def test_the_gradients_of_transposed_weights_lie_transposed(raw):
    x, fc, proj = (t.detach() for t in randn((9, 8), (8, 24), (24, 8), dtype=torch.bfloat16))
    fc, proj = fc.t(), proj.t()
    h = raw.mlp_fwd(x, fc, None, proj, None, "relu", torch.bfloat16, True)[1]
    transposed = raw.mlp_bwd(x, x, h, fc, proj, "relu", 0b01010)
    plain = raw.mlp_bwd(x, x, h, fc.contiguous(), proj.contiguous(), "relu", 0b01010)
    for i, weight in ((1, fc), (3, proj)):
        assert transposed[i].stride() == weight.stride()
        torch.testing.assert_close(transposed[i], plain[i])


def test_lora_drops_the_same_elements_forward_and_backward(raw):
    """With the identity as weights, the low-rank term is the dropped input, and its gradient the mask."""
    n, dtype = 40, torch.bfloat16
    x, zeros, eye = torch.ones(67, n, dtype=dtype), torch.zeros(n, n, dtype=dtype), torch.eye(n, dtype=dtype)
    options = (1.0, 0.25, SEED, dtype)
    y, low = raw.lora_linear_fwd(x, zeros, None, eye, eye, *options)
    dx, _, _, dA, dB = raw.lora_linear_bwd(x, x, low, zeros, eye, eye, *options, 0b11001)
    want = torch.ops.llmfast.dropout(x.float(), SEED, 0.25)
    torch.testing.assert_close(y.float(), want, rtol=1e-2, atol=0)
    torch.testing.assert_close(dx.float(), want, rtol=1e-2, atol=0)
    torch.testing.assert_close(dA.float(), want.sum(0).expand(n, n), rtol=1e-2, atol=0)
    torch.testing.assert_close(dB.float(), want.sum(0).expand(n, n), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", OPS_HERE)
def test_torch_compile_takes_it_without_a_graph_break(name):
    op = OPS[name]
    inputs = op.inputs(op.samples[0], torch.bfloat16)
    with use_backend("cuda"):
        want = op.function(**inputs)
        compiled = torch.compile(lambda kw: op.function(**kw), fullgraph=True, backend="aot_eager")(inputs)
    torch.testing.assert_close(compiled, want)
