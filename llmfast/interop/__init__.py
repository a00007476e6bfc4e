"""Models of other programs: their files, in and out (docs/interop.md), and their speed (``accelerate``)."""

from llmfast.interop.reading import find, load, located
from llmfast.interop.tokenizers import load_tokenizer
from llmfast.interop.writing import convert

__all__ = ["convert", "find", "load", "load_tokenizer", "located"]
