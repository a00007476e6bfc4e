"""No kernel reads or writes outside of its tensors: each lies against a page that may not be touched."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = r'''
import ctypes, mmap, random, sys
import torch, mended_interpreter
mended_interpreter.mend()
from llmfast.kernels import causal_attention, layer_norm, common

name, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
libc, PAGE = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
kept, launches = [], 0

def guarded(t, at_end):
    """A copy of t whose last (or first) byte touches a forbidden page."""
    if t is None or not t.numel():
        return t
    flat = t.contiguous()
    size = flat.numel() * flat.element_size()
    pages = -(-size // PAGE)
    area = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(start + page * PAGE), PAGE, 0) == 0
    offset = PAGE + (pages * PAGE - size if at_end else 0)
    copy = torch.frombuffer(area, dtype=flat.dtype, count=flat.numel(), offset=offset).view(flat.shape)
    kept.append(area)
    return copy.copy_(flat)

# Whatever a wrapper allocates is guarded as well.
def guard_allocations(module, at_end):
    class Guarded:
        def __getattr__(self, name):
            return getattr(torch, name)
        def empty(self, *shape, **options): return guarded(torch.full(*shape_of(shape), 7, **options), at_end())
        def empty_like(self, t, **options): return guarded(torch.full_like(t.contiguous(), 7, **options), at_end())
        def zeros(self, *shape, **options): return guarded(torch.zeros(*shape, **options), at_end())
    module.torch = Guarded()

def shape_of(shape):
    return (tuple(shape),)

def count_launches(tuned):
    def run(*args, **options):
        global launches
        launches += 1
        return type(tuned).__call__(tuned, *args, **options)
    return run

rng = random.Random(seed)
at_end = lambda: rng.random() < 0.7
for module in (causal_attention, layer_norm):
    guard_allocations(module, at_end)
    for key, value in list(vars(module).items()):
        if isinstance(value, common.Tuned):
            setattr(module, key, count_launches(value))

def tensor(*shape, dtype=None):
    return guarded(torch.randn(*shape).to(dtype or DTYPE), at_end())

while launches < count:
    torch.manual_seed(rng.randrange(1 << 30))
    DTYPE = rng.choice((torch.float32, torch.bfloat16, torch.float16))
    p, seed_tensor = rng.choice(((0.0, None), (0.1, guarded(torch.tensor([5]), True)[0])))
    if name == "layer_norm":
        N, C = rng.choice((1, 2, 7, 9)), rng.choice((1, 5, 16, 17, 63, 96))
        x, w, b = tensor(N, C), tensor(C), tensor(C)
        residual = rng.choice((None, tensor(N, C)))
        y, s, mean, rstd = layer_norm.forward(x, residual, w, b, 1e-5, p, seed_tensor)
        mean, rstd = guarded(mean, at_end()), guarded(rstd, at_end())
        ds = rng.choice((None, tensor(N, C)))
        layer_norm.backward(tensor(N, C), ds, guarded(s, True), w, mean, rstd, True, p, seed_tensor, DTYPE, DTYPE)
    else:
        B, H, D = rng.choice(((1, 1), (2, 1), (1, 2))) + (rng.choice((8, 16, 24)),)
        Tk = rng.choice((1, 3, 31, 32, 33)); Tq = rng.choice((Tk, 1, max(1, Tk // 2)))
        q, k, v = tensor(B, H, Tq, D), tensor(B, H, Tk, D), tensor(B, H, Tk, D)
        lens = rng.choice((None, guarded(torch.randint(0, Tk + 1, (B,)), True)))
        docs = rng.choice((None, guarded(torch.randint(0, 2, (B, Tk)).sort().values, at_end())))
        causal_attention._heads = lambda q, T: guarded(torch.full((q.shape[0], T, q.shape[1], q.shape[3]), 7, dtype=q.dtype), at_end()).transpose(1, 2)
        out, lse = causal_attention.forward(q, k, v, 0.3, p, seed_tensor, lens, docs)
        causal_attention.backward(tensor(B, H, Tq, D), q, k, v, out, lse, 0.3, p, seed_tensor, lens, docs)
print(launches)
'''


@pytest.mark.parametrize("name", ["layer_norm", "causal_attention"])
def test_three_hundred_launches_touch_nothing_outside(name):
    command = [sys.executable, "-c", SCRIPT, name, "300", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=sys.path[0] or None, env=_environment())
    assert done.returncode == 0, f"ended with {done.returncode} (a negative number is a signal): {done.stderr[-2000:]}"
    assert int(done.stdout) >= 300


def _environment():
    import os
    from pathlib import Path

    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(f for f in folders if f)}
