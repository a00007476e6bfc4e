"""Which program wrote a checkpoint is found by looking; then its reader is called and what it found is checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfast.config import GPTConfig, suggest
from llmfast.errors import UserError
from llmfast.interop import book, huggingface, llmc, nanogpt, openai_tf, tlfs
from llmfast.interop.hub import NAMES, named_weights
from llmfast.interop.source import Model, Source, check_tensors, read_json, state_dict
from llmfast.interop.torch_files import read_torch
from llmfast.nn import GPT, pretrained
from llmfast.nn.weights import Weights, read_safetensors

OVERRIDES = (*pretrained.OVERRIDES, "n_head")
HUGGING_FACE_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"
)  # fmt: skip
_TORCH = (b"PK\x03\x04", b"\x80\x02")  # zip archives and the pickles before them


def load(path: str | Path, **overrides: Any) -> tuple[GPTConfig, Weights]:
    """Configuration and weights of a checkpoint, whichever program wrote it (docs/interop.md).

    The weights are a mapping of our parameter names, weights (out, in), to views of the file in its own dtype, a tied
    head left out; they fit the configuration. ``overrides`` replace dropout, attn_scale and activation, and tell what
    a file cannot: n_head. ``path`` may be one of GPT-2's names, "gpt2" to "gpt2-xl": see ``hub.named_weights``.
    Raises ``UserError``.
    """
    path = located(path)
    try:
        if pretrained.is_saved(path):
            config, weights = pretrained.load(path, overrides)
        else:
            config, weights = _foreign(path, overrides)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror or error}") from None
    weights.bound(config)
    with torch.device("meta"):
        model = GPT(config)
    weights.check(model)
    return config, weights


def located(path: str | Path) -> Path:
    """``path`` if it exists, else the folder of the weights that it names (``hub.named_weights``); or ``UserError``."""
    path = Path(path)
    if path.exists():
        return path
    named = named_weights(path.as_posix())
    if named is None:
        raise UserError(f"no such checkpoint: {path}{suggest(path.as_posix(), NAMES)}")
    return named


def find(path: str | Path) -> Path:
    """The file (of several: the one that leads to the others) of another program's checkpoint in ``path``.

    Raises ``UserError`` where there is none, or more than one.
    """
    path = located(path)
    if path.is_dir():
        return _find_in(path)
    if path.name in ("checkpoint", "config.json", "generation_config.json", "hparams.json"):
        return _find_in(path.parent)
    if not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is no file")
    if path.name.endswith(".index.json") or path.suffix in (".index", ".safetensors"):
        return path
    if path.with_suffix(".index").is_file():  # model.ckpt.meta, model.ckpt.data-00000-of-00001
        return path.with_suffix(".index")
    with path.open("rb") as file:
        start = file.read(8)
    magic = int.from_bytes(start[:4], "little")
    if start.startswith(_TORCH) or magic == llmc.MAGIC:
        return path
    if magic in llmc.OTHER_FILES:
        raise UserError(f"{path} is {llmc.OTHER_FILES[magic]}, not a model")
    if start.startswith(b"GGUF"):
        raise UserError(f"{path} is a GGUF file, which llmfast writes and does not read: name what it was made from")
    raise UserError(f"{path} is no checkpoint that llmfast knows (docs/interop.md lists them)")


def _find_in(folder: Path) -> Path:
    for name in HUGGING_FACE_FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.index"))
    pointer = folder / "checkpoint"
    if len(found) > 1 and pointer.is_file():
        text = pointer.read_bytes()[:4096].decode("utf-8", "replace")
        latest = text.partition('model_checkpoint_path: "')[2].partition('"')[0]
        found = [file for file in found if file.stem == Path(latest).name] or found
    if not found:
        found = [file for file in sorted(folder.iterdir()) if file.suffix in (".pt", ".pth") and file.is_file()]
        found += [file for file in sorted(folder.glob("*.bin")) if _begins(file) == llmc.MAGIC]
        # llm.c writes each model twice.
        found = [
            file
            for file in found
            if file.with_name(file.name.replace("_bf16.bin", ".bin")) not in found
            or not file.name.endswith("_bf16.bin")
        ]
    if not found:
        raise UserError(f"no checkpoint in {folder} that llmfast knows (docs/interop.md lists them)")
    if len(found) > 1:
        raise UserError(f"{folder} holds {len(found)} checkpoints: name one, such as {found[0]}")
    return found[0]


def _begins(file: Path) -> int:
    with file.open("rb") as opened:
        return int.from_bytes(opened.read(4), "little")


def vocabulary_of(file: Path) -> int | None:
    """The number of token ids of a checkpoint, without reading its weights; None where that cannot be told."""
    try:
        if file.suffix == ".index":
            return read_json(file.parent / "hparams.json").get("n_vocab")
        return _read(file)[1].values["vocab_size"]
    except UserError:
        return None


def _read(file: Path) -> tuple[Source, Model]:
    if file.suffix == ".index":
        return openai_tf.read(file)
    if file.suffix != ".json" and _begins(file) == llmc.MAGIC:
        return llmc.read(file)
    source = _open(file)
    return source, _reader(source)(source)


def _foreign(path: Path, overrides: dict[str, Any]) -> tuple[GPTConfig, Weights]:
    pretrained.check_overrides(overrides, OVERRIDES)
    source, model = _read(find(path))
    config = _configuration(source, model, overrides)
    names = [name for stored in model.stored.values() for name in stored.names]
    check_tensors(source.tensors, names, source.path)
    return config, Weights(model.stored, source.path, mapped=source.mapped)


def _open(file: Path) -> Source:
    """A file of safetensors or of torch.save, or the index of several, with the config.json beside it."""
    beside = file.parent / "config.json"
    config = read_json(beside) if beside.is_file() else {}
    kind = config.get("model_type", "gpt2")
    if kind != "gpt2":
        raise UserError(f"{beside}: model_type is {kind!r}, no language model that llmfast reads (gpt2)")
    if file.name.endswith(".index.json"):
        tensors, mapped = _sharded(file)
        return Source(file, tensors, mapped, config=config)
    if file.suffix == ".safetensors":
        return Source(file, read_safetensors(file), True, config=config)
    content, mapped = read_torch(file)
    extra = content if isinstance(content, dict) else {}
    for key in ("model", "model_state_dict"):
        if isinstance(extra.get(key), dict):
            return Source(file, state_dict(extra[key], file), mapped, extra, config)
    return Source(file, state_dict(content, file), mapped, config=config)


def _sharded(index: Path) -> tuple[dict[str, Tensor], bool]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) and name for name in names.values()):
        raise UserError(f"{index} has no weight_map of tensors to files")
    tensors: dict[str, Tensor] = {}
    mapped = True
    for name in sorted(set(names.values())):
        file = index.parent / name
        if Path(name).name != name or not file.is_file():
            raise UserError(f"{index} names {name[:100]!r}, which is no file beside it")
        if file.suffix == ".safetensors":
            part = read_safetensors(file)
        else:
            content, part_mapped = read_torch(file)
            part, mapped = state_dict(content, file), mapped and part_mapped
        tensors |= part
    if missing := names.keys() - tensors.keys():
        raise UserError(f"{index} promises {min(missing)}, which {names[min(missing)]} does not hold")
    return tensors, mapped


def _reader(source: Source) -> Callable[[Source], Model]:
    """Whose tensors these are, by their names."""
    names = source.tensors
    if "tok_emb.weight" in names:
        return book.read
    if "token_embed.weight" in names:
        return tlfs.read
    for root in ("transformer.", ""):
        first = names.get(f"{root}h.0.attn.c_attn.weight")
        if first is not None and f"{root}wte.weight" in names:
            # Conv1D's (C, 3 C), or nn.Linear's (3 C, C).
            if (first.dim() == 2 and first.shape[1] > first.shape[0]) or "activation_function" in source.config:
                return huggingface.read
            if source.path.suffix == ".safetensors":
                raise UserError(f"{source.path} is a model of llmfast's without its own config.json beside it")
            return nanogpt.read
    raise UserError(f"{source.path} holds no GPT-2 that llmfast knows: it begins with {', '.join(list(names)[:3])}")


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, type(None))) and (not isinstance(value, int) or abs(value) < 1 << 63)


def _configuration(source: Source, model: Model, overrides: dict[str, Any]) -> GPTConfig:
    """What the tensors tell, what stands beside them, and what the user says, in agreement."""
    values = dict(model.values)
    for name, option in model.aliases.items():
        if name not in model.settings:
            continue
        value = model.settings[name]
        if not _is_plain(value):
            raise UserError(f"{source.path}: its {name} is no number, text or truth value of a sensible size")
        if option in values and values[option] != value:
            beside = source.config_file if model.settings is source.config else source.path
            raise UserError(f"{beside}: {name} is {value!r}, but the tensors of {source.path} have {values[option]}")
        values[option] = value
    if "n_head" in values and "n_head" in overrides and overrides["n_head"] != values["n_head"]:
        raise UserError(f"n_head {overrides['n_head']}: {source.path} has {values['n_head']} heads")
    values |= overrides
    for option, why in model.asks.items():
        if option not in values:
            raise UserError(
                f"{source.path} does not tell {option} ({why}): give {option}=... to from_pretrained, --set "
                f"{option}=... to llmfast convert, or write it into a config.json beside it"
            )
    try:
        return GPTConfig.from_dict(values)
    except (UserError, TypeError) as error:
        raise UserError(f"{source.path}: {error}") from None
