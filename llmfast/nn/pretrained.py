"""A model on disk: a directory with ``config.json`` (the ``GPTConfig``) and ``model.safetensors``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmfast.config import GPTConfig, suggest
from llmfast.errors import UserError
from llmfast.nn import adapter
from llmfast.nn.lora import lora_layers

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_TYPE = "llmfast"
CLASSIFIER_TYPE = "llmfast-classifier"
OVERRIDES = ("dropout", "attn_scale")


def save(model: nn.Module, directory: Path) -> None:
    """Write the model's config and weights, a tied matrix once; each file appears whole or not at all.

    Of a model with adapters these alone are written, and in the config which base they belong to.
    """
    text = json.dumps(describe(model), indent=2) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if lora_layers(model):
            base = getattr(model, "lora_base", None) or {}
            adapter.save_adapter(model, directory, base=base.get("path"))
        else:
            state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
            if model.config.tie_embeddings:  # type: ignore[union-attr]
                state.pop("lm_head.weight", None)
            _replace(directory / WEIGHTS_FILE, lambda path: save_file(state, path, metadata={"format": "pt"}))
        _replace(directory / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the model to {directory}: {error}") from error


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


def load(directory: Path, overrides: dict[str, Any]) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and weights of a saved model."""
    for name in overrides:
        if name not in OVERRIDES:
            known = ", ".join(OVERRIDES)
            raise UserError(f"{name} of a saved model cannot be overridden{suggest(name, OVERRIDES)}; can be: {known}")
    if not directory.exists():
        raise UserError(f"{directory} does not exist")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise UserError(f"{directory} is not a saved llmfast model: it has no {name}")
    try:
        values = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{directory / CONFIG_FILE} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or values.pop("model_type", None) != MODEL_TYPE:
        raise UserError(
            f"{directory / CONFIG_FILE} does not describe an llmfast model (model_type is not {MODEL_TYPE})"
        )
    try:
        config = GPTConfig.from_dict({**values, **overrides})
    except (UserError, TypeError) as error:
        raise UserError(f"{directory / CONFIG_FILE}: {error}") from None
    try:
        return config, load_file(directory / WEIGHTS_FILE)
    except SafetensorError as error:
        raise UserError(f"{directory / WEIGHTS_FILE} is damaged: {error}") from None


@torch.no_grad()
def fill(model: nn.Module, state: dict[str, Tensor], directory: Path) -> None:
    """Copy ``state`` into the model's parameters; every name and shape must fit."""
    file, parameters = directory / WEIGHTS_FILE, dict(model.named_parameters())
    if missing := parameters.keys() - state.keys():
        raise UserError(f"{file} lacks {min(missing)}")
    if unknown := state.keys() - parameters.keys():
        raise UserError(f"{file} holds {min(unknown)}, which is not in the model that config.json describes")
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            got, want = tuple(state[name].shape), tuple(parameter.shape)
            raise UserError(f"{file}: {name} is {got}, config.json wants {want}")
        parameter.copy_(state[name])
