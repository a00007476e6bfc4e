"""A model on its way out: into llmfast's own files or another program's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from llmfast.config import GPTConfig
from llmfast.errors import UserError
from llmfast.interop import book, gguf, huggingface, llmc, nanogpt, tlfs
from llmfast.interop.reading import load
from llmfast.interop.tokenizers import load_tokenizer
from llmfast.nn import GPT, pretrained
from llmfast.nn.lora import lora_layers
from llmfast.tokenizer import Tokenizer

Format = Literal["llmfast", "hf", "nanogpt", "llmc", "book", "tlfs", "gguf"]
_FILE_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".gguf")
Writer = Callable[[GPTConfig, Mapping[str, Tensor], Path, "Tokenizer | None"], None]


def _llmfast(config: GPTConfig, weights: Mapping[str, Tensor], folder: Path, shards: int) -> None:
    state = {name: tensor.contiguous() for name, tensor in weights.items()}
    pretrained.write({"model_type": pretrained.MODEL_TYPE, **config.to_dict()}, state, folder, shards=shards)


WRITERS: dict[str, Writer] = {
    "hf": huggingface.write,
    "nanogpt": lambda config, weights, folder, _: nanogpt.write(config, weights, folder),
    "llmc": llmc.write,
    "book": lambda config, weights, folder, _: book.write(config, weights, folder),
    "tlfs": lambda config, weights, folder, _: tlfs.write(config, weights, folder),
    "gguf": gguf.write,
}


def convert(
    source: str | Path | GPT,
    destination: str | Path,
    to: Format = "llmfast",
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    shards: int = 1,
    **overrides: Any,
) -> Path:
    """Write ``source`` into the new folder ``destination`` in another program's format.

    ``source``: a checkpoint, whoever wrote it, or a model in memory. The weights keep their type unless ``dtype`` is
    given. The tokenizer is the source's own unless one is given, and goes along as ``llmfast_tokenizer.json`` and,
    where the program has files for it, in those. ``shards``: of llmfast's format, in how many files, as as many ranks
    write them. ``overrides`` as in ``load``. The folder appears whole or not at
    all. Raises ``UserError``, also for what the program cannot express.
    """
    destination = Path(destination)
    if shards < 1 or (shards > 1 and to != "llmfast"):
        raise UserError(f"{shards} shards: llmfast's own format is written in 1 or more, the others in their own way")
    if destination.suffix in _FILE_SUFFIXES:
        raise UserError(f"{destination}: name the folder to write, the file in it has the name that {to} gives it")
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise UserError(f"{destination} is there already: choose another place")
    config, weights = _in_memory(source) if isinstance(source, GPT) else load(source, **overrides)
    if tokenizer is None and not isinstance(source, GPT):
        tokenizer = load_tokenizer(source)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids and the model {config.vocab_size:,}: it is another model's"
        )
    building = destination.resolve().with_name(f".{destination.resolve().name}.{os.getpid()}.partial")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        building.mkdir()
        cast = weights if dtype is None else _Cast(weights, dtype)
        if to == "llmfast":
            _llmfast(config, cast, building, shards)
        else:
            WRITERS[to](config, cast, building, tokenizer)
        if tokenizer is not None:
            tokenizer.save(building)
        building.replace(destination)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save's own for a full disk is the last
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]
        raise UserError(f"cannot write the model to {destination}: {reason}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return destination


def _in_memory(model: GPT) -> tuple[GPTConfig, dict[str, Tensor]]:
    if hasattr(model, "score"):
        raise UserError("this is a classifier: other programs' formats hold language models")
    if lora_layers(model):
        raise UserError("the model has adapters: merge them first (llmfast.nn.merge_lora)")
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        state.pop("lm_head.weight", None)
    return model.config, state


class _Cast(Mapping[str, Tensor]):
    """Weights in another type, each cast when it is asked for."""

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._weights, self._dtype = weights, dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name].to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
