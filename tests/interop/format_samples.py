"""One small model in every format that llmfast reads, without the programs that own them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmfast import GPT, GPTConfig, interop
import tensorflow_bundle

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


def _hugging_face_state(folder: Path) -> dict[str, Tensor]:
    written("hf", folder)
    file = folder / "model.safetensors"
    state = load_file(file)
    file.unlink()
    return state


def _sharded(folder: Path) -> None:
    state = _hugging_face_state(folder)
    names = sorted(state)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: state[key] for key in part}, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _bin(folder: Path, zipped: bool) -> None:
    state = _hugging_face_state(folder)
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


def _tensorflow(folder: Path) -> None:
    folder.mkdir()
    made = model()
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
    hparams = {"n_vocab": 53, "n_ctx": 13, "n_embd": 24, "n_head": 3, "n_layer": 2}
    (folder / "hparams.json").write_text(json.dumps(hparams))


FORMATS: dict[str, Callable[[Path], Any]] = {
    "llmfast": lambda folder: model().save_pretrained(folder),
    "openai-tf": _tensorflow,
    "hf": lambda folder: written("hf", folder),
    "hf-sharded": _sharded,
    "hf-bin": lambda folder: _bin(folder, True),
    "hf-bin-old": lambda folder: _bin(folder, False),
    "nanogpt": lambda folder: written("nanogpt", folder),
    "llmc": lambda folder: written("llmc", folder),
    "book": lambda folder: written("book", folder),
    "tlfs": lambda folder: written("tlfs", folder, **TLFS),
}
