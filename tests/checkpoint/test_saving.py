"""A checkpoint that is written beside training is the one that would have been written at once."""

from __future__ import annotations

import errno
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from llmfast.checkpoint import find_checkpoint, read_pointer, save, save_checkpoint, verify_checkpoint
from llmfast.checkpoint.save import Saving
from llmfast.config import GPTConfig, LoRAConfig
from llmfast.errors import UserError
from llmfast.nn import GPT
from llmfast.nn.classification import GPTForClassification
from llmfast.nn.lora import add_lora
from llmfast.tokenizer import load_tokenizer

CONFIG = GPTConfig(vocab_size=31, block_size=8, n_layer=1, n_head=1, n_embd=8)


def trained(model):
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


@pytest.fixture
def held(monkeypatch):
    """Threads write nothing before this event is set."""
    event, write = threading.Event(), Saving._write
    monkeypatch.setattr(Saving, "_write", lambda self: event.wait(30) and write(self))
    yield event
    event.set()


@pytest.mark.parametrize("kind", ["tied", "untied", "lora", "classifier"])
def test_what_training_changes_meanwhile_is_not_in_it(tmp_path, held, kind):
    torch.manual_seed(0)
    config = replace(CONFIG, tie_embeddings=kind != "untied")
    model = GPTForClassification(config, ["a", "b"]) if kind == "classifier" else GPT(config)
    if kind == "lora":
        add_lora(model, LoRAConfig(r=2))
    model.register_buffer("seen", torch.zeros(2))
    optimizer = trained(model)
    content = dict(model=model, optimizer=optimizer, tokenizer=load_tokenizer("byte"), state={"lr": 0.1})
    held.set()
    whole = save_checkpoint(tmp_path / "at once", 3, **content)
    held.clear()
    saving = Saving(tmp_path / "beside", 3, beside=True, **content)
    trained(model)
    optimizer.step()
    model.seen += 1
    assert not saving.done()
    assert read_pointer(tmp_path / "beside", "latest") is None
    held.set()
    assert read_pointer(saving.finish().parent, "latest") == saving.path
    verify_checkpoint(saving.path)
    names = {path.name for path in whole.iterdir()} - {"manifest.json"}
    assert names == {path.name for path in saving.path.iterdir()} - {"manifest.json"}
    for name in names:
        left, right = whole / name, saving.path / name
        if name.endswith(".safetensors"):  # whose metadata come in any order
            left, right = load_file(left), load_file(right)
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left), name
        else:
            assert left.read_bytes() == right.read_bytes(), name


def test_a_model_that_cannot_be_copied_is_written_at_once(tmp_path):
    model = GPT(CONFIG)
    model.lock = threading.Lock()
    saving = Saving(tmp_path, 1, model=model, beside=True)
    assert saving.done()
    verify_checkpoint(saving.finish())


def test_what_goes_wrong_in_the_thread_is_raised_by_finish(tmp_path, monkeypatch):
    model = GPT(CONFIG)
    save_checkpoint(tmp_path, 1, model=model)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save, "checksums", full)
    saving = Saving(tmp_path, 2, model=model, beside=True)
    with pytest.raises(UserError, match=r"step-000002: No space left on device; make room"):
        saving.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001"]
    assert find_checkpoint(tmp_path).name == "step-000001"


def test_a_save_that_is_abandoned_leaves_nothing(tmp_path):
    save_checkpoint(tmp_path, 1, model=GPT(CONFIG))
    Saving(tmp_path, 2, model=GPT(CONFIG), beside=True).abandon(30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001"]
