"""One small model in every format that llmfast reads, without the programs that own them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow_bundle
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmfast import GPT, GPTConfig, interop

SHAPE: dict[str, Any] = dict(vocab_size=53, block_size=13, n_layer=2, n_head=3, n_embd=24, activation="gelu_tanh")
TLFS = dict(activation="relu", qkv_bias=False, tie_embeddings=False, lm_head_bias=True, init="pytorch")


def model(**options: Any) -> GPT:
    """Random weights, the biases and norms too: nothing stays at its initial 0 or 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = GPT(GPTConfig(**{**SHAPE, **options}))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_(0.1, 0.2)
    return made.eval()


def written(to: str, folder: Path, **options: Any) -> Path:
    """The model in the format that ``llmfast convert --to`` gives it."""
    source = folder.with_name(f".{folder.name}.source")
    model(**options).save_pretrained(source)
    return interop.convert(source, folder, to)  # type: ignore[arg-type]


def _hugging_face_state(folder: Path, options: dict[str, Any]) -> dict[str, Tensor]:
    written("hf", folder, **options)
    file = folder / "model.safetensors"
    state = load_file(file)
    file.unlink()
    return state


def _sharded(folder: Path, **options: Any) -> None:
    state = _hugging_face_state(folder, options)
    names = sorted(state)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: state[key] for key in part}, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _bin(folder: Path, zipped: bool, options: dict[str, Any]) -> None:
    state = _hugging_face_state(folder, options)
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


def _tensorflow(folder: Path, **options: Any) -> None:
    folder.mkdir()
    made = model(**options)
    tensors = {}
    for name, t in made.state_dict().items():
        if name == "lm_head.weight":
            continue
        parts = name.removeprefix("transformer.").replace("h.", "h", 1).split(".")
        matrix = parts[-2].startswith("c_") and parts[-1] == "weight"
        if parts[0] in ("wte", "wpe"):
            parts = parts[:1]
        else:
            parts[-1] = {"weight": "w" if matrix else "g", "bias": "b"}[parts[-1]]
        tensors["model/" + "/".join(parts)] = (t.T[None] if matrix else t).numpy()
    tensorflow_bundle.write(folder, tensors)
    names = {
        "n_vocab": "vocab_size",
        "n_ctx": "block_size",
        "n_embd": "n_embd",
        "n_head": "n_head",
        "n_layer": "n_layer",
    }
    hparams = {theirs: getattr(made.config, ours) for theirs, ours in names.items()}
    (folder / "hparams.json").write_text(json.dumps(hparams))


FORMATS: dict[str, Callable[..., Any]] = {  # (folder, options of the model)
    "llmfast": lambda folder, **options: model(**options).save_pretrained(folder),
    "openai-tf": _tensorflow,
    "hf": lambda folder, **options: written("hf", folder, **options),
    "hf-sharded": _sharded,
    "hf-bin": lambda folder, **options: _bin(folder, True, options),
    "hf-bin-old": lambda folder, **options: _bin(folder, False, options),
    "nanogpt": lambda folder, **options: written("nanogpt", folder, **options),
    "llmc": lambda folder, **options: written("llmc", folder, **options),
    "book": lambda folder, **options: written("book", folder, **options),
    "tlfs": lambda folder, **options: written("tlfs", folder, **TLFS, **options),
}
