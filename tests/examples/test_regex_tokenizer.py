"""The word tokenizer of examples/regex_tokenizer.py gives the ids that the book prints for the same text."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "examples" / "regex_tokenizer.py"
RegexTokenizer = runpy.run_path(str(PATH))["RegexTokenizer"]

TEXT = "Hello, do you like tea? <|endoftext|> In the sunlit terraces of the palace."
BOOK_IDS = [1131, 5, 355, 1126, 628, 975, 10, 1130, 55, 988, 956, 984, 722, 988, 1131, 7]
BOOK_TEXT = "<|unk|>, do you like tea? <|endoftext|> In the sunlit terraces of the <|unk|>."


@pytest.fixture
def verdict() -> Path:
    folder = os.environ.get("LLMFAST_TEST_DATA")
    if not folder:
        pytest.skip("LLMFAST_TEST_DATA is not set: it names the folder of real test files")
    return Path(folder) / "text/the-verdict.txt"


def test_ids_and_words_are_the_books(verdict):
    tokenizer = RegexTokenizer(verdict.read_text(encoding="utf-8"))
    assert len(tokenizer.words) == 1132
    assert tokenizer.encode(TEXT) == BOOK_IDS
    assert tokenizer.decode(BOOK_IDS) == BOOK_TEXT


def test_known_words_come_back_and_others_are_unknown():
    tokenizer = RegexTokenizer('Is this-- a test? "Yes," it said.')
    assert tokenizer.words[-2:] == ["<|endoftext|>", "<|unk|>"]
    assert tokenizer.decode(tokenizer.encode("Is this a test, said it.")) == "Is this a test, said it."
    assert tokenizer.decode(tokenizer.encode("Is that a toast?")) == "Is <|unk|> a <|unk|>?"
    assert tokenizer.encode(" \n") == []
    assert RegexTokenizer("").encode("any thing") == [1, 1]


def test_the_script_prints_the_ids(verdict, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["regex_tokenizer.py", str(verdict)])
    runpy.run_path(str(PATH), run_name="__main__")
    assert str(BOOK_IDS) in capsys.readouterr().out
