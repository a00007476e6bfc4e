"""Bad input is one clear error; options mean what they say."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from llmfast import ops
from llmfast.ops import _library, dropout
from llmfast.ops._dropout import keep_mask

f = torch.randn
ids = torch.zeros
i64 = torch.int64


def _lce(x=None, w=None, t=None, **options):
    x, w = (f(4, 8) if x is None else x), (f(11, 8) if w is None else w)
    return ops.linear_cross_entropy(x, w, ids(4, dtype=i64) if t is None else t, **options)


def _attention(q=None, k=None, v=None, **options):
    return ops.causal_attention(*(f(2, 3, 4, 8) if t is None else t for t in (q, k, v)), **options)


BAD = [
    (lambda: ops.layer_norm([1.0], f(1)), TypeError, "x must be a tensor, got list"),
    (lambda: ops.dropout(f(3), 1.0), ValueError, "p must lie in [0, 1), got 1.0"),
    (
        lambda: ops.layer_norm(f(3, 4).bfloat16(), f(4).bfloat16(), f(4)),
        TypeError,
        "bias must be torch.bfloat16 as weight is, got torch.float32",
    ),
    (lambda: ops.layer_norm(ids(3, 4, dtype=i64), f(4)), TypeError, "x must be floating point, got torch.int64"),
    (lambda: ops.layer_norm(f(3, 4), f(5)), ValueError, "weight must have shape .*4.*, got (5,)"),
    (lambda: ops.layer_norm(f(3, 4), f(4), f(4, 1)), ValueError, "bias must have shape"),
    (lambda: ops.layer_norm(f(3, 4), f(4).double()), TypeError, "weight must be torch.float32.*, got torch.float64"),
    (lambda: ops.layer_norm(f(3, 4), f(4, device="meta")), ValueError, "weight must be on cpu, got meta"),
    (lambda: ops.layer_norm(f(3, 4), f(4), eps=0.0), ValueError, "eps must be above 0, got 0.0"),
    (lambda: ops.layer_norm(torch.tensor(1.0), None), ValueError, "x must have at least 1 dimension"),
    (lambda: ops.add_layer_norm(f(3, 4), f(4), f(4)), ValueError, "residual must be (3, 4) on cpu.*got (4,)"),
    (lambda: ops.add_layer_norm(f(3, 4), f(3, 4), f(4), dropout_p=1.0), ValueError, "dropout_p must lie in [0, 1)"),
    (lambda: _attention(q=f(3, 4, 8)), ValueError, "q must be (B, H, Tq, D), got (3, 4, 8)"),
    (lambda: _attention(k=f(2, 3, 4, 9)), ValueError, "k must be (2, 3, Tk, 8).*got (2, 3, 4, 9)"),
    (lambda: _attention(v=f(2, 3, 5, 8)), ValueError, "v must have shape"),
    (lambda: _attention(v=f(2, 3, 4, 8).half()), TypeError, "v must be torch.float32.*got torch.float16"),
    (lambda: _attention(kv_lens=f(2)), TypeError, "kv_lens must be an int64 or int32 tensor, got torch.float32"),
    (lambda: _attention(kv_lens=ids(3, dtype=i64)), ValueError, "kv_lens must be (2,) on cpu, got (3,)"),
    (lambda: _attention(doc_ids=ids(2, 5, dtype=i64)), ValueError, "doc_ids must be (2, 4) on cpu, got (2, 5)"),
    (lambda: _attention(dropout_p=-0.1), ValueError, "dropout_p must lie in [0, 1), got -0.1"),
    (
        lambda: ops.mlp(f(2, 4), f(8, 5), None, f(4, 8), None),
        ValueError,
        "fc_weight must have shape (8, 4), got (8, 5)",
    ),
    (lambda: ops.mlp(f(2, 4), f(8, 4), None, f(4, 9), None), ValueError, "proj_weight must have shape (4, 8)"),
    (lambda: ops.mlp(f(2, 4), f(8, 4), f(7), f(4, 8), None), ValueError, "fc_bias must have shape (8,), got (7,)"),
    (
        lambda: ops.mlp(f(2, 4), f(8, 4), None, f(4, 8), None, activation="gelu_tan"),
        ValueError,
        "activation must be .*did you mean gelu_tanh",
    ),
    (lambda: ops.mlp(f(2, 4), f(8, 4).bfloat16(), None, f(4, 8), None), TypeError, "fc_weight must be torch.float32"),
    (
        lambda: ops.lora_linear(f(2, 4), f(5, 4), None, f(2, 3), f(5, 2), scaling=1.0),
        ValueError,
        "lora_A must have shape (2, 4), got (2, 3)",
    ),
    (
        lambda: ops.lora_linear(f(2, 4), f(5, 4), None, f(2, 4), f(5, 3), scaling=1.0),
        ValueError,
        "lora_B must have shape (5, 2), got (5, 3)",
    ),
    (lambda: ops.linear(f(2, 4), f(5, 3)), ValueError, "weight must be (N, K) for x .*(2, 4), got (5, 3)"),
    (lambda: _lce(w=f(11, 7)), ValueError, "weight must have shape (11, 8), got (11, 7)"),
    (lambda: _lce(bias=f(10)), ValueError, "bias must have shape (11,), got (10,)"),
    (lambda: _lce(t=f(4)), TypeError, "target must be an int64 or int32 tensor, got torch.float32"),
    (lambda: _lce(t=ids(5, dtype=i64)), ValueError, "target must be (4,) on cpu, got (5,)"),
    (
        lambda: _lce(t=torch.tensor([0, 1, 11, 2])),
        ValueError,
        "target must lie in [0, 11) or be ignore_index -100, got 11",
    ),
    (lambda: _lce(t=torch.tensor([0, 1, -1, -100])), ValueError, "target must lie in [0, 11).*got -1"),
    (lambda: _lce(reduction="avg"), ValueError, "reduction must be none, mean, sum, got 'avg'"),
    (lambda: _lce(label_smoothing=1.5), ValueError, "label_smoothing must lie in [0, 1], got 1.5"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_names_the_argument_what_it_got_and_what_it_wants(call, kind, message):
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(kind, match=pattern) as error:
        call()
    assert "\n" not in str(error.value)


def test_every_target_ignored_gives_zero_loss_and_zero_gradients():
    x, weight = f(5, 8, requires_grad=True), f(11, 8, requires_grad=True)
    loss = ops.linear_cross_entropy(x, weight, torch.full((5,), -100))
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_equals_pytorchs_over_several_chunks(reduction):
    x, weight, bias = f(1300, 16), f(37, 16), f(37)
    target = torch.randint(37, (1300,)).masked_fill(torch.rand(1300) < 0.2, 7)
    options = {"ignore_index": 7, "reduction": reduction, "label_smoothing": 0.1}
    ours = ops.linear_cross_entropy(x, weight, target, bias=bias, **options)
    torch.testing.assert_close(
        ours, F.cross_entropy(F.linear(x, weight, bias), target, **options), rtol=1e-5, atol=1e-5
    )


@pytest.mark.skipif(_library.why_not_loaded() is not None, reason="no compiled kernels")
@pytest.mark.parametrize("bf16", [False, True])
def test_the_number_of_threads_does_not_change_a_bit_of_the_loss(bf16):
    x, weight, bias = f(700, 97), f(5003, 97), f(5003)
    target, rows = torch.randint(5003, (700,)), torch.rand(700)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            raw = torch.ops.llmfast.linear_cross_entropy.default
            results.append(raw(x, weight, bias, target, rows, 0.1, bf16, True, True, True))
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_vocabulary_of_one_costs_exactly_nothing():
    losses = ops.linear_cross_entropy(
        f(600, 33), f(1, 33), torch.zeros(600, dtype=torch.long), bias=f(1), reduction="none", label_smoothing=0.1
    )
    assert not losses.any()


def test_the_loss_is_exact_where_the_probability_underflows():
    x, weight = torch.eye(2), torch.tensor([[500.0, 0.0], [0.0, 500.0], [0.0, 0.0]])
    losses = ops.linear_cross_entropy(x, weight, torch.tensor([1, 1]), reduction="none")
    torch.testing.assert_close(losses, torch.tensor([500.0, 0.0]))


def test_the_loss_gradient_scales_with_the_incoming_one_and_can_be_asked_for_twice():
    x, weight, target = f(6, 8, requires_grad=True), f(11, 8), torch.arange(6)
    loss = ops.linear_cross_entropy(x, weight, target)
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, x, torch.tensor(-3.0), retain_graph=True)
    (again,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(scaled, -3 * once)
    torch.testing.assert_close(again, once, rtol=0, atol=0)


def test_the_loss_can_be_accumulated_from_one_graph():
    x, weight = f(6, 8, requires_grad=True), f(11, 8, requires_grad=True)
    loss = ops.linear_cross_entropy(x, weight, torch.arange(6))
    dx, dweight = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    for keep in (True, True, False):
        loss.backward(retain_graph=keep)
    torch.testing.assert_close(x.grad, 3 * dx)
    torch.testing.assert_close(weight.grad, 3 * dweight)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_differentiating_the_loss_twice_is_refused_not_wrong(reduction):
    x, weight = f(6, 8, requires_grad=True), f(11, 8)
    loss = ops.linear_cross_entropy(x, weight, torch.arange(6), reduction=reduction).sum()
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy: .* once only"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_differentiating_dropout_attention_twice_is_refused_not_wrong():
    q = f(1, 1, 3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"causal_attention: .* once only"):
        torch.autograd.grad(_attention(q, q, q, dropout_p=0.1).sum(), q, create_graph=True)


def test_the_loss_needs_no_tensor_of_the_size_of_the_logits():
    x, weight = f(4096, 4, requires_grad=True), f(2003, 4, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.linear_cross_entropy(x, weight, torch.zeros(4096, dtype=i64)).backward()
    largest = max(e.cpu_memory_usage for e in profile.events() if e.name.startswith("aten::empty"))
    assert 512 * 2003 * 4 <= largest < 4096 * 2003 * 4 / 4


def test_queries_that_see_no_key_give_zeros_and_zero_gradients():
    q, k, v = (f(2, 1, 3, 8, requires_grad=True) for _ in range(3))
    y = ops.causal_attention(q, k, v, kv_lens=torch.tensor([0, 3]))
    y.sum().backward()
    assert not y[0].any()
    assert y[1].all()
    for tensor in (q, k, v):
        assert not tensor.grad[0].any()
        assert torch.isfinite(tensor.grad).all()


def test_packed_documents_are_attended_as_if_apart():
    q, k, v = (f(1, 2, 12, 8) for _ in range(3))
    together = ops.causal_attention(q, k, v, doc_ids=torch.tensor([[4] * 5 + [9] * 7]))
    apart = [ops.causal_attention(q[:, :, s], k[:, :, s], v[:, :, s]) for s in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(together, torch.cat(apart, 2))


def test_decoding_with_a_cache_equals_the_whole_sequence():
    q, k, v = (f(2, 3, 9, 8) for _ in range(3))
    whole = ops.causal_attention(q, k, v)
    for start in range(9):
        part = ops.causal_attention(q[:, :, start:], k, v)
        torch.testing.assert_close(part, whole[:, :, start:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_dropout_keeps_the_right_share_and_the_mean(p):
    mask, scale = keep_mask((300, 1001), p)
    n = mask.numel()
    assert abs(mask.float().mean().item() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5 + 2**-16
    assert abs(scale * (1 - p) - 1) < 0.01
    columns = mask.float().mean(0)
    assert columns.std() < 2 * (max(p * (1 - p), 1e-9) / 300) ** 0.5 + 1e-6


def test_dropout_follows_the_seed():
    x = f(7, 33)
    torch.manual_seed(5)
    a = dropout(x, 0.3)
    b = dropout(x, 0.3)
    torch.manual_seed(5)
    assert torch.equal(a, dropout(x, 0.3))
    assert not torch.equal(a, b)


def _dropout_mask_of(attend, T, D):
    """Attention weights after dropout, by attending to one-hot values."""
    q = k = torch.zeros(1, 1, T, D)
    return attend(q, k, torch.eye(T, D)[None, None])[0, 0]


def test_attention_dropout_drops_weights_and_scales_the_others():
    T = 64
    torch.manual_seed(0)
    weights = _dropout_mask_of(lambda *qkv: ops.causal_attention(*qkv, dropout_p=0.25), T, T)
    counts = torch.arange(1, T + 1)[:, None]
    visible = torch.ones(T, T).tril().bool()
    assert not weights[~visible].any()
    kept = weights[visible] > 0
    assert abs(kept.float().mean() - 0.75) < 0.05
    expected = (1 / (0.75 * counts)).expand(T, T)[visible]
    torch.testing.assert_close(weights[visible][kept], expected[kept], rtol=1e-4, atol=1e-6)


def test_attention_dropout_gradients_are_those_of_the_mask_it_drew():
    def run(q, k, v):
        torch.manual_seed(1)
        return ops.causal_attention(q, k, v, dropout_p=0.3, scale=0.4)

    q, k, v = (torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("name", ["add_layer_norm", "lora_linear"])
def test_dropout_of_an_op_acts_on_its_branch(name):
    torch.manual_seed(2)
    if name == "add_layer_norm":
        x = torch.ones(200, 64)
        dropped = ops.add_layer_norm(x, torch.zeros(200, 64), torch.ones(64), dropout_p=0.25)[1]
    else:
        x, eye = torch.ones(200, 64), torch.eye(64)
        dropped = ops.lora_linear(x, torch.zeros(64, 64), None, eye, eye, scaling=1.0, dropout_p=0.25)
    values = dropped.unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 4 / 3]), rtol=1e-5, atol=1e-6)
    assert abs(dropped.mean() - 1) < 0.03
