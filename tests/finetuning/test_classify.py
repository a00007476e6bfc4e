"""Classification: data, loss, what is trained, and the commands."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmfast.checkpoint import load_model
from llmfast.cli.main import main
from llmfast.config import ClassifyConfig, GPTConfig
from llmfast.errors import UserError
from llmfast.finetuning.classify import ClassificationLoss, Collate, Scores, class_probabilities, finetune_classify
from llmfast.finetuning.classify_data import Example, balanced, class_weights, read_splits_of
from llmfast.nn import GPT, GPTForClassification
from llmfast.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = os.environ.get("LLMFAST_TEST_DATA")
FEW = dict(epochs=2, micro_batch_size=4, learning_rate=1e-2, device="cpu", threads=1, warmup_steps=2)


def config(base, data, out, **options):
    return ClassifyConfig(checkpoint=str(base), data=str(data), out=str(out), **{**FEW, **options})


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A checkpoint directory: 2 layers of width 16, one byte a token, context 48."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=48, n_layer=2, n_head=2, n_embd=16))
    model.save_pretrained(folder)
    load_tokenizer("byte").save(folder)
    return folder


def some_messages(count=60, labels=("ham", "spam")):
    rng = random.Random(4)
    words = {label: [f"{label[0] * 2}{i}" for i in range(5)] for label in labels}
    for i in range(count):
        label = labels[i % len(labels)]
        yield label, " ".join(rng.choice(words[label]) for _ in range(rng.randint(1, 8)))


@pytest.fixture
def messages(tmp_path):
    """A TSV file without a header, quotes included."""
    path = tmp_path / "messages.tsv"
    path.write_text("".join(f'{label}\t"{text}\n' for label, text in some_messages()), encoding="utf-8")
    return path


@pytest.mark.parametrize("train", ["all", "last-block", "head", "lora"])
def test_a_run_from_end_to_end(base, messages, tmp_path, train):
    out = tmp_path / "run"
    result = finetune_classify(config(base, messages, out, train=train, epochs=8), progress=False)
    assert result.labels == ["ham", "spam"]
    lines = lines_of(out / "metrics.jsonl")
    evaluated = [line for line in lines if "val_loss" in line]
    assert len(evaluated) == 8
    assert lines[0]["loss"] > evaluated[-1]["loss"]
    assert all(np.sum(line["val_confusion"]) == 6 for line in evaluated)
    assert json.loads((out / "results.json").read_text())["test"] == result.test
    assert sum(map(sum, result.test["confusion"])) == 12
    if train in ("all", "lora"):
        assert result.test["accuracy"] == 1.0
    assert (out / "loss.png").exists()

    fresh, trained = load_model(base), load_model(out)
    changed = {
        name.rsplit(".", 2)[0] if train == "lora" else name
        for name, p in trained.named_parameters()
        if not name.startswith("score") and not torch.equal(p, fresh.get_parameter(name))
    }
    last = {name for name, _ in fresh.named_parameters() if name.startswith(("transformer.h.1.", "transformer.ln_f."))}
    if train == "head":
        assert not changed
    elif train == "last-block":
        assert changed
        assert changed <= last
    else:
        assert any(name.startswith("transformer.h.0.") for name in changed)
    if train == "lora":  # the checkpoint holds the adapters and the head alone
        state = load_file(result.training.checkpoint / "adapter_model.safetensors")
        assert all("lora_" in name or ".score." in name for name in state)
        assert not (result.training.checkpoint / "model.safetensors").exists()
        optimizer = load_file(result.training.checkpoint / "optimizer.safetensors")
        assert all("lora_" in name or "/score." in name for name in optimizer)


def test_the_splits_on_disk_are_fixed_and_whole(base, messages, tmp_path):
    for name in ("a", "b"):
        finetune_classify(config(base, messages, tmp_path / name, seed=len(name), epochs=1), progress=False)
    found = {}
    for split in ("train", "validation", "test"):
        a, b = ((tmp_path / name / "data" / f"{split}.jsonl").read_bytes() for name in ("a", "b"))
        assert a == b
        found[split] = lines_of(tmp_path / "a" / "data" / f"{split}.jsonl")
    assert {name: len(rows) for name, rows in found.items()} == {"train": 42, "validation": 6, "test": 12}
    assert sorted(row["line"] for rows in found.values() for row in rows) == list(range(1, 61))
    assert all(row["text"].startswith('"') for row in found["train"])


@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_resume_goes_on_bit_by_bit(base, messages, tmp_path, train, monkeypatch):
    options = dict(train=train, epochs=None, save_every=5, eval_every=5, lora_dropout=0.1)
    whole = finetune_classify(config(base, messages, tmp_path / "whole", max_steps=10, **options), progress=False)
    half = config(base, messages, tmp_path / "half", max_steps=10, schedule="cosine", **options)
    stop_after(5, monkeypatch)
    stopped = finetune_classify(half, progress=False)
    monkeypatch.undo()
    assert stopped.training.steps == 5
    messages.unlink()  # the run has its own copy of the examples
    resumed = finetune_classify(dataclasses.replace(half, resume=True), progress=False)
    for name, p in load_model(whole.training.checkpoint).named_parameters():
        assert torch.equal(p, load_model(resumed.training.checkpoint).get_parameter(name)), name
    assert resumed.test == whole.test


def stop_after(steps, monkeypatch):
    """SIGTERM in the middle of a run, in the loss of so many batches."""
    left, plain = [steps], ClassificationLoss.__call__

    def loss(self, model, batch):
        if model.training:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, model, batch)

    monkeypatch.setattr(ClassificationLoss, "__call__", loss)


def test_padding_changes_nothing_and_the_head_reads_the_last_token():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=16))
    model = GPTForClassification.from_gpt(gpt, ["a", "b", "c"]).eval()
    texts = [[5, 6, 7], [1], [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    alone = torch.cat([model(torch.tensor([text])) for text in texts])
    for width, pad in ((10, 0), (16, 49)):
        padded = torch.tensor([text + [pad] * (width - len(text)) for text in texts])
        together = model(padded, torch.tensor([len(text) for text in texts]))
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    by_hand = torch.stack([gpt.hidden_states(torch.tensor([t]))[0, -1] for t in texts]) @ model.score.weight.T
    torch.testing.assert_close(alone, by_hand + model.score.bias, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(class_probabilities(model, texts, batch_size=2), alone.softmax(1), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="text 1 has no token"):
        class_probabilities(model, [[1], []])


def test_weighted_losses_accumulate_to_the_full_batch_and_equal_pytorchs():
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0, 0, 1])
    weights = [0.5, 2.0, 1.5]
    loss = ClassificationLoss(weights)
    whole, count, sums = loss(lambda ids, lengths: logits, (labels, labels, labels))
    parts = [loss(lambda ids, lengths, at=at: logits[at], (labels[at],) * 3) for at in (slice(0, 4), slice(4, 6))]
    torch.testing.assert_close(sum(part * n for part, n, _ in parts) / 6, whole)
    reference = torch.nn.functional.cross_entropy(logits, labels, weight=torch.tensor(weights), reduction="sum") / 6
    torch.testing.assert_close(whole, reference)
    assert count == 6
    assert sums["confusion"].sum(1).tolist() == [3, 2, 1]


def test_scores_of_a_confusion_matrix_by_hand():
    scores = Scores(["a", "b", "c"])({"confusion": torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]])}, 10)
    assert scores["accuracy"] == 0.7
    assert scores["classes"]["a"] == {"precision": 0.6, "recall": 0.75, "f1": pytest.approx(2 / 3), "count": 4}
    assert scores["classes"]["b"]["precision"] == 0.8
    assert scores["classes"]["c"]["f1"] == 0.0
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 8 / 11) / 2)  # of the classes that occur


def test_batches_are_padded_to_their_longest_or_as_told():
    examples = [Example("x", [1, 2, 3], "b", 1), Example("y", [4], "a", 2)]
    ids, lengths, labels = Collate(["a", "b"], 9, config("b", "d", "o"))(examples)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert (lengths.tolist(), labels.tolist()) == ([3, 1], [1, 0])
    ids, _, _ = Collate(["a", "b"], 9, config("b", "d", "o", pad_to=5))(examples)
    assert ids.tolist() == [[1, 2, 3, 9, 9], [4, 9, 9, 9, 9]]


def test_balancing_keeps_the_rarest_whole_and_class_weights_have_mean_one():
    examples = [Example(str(i), [i], "many" if i % 4 else "few", i) for i in range(40)]
    chosen = balanced(examples, 1)
    assert [e.line for e in chosen if e.label == "few"] == list(range(0, 40, 4))
    assert len({e.line for e in chosen}) == 20
    splits = read_splits_like(examples)
    weights = class_weights(config("b", "d", "o", class_weights=["balanced"]), splits)
    assert weights == pytest.approx([2.0, 2 / 3])
    assert class_weights(config("b", "d", "o", class_weights=["few=3"]), splits) == pytest.approx([2.0, 2 / 3])
    for word, says in (("none=2", "with a label of few, many"), ("few=x", "no number"), ("few=0", "above 0")):
        with pytest.raises(UserError, match=says):
            class_weights(config("b", "d", "o", class_weights=[word]), splits)


def read_splits_like(examples):
    from llmfast.finetuning.classify_data import Splits

    return Splits(examples, [], [], ["few", "many"])


@pytest.mark.skipif(not DATA, reason="LLMFAST_TEST_DATA names no folder of test data")
def test_the_sms_collection_is_split_as_the_book_splits_it():
    """The book's own lines, by numpy alone: pandas' sample(random_state=123) is RandomState(123).permutation."""
    path = Path(DATA, "spam", "SMSSpamCollection.tsv")
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line]
    ham = [text for label, text in rows if label == "ham"]
    spam = [text for label, text in rows if label == "spam"]
    both = [ham[i] for i in np.random.RandomState(123).permutation(len(ham))[: len(spam)]] + spam
    order = np.random.RandomState(123).permutation(len(both))
    said = []
    splits = read_splits_of(config("b", path, "o", balance=True), load_tokenizer("byte"), 1024, said.append)
    got = [example.text for part in (splits.train, splits.validation, splits.test) for example in part]
    assert got == [both[i] for i in order]
    assert [len(part) for _, part in splits.items()] == [1045, 149, 300]
    assert "labels: ham (4,827), spam (747)" in said


def test_columns_are_named_guessed_and_said(base, tmp_path):
    def splits(name, content, **options):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        said = []
        found = read_splits_of(
            config(base, path, "o", val_fraction=0.0, test_fraction=0.0, **options), load_tokenizer("byte"), 48,
            said.append,
        )  # fmt: skip
        return said[0], found

    said, found = splits("a.csv", 'Category,Message\nham,"a, b"\nspam,c d e f\n')
    assert "text is column 'Message', label is column 'Category'" in said
    assert {example.text for example in found.train} == {"a, b", "c d e f"}
    said, _ = splits("b.tsv", "x\tsome words\ny\tother words\n")
    assert "text is column '2', label is column '1'" in said
    said, found = splits("c.jsonl", '{"q": "why?", "kind": 1}\n{"q": "who is?", "kind": 2}\n')
    assert "text is column 'q', label is column 'kind'" in said
    assert found.labels == ["1", "2"]
    said, _ = splits("d.csv", "q,r\na,b\nc,d\n", text_column="r", label_column="q")
    assert "text is column 'r', label is column 'q'" in said
    with pytest.raises(UserError, match="no column 's'"):
        splits("d.csv", "q,r\na,b\nc,d\n", text_column="s", label_column="q")


GOOD = "".join(f"{label}\t{text}\n" for label, text in some_messages())
BAD = {
    "missing column": (GOOD + "ham\n", ":61: 1 columns, expected 2"),
    "one class": ("ham\tsome words\nham\tother words\n", "a classifier needs two"),
    "empty text": (GOOD + "ham\t \n", ":61: '2' is empty"),
    "empty label": (GOOD + "\tabc\n", ":61: the label is empty"),
    "label never seen in training": (GOOD + "eggs\tabc\n", "never in training"),
    "text longer than the context": (GOOD + f"ham\t{'x' * 49}\n", ":61: 49 tokens are more than the model's context"),
    "not UTF-8": (GOOD.encode() + b"ham\t\xa31\n", ":61: not UTF-8"),
    "empty file": ("", "holds no record"),
}
SKIPPED = ("missing column", "empty text", "empty label", "text longer than the context", "not UTF-8")


@pytest.mark.parametrize(("content", "says"), BAD.values(), ids=BAD)
def test_bad_data_is_one_line_and_leaves_nothing_behind(base, tmp_path, capsys, content, says):
    path, out = tmp_path / "bad.tsv", tmp_path / "run"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    # A rare label's split depends on the seed; this one puts it into the test split.
    words = f"finetune classify --checkpoint {base} --data {path} --out {out} --split-seed 2 --device cpu".split()
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert says in error
    assert str(path) in error
    assert not out.exists()


@pytest.mark.parametrize("name", SKIPPED)
def test_bad_examples_are_left_out_and_counted_when_asked(base, tmp_path, capsys, name):
    content = BAD[name][0]
    path = tmp_path / "bad.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = f"finetune classify --checkpoint {base} --data {path} --out {tmp_path / 'run'} --skip-bad".split()
    assert main([*words, "--epochs", "1", "--device", "cpu", "--threads", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert f"left out 1 of 61 records of {path}" in captured.err
    assert json.loads(captured.out)["labels"] == ["ham", "spam"]


def test_a_label_that_is_never_trained_is_left_out_and_counted_when_asked(base, tmp_path, capsys):
    path, out = tmp_path / "bad.tsv", tmp_path / "run"
    path.write_text(BAD["label never seen in training"][0])
    words = f"finetune classify --checkpoint {base} --data {path} --out {out} --split-seed 2 --skip-bad --epochs 1"
    assert main([*words.split(), "--device", "cpu", "--threads", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert f"left out 1 of 13 examples of the test split; the first: {path}:61: the label 'eggs'" in captured.err
    result = json.loads(captured.out)
    assert result["labels"] == load_model(out).labels == ["ham", "spam"]
    assert np.sum(result["test"]["confusion"]) == 12


def test_labels_of_other_files_must_be_known(base, messages, tmp_path):
    other = tmp_path / "other.tsv"
    other.write_text("ham\taa1\neggs\tbb2\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"other\.tsv:2: the label 'eggs' never stands in training"):
        finetune_classify(config(base, messages, tmp_path / "run", test_data=str(other)), progress=False)


def test_the_classify_command(base, messages, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    finetune_classify(config(base, messages, run, epochs=6), progress=False)
    assert main(["classify", "--checkpoint", str(run), "--device", "cpu", "hh1 hh2 hh3", "ss3 ss1", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["label"] for result in results] == ["ham", "spam"]
    assert all(sum(result["probabilities"].values()) == pytest.approx(1.0) for result in results)
    table = tmp_path / "new.csv"
    table.write_text("text,other\nhh1,1\nss2 ss2,2\n", encoding="utf-8")
    assert main(["classify", "--checkpoint", str(run), "--device", "cpu", str(table)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ham", "spam"]
    assert main(["classify", "--checkpoint", str(run), "--device", "cpu", "ss1", "--max-length", "99"]) == 2
    assert main(["generate", "--checkpoint", str(run), "--device", "cpu", "ss1"]) == 2
    assert "is a classifier" in capsys.readouterr().err
    assert (
        main(["pretrain", "--checkpoint", str(run), "--data", str(table), "--device", "cpu", "--out", f"{run}2"]) == 2
    )
    assert "is a classifier" in capsys.readouterr().err
    assert main(["classify", "--checkpoint", str(run), "--device", "cpu", "missing.csv"]) == 2
    assert "there is no file missing.csv" in capsys.readouterr().err
    assert main(["classify", "--checkpoint", str(base), "--device", "cpu", "ss1"]) == 2
    assert "is no classifier" in capsys.readouterr().err


def test_an_adapter_whose_base_is_gone_or_another_says_so(base, messages, tmp_path):
    import shutil

    own = tmp_path / "base"
    shutil.copytree(base, own)
    run = tmp_path / "run"
    finetune_classify(config(own, messages, run, train="lora", epochs=1), progress=False)
    model = GPT.from_pretrained(own)
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] += 1
    model.save_pretrained(own)
    with pytest.raises(UserError, match="is not the base that the adapter"):
        load_model(run)
    shutil.rmtree(own)
    with pytest.raises(UserError, match=r"its base .* cannot be had"):
        load_model(run)
