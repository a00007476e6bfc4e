"""Checkpoints that the real programs wrote: recognised by looking, and computing what those programs computed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llmfast import GPT, interop
from llmfast.cli.main import main
from llmfast.errors import UserError
from llmfast.generation.decoding import generate_ids

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = [
    "book-gptmodel", "book-gptmodel-noqkvbias", "hf-gpt2", "hf-gpt2-untied", "llmc", "nanogpt", "nanogpt-nobias",
    "train-llm-from-scratch", "train-llm-from-scratch-2025", "train-llm-from-scratch-early",
]  # fmt: skip


@pytest.fixture
def shared() -> Path:
    if "LLMFAST_TEST_CHECKPOINTS" not in os.environ:
        pytest.skip("LLMFAST_TEST_CHECKPOINTS is not set")
    return Path(os.environ["LLMFAST_TEST_CHECKPOINTS"])


def differences(model: GPT, expected: dict[str, np.ndarray]) -> tuple[float, float]:
    """The largest difference of a logit, and that of the loss."""
    ids, targets = (torch.from_numpy(expected[name]).long() for name in ("input_ids", "targets"))
    with torch.no_grad():
        logits, _ = model.eval()(ids)
        _, loss = model(ids, targets)
    wrong = (logits - torch.from_numpy(expected["logits"])).abs().max()
    return float(wrong), abs(float(loss) - float(expected["loss"]))


@pytest.mark.parametrize("name", EXACT)
def test_the_programs_logits_and_loss(shared, name):
    model = GPT.from_pretrained(shared / name)
    logits, loss = differences(model, np.load(shared / f"{name}.expected.npz"))
    assert logits < 1e-4
    assert loss < 1e-4


def test_a_bfloat16_file_to_its_precision(shared):
    expected = np.load(shared / "llmc.expected.npz")
    model = GPT.from_pretrained(shared / "llmc/model_bf16.bin")
    full = GPT.from_pretrained(shared / "llmc/model.bin").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, full[name].bfloat16().float())
    logits, loss = differences(model, expected)
    assert logits < 0.02
    assert loss < 1e-3


def test_greedy_text_is_hugging_faces(shared):
    expected = np.load(shared / "hf-gpt2.expected.npz")["greedy"][0].tolist()
    model = GPT.from_pretrained(shared / "hf-gpt2").eval()
    prompt = 8  # tokens
    assert generate_ids(model, [expected[:prompt]], max_new_tokens=len(expected) - prompt, temperature=0) == [
        expected[prompt:]
    ]


def test_openais_checkpoint_without_its_query_key_value_bias(shared, caplog):
    """The shared file has all tensors of hf-gpt2 but c_attn/b: it gives that model's logits without these."""
    model = GPT.from_pretrained(shared / "openai-tf")
    assert "has no c_attn/b" in caplog.text
    whole = GPT.from_pretrained(shared / "hf-gpt2").state_dict()
    state = model.state_dict()
    assert whole.keys() - state.keys() == {f"transformer.h.{i}.attn.c_attn.bias" for i in range(2)}
    assert all(torch.equal(state[name], whole[name]) for name in state)
    for name in whole.keys() - state.keys():
        whole[name].zero_()
    reference = GPT(dataclasses.replace(model.config, qkv_bias=True)).eval()
    reference.load_state_dict(whole)
    ids = torch.from_numpy(np.load(shared / "openai-tf.expected.npz")["input_ids"]).long()
    with torch.no_grad():
        assert (model.eval()(ids)[0] - reference(ids)[0]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "file", ["checkpoint", "hparams.json", "model.ckpt.index", "model.ckpt.meta", "model.ckpt.data-00000-of-00001"]
)
def test_any_file_of_openais_checkpoint_leads_to_it(shared, file):
    assert interop.find(shared / "openai-tf" / file) == shared / "openai-tf/model.ckpt.index"


ASKED = {
    "book-gptmodel": ("model.pth", "n_head", 4),
    "train-llm-from-scratch-2025": ("transformer.pt", "attn_scale", None),
    "train-llm-from-scratch-early": ("transformer.pt", "attn_scale", "n_embd"),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_a_file_cannot_tell_is_asked_for_by_name(shared, tmp_path, name):
    file, option, value = ASKED[name]
    shutil.copy(shared / name / file, tmp_path / file)
    with pytest.raises(UserError, match=rf"does not tell {option} .*--set {option}=.*config.json beside it"):
        GPT.from_pretrained(tmp_path)
    expected = np.load(shared / f"{name}.expected.npz")
    assert differences(GPT.from_pretrained(tmp_path, **{option: value}), expected)[0] < 1e-4
    command = ["convert", str(tmp_path), str(tmp_path / "out"), "--set", f"{option}={value or 'none'}"]
    assert main(command) == 0
    assert differences(GPT.from_pretrained(tmp_path / "out"), expected)[0] < 1e-4
    if value is not None:
        (tmp_path / "config.json").write_text(json.dumps({option: value}))
        assert differences(GPT.from_pretrained(tmp_path), expected)[0] < 1e-4


def test_a_wrong_answer_is_refused(shared, tmp_path):
    shutil.copy(shared / "book-gptmodel/model.pth", tmp_path)
    with pytest.raises(UserError, match="n_embd 64 is not a multiple of n_head 5"):
        GPT.from_pretrained(tmp_path, n_head=5)
    with pytest.raises(UserError, match=r"n_head 2: .* has 4 heads"):
        GPT.from_pretrained(shared / "train-llm-from-scratch", n_head=2)
    with pytest.raises(UserError, match="n_layer of a saved model cannot be overridden"):
        GPT.from_pretrained(shared / "hf-gpt2", n_layer=1)


BACK = [
    ("hf-gpt2", "hf"), ("hf-gpt2", "nanogpt"), ("hf-gpt2", "llmc"), ("hf-gpt2", "book"), ("hf-gpt2", "llmfast"),
    ("hf-gpt2-untied", "hf"), ("hf-gpt2-untied", "book"), ("nanogpt", "nanogpt"), ("nanogpt", "hf"),
    ("nanogpt-nobias", "nanogpt"), ("llmc", "llmc"), ("book-gptmodel", "book"), ("book-gptmodel", "hf"),
    ("book-gptmodel-noqkvbias", "book"), ("train-llm-from-scratch", "tlfs"), ("train-llm-from-scratch", "llmfast"),
    ("train-llm-from-scratch-2025", "tlfs"), ("train-llm-from-scratch-early", "tlfs"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "to"), BACK)
def test_out_and_back_bit_for_bit(shared, tmp_path, name, to):
    before = GPT.from_pretrained(shared / name).state_dict()
    after = GPT.from_pretrained(interop.convert(shared / name, tmp_path / "out", to)).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(("name", "file", "to"), [("llmc", "model.bin", "llmc"), ("llmc", "model_bf16.bin", "llmc")])
def test_an_llm_c_file_comes_back_byte_for_byte(shared, tmp_path, name, file, to):
    out = interop.convert(shared / name / file, tmp_path / "out", to)
    assert (out / "model.bin").read_bytes() == (shared / name / file).read_bytes()
