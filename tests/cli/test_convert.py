"""``llmfast convert``, and other programs' checkpoints where a command takes one."""

from __future__ import annotations

import json

import pytest
import torch

from llmfast import GPT
from llmfast.checkpoint import load_model
from llmfast.cli.main import main
from llmfast.config import LoRAConfig
from llmfast.nn import add_lora

pytestmark = pytest.mark.usefixtures("one_thread")


def printed(capsys, *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("to", ["llmfast", "hf", "nanogpt", "llmc", "book"])
def test_every_command_takes_what_convert_wrote(home, tmp_path, capsys, to):
    out = tmp_path / "out"
    answer = json.loads(printed(capsys, "convert", home / "run", out, "--to", to, "--json"))
    assert answer["format"] == to
    assert set(answer["files"]) == {path.name for path in out.iterdir()}
    extra = ["--set", "activation=gelu_tanh"] if to == "nanogpt" else []
    printed(capsys, "convert", out, tmp_path / "back", *extra)
    text = ["--seed", "1", "--max-new-tokens", "12", "The cat"]
    assert printed(capsys, "generate", "--checkpoint", tmp_path / "back", *text) == printed(
        capsys, "generate", "--checkpoint", home / "run", *text
    )
    evaluate = ["--data", home / "shards", "--json"]
    losses = [
        json.loads(printed(capsys, "evaluate", "--checkpoint", place, *evaluate))["loss"]
        for place in (out, home / "run")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if to == "nanogpt" else 1e-6)


def test_training_goes_on_from_another_programs_checkpoint(home, tmp_path, capsys):
    printed(capsys, "convert", home / "run", tmp_path / "hf", "--to", "hf")
    few = "--max-steps 2 --eval-every 2 --eval-batches 1 --sample-tokens 2 --micro-batch-size 2".split()
    printed(
        capsys, "pretrain", "--checkpoint", tmp_path / "hf", "--data", home / "shards", "--out", tmp_path / "run", *few
    )
    assert load_model(tmp_path / "run").config == load_model(home / "run").config


def test_an_adapter_is_merged_into_its_base(home, tmp_path, capsys):
    printed(capsys, "convert", home / "run", tmp_path / "base", "--to", "hf")
    model = GPT.from_pretrained(tmp_path / "base")
    add_lora(model, LoRAConfig(r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    model.lora_base = {"path": str(tmp_path / "base")}
    model.save_pretrained(tmp_path / "adapter")
    printed(capsys, "convert", tmp_path / "adapter", tmp_path / "merged")
    ids = torch.arange(5)[None]
    with torch.no_grad():
        merged = GPT.from_pretrained(tmp_path / "merged").eval()(ids)[0]
        assert torch.allclose(merged, model.eval()(ids)[0], atol=1e-5)
        assert not torch.allclose(merged, GPT.from_pretrained(tmp_path / "base").eval()(ids)[0], atol=1e-2)
    text = ["--seed", "1", "--max-new-tokens", "5", "The cat"]
    assert printed(capsys, "generate", "--checkpoint", tmp_path / "adapter", *text)
