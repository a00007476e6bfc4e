"""What each verb prints and writes when all is well."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from llmfast.cli.main import main
from llmfast.errors import UserError

TINY = """
    --n-layer 1 --n-head 2 --n-embd 8 --block-size 16 --micro-batch-size 2 --eval-batches 1 --sample-tokens 2
""".split()


class Input(io.TextIOWrapper):
    """Standard input that is a pipe."""

    def __init__(self, text: str):
        super().__init__(io.BytesIO(text.encode()), encoding="utf-8")


@pytest.fixture
def say(capsys, monkeypatch):
    """Runs a command; returns what it prints on standard output."""

    def run(*words: object, input: str = "", code: int = 0) -> str:
        monkeypatch.setattr(sys, "stdin", Input(input))
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        return capsys.readouterr().out

    return run


@pytest.fixture
def tell(say):
    """The same with ``--json``, parsed."""
    return lambda *words, **options: json.loads(say(*words, "--json", **options))


def test_tokenizer_there_and_back(say, tell):
    text = "Grüße, 世界 <|endoftext|>"
    ids = say("tokenizer", "encode", text, "--tokenizer", "byte").split()
    assert [int(i) for i in ids] == list(text.encode())
    assert say("tokenizer", "decode", *ids, "--tokenizer", "byte") == text + "\n"
    assert say("tokenizer", "decode", "--tokenizer", "byte", input=" ".join(ids)) == text + "\n"
    assert tell("tokenizer", "encode", "--tokenizer", "byte", input=text) == {
        "tokens": len(ids),
        "ids": [*text.encode()],
    }
    special = tell("tokenizer", "encode", text, "--tokenizer", "byte", "--allow-special")
    assert special["ids"] == [*"Grüße, 世界 ".encode(), 256]


def test_tokenizer_trained_and_shown(home, say, tell, tmp_path):
    made = tell("tokenizer", "train", "--data", home / "text.txt", "--size", 280, "--out", tmp_path / "t")
    assert made == {"kind": "bpe", "vocab_size": 280, "path": str(tmp_path / "t" / "llmfast_tokenizer.json")}
    facts = tell("tokenizer", "show", "--tokenizer", tmp_path / "t")
    assert facts == {"kind": "bpe", "vocab_size": 280, "eot_id": 279}
    assert "vocab_size  280" in say("tokenizer", "show", "--tokenizer", tmp_path / "t")
    ids = say("tokenizer", "encode", "the cat", "--tokenizer", tmp_path / "t").split()
    assert len(ids) < len("the cat")
    made = tell("tokenizer", "train", "--data", home / "text.txt", "--kind", "char", "--out", tmp_path / "c")
    assert made["vocab_size"] == len(set((home / "text.txt").read_text()))


def test_tokenizer_of_a_run(home, say):
    run, data = (say("tokenizer", "show", "--tokenizer", home / name) for name in ("run", "shards"))
    assert run == data


def test_prepare_says_what_it_wrote(home, tell, say, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "One two"}\n{"body": "one  two"}\n{"body": "one two"}\n')
    words = ["prepare", tmp_path / "a.jsonl", "--field", "body", "--tokenizer", "byte", "--val-fraction", "0"]
    cleaned = tell(*words, "--clean", "lowercase", "whitespace", "duplicates", "--out", tmp_path / "out")
    assert cleaned["tokens"] == {"train": len("one two") + 1, "val": 0}
    assert (cleaned["documents"]["train"], cleaned["duplicates"], cleaned["skipped"]) == (1, 2, 0)
    tokens = np.fromfile(tmp_path / "out" / "train-00000.bin", np.uint16)
    assert tokens.tolist() == [*b"one two", 256]
    shown = say(*words, "--out", tmp_path / "other")
    assert re.search(r"^train +25 tokens, 3 documents$", shown, re.M)


def test_prepare_writes_hdf5_that_trains_like_the_shards(home, tell, tmp_path):
    tell(
        "prepare", home / "text.txt", "--out", tmp_path / "a", "--tokenizer", home / "shards", "--hdf5", tmp_path / "h5"
    )
    h5py = pytest.importorskip("h5py")
    for split in ("train", "val"):
        with h5py.File(tmp_path / "h5" / f"{split}.h5") as file:
            tokens = file["tokens"][:]
        assert tokens.dtype == np.int32
        assert tokens.tolist() == np.fromfile(home / "shards" / f"{split}-00000.bin", np.uint16).tolist()


def test_pretrain_on_text_prepares_it_trains_and_says_where_everything_is(home, say, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = [*TINY, "--max-steps", 3]
    shown = say("pretrain", "--data", home / "text.txt", "--tokenizer-size", 270, *few)
    places = dict(line.split(maxsplit=1) for line in shown.splitlines() if "runs/run" in line)
    assert places["checkpoint"] == "runs/run/checkpoints/step-000003"
    for name in ("checkpoint", "plot", "metrics", "samples"):
        assert Path(places[name]).exists()
    metrics = [json.loads(line) for line in Path(places["metrics"]).read_text().splitlines()]
    assert f"{metrics[-1]['val_loss']:.4f}" in shown
    # A resume takes its options from the run, and the data that is there; more steps are asked for by a flag.
    result = json.loads(say("pretrain", "--resume", "--max-steps", 5, "--json"))
    assert (result["steps"], result["checkpoint"]) == (5, "runs/run/checkpoints/step-000005")


def test_a_resume_keeps_the_tokenizer_that_the_run_trained(home, tell, tmp_path):
    few = [*TINY, "--max-steps", 1]
    out = tmp_path / "out"
    tell("pretrain", "--data", home / "text.txt", "--tokenizer", "char", "--out", out, *few)
    shutil.rmtree(out / "data")  # the text is there still, and gives the same tokens again
    assert tell("pretrain", "--resume", "--out", out, "--max-steps", 2)["steps"] == 2
    assert tell("tokenizer", "show", "--tokenizer", out)["kind"] == "char"
    assert tell("plan", "--config", out / "config.toml")["steps"] == 2


def test_pretrain_takes_weights_from_a_checkpoint_and_keeps_its_tokenizer(home, tell, tmp_path):
    few = "--max-steps 1 --learning-rate 1e-30 --warmup-steps 0 --eval-batches 1 --sample-every 0".split()
    words = ["--checkpoint", home / "run", "--data", home / "text.txt", "--out", tmp_path / "next", *few]
    tell("pretrain", *words)
    before, after = (
        tell("evaluate", "--checkpoint", run, "--data", home / "shards") for run in (home / "run", tmp_path / "next")
    )
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
    tokenizers = [tell("tokenizer", "show", "--tokenizer", path) for path in (home / "run", tmp_path / "next")]
    assert tokenizers[0] == tokenizers[1]


@pytest.mark.parametrize(
    ("options", "size"),
    [([], 270), (["--vocab-size", "512"], 512), (["--model", "book-124m", "--vocab-size", "300"], 300)],
)
def test_the_vocabulary_follows_the_tokenizer_unless_it_is_named(home, say, tmp_path, options, size):
    few = [*TINY, "--max-steps", 1]
    words = ["--data", home / "text.txt", "--tokenizer-size", 270, "--out", tmp_path / "r"]
    say("pretrain", *words, *few, *options)
    assert json.loads(next((tmp_path / "r").rglob("config.json")).read_text())["vocab_size"] == size


def test_a_preset_s_padded_vocabulary_is_kept():
    from types import SimpleNamespace

    from llmfast.cli.pretrain import Options, new_model

    small = dict(n_layer=1, n_head=1, n_embd=2, block_size=4)
    for tokens, size in ((50257, 50304), (50304, 50304), (49000, 49000), (60000, 60000)):
        notes: list[str] = []
        corpus = SimpleNamespace(train=SimpleNamespace(vocab_size=tokens))
        model = new_model(Options(model="tlfs-13m", **small), corpus, notes)
        assert model.config.vocab_size == size
        assert f"{size:,} ids, " in notes[0]


def test_int8_weights_are_an_option_of_every_verb_that_runs_a_model(home, say, tell, capsys):
    options = ["--checkpoint", home / "run", "--quantize", "int8"]
    assert say("generate", *options, "--max-new-tokens", 6, "--temperature", 0, "the").startswith("the")
    assert len(say("chat", *options, "--max-new-tokens", 6, "--temperature", 0, input="the\n")) > 1
    float32 = tell("evaluate", "--checkpoint", home / "run", "--data", home / "shards")["loss"]
    int8 = tell("evaluate", *options, "--data", home / "shards")["loss"]
    assert 0 < abs(int8 - float32) < 0.01
    capsys.readouterr()
    assert main(["generate", *map(str, options), "--dtype", "bfloat16", "the"]) == 2
    assert "--quantize int8 runs on a CPU in float32, not on cpu in bfloat16" in capsys.readouterr().err


def test_generate_writes_on_from_words_a_file_and_a_pipe(home, say, tell, tmp_path):
    words = ["generate", "--checkpoint", home / "run", "--max-new-tokens", 6, "--seed", 3]
    text = say(*words, "the cat")
    assert text.startswith("the cat")
    assert text.endswith("\n")
    assert text == say(*words, "the cat") == say(*words, input="the cat")
    (tmp_path / "prompt").write_text("the cat")
    assert text == say(*words, "--prompt-file", tmp_path / "prompt")
    answer = tell(*words, "the cat", "a dog")["completions"]
    assert [pair["prompt"] for pair in answer] == ["the cat", "a dog"]
    assert answer[0]["prompt"] + answer[0]["completion"] + "\n" == text
    assert text != say(*words, "the cat", "--seed", 4)
    assert say(*words, "the cat", "--samples", 3).count("\n---\n") == 2
    assert say(*words, input="").strip() != ""


def test_greedy_needs_no_seed(home, say):
    words = ["generate", "--checkpoint", home / "run", "--max-new-tokens", 9, "--temperature", 0, "the"]
    assert say(*words) == say(*words)


def test_chat_keeps_the_dialogue_within_the_context(home, say, monkeypatch):
    prompts = []

    def generate(model, tokenizer, given, *, stream, **options):
        prompts.append(tokenizer.decode(given[0]))
        assert len(given[0]) <= model.config.block_size - options["max_new_tokens"]
        stream(0, " ok")

    monkeypatch.setattr("llmfast.generation.generate", generate)
    lines = ["the cat", "/wat", "sat", "/reset", "a bird sang " * 9, "/quit", "never"]
    shown = say("chat", "--checkpoint", home / "run", "--max-new-tokens", 2, input="\n".join(lines))
    assert shown == " ok\n" * 3
    assert prompts[:2] == ["the cat\n", "the cat\n ok\nsat\n"]
    assert prompts[2].endswith("a bird sang \n")
    assert "sat" not in prompts[2]


def test_chat_answers_a_pipe(home, say):
    shown = say("chat", "--checkpoint", home / "run", "--max-new-tokens", 3, "--seed", 1, input="the cat\nsat on")
    assert shown.count("\n") >= 2


def test_chat_leaves_half_the_context_to_the_dialogue_however_long_a_reply_may_be(home, say, monkeypatch):
    lengths = []
    monkeypatch.setattr("llmfast.generation.generate", lambda model, _, given, **options: lengths.append(len(given[0])))
    say("chat", "--checkpoint", home / "run", "--max-new-tokens", 1000, input="a bird sang " * 9)
    assert lengths == [8]  # of 16


def test_chat_at_a_terminal_asks_until_the_end_of_input(home, capsys, monkeypatch):
    words = iter(["the cat", "wrong", "/quit"])

    def encode(tokenizer, text):
        if "wrong" in text:
            raise UserError("a word that is not known")
        return [0]

    monkeypatch.setattr("llmfast.generation.generate", lambda *_, **__: None)
    monkeypatch.setattr("llmfast.tokenizer.bpe.BPETokenizer.encode", encode)
    monkeypatch.setattr(Input, "isatty", lambda _: True)
    monkeypatch.setattr(sys, "stdin", Input(""))
    monkeypatch.setattr("builtins.input", lambda prompt: next(words))
    assert main(["chat", "--checkpoint", str(home / "run"), "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr().err
    assert "/reset forgets what was said" in said
    assert "llmfast: a word that is not known" in said  # and the dialogue goes on


def test_evaluate_equals_the_mean_over_all_tokens(home, say, tell):
    import torch

    from llmfast.checkpoint import load_model
    from llmfast.data import open_tokens

    facts = tell("evaluate", "--checkpoint", home / "run", "--data", home / "shards", "--batch-size", 3)
    ids = torch.from_numpy(
        np.asarray(open_tokens(home / "shards", "val").window(0, facts["tokens"] + 1)).astype(np.int64)
    )
    assert facts["tokens"] == len(open_tokens(home / "shards", "val")) - 1
    model, losses = load_model(home / "run"), []
    for start in range(0, len(ids) - 1, 16):
        piece = ids[start : start + 17]
        with torch.no_grad():
            logits = model(piece[None, :-1])[0][0].double()
        losses += torch.nn.functional.cross_entropy(logits, piece[1:], reduction="none").tolist()
    assert facts["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert facts["perplexity"] == pytest.approx(np.exp(facts["loss"]))
    assert 0 < facts["bits_per_byte"] < 8
    shown = say("evaluate", "--checkpoint", home / "run", "--data", home / "shards")
    assert f"{facts['loss']:.4f} nats a token" in shown


def test_evaluate_reads_text_tokens_and_parts(home, tell, tmp_path):
    words = ["evaluate", "--checkpoint", home / "run"]
    val, train = (tell(*words, "--data", home / "shards", "--split", split) for split in ("val", "train"))
    assert val["tokens"] < train["tokens"]
    file = tell(*words, "--data", home / "shards" / "val-00000.bin")
    assert file["loss"] == val["loss"]
    text = tell(*words, "--data", home / "text.txt")
    assert text["tokens"] == pytest.approx(val["tokens"] + train["tokens"], abs=3)
    some = tell(*words, "--data", home / "text.txt", "--eval-batches", 2, "--batch-size", 4)
    assert some["tokens"] == 2 * 4 * 16


def test_evaluate_prints_the_bigram_model_beside(home, say, tell):
    from llmfast.data import open_tokens
    from llmfast.evaluation import bigram_loss

    words = ["evaluate", "--checkpoint", home / "run", "--data", home / "shards", "--baseline"]
    facts = tell(*words)
    train, val = (open_tokens(home / "shards", split) for split in ("train", "val"))
    assert facts["bigram_loss"] == bigram_loss(train, val, 300)
    assert f"{facts['bigram_loss']:.4f} nats" in say(*words)
    assert "above the bigram model" in say(*words)


def test_plan_counts_what_pretrain_would_train(home, say, tell):
    shape = "--n-layer 2 --n-head 2 --n-embd 16 --block-size 16 --micro-batch-size 2".split()
    facts = tell("plan", "--data", home / "shards", "--epochs", 2, *shape)
    model = json.loads(next((home / "run").rglob("config.json")).read_text())
    assert facts["model"]["vocab_size"] == model["vocab_size"] == 300
    assert facts["model"]["block_size"] == 16
    assert facts["parameters"] == 300 * 16 + 16 * 16 + 2 * (12 * 16 * 16 + 13 * 16) + 2 * 16
    tokens = tell("evaluate", "--checkpoint", home / "run", "--data", home / "shards", "--split", "train")["tokens"]
    assert facts["steps"] == int(2 * (tokens // 16) / 2)
    shown = say("plan", "--data", home / "shards", "--epochs", 2, *shape)
    assert f"{facts['parameters']:,}" in shown
    assert re.search(r"^ +141 GB +fits +H200$", shown, re.M)
    assert tell("plan", "--checkpoint", home / "run")["model"] == {k: v for k, v in model.items() if k != "model_type"}


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (["--model", "gpt2"], 50257),
        (["--tokenizer", "byte"], 257),
        (["--tokenizer", "bpe", "--tokenizer-size", "1000"], 1000),
        (["--vocab-size", "77"], 77),
        (["--model", "gpt2", "--data", "text.txt"], 4096),
    ],
)
def test_plan_takes_the_vocabulary_that_pretrain_would(home, tell, options, size):
    options = [str(home / word) if word == "text.txt" else word for word in options]
    assert tell("plan", *options)["model"]["vocab_size"] == size


def test_info_tells_what_runs_and_why_not_the_rest(say, tell):
    facts, shown = tell("info"), say("info")
    for op, devices in facts["ops"].items():
        assert re.search(rf"^  {op} +{devices['cpu']['chosen']}: ", shown, re.M)
        for backend, state in devices["cpu"]["backends"].items():
            if not state["available"]:
                assert f"    {backend:<9}{'; '.join(state['reasons'])}" in shown
