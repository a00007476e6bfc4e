"""A dataclass becomes flags, TOML keys and help, and every mistake in them becomes one line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from llmfast.cli.options import help_text, options_of, parse, pick_action
from llmfast.config import PretrainConfig, option
from llmfast.errors import UserError


@dataclass
class Base:
    """What is shared."""

    seed: int = option(7, "the seed")
    dtype: Literal["float32", "bfloat16"] | None = option(None, "compute type")


@dataclass
class Options(Base):
    """Options of a verb."""

    checkpoint: str = field(metadata={"help": "weights"}, kw_only=True)
    words: list[str] = field(default_factory=list, metadata={"help": "what to say", "positional": True})
    data_files: list[str] = field(default_factory=list, metadata={"help": "data"})
    rate: float = option(1e-3, "a rate")
    scale: float | Literal["auto"] | None = option(None, "a scale")
    shuffle: bool = option(True, "whether to shuffle")
    bias: bool | None = option(None, "whether there is a bias")


def ask(line: str | list[str]) -> Options:
    words = line.split() if isinstance(line, str) else line
    options = parse(Options, ["--checkpoint", "c", *words], "llmfast verb", "does it")
    assert options is not None
    return options


def complaint(line: str | list[str]) -> str:
    with pytest.raises(UserError) as caught:
        ask(line)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_the_dataclass_s():
    assert ask("") == Options(checkpoint="c")


def test_every_kind_of_field_has_its_flag():
    given = ask(
        "hello --seed -3 --data-files a b --rate 1e-4 --scale auto --no-shuffle --bias --dtype float32 --data-files c"
    )
    assert given == Options(
        checkpoint="c", words=["hello"], data_files=["a", "b", "c"], rate=1e-4, scale="auto", shuffle=False, bias=True,
        seed=-3, dtype="float32",
    )  # fmt: skip
    assert ask("--scale 0.5").scale == 0.5
    assert ask("--no-bias").bias is False


@pytest.mark.parametrize("line", ["a b --seed 1", "--seed 1 a b", "a --seed 1 b", "a --seed=1 -- b"])
def test_words_may_stand_anywhere(line):
    assert ask(line).words == ["a", "b"]


def test_after_two_dashes_a_word_may_look_like_a_flag():
    assert ask(["--", "--seed", "x"]).words == ["--seed", "x"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--sed 3", "unknown flag --sed (did you mean --seed?)"),
        ("--zzz=3", "unknown flag --zzz; see llmfast verb --help"),
        ("--see 3", "unknown flag --see (did you mean --seed?)"),
        ("--seed x", "--seed: expected an integer, got 'x'"),
        ("--seed 1.5", "--seed: expected an integer, got '1.5'"),
        ("--seed", "--seed: expected one argument"),
        ("--rate fast", "--rate: expected a number, got 'fast'"),
        ("--rate inf", "--rate: expected a number, got 'inf'"),
        ("--scale aut", "--scale: expected a number or one of auto, got 'aut' (did you mean auto?)"),
        ("--dtype bfloat", "--dtype: expected one of float32, bfloat16, got 'bfloat' (did you mean bfloat16?)"),
        ("--data-files", "--data-files: expected at least one argument"),
    ],
)
def test_a_wrong_flag_or_value_is_named(line, said):
    assert complaint(line).startswith(said)


def test_a_missing_required_option_is_named():
    with pytest.raises(UserError, match="--checkpoint is missing; see llmfast verb --help"):
        parse(Options, [], "llmfast verb", "")


def test_a_word_too_many_is_named():
    with pytest.raises(UserError, match="unexpected argument 'a'"):
        parse(Base, ["a"], "llmfast verb", "")


def test_toml_sets_options_and_flags_override_it(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('seed = 5\nrate = 1\ndata-files = ["x"]\nshuffle = false\ndtype = "bfloat16"\nscale = "auto"\n')
    expected = Options(
        checkpoint="c", seed=6, rate=1.0, data_files=["x"], shuffle=False, dtype="bfloat16", scale="auto"
    )
    assert ask(f"--config {path} --seed 6") == expected
    assert type(expected.rate) is float
    path.write_text('checkpoint = "from the file"\nwords = "one"')
    given = parse(Options, ["--config", str(path)], "llmfast verb", "")
    assert given == Options(checkpoint="from the file", words=["one"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sede = 3", "unknown key 'sede' (did you mean seed?)"),
        ("data-flies = []", "unknown key 'data-flies' (did you mean data_files?)"),
        ("seed = 1.0", "seed: expected an integer, got 1.0 (float)"),
        ("seed = true", "seed: expected an integer, got True (bool)"),
        ('rate = "1e-3"', "rate: expected a number, got '1e-3' (str)"),
        ("rate = nan", "rate: expected a number, got nan (float)"),
        ("shuffle = 1", "shuffle: expected true or false, got 1 (int)"),
        ("data_files = [1]", "data_files: expected text, got 1 (int)"),
        ('seed = ["a"]', "seed: expected an integer, got ['a'] (list)"),
        ('dtype = "float23"', "dtype: expected one of float32, bfloat16, got 'float23' (str) (did you mean float32?)"),
        ("[seed]\nx = 1", "seed: expected an integer, got {'x': 1} (dict)"),
        ("seed = 1 2", "not a TOML file: Expected newline or end of document after a statement (at line 1, column 10)"),
    ],
)
def test_a_wrong_toml_names_file_key_and_value(tmp_path, text, said):
    path = tmp_path / "run.toml"
    path.write_text(text)
    assert complaint(f"--config {path}").startswith(f"{path}: {said}")


def test_a_toml_that_is_not_text_is_told(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert complaint(f"--config {path}").startswith(f"{path}: not a TOML file: 'utf-8' codec")


def test_help_holds_every_flag_with_its_help_and_default(capsys):
    assert parse(PretrainConfig, ["--help"], "llmfast pretrain", "train a model") is None
    shown = " ".join(capsys.readouterr().out.split())
    for one in options_of(PretrainConfig):
        assert one.flag in shown
        assert one.help, one.name
        assert help_text(one) in shown
    assert "--max-steps INT optimizer steps (default: 1000)" in shown
    assert "--shuffle, --no-shuffle shuffle sliding windows in every epoch (default: on)" in shown
    assert "usage: llmfast pretrain [options] train a model" in shown


def test_help_says_what_is_required_and_what_words_mean(capsys):
    parse(Options, ["-h"], "llmfast verb", "does it")
    shown = capsys.readouterr().out
    assert shown.startswith("usage: llmfast verb [WORDS ...] [options]\n\ndoes it\n  WORDS: what to say\n")
    assert "weights (required)" in shown
    assert shown.index("--checkpoint") < shown.index("What is shared:") < shown.index("--seed")


def test_a_field_without_a_flag_is_our_bug():
    @dataclass
    class Strange:
        table: dict = field(default_factory=dict)

    with pytest.raises(TypeError, match="no flag can be made of"):
        options_of(Strange)


def test_actions_are_picked_by_name_and_a_typo_is_told(capsys):
    actions = {"encode": ("text to ids", Base, print), "decode": ("ids to text", Options, print)}
    assert pick_action("tokenizer", "does things", actions, ["decode", "1"]) == (
        "tokenizer decode", "ids to text", Options, print,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"unknown tokenizer action 'encdoe' \(did you mean encode\?\)"):
        pick_action("tokenizer", "does things", actions, ["encdoe"])
    assert pick_action("tokenizer", "does things", actions, []) is None
    assert "decode      ids to text" in capsys.readouterr().out
