"""Adapters on disk, in PEFT's own format: ``adapter_config.json`` and ``adapter_model.safetensors``.

The names are those that PEFT gives a Hugging Face GPT-2: ``base_model.model.transformer.h.0.attn.c_attn.lora_A.weight``
(r, in) and ``lora_B.weight`` (out, r). Adapters of their own for q, k and v become one of rank 3 r for c_attn, whose B
is block-diagonal: the same function exactly. What else a model trains, such as a classification head, stands beside
them under its own name.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmfast.errors import UserError
from llmfast.nn.lora import HEADS, QKV, LoRALinear, LoRAShape, attach, lora_layers

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SPLITS_KEY = "llmfast_qkv_splits"  # in the file's metadata, so that a resume finds the three adapters again
_PREFIX = "base_model.model."
_PARTS = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}
# What a PEFT adapter may ask for that is another function of the weights: setting -> values that are harmless.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None), "use_dora": (False, None), "lora_bias": (False, None), "layer_replication": (None,),
    "megatron_config": (None,), "trainable_token_indices": (None,), "use_qalora": (False, None),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None), "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
}  # fmt: skip


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of an adapted model holds, by the model's names: adapters, head of a task, what else trains."""
    return {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad or name.rpartition(".")[2] in _PARTS.values() or name.startswith("score.")
    }


