"""Checkpoints: complete or absent, whatever happens on the way."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import time

import numpy as np
import pytest
import torch

from llmfast.checkpoint import (
    capture_rng,
    find_checkpoint,
    layout,
    load_model,
    load_tokenizer_of,
    load_training_state,
    read_state,
    restore_rng,
    save_checkpoint,
    verify_checkpoint,
)
from llmfast.config import GPTConfig
from llmfast.errors import UserError
from llmfast.nn import GPT
from llmfast.tokenizer import load_tokenizer

CONFIG = GPTConfig(vocab_size=31, block_size=8, n_layer=1, n_head=1, n_embd=8)


class Killed(BaseException):
    """Stands for kill -9: no ``except Exception`` sees it."""


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(CONFIG)


def stepped_optimizer(model):
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def test_a_checkpoint_holds_all_its_files_and_no_pickle(model, tmp_path):
    path = save_checkpoint(
        tmp_path,
        7,
        model=model,
        optimizer=stepped_optimizer(model),
        tokenizer=load_tokenizer("byte"),
        state={"lr": 0.1},
    )
    assert path == tmp_path / "step-000007"
    names = {p.name for p in path.iterdir()}
    assert names == {
        "model.safetensors", "config.json", "optimizer.safetensors", "trainer.json", "llmfast_tokenizer.json",
        "manifest.json",
    }  # fmt: skip
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == names - {"manifest.json"}
    assert read_state(path) == {"step": 7, "lr": 0.1}
    assert load_tokenizer_of(tmp_path).encode("hé") == load_tokenizer("byte").encode("hé")


def test_tied_weights_are_stored_once(model, tmp_path):
    size = (save_checkpoint(tmp_path, 1, model=model) / "model.safetensors").stat().st_size
    assert 4 * model.num_parameters() <= size < 4 * model.num_parameters() + 4096


def test_weights_and_optimizer_come_back_bit_for_bit(model, tmp_path):
    optimizer = stepped_optimizer(model)
    path = save_checkpoint(tmp_path, 1, model=model, optimizer=optimizer)
    other = GPT(CONFIG)
    restored = torch.optim.AdamW(other.parameters())
    assert load_training_state(path, other, restored) == {"step": 1}
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[a][key], restored.state[b][key]), (name, key)
    assert torch.equal(load_model(tmp_path).transformer.wte.weight, model.transformer.wte.weight)


def test_another_models_checkpoint_is_refused_by_name(model, tmp_path):
    path = save_checkpoint(tmp_path, 1, model=model)
    wider = GPT(GPTConfig(**{**CONFIG.to_dict(), "vocab_size": 32}))
    with pytest.raises(UserError, match=r"transformer.wte.weight is \(31, 8\), the model wants \(32, 8\)"):
        load_training_state(path, wider)
    with pytest.raises(UserError, match=r"has no transformer.h.1"):
        load_training_state(path, GPT(GPTConfig(**{**CONFIG.to_dict(), "n_layer": 2})))


def test_old_checkpoints_go_and_the_best_stays(model, tmp_path):
    for step in range(1, 7):
        save_checkpoint(tmp_path, step, model=model, best=step == 2, keep=2)
    assert [p.name for _, p in layout.checkpoints_in(tmp_path)] == ["step-000006", "step-000005", "step-000002"]
    assert find_checkpoint(tmp_path).name == "step-000002"
    assert find_checkpoint(tmp_path, prefer="latest").name == "step-000006"
    assert os.readlink(tmp_path / "latest") == "step-000006"


def test_a_run_its_folder_and_one_checkpoint_are_all_found(model, tmp_path):
    root = tmp_path / "run" / "checkpoints"
    path = save_checkpoint(root, 3, model=model)
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(root) == find_checkpoint(path) == path
    assert verify_checkpoint(find_checkpoint(root / "latest")) is None
    model.save_pretrained(tmp_path / "plain")
    assert find_checkpoint(tmp_path / "plain") == tmp_path / "plain"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-1]),
            "bytes instead of",
        ),
        (lambda p: flip(p / "model.safetensors"), "SHA-256"),
        (lambda p: (p / "trainer.json").unlink(), "trainer.json is missing"),
        (lambda p: (p / "manifest.json").unlink(), "has no manifest.json"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is not readable"),
        (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json is not readable"),
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over_and_said(model, tmp_path, caplog, damage, said):
    save_checkpoint(tmp_path, 1, model=model)
    newest = save_checkpoint(tmp_path, 2, model=model)
    assert find_checkpoint(tmp_path, prefer="latest") == newest  # what was found good once may be damaged later
    time.sleep(0.02)  # a file system's clock ticks every few milliseconds
    damage(newest)
    with caplog.at_level(logging.WARNING, "llmfast"):
        assert find_checkpoint(tmp_path, prefer="latest").name == "step-000001"
    assert said in caplog.text
    assert "step-000002" in caplog.text
    with pytest.raises(UserError, match=said):
        find_checkpoint(tmp_path / "step-000002")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_no_checkpoint_is_one_clear_line(model, tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        find_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match="no checkpoint in"):
        find_checkpoint(tmp_path)
    flip(save_checkpoint(tmp_path, 1, model=model) / "config.json")
    with pytest.raises(UserError, match=r"verifies: .*config\.json is damaged"):
        find_checkpoint(tmp_path)


CALLS = ("fsync", "rename", "replace", "symlink", "unlink", "rmdir", "mkdir")


def interrupt_after(monkeypatch, count, error):
    """Make the ``count``-th file-system call of any kind raise ``error``; returns the calls made so far."""
    made = []
    for name in CALLS:
        real = getattr(os, name)

        def call(*args, real=real, name=name, **kwargs):
            if len(made) == count:
                made.append("!" + name)
                raise error
            made.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)
    return made


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_end_at_any_file_system_call_leaves_a_good_checkpoint(model, tmp_path, same_step, error):
    second = 1 if same_step else 2
    for count in range(1000):
        root = tmp_path / str(count)
        save_checkpoint(root, 1, model=model, state={"write": 1}, best=True, keep=1)
        with pytest.MonkeyPatch.context() as patch:
            made = interrupt_after(patch, count, error)
            ended = None
            try:
                save_checkpoint(root, second, model=model, state={"write": 2}, best=True, keep=1)
            except (Killed, UserError) as raised:
                ended = raised
        assert ended is None or isinstance(ended, Killed) or "No space left on device" in str(ended)
        for prefer in ("best", "latest"):
            assert read_state(find_checkpoint(root, prefer=prefer))["write"] in (1, 2)
        # The next save goes through and leaves nothing behind.
        save_checkpoint(root, 3, model=model, state={"write": 3}, best=True, keep=1)
        assert sorted(p.name for p in root.iterdir()) == ["best", "latest", "step-000003"]
        shutil.rmtree(root)
        if not any(name.startswith("!") for name in made):
            break
    assert count > 12


def test_a_dead_process_leftovers_are_removed_and_a_live_ones_kept(model, tmp_path):
    child = os.spawnlp(os.P_NOWAIT, "true", "true")
    os.waitpid(child, 0)
    for owner in (child, os.getppid()):
        (tmp_path / f".tmp-{owner}-step-000001").mkdir()
        (tmp_path / f".tmp-{owner}-step-000001" / "model.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, 2, model=model)
    assert [p.name for p in tmp_path.glob(".tmp-*")] == [f".tmp-{os.getppid()}-step-000001"]


def test_pointers_work_without_symlinks(model, tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("symbolic link privilege not held")

    monkeypatch.setattr(os, "symlink", refuse)
    save_checkpoint(tmp_path, 1, model=model, best=True)
    save_checkpoint(tmp_path, 2, model=model)
    assert (tmp_path / "best").read_text() == "step-000001\n"
    assert find_checkpoint(tmp_path).name == "step-000001"
    assert layout.read_pointer(tmp_path, "latest").name == "step-000002"


def test_a_target_that_cannot_be_a_folder_is_a_user_error(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        save_checkpoint(tmp_path / "file", 1, model=model)


def test_random_states_go_through_json():
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    np.random.standard_normal()  # leaves a cached second value
    saved = json.loads(json.dumps(capture_rng()))
    draws = [(random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist()) for _ in range(2)]
    restore_rng(saved)
    assert draws == [(random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist()) for _ in range(2)]
    with pytest.raises(UserError, match="random states"):
        restore_rng({"python": [3, [], None]})
