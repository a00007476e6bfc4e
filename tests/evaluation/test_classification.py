"""llmfast evaluate on a classifier: the figures of the run that made it, and mistakes."""

from __future__ import annotations

import json

import pytest
import torch

from llmfast.cli.main import main
from llmfast.config import GPTConfig
from llmfast.finetuning.classify import class_probabilities
from llmfast.nn import GPT, GPTForClassification
from llmfast.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
CUT = 12  # tokens


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run, its result): a classifier of three labels that cuts its texts."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    GPT(GPTConfig(vocab_size=257, block_size=48, n_layer=1, n_head=2, n_embd=16)).save_pretrained(folder / "base")
    load_tokenizer("byte").save(folder / "base")
    data = folder / "data.csv"
    data.write_text(
        "label,text\n" + "".join(f"{'xyz'[i % 3]},{'abc'[(i + i // 50) % 3] * (1 + i % 30)}\n" for i in range(90))
    )
    words = f"--checkpoint {folder / 'base'} --data {data} --out {folder / 'run'} --max-length {CUT} --epochs 3"
    settings = "--micro-batch-size 4 --learning-rate 1e-2 --warmup-steps 2 --device cpu --threads 1 --json"
    assert main(["finetune", "classify", *words.split(), *settings.split()]) == 0
    return folder / "run", json.loads((folder / "run" / "results.json").read_text())["test"]


def evaluate(capsys, *words) -> tuple[int, str]:
    code = main(["evaluate", "--device", "cpu", "--threads", "1", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out if code == 0 else captured.err


def test_a_runs_own_test_split_gives_the_figures_of_the_run(trained, capsys):
    run, result = trained
    code, out = evaluate(capsys, "--checkpoint", run, "--json")
    assert code == 0
    found = json.loads(out)
    for name in ("accuracy", "macro_f1", "confusion", "classes"):
        assert found[name] == result[name]
    assert found["loss"] == pytest.approx(result["loss"], rel=1e-6)
    assert 0 < found["accuracy"] < 1
    code, out = evaluate(capsys, "--checkpoint", run)
    assert f"accuracy    {found['accuracy']:.2%}" in out
    assert "precision" in out


def test_other_texts_in_any_order_and_batch(trained, capsys, tmp_path):
    run, _ = trained
    rows = [("cc", "y"), ("aaaaaaa", "x"), ("b", "z"), ("ab" * 9, "y"), ("cab", "x")]
    data = tmp_path / "other.jsonl"
    data.write_text("".join(json.dumps({"words": text, "kind": label}) + "\n" for text, label in rows))
    columns = ("--text-column", "words", "--label-column", "kind")
    model = GPTForClassification.from_pretrained(run / "checkpoints" / "best").eval()
    ids = [load_tokenizer("byte").encode(text) for text, _ in rows]
    wanted = torch.tensor([model.labels.index(label) for _, label in rows])
    p = class_probabilities(model, ids)
    for batch in (1, 2, 8):
        code, out = evaluate(capsys, "--checkpoint", run, "--data", data, *columns, "--batch-size", batch, "--json")
        assert code == 0
        found = json.loads(out)
        assert found["examples"] == 5
        assert found["accuracy"] == pytest.approx((p.argmax(1) == wanted).double().mean().item())
        assert found["loss"] == pytest.approx(-p[range(5), wanted].log().mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("text,label\na,x\nb,q\n", [], "data.csv:3: the label 'q' never stands in training (x, y, z)"),
        (f"text,label\n{'a' * 60},x\n", [], "60 tokens are more than the model's context, 48: --max-length 48 cuts"),
        ("text,label\n,x\n", [], "data.csv:2: 'text' is empty"),
        ("text,label\na,x\n", ["--baseline"], "is a classifier: leave out --baseline"),
        ("text,label\na,x\n", ["--quantize", "int8"], "--quantize int8 is for models that write text"),
        ("text,label\na,x\n", ["--max-length", "49"], "max_length must lie between 1 and the model's context of 48"),
        ("text,label\na,x\n", ["--text-column", "txt"], "has no column 'txt' (did you mean text?)"),
        ("text,label\na,q\n", ["--skip-bad"], "holds no example that can be used"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(trained, capsys, tmp_path, text, flags, words):
    data = tmp_path / "data.csv"
    data.write_text(text)
    code, err = evaluate(capsys, "--checkpoint", trained[0], "--data", data, *flags)
    assert code == 2
    assert words in err.splitlines()[-1]


def test_what_cannot_be_used_is_left_out_on_request(trained, capsys, tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("text,label\na,x\nb,q\n,y\nc,z\n")
    code, out = evaluate(capsys, "--checkpoint", trained[0], "--data", data, "--skip-bad", "--json")
    assert code == 0
    assert json.loads(out)["examples"] == 2


def test_flags_for_labels_are_refused_for_a_model_that_writes(trained, capsys, tmp_path):
    run, _ = trained
    code, err = evaluate(capsys, "--checkpoint", run.parent / "base", "--data", run.parent / "data.csv", "--skip-bad")
    assert code == 2
    assert "is no classifier: leave out --skip-bad" in err