def weights_sha256(model: nn.Module) -> str:
    """A hash of a model's weights, by which an adapter knows its base again."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def save_adapter(model: nn.Module, directory: str | Path, *, base: str | None = None) -> None:
    """Write the adapters of ``model`` into ``directory``, for ``load_adapter`` and for PEFT.

    ``base`` is the path or name of the model that they belong to. Raises ``ValueError`` for a model without adapters.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no adapters")
    state = {}
    for name, tensor in own_tensors(model).items():
        owner, _, last = name.rpartition(".")
        if owner in layers and last in _PARTS.values():
            tensor = layers[owner].full_B() if last == "lora_B" else tensor
            name += ".weight"
        state[_PREFIX + name] = tensor.detach().contiguous()
    splits = max(layer.splits for layer in layers.values())
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(state, directory / WEIGHTS_FILE, metadata={"format": "pt", SPLITS_KEY: str(splits)})
        text = json.dumps(_peft_config(model, layers, base), indent=2, sort_keys=True)
        (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the adapter to {directory}: {error}") from error


def _peft_config(model: nn.Module, layers: dict[str, LoRALinear], base: str | None) -> dict[str, Any]:
    shapes = {name: (layer.splits * layer.r, layer.splits * layer.alpha) for name, layer in layers.items()}
    r, alpha = min(shapes.values())  # the common one; what differs (a split c_attn) stands in the patterns
    others = {name: shape for name, shape in shapes.items() if shape != (r, alpha)}
    head_is_whole = hasattr(model, "score") and "score" not in layers
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": max(layer.dropout for layer in layers.values()),
        "target_modules": _targets(model, layers),
        "rank_pattern": {name: shape[0] for name, shape in others.items()},
        "alpha_pattern": {name: shape[1] for name, shape in others.items()},
        "modules_to_save": ["score"] if head_is_whole else None,
        "fan_in_fan_out": True,  # Hugging Face's GPT-2 has Conv1D
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _targets(model: nn.Module, layers: dict[str, LoRALinear]) -> list[str]:
    """The adapted layers by the ends of their names where these name no other layer, else by whole names."""
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | LoRALinear)]
    ends = sorted({".".join(name.split(".")[-2:]) for name in layers})
    named = {name for name in linears for end in ends if name == end or name.endswith("." + end)}
    return ends if named == set(layers) else sorted(layers)


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Add the adapter in ``directory``, written here or by PEFT, to ``model``, whose weights it freezes.

    Raises ``UserError`` for an adapter that is damaged, that belongs to another model, or that is more than LoRA.
    """
    directory = Path(directory)
    config = read_config(directory)
    state, stored_splits = read_adapter(directory), _splits(directory)
    shapes = {}
    for name, tensor in state.items():
        owner, _, last = name.rpartition(".")
        if last != "lora_A":
            continue
        splits = stored_splits if owner.endswith(QKV) else 1
        r = tensor.shape[0] // splits
        alpha = _pattern(config.get("alpha_pattern"), owner, config["lora_alpha"]) / splits
        if config.get("use_rslora"):
            alpha *= r**0.5
        shapes[owner] = LoRAShape(r, alpha, config.get("lora_dropout") or 0.0, splits)
    try:
        attach(model, shapes)
    except AttributeError:
        raise UserError(f"{directory / WEIGHTS_FILE} belongs to another model: {', '.join(shapes)[:200]}") from None
    fill_adapter(model, directory, state)
    return model


@torch.no_grad()
def fill_adapter(model: nn.Module, directory: Path, state: dict[str, Tensor] | None = None) -> None:
    """Copy the adapter in ``directory`` into the adapters that ``model`` has; every name and shape must fit."""
    file = directory / WEIGHTS_FILE
    state = read_adapter(directory) if state is None else state
    wanted = own_tensors(model)
    for name in {**wanted, **state}:
        if name not in state:
            raise UserError(f"{file} has no {name}: it is another model's adapter")
        if name not in wanted:
            raise UserError(f"{file} holds {name}, which the model does not have")
        if wanted[name].shape != state[name].shape:
            got, want = tuple(state[name].shape), tuple(wanted[name].shape)
            raise UserError(f"{file}: {name} is {got}, the model wants {want}")
        wanted[name].copy_(state[name])


def read_config(directory: Path) -> dict[str, Any]:
    """``adapter_config.json``, where it describes nothing but LoRA."""
    file = directory / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{directory} has no {CONFIG_FILE} beside its {WEIGHTS_FILE}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not readable: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{file} describes no LoRA adapter (peft_type is not LORA)")
    for name, plain in _PLAIN.items():
        if config.get(name, plain[0]) not in plain:
            raise UserError(f"{file}: {name} {config[name]!r} is not supported: merge it in PEFT, and load the model")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise UserError(f"{file}: lora_alpha must be a number, got {config.get('lora_alpha')!r}")
    return config


def read_adapter(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter under the model's own names, adapters of q, k and v as they are trained."""
    file = directory / WEIGHTS_FILE
    try:
        with safe_open(file, "pt") as opened:
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no dict
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not readable: {error}") from None
    state, stored_splits = {}, _splits(directory)
    for name, tensor in stored.items():
        ours = name.removeprefix(_PREFIX).removesuffix(".weight")
        if ours.rpartition(".")[2] not in _PARTS.values():
            ours = name.removeprefix(_PREFIX)
        if not ours.startswith(("transformer.", *(f"{head}." for head in HEADS))):
            ours = f"transformer.{ours}"  # PEFT around a model without a head
        splits = stored_splits if ours.endswith(f"{QKV}.lora_B") else 1
        if splits > 1:  # the blocks of a block-diagonal matrix
            rows, columns = tensor.shape[0] // splits, tensor.shape[1] // splits
            tensor = torch.cat([tensor[i * rows :][:rows, i * columns :][:, :columns] for i in range(splits)])
        state[ours] = tensor
    if "score.weight" in state and "score.bias" not in state:  # Hugging Face's classification head has no bias
        state["score.bias"] = state["score.weight"].new_zeros(len(state["score.weight"]))
    return state


def _splits(directory: Path) -> int:
    with safe_open(directory / WEIGHTS_FILE, "pt") as opened:
        return int((opened.metadata() or {}).get(SPLITS_KEY, 1))


def _pattern(patterns: dict[str, Any] | None, name: str, default: float) -> float:
    """What PEFT's ``alpha_pattern`` says of a layer: keys are ends of names."""
    for key, value in (patterns or {}).items():
        if name == key or name.endswith("." + key):
            return value
    return default
