"""The native causal attention on the CPU: what the tests over all ops do not reach."""

from __future__ import annotations

import pytest
import torch

from llmfast import ops
from llmfast.ops import _library, _verify, use_backend
from llmfast.ops._registry import OPS

pytestmark = pytest.mark.skipif(_library.why_not_loaded() is not None, reason=str(_library.why_not_loaded()))
DTYPES = [torch.float32, torch.bfloat16]


def _run(q, k, v, **options):
    """[out, dq, dk, dv] of the native kernel for one fixed cotangent."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    cotangent = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
    with use_backend("cpp"):
        out = ops.causal_attention(q, k, v, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), cotangent)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_thirds_of_a_packed_projection_give_the_same_bits_as_copies(dtype):
    B, T, H, D = 2, 70, 3, 20
    thirds = [t.transpose(1, 2) for t in torch.randn(B, T, 3, H, D).to(dtype).unbind(2)]
    packed, copies = _run(*thirds), _run(*(t.contiguous() for t in thirds))
    for a, b in zip(packed, copies, strict=True):
        assert torch.equal(a, b)
        assert a.transpose(1, 2).is_contiguous()  # what the projections beside it want, without a copy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"doc_ids": True}, {"kv_lens": True}, {"Tq": 333}])
def test_many_blocks_of_keys_stay_as_exact(dtype, options):
    shape = {"B": 1, "H": 2, "Tq": 1111, "Tk": 1111, "D": 24, **options}
    worst, where = _verify.worst_ratio(OPS["causal_attention"], "cpp", shape, dtype)
    assert worst <= 1, f"{where}: {worst:.2f} times the allowed error"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [1, 5])
def test_the_number_of_threads_does_not_change_a_bit(dtype, H):
    inputs = torch.randn(3, 1, H, 700, 16).to(dtype).unbind(0)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 3):
            torch.set_num_threads(n)
            torch.manual_seed(0)
            results.append(_run(*inputs, dropout_p=0.1))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def _kept(q, k, p, seed):
    """The mask of dropout, read from attention over one-hot values."""
    torch.manual_seed(seed)
    one_hot = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
    narrow = [torch.nn.functional.pad(t, (0, k.shape[2] - t.shape[3])) for t in (q, k)]
    return _run(*narrow, one_hot, scale=0.1, dropout_p=p)[0] != 0


def test_dropout_drops_its_share_and_the_gradient_uses_the_same_mask():
    B, H, T, D, p = 1, 2, 300, 16, 0.3
    q, k, v = torch.randn(3, B, H, T, D).unbind(0)
    kept = _kept(q, k, p, seed=7)
    assert torch.equal(kept, _kept(q, k, p, seed=7))
    other = _kept(q, k, p, seed=8)
    seen = torch.ones(T, T).tril().bool().expand_as(kept)
    n = int(seen.sum())
    for mask, share in ((kept, 1 - p), (kept == other, p**2 + (1 - p) ** 2)):
        assert abs(float(mask[seen].double().mean()) - share) < 4 * (share * (1 - share) / n) ** 0.5
    assert not torch.equal(kept[:, 0], kept[:, 1])

    torch.manual_seed(7)
    ours = _run(q, k, v, scale=0.1, dropout_p=p)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    scores = (leaves[0] @ leaves[1].mT * 0.1).masked_fill(~seen, -torch.inf)
    out = (scores.softmax(-1) * kept / (1 - p)) @ leaves[2]
    cotangent = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).double()
    for a, b in zip(ours, [out, *torch.autograd.grad(out, leaves, cotangent)], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_a_not_a_number_is_passed_on():
    q, k, v = torch.randn(3, 1, 1, 9, 8).unbind(0)
    q[0, 0, 4, 2] = torch.nan
    out = _run(q, k, v)[0]
    assert out[0, 0, 4].isnan().all()
    assert out[0, 0, torch.arange(9) != 4].isfinite().all()


def test_the_raw_op_refuses_what_it_cannot_take():
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
    forward = torch.ops.llmfast.causal_attention_fwd
    for message, arguments in {
        "k must be": (q, k[:, :1], k[:, :1], 1.0, 0.0, None, None, None),
        "v must have k's": (q, k, k[:, :, 1:], 1.0, 0.0, None, None, None),
        "v must have q's dtype": (q, k, k.double(), 1.0, 0.0, None, None, None),
        "q must be float32 or bfloat16": (q.double(), k.double(), k.double(), 1.0, 0.0, None, None, None),
        "dropout needs a seed": (q, k, k, 1.0, 0.5, None, None, None),
        "kv_lens must be": (q, k, k, 1.0, 0.0, None, torch.tensor([1, 2]), None),
        "doc_ids must be": (q, k, k, 1.0, 0.0, None, None, torch.zeros(1, 7)),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            forward(*arguments)
    out, lse = forward(q, k, k, 1.0, 0.0, None, None, None)
    with pytest.raises(RuntimeError, match="dout must have q's shape"):
        torch.ops.llmfast.causal_attention_bwd(out[:, :, 1:], q, k, k, out, lse, 1.0, 0.0, None, None, None)
    with pytest.raises(RuntimeError, match="lse must be"):
        torch.ops.llmfast.causal_attention_bwd(out, q, k, k, out, lse[:, :1], 1.0, 0.0, None, None, None)
