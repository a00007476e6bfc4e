"""Text to token ids and back: GPT-2's encoding, bytes, characters, and byte-pair encodings trained on any text."""

from __future__ import annotations

from llmfast.tokenizer.base import TOKENIZER_FILE, Tokenizer
from llmfast.tokenizer.bpe import BPETokenizer
from llmfast.tokenizer.bpe_train import train_bpe
from llmfast.tokenizer.load import load_tokenizer
from llmfast.tokenizer.simple import ByteTokenizer, CharTokenizer, train_char

__all__ = [
    "TOKENIZER_FILE",
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "train_bpe",
    "train_char",
]
