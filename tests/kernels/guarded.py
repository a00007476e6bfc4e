"""Launches the kernels of one module on tensors that touch forbidden pages: whoever leaves its tensor dies of a signal.

    TRITON_INTERPRET=1 python tests/kernels/guarded.py MODULE LAUNCHES [SEED]

``test_bounds.py`` runs it in a process of its own. Cases are drawn until each kernel of the module was launched
LAUNCHES times; what was launched, and how often, is printed as JSON.
"""

from __future__ import annotations

import collections
import ctypes
import json
import mmap
import random
import sys
from pathlib import Path

import mended_interpreter
import torch
from triton.runtime.interpreter import InterpretedFunction

from llmfast.kernels import causal_attention, common, layer_norm, linear_cross_entropy, lora_linear, matmul, mlp

LIBC, PAGE = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Every kernel, as the ahead-of-time lane has it: "case | kernel number | architecture".
COMPILED = json.loads(Path(__file__).with_name("aot_baseline.json").read_text())["launches"]
KERNELS = {key.split(" | ")[1].split()[0] for key in COMPILED}


class Guard:
    """Draws cases, and makes tensors whose last (or first) byte touches a forbidden page."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.dtype = torch.float32
        self.areas: list[mmap.mmap] = []  # unmapped when a case is over

    def copy(self, t):
        """A copy of t, guarded; contiguous."""
        if t is None or not t.numel():
            return t
        flat = t.contiguous()
        size = flat.numel() * flat.element_size()
        pages = -(-size // PAGE)
        area = mmap.mmap(-1, (pages + 2) * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for page in (0, pages + 1):
            assert LIBC.mprotect(ctypes.c_void_p(start + page * PAGE), PAGE, 0) == 0
        offset = PAGE + (pages * PAGE - size if self.rng.random() < 0.7 else 0)
        self.areas.append(area)
        return torch.frombuffer(area, dtype=flat.dtype, count=flat.numel(), offset=offset).view(flat.shape).copy_(flat)

    def randn(self, *shape, dtype=None):
        return self.copy(torch.randn(*shape).to(dtype or self.dtype))

    def maybe(self, make):
        return make() if self.rng.random() < 0.5 else None

    def dropout(self):
        return self.rng.choice(((0.0, None), (0.1, self.copy(torch.tensor([5]))[0])))

    # What a wrapper allocates is guarded as well: this object stands in for its ``torch``.
    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *shape, **options):
        return self.copy(torch.full(shape, 7, **options))

    def empty_like(self, t, **options):
        return self.copy(torch.full_like(t.contiguous(), 7, **options))

    def zeros(self, *shape, **options):
        return self.copy(torch.zeros(*shape, **options))


def run_common(guard):
    rows, N = guard.rng.choice((1, 31, 33, 300)), guard.rng.choice((1, 5, 64, 65))
    common.column_sum(guard.randn(rows, N), guard.randn(N), add=guard.rng.random() < 0.5)


def run_layer_norm(guard):
    N, C = guard.rng.choice((1, 2, 7, 9)), guard.rng.choice((1, 5, 16, 17, 63, 96))
    p, seed = guard.dropout()
    x, w, b = guard.randn(N, C), guard.randn(C), guard.randn(C)
    residual = guard.maybe(lambda: guard.randn(N, C))
    _, s, mean, rstd = layer_norm.forward(x, residual, w, b, 1e-5, p, seed)
    ds = guard.maybe(lambda: guard.randn(N, C))
    options = (w, mean, rstd, True, p, seed, guard.dtype, guard.dtype)
    layer_norm.backward(guard.randn(N, C), ds, s, *options)


def run_causal_attention(guard):
    rng = guard.rng
    B, H = rng.choice(((1, 1), (2, 1), (1, 2)))
    D, Tk = rng.choice((8, 16, 24)), rng.choice((1, 3, 31, 32, 33))
    Tq = rng.choice((Tk, 1, max(1, Tk // 2)))
    p, seed = guard.dropout()
    q, k, v, dout = (guard.randn(B, H, T, D) for T in (Tq, Tk, Tk, Tq))
    lens = guard.maybe(lambda: guard.copy(torch.randint(0, Tk + 1, (B,))))
    docs = guard.maybe(lambda: guard.copy(torch.randint(0, 2, (B, Tk)).sort().values))
    out, lse = causal_attention.forward(q, k, v, 0.3, p, seed, lens, docs)
    causal_attention.backward(dout, q, k, v, out, lse, 0.3, p, seed, lens, docs)


def sizes(guard, count):
    return (guard.rng.choice((1, 2, 7, 16, 33, 70)) for _ in range(count))


def run_matmul(guard):
    M, N, K = sizes(guard, 3)
    a = guard.randn(M, K) if guard.rng.random() < 0.5 else guard.randn(K, M).t()
    b = guard.randn(N, K) if guard.rng.random() < 0.5 else guard.randn(K, N).t()
    out, bias = guard.randn(M, N), guard.maybe(lambda: guard.randn(N))
    matmul.product(a, b, out, bias=bias, factor=guard.maybe(lambda: guard.randn(1)), add=guard.rng.random() < 0.5)


def run_mlp(guard):
    N, C, M, out = sizes(guard, 4)
    shapes = ((N, C), (M, C), (M,), (out, M), (out,))
    x, fc, fc_bias, proj, proj_bias = (guard.randn(*shape) for shape in shapes)
    fc_bias, proj_bias = guard.maybe(lambda: fc_bias), guard.maybe(lambda: proj_bias)
    activation = guard.rng.choice(("gelu", "gelu_tanh", "relu"))
    y, h = mlp.forward(x, fc, fc_bias, proj, proj_bias, activation, True)
    gradients = [guard.maybe(lambda shape=shape: guard.empty(*shape, dtype=guard.dtype)) for shape in shapes]
    mlp.backward(y, x, h, fc, proj, activation, gradients)


def run_lora_linear(guard):
    N, K, M = sizes(guard, 3)
    r = guard.rng.choice((1, 3, 16, 17))
    shapes = ((N, K), (M, K), (M,), (r, K), (M, r))
    x, weight, bias, A, B = (guard.randn(*shape) for shape in shapes)
    p, seed = guard.dropout()
    y, low = lora_linear.forward(x, weight, guard.maybe(lambda: bias), A, B, 0.5, p, seed)
    gradients = [guard.maybe(lambda shape=shape: guard.empty(*shape, dtype=guard.dtype)) for shape in shapes]
    lora_linear.backward(y, x, low, weight, A, B, 0.5, p, seed, gradients)


def run_linear_cross_entropy(guard):
    N, C, V = sizes(guard, 3)
    x, weight, bias = guard.randn(N, C), guard.randn(V, C), guard.maybe(lambda: guard.randn(V))
    target = guard.copy(torch.randint(0, V, (N,)))
    counts = guard.copy((torch.rand(N) < 0.7).float())
    shapes = ((N, C), (V, C), (V,) if bias is not None else None)
    gradients = [s and guard.maybe(lambda s=s: guard.empty(*s, dtype=guard.dtype)) for s in shapes]
    linear_cross_entropy.CHUNK_ELEMENTS = guard.rng.choice((1, 100, 10000))
    smoothing = guard.rng.choice((0.0, 0.1))
    linear_cross_entropy.forward(x, weight, bias, target, counts, smoothing, *gradients)


MODULES = {
    "common": (common, run_common),
    "layer_norm": (layer_norm, run_layer_norm),
    "causal_attention": (causal_attention, run_causal_attention),
    "matmul": (matmul, run_matmul),
    "mlp": (mlp, run_mlp),
    "lora_linear": (lora_linear, run_lora_linear),
    "linear_cross_entropy": (linear_cross_entropy, run_linear_cross_entropy),
}


def main(name: str, count: int, seed: int = 0) -> None:
    mended_interpreter.mend()
    guard = Guard(seed)
    module, run = MODULES[name]
    module.torch = common.torch = guard
    if name == "causal_attention":

        def heads(q, T):
            return guard.empty(q.shape[0], T, q.shape[1], q.shape[3], dtype=q.dtype).transpose(1, 2)

        module._heads = heads
    launches = collections.Counter(dict.fromkeys(sorted(KERNELS & vars(module).keys()), 0))
    run_kernel = InterpretedFunction.run

    def counted(self, *args, **options):
        launches[self.__name__] += 1
        return run_kernel(self, *args, **options)

    InterpretedFunction.run = counted
    own = list(launches)
    while min(launches[kernel] for kernel in own) < count:
        torch.manual_seed(guard.rng.randrange(1 << 30))
        guard.dtype = guard.rng.choice(DTYPES)
        run(guard)
        guard.areas.clear()
    print(json.dumps(launches))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
