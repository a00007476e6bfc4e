"""Documents packed into a row are read as if each stood alone; losses without a reduction."""

from __future__ import annotations

import pytest
import torch

from llmfast.config import GPTConfig
from llmfast.nn import GPT
from llmfast.nn.embedding import document_positions

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [[5, 1, 7], [13], [2, 2, 9]]
VARIANTS = {"tied": {}, "untied": dict(tie_embeddings=False), "relu, no bias": dict(activation="relu", bias=False)}


def make(dtype=torch.float64, **options) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(vocab_size=29, block_size=13, n_layer=2, n_head=3, n_embd=24), **options}))
    return model.to(dtype)


def packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    idx = torch.randint(29, (3, 13), generator=generator)
    targets = torch.randint(29, (3, 13), generator=generator).masked_fill(idx % 5 == 0, -100)
    names = [[4, 9, 2], [7], [1, 0, 1 << 40]]  # any ids do
    rows = zip(names, LENGTHS, strict=True)
    doc_ids = torch.tensor([[d for d, n in zip(*row, strict=True) for _ in range(n)] for row in rows])
    return idx, targets, doc_ids


def alone(model: GPT, idx: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, summed loss) of every document on its own."""
    logits, loss = torch.empty(3, 13, 29, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            got = model(idx[row : row + 1, part], targets[row : row + 1, part], return_logits=True, reduction="sum")
            logits[row, part], loss, start = got[0][0].detach(), loss + got[1], start + length
    return logits, loss


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_equal_each_alone(variant, recompute):
    idx, targets, doc_ids = packed()
    model = make(**VARIANTS[variant])
    logits, total = alone(model, idx, targets)
    (total / (targets != -100).sum()).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.activation_checkpointing = recompute
    got, loss = model(idx, targets, doc_ids=doc_ids, return_logits=True)
    loss.backward()
    torch.testing.assert_close(got, logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, total / (targets != -100).sum(), rtol=1e-12, atol=0)
    for p, grad in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-10, atol=1e-13)


def test_float32_kernels_keep_documents_apart():
    idx, targets, doc_ids = packed()
    _, total = alone(make(), idx, targets)
    loss = make(torch.float32)(idx, targets, doc_ids=doc_ids, reduction="sum")[1]
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    assert loss.item() != pytest.approx(make(torch.float32)(idx, targets, reduction="sum")[1].item(), rel=1e-4)


def test_one_document_a_row_is_an_ordinary_batch():
    idx, targets, _ = packed()
    model = make()
    same = model(idx, targets, doc_ids=torch.zeros_like(idx))[1]
    torch.testing.assert_close(same, model(idx, targets)[1], rtol=1e-14, atol=0)


def test_positions_restart_with_every_document():
    doc_ids = torch.tensor([[3, 3, 3, 1, 1, 8], [0, 5, 5, 5, 5, 5]])
    assert document_positions(doc_ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    assert document_positions(doc_ids[:, :1]).tolist() == [[0], [0]]


def test_losses_without_a_reduction_sum_to_the_loss():
    idx, targets, _ = packed()
    model = make()
    losses = model(idx, targets, reduction="none")[1]
    counted = targets != -100
    assert losses.shape == idx.shape
    assert not losses[~counted].any()
    torch.testing.assert_close(losses.sum() / counted.sum(), model(idx, targets)[1], rtol=1e-14, atol=0)
    log_p = model(idx)[0].log_softmax(-1)
    want = -log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * counted
    torch.testing.assert_close(losses, want, rtol=1e-12, atol=1e-14)


def test_documents_that_do_not_fit_are_refused():
    idx, _, doc_ids = packed()
    with pytest.raises(ValueError, match="doc_ids must have idx's shape"):
        make()(idx, doc_ids=doc_ids[:, :-1])
