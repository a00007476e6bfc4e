"""A model on disk: a directory with ``config.json`` (the ``GPTConfig``) and ``model.safetensors``."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmfast.config import GPTConfig, suggest
from llmfast.errors import UserError
from llmfast.nn import adapter
from llmfast.nn.lora import lora_layers
from llmfast.nn.weights import Stored, Weights, read_safetensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
SHARDS = "shards"  # a folder of parts, which the ranks of a run wrote (llmfast.checkpoint.shards)
MODEL_TYPE = "llmfast"
CLASSIFIER_TYPE = "llmfast-classifier"
OVERRIDES = ("dropout", "attn_scale", "activation")


def save(model: nn.Module, directory: Path) -> None:
    """Write the model's config and weights, a tied matrix once; each file appears whole or not at all.

    Of a model with adapters these alone are written, and in the config which base they belong to.
    """
    try:
        if lora_layers(model):
            directory.mkdir(parents=True, exist_ok=True)
            base = getattr(model, "lora_base", None) or {}
            adapter.save_adapter(model, directory, base=base.get("path"))
            write_config(describe(model), directory)
        else:
            state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
            if model.config.tie_embeddings:  # type: ignore[union-attr]
                state.pop("lm_head.weight", None)
            write(describe(model), state, directory)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the model to {directory}: {error}") from error


def write(description: dict[str, Any], state: dict[str, Tensor], directory: Path, *, shards: int = 1) -> None:
    """Write contiguous weights that share no memory, in one file or so many ``shards``, and the config."""
    directory.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        _replace(directory / WEIGHTS_FILE, lambda path: save_file(state, path, metadata={"format": "pt"}))
    else:
        _write_shards(state, directory / SHARDS, shards)
    write_config(description, directory)


def _write_shards(state: dict[str, Tensor], folder: Path, count: int) -> None:
    """As so many ranks of FSDP2 write them: equal runs of rows, the last ones shorter or absent."""
    folder.mkdir()
    for number in range(count):
        parts, places = {}, {}
        for name, tensor in state.items():
            rows = -(-len(tensor) // count)
            part = tensor[number * rows : (number + 1) * rows]
            if len(part):
                parts[name] = part
                places[name] = {"saved_offsets": [number * rows] + [0] * (tensor.dim() - 1)}
        metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places)}
        save_file(parts, folder / f"shard-{number + 1:05d}-model-{number + 1:05d}-of-{count:05d}.safetensors", metadata)


def write_config(description: dict[str, Any], directory: Path) -> None:
    text = json.dumps(description, indent=2) + "\n"
    _replace(directory / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def describe(model: nn.Module) -> dict[str, Any]:
    """The content of ``config.json``: the ``GPTConfig``, a classifier's labels, the base that adapters belong to."""
    config: GPTConfig = model.config  # type: ignore[assignment]
    values = {"model_type": MODEL_TYPE, **config.to_dict()}
    if hasattr(model, "labels"):
        values |= {"model_type": CLASSIFIER_TYPE, "labels": model.labels}
    if lora_layers(model):
        values["base"] = getattr(model, "lora_base", None)
    return values


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def is_saved(directory: Path) -> bool:
    """Whether ``directory`` is what ``save`` writes, and not another program's model."""
    try:
        values = json.loads((directory / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("model_type") == MODEL_TYPE


def weights_file(directory: Path) -> Path:
    """The file of the weights in what ``save`` writes, or the first of its parts."""
    return next(iter(sorted((directory / SHARDS).glob("*.safetensors"))), directory / WEIGHTS_FILE)


def load(directory: Path, overrides: dict[str, Any]) -> tuple[GPTConfig, Weights]:
    """Config and weights of a saved model."""
    check_overrides(overrides)
    values = json.loads((directory / CONFIG_FILE).read_bytes())
    del values["model_type"]
    try:
        config = GPTConfig.from_dict({**values, **overrides})
    except (UserError, TypeError) as error:
        raise UserError(f"{directory / CONFIG_FILE}: {error}") from None
    file = directory / WEIGHTS_FILE
    if (directory / SHARDS).is_dir():
        return config, Weights(_read_shards(directory / SHARDS), directory / SHARDS, mapped=True)
    if not file.is_file():
        raise UserError(f"{directory} has no {WEIGHTS_FILE} beside its {CONFIG_FILE}: take the model from another copy")
    stored = {name: Stored((name,), (tensor,)) for name, tensor in read_safetensors(file).items()}
    return config, Weights(stored, file, mapped=True)


def _read_shards(folder: Path) -> dict[str, Stored]:
    """The weights of a training checkpoint in shards, each end to end along dimension 0."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = read_safetensors(file)
        try:
            with safe_open(file, "pt") as opened:
                places = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            for name, tensor in tensors.items():
                if "/" not in name and tensor.numel():  # not the optimizer's
                    parts.setdefault(name, []).append((places[name]["saved_offsets"][0], tensor))
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise UserError(f"{file} does not say where its parts belong: {error!r}") from None
    stored = {}
    for name, found in parts.items():
        found.sort(key=lambda part: part[0])
        ends = itertools.accumulate((len(tensor) for _, tensor in found), initial=0)
        if any(start != end for (start, _), end in zip(found, ends, strict=False)):
            raise UserError(f"{folder}: a part of {name} is missing")
        stored[name] = Stored((name,) * len(found), tuple(tensor for _, tensor in found), even=False)
    return stored


def check_overrides(overrides: dict[str, Any], known: Sequence[str] = OVERRIDES) -> None:
    for name in overrides:
        if name not in known:
            raise UserError(
                f"{name} of a saved model cannot be overridden{suggest(name, known)}; can be: {', '.join(known)}"
            )
