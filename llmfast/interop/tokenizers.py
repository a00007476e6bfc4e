"""The tokenizer that goes with another program's checkpoint, where the checkpoint brings one."""

from __future__ import annotations

import logging
from pathlib import Path

from llmfast.errors import UserError
from llmfast.interop.reading import find
from llmfast.nn import pretrained
from llmfast.tokenizer import TOKENIZER_FILE, Tokenizer
from llmfast.tokenizer import load_tokenizer as load_saved
from llmfast.tokenizer.gpt2 import is_gpt2_path, load_gpt2

logger = logging.getLogger("llmfast")

GPT2_SIZES = (50257, 50304)  # its vocabulary, and that padded to a multiple of 64


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer | None:
    """The tokenizer beside the checkpoint ``path``, or None with the reason logged.

    GPT-2's is taken for a model of ``vocab_size`` 50257 or 50304 that brings none, where its files are at hand.
    """
    path = Path(path)
    folder = path if pretrained.is_saved(path) else find(path).parent
    if (folder / TOKENIZER_FILE).is_file():
        return load_saved(folder)
    if is_gpt2_path(folder):
        try:
            return load_gpt2(folder)
        except UserError as error:
            logger.warning("the tokenizer beside %s is not brought along: %s", path, error)
            return None
    if (folder / "meta.pkl").is_file():
        logger.warning("%s is a pickle, which llmfast does not load: name the tokenizer", folder / "meta.pkl")
    return None
