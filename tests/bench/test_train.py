"""``bench train``: every provider takes the same step, and the records follow from the samples."""

from __future__ import annotations

import json

import pytest
import torch

from llmfast.bench import plots, steps, tables, train
from llmfast.bench.ceilings import Ceilings
from llmfast.bench.steps import LADDER, Provider, Shape, climbed
from llmfast.config import GPTConfig
from llmfast.nn import GPT
from llmfast.training.device import flops_per_token

SHAPE = Shape(n_layer=2, n_head=2, n_embd=32, vocab_size=97, block_size=16, batch_size=2)
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def as_before():
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    steps.BACKEND.close()


def losses(kind, dtype="fp32"):
    return Provider(kind, SHAPE, dtype).losses


def test_llmfast_hugging_face_and_plain_pytorch_compute_the_same_losses():
    pytest.importorskip("transformers")
    plain = losses("eager")
    assert plain[2] < plain[0]
    assert losses("llmfast") == pytest.approx(plain, rel=1e-4)
    assert losses("huggingface") == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("rung", [rung for rung in LADDER if LADDER.index(rung) < LADDER.index("compile")])
def test_every_rung_of_the_ladder_is_the_same_model(rung):
    assert losses(f"ladder {rung}") == pytest.approx(losses("eager"), rel=2e-2 if rung not in LADDER[:3] else 1e-4)


def test_the_last_rungs_pad_the_vocabulary_and_enlarge_the_batch():
    assert climbed(SHAPE, LADDER[:-1]).vocab_size == 128
    assert climbed(SHAPE, LADDER) == Shape(2, 2, 32, 128, 16, 8)
    assert climbed(SHAPE, LADDER[:3]) == SHAPE


@pytest.mark.parametrize("kind", steps.FOLDERS)
def test_peers_take_steps_where_their_checkouts_are(kind, shared_peers):
    found = losses(kind)
    assert found[2] < found[0]
    if kind in ("nanogpt", "llm.c"):
        assert found == pytest.approx(losses("eager"), rel=1e-4)


@pytest.fixture
def shared_peers(monkeypatch):
    import os
    import sys

    if steps.PEERS not in os.environ:
        pytest.skip(f"{steps.PEERS} names no checkouts")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("model", "train_gpt2", "src", "src.models", "src.models.transformer"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_record_follows_from_its_samples(monkeypatch, tmp_path):
    samples = {
        "eager fp32": [(0.2, 0.0), (0.1, 0.0), (0.4, 0.0)],
        "llmfast fp32": [(0.1, 0.0), (0.05, 0.0), (0.1, 0.0)],
    }
    fact = {"tokens": 32, "extra": 10**7, "losses": [4.0, 3.0, 2.0], "setting": ""}
    facts = {
        "eager fp32": fact,
        "llmfast fp32": {**fact, "losses": [4.0, 3.0, 2.1]},
        "huggingface fp32": {"why": "not installed"},
    }
    monkeypatch.setattr(train, "measure", lambda *_: (samples, facts))
    monkeypatch.setattr(train, "measure_ceilings", lambda *_: Ceilings(1e10, {"float32": 1e11, "bfloat16": 2e11}))
    results = train.bench_train(SHAPE, CPU, ["eager", "llmfast", "huggingface"], "fp32", 3, progress=False)
    ours = results["steps"][1]
    assert ours["tokens_per_second"] == pytest.approx(320)
    assert ours["ratio_to_eager"] == pytest.approx([2.0, 2.0, 4.0])
    assert ours["mfu"] == pytest.approx(320 * train.flops_per_token(SHAPE) / 1e11)
    assert ours["loss_agrees"] is False
    assert results["not_run"] == [{"provider": "huggingface fp32", "why": "not installed"}]
    table = tables.steps_table(json.loads(json.dumps(results)))
    assert "llmfast fp32 *" in table
    assert "huggingface fp32: cannot run: not installed" in table
    plots.plot_steps(results, tmp_path / "a.png")


def test_flops_are_counted_as_the_training_loop_does():
    model = GPT(GPTConfig(**SHAPE.sizes, qkv_bias=False, bias=False))
    assert train.flops_per_token(SHAPE) == pytest.approx(flops_per_token(model, SHAPE.block_size), rel=0.01)


def test_an_unknown_provider_is_the_users_mistake():
    from llmfast.cli.main import main

    assert main(["bench", "train", "--device", "cpu", "--providers", "nanogtp"]) == 2
    assert main(["bench", "train", "--device", "cpu", "--turns", "0"]) == 2


def test_generation_is_timed_by_token_and_prompt(monkeypatch, tmp_path):
    from llmfast.bench import generate

    pytest.importorskip("transformers")
    monkeypatch.setattr(generate, "measure_ceilings", lambda *_: Ceilings(1e10, {"float32": 1e11}))
    monkeypatch.setattr(generate, "measure_read", lambda *_: 1e10)
    config = GPTConfig(**SHAPE.sizes)
    options = dict(dtypes=["float32", "int8"], batches=[1, 2], prompt=4, tokens=6, turns=3, progress=False)
    results = generate.bench_generate(config, CPU, **options)
    cells = {(r["provider"], r["dtype"], r["batch"]) for r in results["generate"]}
    assert len(cells) == 6
    assert {(r["provider"], r["dtype"]) for r in results["not_run"]} == {("huggingface", "int8")}
    record = next(r for r in results["generate"] if r["provider"] == "llmfast" and r["dtype"] == "float32")
    assert record["tokens_per_second"] == pytest.approx(record["batch"] / record["token_seconds"][0])
    model = GPT(config)
    read = sum(p.nbytes for p in model.parameters()) - model.transformer.wpe.weight.nbytes
    assert record["weight_bytes"] == read
    assert record["share"] == pytest.approx(read / 1e10 / record["token_seconds"][0])
    tables.generate_table(results)
    plots.plot_generate(results, tmp_path / "a.png")


def test_data_is_counted_as_prepared(tmp_path):
    from llmfast.bench import data
    from llmfast.tokenizer import train_bpe

    tokenizer = train_bpe(["the cat sat on the mat; def f(x): return x"] * 50, 300)
    results = data.bench_data(tokenizer, megabytes=1, workers=1, turns=1, progress=False)
    by = {r["provider"]: r for r in results["data"]}
    assert set(by) == {"prepare", "tiktoken", "batches"}
    # prepare adds an end-of-text token to each document
    assert 0 < by["prepare"]["tokens"] - by["tiktoken"]["tokens"] < 2000
    assert by["prepare"]["ratio_to_tiktoken"][0] > 0
    tables.data_table(results)
    plots.plot_data(results, tmp_path / "a.png")
