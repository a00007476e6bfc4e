from __future__ import annotations

import os
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from llmfast.tokenizer import BPETokenizer, load_tokenizer

# The oldest Unicode of the libraries compared here is 13.0 or later: characters that Python 3.10 knows.
BLOCKS = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x600), (0x900, 0xE00), (0x1E00, 0x2100), (0x2100, 0x2C00)]
BLOCKS += [(0x3000, 0x3100), (0x4E00, 0x9FF0), (0xAC00, 0xD7A4), (0xE000, 0xE100), (0xFB00, 0xFF00), (0x1D400, 0x1D800)]
BLOCKS += [(0x1F300, 0x1F650), (0x20000, 0x20100), (0xE0020, 0xE0080), (0x10FF00, 0x10FFFE)]
SPACE = " \t\n\r\v\f\x85\xa0\u1680\u2003\u2028\u3000"
WORDS = [
    "'s",
    "'ll",
    "'RE",
    "don't",
    "we've",
    "I'm",
    "''d",
    "--",
    "...",
    "<|endoftext|>",
    "1234",
    "3.14",
    " the",
    "Été",
]
WORDS += [
    "e\u0301",
    "👩‍👩‍👧",
    "🇩🇪",
    "مرحبا",
    "हिन्दी",
    "ไทย",
    "½",
    "Ⅷ",
    "٣٤",
    "\u200b",
    "\ufeff",
    "\x00",
    "\x1c\x1d",
    "\x7f",
]


def _random_text(rng: random.Random) -> str:
    """Words, numbers, runs of white space and characters of every plane, in any order."""
    parts = []
    for _ in range(rng.randrange(12)):
        choice = rng.randrange(6)
        if choice == 0:
            parts.append("".join(rng.choices(SPACE, k=rng.randrange(1, 6))))
        elif choice == 1:
            parts.append(" " * rng.randrange(1, 9))
        elif choice == 2:
            parts.append(rng.choice(WORDS))
        elif choice == 3:
            parts.append("".join(rng.choices("abcdefghijklmnopqrstuvwxyzABC0123456789'", k=rng.randrange(1, 12))))
        elif choice == 4:
            parts.append(chr(rng.randrange(0x20)) * rng.randrange(1, 4))
        else:
            first, last = rng.choice(BLOCKS)
            characters = (chr(rng.randrange(first, last)) for _ in range(rng.randrange(1, 8)))
            parts.append("".join(c for c in characters if unicodedata.category(c) != "Cn"))
    return "".join(parts)


@pytest.fixture(scope="session")
def random_texts() -> Callable[[int, int], list[str]]:
    """``random_texts(n, seed)``: n random Unicode strings."""

    def make(n: int, seed: int) -> list[str]:
        rng = random.Random(seed)
        return [_random_text(rng) for _ in range(n)]

    return make


@pytest.fixture(scope="session")
def data_folder() -> Path:
    folder = os.environ.get("LLMFAST_TEST_DATA")
    if not folder:
        pytest.skip("LLMFAST_TEST_DATA is not set: it names the folder of real test files")
    return Path(folder)


@pytest.fixture(scope="session")
def gpt2(data_folder: Path) -> BPETokenizer:
    tokenizer = load_tokenizer(data_folder / "gpt2")
    assert isinstance(tokenizer, BPETokenizer)
    return tokenizer
