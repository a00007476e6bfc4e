"""A word tokenizer in thirty lines: split text with a regular expression, give each distinct word an id.

Follows chapter 2 of Sebastian Raschka, "Build a Large Language Model (From Scratch)". A word that the vocabulary lacks
becomes <|unk|>, and is lost; <|endoftext|> stands between unrelated texts. Byte-pair encodings (llmfast.tokenizer) need
no <|unk|>: they spell any word from pieces, at worst from its bytes.

Run `python regex_tokenizer.py the-verdict.txt`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<|unk|>"


def split_words(text: str) -> list[str]:
    """Words and punctuation marks in order, without the white space between them."""
    return [part.strip() for part in re.split(r'([,.:;?_!"()\']|--|\s)', text) if part.strip()]


class RegexTokenizer:
    """Ids in alphabetical order of the words of ``text``, then <|endoftext|> and <|unk|>."""

    def __init__(self, text: str):
        self.words = [*sorted(set(split_words(text))), END_OF_TEXT, UNKNOWN]
        self.ids = {word: i for i, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(word, self.ids[UNKNOWN]) for word in split_words(text)]

    def decode(self, ids: list[int]) -> str:
        """The words with one space between them, and none before a punctuation mark."""
        return re.sub(r'\s+([,.:;?!"()\'])', r"\1", " ".join(self.words[i] for i in ids))


def main() -> None:
    tokenizer = RegexTokenizer(Path(sys.argv[1]).read_text(encoding="utf-8"))
    text = f"Hello, do you like tea? {END_OF_TEXT} In the sunlit terraces of the palace."
    ids = tokenizer.encode(text)
    print(f"{len(tokenizer.words):,} words\n{text}\n{ids}\n{tokenizer.decode(ids)}")


if __name__ == "__main__":
    main()
