"""save_pretrained and from_pretrained: what was written comes back, and what is no model is one clear line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmfast.config import GPTConfig
from llmfast.errors import UserError
from llmfast.nn import GPT

SMALL = dict(vocab_size=53, block_size=13, n_layer=2, n_head=3, n_embd=21)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    GPT(GPTConfig(**SMALL)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "options",
    [{}, dict(tie_embeddings=False, lm_head_bias=True), dict(bias=False, attn_out_proj=False, attn_scale="n_embd")],
)
def test_weights_and_config_come_back(tmp_path, options):
    model = GPT(GPTConfig(**SMALL, **options, dropout=0.1))
    model.save_pretrained(tmp_path / "a/b")
    rng = torch.get_rng_state()
    again = GPT.from_pretrained(tmp_path / "a/b")
    assert torch.equal(rng, torch.get_rng_state())
    assert again.config == model.config
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in again.state_dict().items())
    assert (again.lm_head.weight is again.transformer.wte.weight) == model.config.tie_embeddings
    assert sorted(p.name for p in (tmp_path / "a/b").iterdir()) == ["config.json", "model.safetensors"]


def test_a_tied_matrix_is_stored_once(saved):
    names = set(load_file(saved / "model.safetensors"))
    assert "lm_head.weight" not in names
    assert "transformer.wte.weight" in names


def test_what_weights_do_not_tell_can_be_overridden_and_nothing_else(saved):
    config = GPT.from_pretrained(saved, dropout=0.3, attn_scale=0.5).config
    assert (config.dropout, config.attn_scale) == (0.3, 0.5)
    with pytest.raises(
        UserError, match=r"n_layer of a saved model cannot be overridden; can be: dropout, attn_scale, activation"
    ):
        GPT.from_pretrained(saved, n_layer=3)
    with pytest.raises(UserError, match=r"did you mean dropout\?"):
        GPT.from_pretrained(saved, drop_out=0.3)


def test_saving_over_a_model_that_is_in_use_leaves_it_whole(saved):
    model = GPT.from_pretrained(saved)
    expected = model.lm_head.weight.clone()
    GPT(GPTConfig(**SMALL)).save_pretrained(saved)
    assert torch.equal(model.lm_head.weight, expected)
    assert not torch.equal(GPT.from_pretrained(saved).lm_head.weight, expected)


def test_an_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the model to"):
        GPT(GPTConfig(**SMALL)).save_pretrained(tmp_path / "file")


def rewrite_config(saved: Path, **changes) -> None:
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**values, **changes}))


def rewrite_weights(saved: Path, change) -> None:
    state = load_file(saved / "model.safetensors")
    change(state)
    save_file(state, saved / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "without its own config.json beside it"),
        (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors beside its config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), "config.json is not valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (lambda d: rewrite_config(d, model_type="gpt2"), "without its own config.json beside it"),
        (lambda d: rewrite_config(d, n_layers=3), r"unknown model option 'n_layers' \(did you mean n_layer\?\)"),
        (lambda d: rewrite_config(d, dropout="much"), "config.json: "),
        (lambda d: rewrite_config(d, n_layer=3), "model.safetensors lacks transformer.h.2"),
        (lambda d: rewrite_config(d, n_layer=1), "model.safetensors holds transformer.h.1"),
        (lambda d: rewrite_config(d, block_size=12), r"wpe.weight is \(13, 21\), the model wants \(12, 21\)"),
        (lambda d: rewrite_weights(d, lambda s: s.pop("transformer.ln_f.bias")), "lacks transformer.ln_f.bias"),
        (lambda d: (d / "model.safetensors").write_bytes(b"not tensors"), "model.safetensors is damaged"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
        (lambda d: d.rename(d.parent / "elsewhere"), "no such checkpoint"),
    ],
)
def test_what_is_no_model_is_one_clear_line(saved, damage, message):
    damage(saved)
    with pytest.raises(UserError, match=message) as caught:
        GPT.from_pretrained(saved)
    assert "\n" not in str(caught.value)
