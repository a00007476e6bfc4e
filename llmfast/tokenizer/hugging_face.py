"""Tokenizers in Hugging Face's files: tokenizer.json, vocab.json and merges.txt, tokenizer_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmfast.errors import UserError
from llmfast.tokenizer.base import END_OF_TEXT, Tokenizer
from llmfast.tokenizer.bpe import BPETokenizer
from llmfast.tokenizer.gpt2 import parse_written, written
from llmfast.tokenizer.simple import CharTokenizer

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def write(tokenizer: Tokenizer, folder: Path, block_size: int) -> None:
    """Files from which transformers' AutoTokenizer makes the same tokens."""
    special = tokenizer.eot_id is not None
    content: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [
            {"id": tokenizer.eot_id, "content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
        ] if special else [],
    }  # fmt: skip
    settings: dict[str, Any] = {"model_max_length": block_size, "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, CharTokenizer):
        split = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False}
        vocabulary = {character: i for i, character in enumerate(tokenizer.characters)}
        content |= {"pre_tokenizer": split, "decoder": {"type": "Fuse"}}
        content["model"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": ""}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        vocabulary = {written(token): i for i, token in enumerate(tokenizer.token_bytes()) if i != tokenizer.eot_id}
        if special:
            vocabulary[END_OF_TEXT] = tokenizer.vocab_size - 1
        merges = tokenizer.merges() if isinstance(tokenizer, BPETokenizer) else []
        pairs = [[written(left), written(right)] for left, right in merges]
        content |= {"pre_tokenizer": _BYTE_LEVEL, "decoder": _BYTE_LEVEL}
        content["model"] = {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary, "merges": pairs,
        }  # fmt: skip
        settings |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
        settings |= {name: END_OF_TEXT for name in ("bos_token", "eos_token", "unk_token")}
        _write(folder / "vocab.json", vocabulary)
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in pairs)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write(folder / "tokenizer.json", content)
    _write(folder / "tokenizer_config.json", settings)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_folder(folder: Path) -> bool:
    """Whether Hugging Face's tokenizer files stand in ``folder``."""
    return (folder / "tokenizer.json").is_file() or (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    )


def read(folder: Path) -> Tokenizer:
    """A byte-level BPE with GPT-2's pattern, or characters as ``write`` writes them.

    Its ids must be those of llmfast's: tokens in the order of their merges, <|endoftext|> last. ``UserError`` for
    another kind.
    """
    file = folder / "tokenizer.json"
    try:
        if file.is_file():
            content = json.loads(file.read_bytes())
            model = content["model"]
            return _characters(model["vocab"]) if model["type"] == "WordLevel" else _byte_pairs(content)
        file = folder / "vocab.json"
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        return _build(json.loads(file.read_bytes()), merges)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(f"{file} is no tokenizer that llmfast knows ({type(error).__name__}: {error})") from None


def _characters(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = CharTokenizer(vocabulary)
    if vocabulary != {character: i for i, character in enumerate(tokenizer.characters)}:
        raise UserError("its words are not single characters in order")
    return tokenizer


def _byte_pairs(content: dict[str, Any]) -> Tokenizer:
    model, before = content["model"], content["pre_tokenizer"]
    if model["type"] != "BPE" or before["type"] != "ByteLevel":
        raise UserError("it is no byte-level BPE")
    if before.get("add_prefix_space", True) or not before.get("use_regex", True) or content.get("normalizer"):
        raise UserError("it changes or splits the text otherwise than GPT-2's does")
    vocabulary = dict(model["vocab"])
    for token in content.get("added_tokens") or []:
        vocabulary[token["content"]] = token["id"]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return _build(vocabulary, merges)


def _build(vocabulary: dict[str, int], merges: list[list[str]]) -> Tokenizer:
    names = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[name] for name in names] != list(range(len(names))) or names[-1] != END_OF_TEXT:
        raise UserError(f"its last id is not {END_OF_TEXT}, as llmfast's tokenizers have it")
    tokenizer = BPETokenizer([parse_written(name) for name in names[:-1]])
    if tokenizer.merges() != [tuple(parse_written(part) for part in pair) for pair in merges]:
        raise UserError("its ids are not in the order of its merges")
    return tokenizer
