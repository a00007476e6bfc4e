"""The tokenizer that goes with another program's checkpoint, where the checkpoint brings one."""

from __future__ import annotations

import logging
from pathlib import Path

from llmfast.errors import UserError
from llmfast.interop.reading import find, vocabulary_of
from llmfast.interop.target import GPT2_SIZES
from llmfast.nn import pretrained
from llmfast.tokenizer import TOKENIZER_FILE, Tokenizer, hugging_face
from llmfast.tokenizer import load_tokenizer as load_saved
from llmfast.tokenizer.gpt2 import is_gpt2_path, load_gpt2

logger = logging.getLogger("llmfast")


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of the checkpoint ``path``: its own, or None with the reason logged.

    GPT-2's is taken for a model of 50257 or 50304 tokens that brings none, where its files are on this machine.
    """
    path = Path(path)
    file = pretrained.weights_file(path) if pretrained.is_saved(path) else find(path)
    folder = path if path.is_dir() else file.parent
    if (folder / TOKENIZER_FILE).is_file():
        return load_saved(folder)
    reasons = []
    for is_here, read in ((is_gpt2_path, load_gpt2), (hugging_face.is_folder, hugging_face.read)):
        if is_here(folder):
            try:
                return read(folder)
            except UserError as error:
                reasons.append(str(error))
    if reasons:
        logger.warning("the tokenizer in %s is not brought along: %s", folder, reasons[-1])
        return None
    if (folder / "meta.pkl").is_file():
        logger.warning("%s is a pickle, which llmfast does not load: name the tokenizer", folder / "meta.pkl")
        return None
    if vocabulary_of(file) not in GPT2_SIZES:
        return None
    try:
        return load_gpt2(network=False)
    except UserError as error:
        logger.warning("%s has GPT-2's vocabulary, whose files are not at hand: %s", path, error)
        return None
