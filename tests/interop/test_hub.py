"""GPT-2 by name, from a hub and an OpenAI on the loopback address."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from web import page, web

from llmfast import GPT, GPTConfig
from llmfast.checkpoint import load_model
from llmfast.data import catalog
from llmfast.data.catalog import Entry, Remote
from llmfast.data.download import Patience, fetch
from llmfast.errors import UserError
from llmfast.interop import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "vocab.json": b"vocab",
    "merges.txt": b"merges",
}


@pytest.fixture
def server(monkeypatch, tmp_path):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLMFAST_CACHE", str(tmp_path / "cache"))
    with web() as running:
        yield running


@pytest.fixture
def hugging_face(server, monkeypatch, tmp_path):
    """A hub with a small gpt2, and an empty cache of huggingface_hub's."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", server.url(""))
    digest = hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    monkeypatch.setitem(catalog.HUB_MODELS, "gpt2", (COMMIT, (None, None), (digest, None)))

    def serve(files: dict[str, bytes]) -> None:
        for name, data in files.items():
            answer = page(data)
            at = f"/openai-community/gpt2/resolve/{COMMIT}/{name}"
            server.pages[at] = lambda handler, data=data, answer=answer: handler.answer(
                200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT
            )

    serve(FILES)
    return serve


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_the_hubs_files_are_fetched_once(server, hugging_face, name):
    folder = hub.named_weights(name)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    asked = len(server.requests)
    assert hub.named_weights(name) == folder
    assert len(server.requests) == asked


def test_weights_that_are_not_the_pinned_ones_are_refused(hugging_face):
    hugging_face({"model.safetensors": b"something else"})
    with pytest.raises(UserError, match=r"has the SHA-256 [0-9a-f]{64} instead of"):
        hub.named_weights("gpt2")


def test_without_a_network_there_is_one_line_and_the_cache_still_serves(server, hugging_face, monkeypatch):
    folder = hub.named_weights("gpt2")
    server.shutdown()
    server.server_close()
    assert hub.named_weights("gpt2") == folder
    start = time.monotonic()
    with pytest.raises(UserError, match="gpt2-xl is in no cache on this machine and cannot be fetched: ") as caught:
        hub.named_weights("gpt2-xl")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 30


def test_without_the_library_openais_own_files_are_taken(server, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    files = {"checkpoint": b"c", "model.ckpt.index": b"i"}
    remotes = []
    for name, data in files.items():
        server.pages[f"/{name}"] = page(data)
        remotes.append(Remote(name, (server.url(f"/{name}"),), hashlib.sha256(data).hexdigest()))
    monkeypatch.setitem(catalog.ENTRIES, "gpt2-124M", Entry("", tuple(remotes)))
    for _ in range(2):
        folder = hub.named_weights("gpt2", progress=False)
        assert folder == tmp_path / "cache" / "gpt2-124M"
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert len(server.requests) == 2
    server.server_close()
    monkeypatch.setenv("LLMFAST_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(hub, "fetch", functools.partial(fetch, patience=Patience(pause=0.01)))
    with pytest.raises(UserError, match="cannot download"):
        hub.named_weights("gpt2", progress=False)


@pytest.fixture
def checkpoints() -> Path:
    folder = os.environ.get("LLMFAST_TEST_CHECKPOINTS")
    if not folder:
        pytest.skip("LLMFAST_TEST_CHECKPOINTS names no folder of checkpoints")
    return Path(folder)


def logits_error(model: GPT, expected: Path) -> float:
    known = np.load(expected)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(known["input_ids"]))[0]
    return float((logits - torch.from_numpy(known["logits"])).abs().max())


def test_from_pretrained_takes_the_hubs_gpt2(hugging_face, monkeypatch, checkpoints, one_thread):
    folder = checkpoints / "hf-gpt2"
    weights = (folder / "model.safetensors").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    monkeypatch.setitem(catalog.HUB_MODELS, "gpt2", (COMMIT, (None, None), (digest, None)))
    hugging_face({"config.json": (folder / "config.json").read_bytes(), "model.safetensors": weights})
    for model in (GPT.from_pretrained("gpt2"), load_model("openai-community/gpt2")):
        assert logits_error(model, checkpoints / "hf-gpt2.expected.npz") < 1e-4


def test_from_pretrained_takes_openais_gpt2(server, monkeypatch, checkpoints, one_thread):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    remotes = []
    for file in sorted((checkpoints / "openai-tf").iterdir()):
        server.pages[f"/{file.name}"] = page(file.read_bytes())
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        remotes.append(Remote(file.name, (server.url(f"/{file.name}"),), digest))
    monkeypatch.setitem(catalog.ENTRIES, "gpt2-124M", Entry("", tuple(remotes)))
    expected = GPT.from_pretrained(checkpoints / "openai-tf").state_dict()
    found = GPT.from_pretrained("gpt2").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_folder_of_that_name_wins(server, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    GPT(GPTConfig(vocab_size=7, block_size=8, n_layer=1, n_head=1, n_embd=4)).save_pretrained("gpt2")
    assert GPT.from_pretrained("gpt2").config.vocab_size == 7
    assert load_model("gpt2").config.vocab_size == 7
    assert server.requests == []


def test_a_name_nearly_right_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (GPT.from_pretrained, load_model):
        with pytest.raises(UserError, match=r"no such checkpoint: gpt2-meduim \(did you mean gpt2-medium\?\)"):
            load("gpt2-meduim")


def test_other_names_are_not_its_business():
    for name in ("gpt3", "runs/gpt2", "openai-community/gpt3", "./gpt2"):
        assert hub.named_weights(name) is None


def test_the_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("LLMFAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hub.cache_folder() == tmp_path / "llmfast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.cache_folder().parts[-2:] == (".cache", "llmfast")
