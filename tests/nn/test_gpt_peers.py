"""GPT with the weights of other codebases gives the logits and losses that those codebases gave."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmfast.config import GPTConfig
from llmfast.nn import GPT

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = dict(vocab_size=384, block_size=64, n_layer=2, n_head=4, n_embd=64)
TLFS = dict(qkv_bias=False, activation="relu", tie_embeddings=False, lm_head_bias=True)

Weights = dict[str, torch.Tensor]


def checkpoints() -> Path:
    if "LLMFAST_TEST_CHECKPOINTS" not in os.environ:
        pytest.skip("LLMFAST_TEST_CHECKPOINTS is not set")
    return Path(os.environ["LLMFAST_TEST_CHECKPOINTS"])


def hugging_face(folder: Path) -> Weights:
    state = load_file(folder / "model.safetensors")
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    projections = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Conv1D: (in, out)
    state = {name: t.T if name.endswith(projections) else t for name, t in state.items()}
    return {**state, "lm_head.weight": state["transformer.wte.weight"]} if tied else state


def nanogpt(folder: Path) -> Weights:
    return torch.load(folder / "ckpt.pt", weights_only=True)["model"]


def book(folder: Path) -> Weights:
    state = torch.load(folder / "model.pth", weights_only=True)
    names = {
        "norm1.scale": "ln_1.weight", "norm1.shift": "ln_1.bias", "norm2.scale": "ln_2.weight",
        "norm2.shift": "ln_2.bias", "att.out_proj": "attn.c_proj", "ff.layers.0": "mlp.c_fc",
        "ff.layers.2": "mlp.c_proj", "trf_blocks": "transformer.h", "tok_emb": "transformer.wte",
        "pos_emb": "transformer.wpe", "final_norm.scale": "transformer.ln_f.weight",
        "final_norm.shift": "transformer.ln_f.bias", "out_head": "lm_head",
    }  # fmt: skip
    weights = {}
    for name, t in state.items():
        if name.endswith("mask") or "W_key" in name or "W_value" in name:
            continue
        if "W_query" in name:
            t = torch.cat([state[name.replace("query", part)] for part in ("query", "key", "value")])
            name = name.replace("att.W_query", "attn.c_attn")
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = t
    return weights


def train_llm_from_scratch(folder: Path) -> Weights:
    state = torch.load(folder / "transformer.pt", weights_only=True)["model_state_dict"]
    names = {
        "ln1": "ln_1", "ln2": "ln_2", "attn.proj": "attn.c_proj", "mlp.hidden": "mlp.c_fc", "mlp.proj": "mlp.c_proj",
        "attn_blocks": "transformer.h", "token_embed": "transformer.wte", "position_embed": "transformer.wpe",
        "layer_norm": "transformer.ln_f",
    }  # fmt: skip
    weights = {}
    for name, t in state.items():
        if name == "pos_idxs" or ".heads." in name:
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = t
    for layer in range(SHAPE["n_layer"]):
        parts = [
            state[f"attn_blocks.{layer}.attn.heads.{head}.{part}.weight"]
            for part in ("query", "key", "value")
            for head in range(SHAPE["n_head"])
        ]
        weights[f"transformer.h.{layer}.attn.c_attn.weight"] = torch.cat(parts)
    return weights


PEERS = {
    "hf-gpt2": (hugging_face, {}),
    "hf-gpt2-untied": (hugging_face, dict(tie_embeddings=False)),
    "nanogpt": (nanogpt, {}),
    "nanogpt-nobias": (nanogpt, dict(bias=False)),
    "book-gptmodel": (book, dict(tie_embeddings=False)),
    "book-gptmodel-noqkvbias": (book, dict(tie_embeddings=False, qkv_bias=False)),
    "train-llm-from-scratch": (train_llm_from_scratch, TLFS),
    "train-llm-from-scratch-2025": (train_llm_from_scratch, dict(TLFS, attn_out_proj=False)),
    "train-llm-from-scratch-early": (train_llm_from_scratch, dict(TLFS, attn_out_proj=False, attn_scale="n_embd")),
}


def load_peer(name: str) -> tuple[GPT, dict[str, np.ndarray]]:
    read, options = PEERS[name]
    # The book's activation is the tanh form, as GPT-2's; nanoGPT's is the erf form.
    options = {**SHAPE, **options, **(dict(activation="gelu") if "nanogpt" in name else {})}
    model = GPT(GPTConfig(**options))
    model.load_state_dict(read(checkpoints() / name))
    return model.eval(), dict(np.load(checkpoints() / f"{name}.expected.npz"))


@pytest.mark.parametrize("name", PEERS)
def test_logits_and_loss_equal_the_peers(name):
    model, expected = load_peer(name)
    idx, targets = torch.from_numpy(expected["input_ids"]), torch.from_numpy(expected["targets"])
    with torch.no_grad():
        logits, loss = model(idx, targets, return_logits=True)
    np.testing.assert_allclose(logits.numpy(), expected["logits"], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(loss.item(), expected["loss"], rtol=1e-6)


def test_greedy_tokens_equal_hugging_faces():
    from llmfast.generation import generate_ids

    model, expected = load_peer("hf-gpt2")
    greedy = expected["greedy"][0].tolist()
    prompt = expected["input_ids"][0, :8].tolist()
    assert greedy[:8] == prompt
    assert generate_ids(model, [prompt], max_new_tokens=len(greedy) - 8, temperature=0) == [greedy[8:]]
