"""``chat`` and ``generate`` write to a tuned checkpoint in the style that it was tuned with."""

from __future__ import annotations

import io
import json
import re
import sys
from types import SimpleNamespace

import pytest

from llmfast.cli.main import main

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = "--device cpu --threads 1 --epochs 0.2 --micro-batch-size 4 --sample-every 0 --response-tokens 0"


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A run tuned with a template of a file that is gone."""
    home = tmp_path_factory.mktemp("tuned")
    data = [{"instruction": "Say a", "output": "a"}] * 20
    (home / "data.json").write_text(json.dumps(data))
    (home / "style.txt").write_text("Q: {instruction}\nA:")
    words = f"finetune instruct --checkpoint {base} --data {home}/data.json --out {home}/run {SMALL}"
    assert main([*words.split(), "--prompt-style", str(home / "style.txt"), "--train", "lora"]) == 0
    (home / "style.txt").unlink()
    return home / "run"


@pytest.fixture
def asked(monkeypatch):
    """The prompts that ``generate`` was given, as bytes with ``$`` for end of text; it replies " ok"."""
    prompts = []

    def generate(model, tokenizer, given, *, stream=None, **options):
        ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in given]
        prompts.extend("".join("$" if token == 256 else chr(token) for token in row) for row in ids)
        if stream is not None:
            stream(0, " ok")
        return [" ok"] * len(given)

    monkeypatch.setattr("llmfast.generation.generate", generate)
    return prompts


def say(monkeypatch, capsys, *words, input=""):
    """(standard output, standard error) of a command."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(input.encode()), isatty=lambda: False))
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr()


def test_chat_answers_turn_by_turn(tuned, asked, monkeypatch, capsys):
    lines = "Say b\n\nSay c\n/reset\nSay d\n" + "x" * 48
    shown = say(monkeypatch, capsys, "chat", "--checkpoint", tuned, "--max-new-tokens", 30, input=lines)
    assert shown.out == " ok\n" * 4
    assert asked == [
        "Q: Say b\nA:",
        "Q: Say b\nA: ok$\n\nQ: Say c\nA:",
        "Q: Say d\nA:",
        f"Q: {'x' * 48}\nA:",  # with the turn before, it would not fit
    ]


def test_generate_takes_prompts_for_instructions(tuned, asked, monkeypatch, capsys):
    words = ["generate", "--checkpoint", tuned]
    one = say(monkeypatch, capsys, *words, "Say b")
    assert one.out == " ok\n"
    assert "the prompt is an instruction" in one.err
    assert say(monkeypatch, capsys, *words, "Say c", "Say d").out == " ok\n\n---\n\n ok\n"
    assert json.loads(say(monkeypatch, capsys, *words, "--json", input="Say e\n").out) == {
        "completions": [{"prompt": "Say e\n", "completion": " ok"}]
    }
    assert asked == [f"Q: Say {letter}\nA:" for letter in "bcde"]


def test_another_style_or_none_may_be_asked_for(tuned, base, asked, monkeypatch, capsys):
    plain = say(monkeypatch, capsys, "generate", "--checkpoint", tuned, "--prompt-style", "none", "Say b")
    assert (plain.out, plain.err) == ("Say b ok\n", "")
    say(monkeypatch, capsys, "chat", "--checkpoint", tuned, "--prompt-style", "none", input="Say b\nSay c")
    say(monkeypatch, capsys, "chat", "--checkpoint", base, "--prompt-style", "[{instruction}]", input="Say d\n")
    assert asked == ["Say b", "Say b\n", "Say b\n ok\nSay c\n", "[Say d]"]


def test_an_empty_instruction_is_refused(tuned, capsys):
    assert main(["generate", "--checkpoint", str(tuned), " "]) == 2
    assert "an instruction is missing" in capsys.readouterr().err


def test_a_finished_run_is_resumed_by_its_name_alone(tuned, capsys):
    before = (tuned / "config.toml").read_bytes()
    capsys.readouterr()
    assert main(["finetune", "instruct", "--out", str(tuned), "--resume"]) == 0
    assert re.search(r"steps +1 in", capsys.readouterr().out)
    assert (tuned / "config.toml").read_bytes() == before


def test_tuning_goes_on_in_the_bases_style(tuned, tmp_path, capsys):
    pairs = [{"prompt": "Say a", "chosen": "a", "rejected": "b"}] * 20
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    words = f"finetune preference --checkpoint {tuned} --data {tmp_path}/pairs.json --out {tmp_path}/run {SMALL}"
    assert main(words.split()) == 0
    assert 'prompt_style = "Q: {instruction}\\nA:"' in (tmp_path / "run" / "config.toml").read_text()
