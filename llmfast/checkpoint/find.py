"""Finding, verifying and loading checkpoints."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llmfast.checkpoint import layout
from llmfast.checkpoint.save import distinct
from llmfast.errors import UserError
from llmfast.files import hash_file
from llmfast.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

logger = logging.getLogger("llmfast")


def verify_checkpoint(path: str | Path) -> None:
    """Compare every file with ``manifest.json``; ``UserError`` names the first that is missing or differs."""
    path = Path(path)
    manifest_path = path / layout.MANIFEST_FILE
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        version = manifest["format"]
    except FileNotFoundError:
        raise UserError(f"{path} is no complete checkpoint: it has no {layout.MANIFEST_FILE}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{manifest_path} is not readable: {error}") from None
    if version != layout.MANIFEST_FORMAT:
        raise UserError(
            f"{path} has checkpoint format {version}, this llmfast reads {layout.MANIFEST_FORMAT}: update it"
        )
    if layout.CONFIG_FILE not in files:
        raise UserError(f"{manifest_path} does not list {layout.CONFIG_FILE}")
    weights = {layout.MODEL_FILE, layout.ADAPTER_FILE, layout.SHARDS}
    if weights.isdisjoint(name.partition("/")[0] for name in files):
        raise UserError(f"{manifest_path} does not list {layout.MODEL_FILE}")
    for name, (size, digest) in files.items():
        file = path / name
        try:
            found = file.stat().st_size
            if found != size:
                raise UserError(f"{file} is damaged: {found:,} bytes instead of {size:,}")
            if hash_file(file).hexdigest() != digest:
                raise UserError(f"{file} is damaged: its SHA-256 is not the one in {layout.MANIFEST_FILE}")
        except FileNotFoundError:
            raise UserError(f"{file} is missing") from None
        except OSError as error:
            raise UserError(f"{file} is not readable: {error.strerror or error}") from None


def _verify(path: Path) -> None:
    """``verify_checkpoint``, once a process for the same files: a command finds its checkpoint several times."""
    files = [(str(file), file.stat()) for file in layout.files_in(path)]
    _verify_once(path.resolve(), tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)))


@functools.lru_cache(maxsize=16)
def _verify_once(path: Path, files: tuple[tuple[str, int, int], ...]) -> None:
    verify_checkpoint(path)


def find_checkpoint(path: str | Path, *, prefer: Literal["best", "latest"] = "best") -> Path:
    """The checkpoint that ``path`` means: a run, its ``checkpoints`` folder, or a checkpoint itself.

    Of several, ``prefer="best"`` takes the best one where it verifies; otherwise, and for ``"latest"``, it is the
    newest that verifies. What is passed over is logged with the reason. A folder with weights but no manifest
    (``save_pretrained``) is taken as it is, and so is another program's checkpoint (docs/interop.md), a file or a
    folder. "gpt2" and its larger sisters are fetched where there is nothing of that name. Raises ``UserError`` where
    there is none.
    """
    from llmfast import interop  # a door to a room beside (docs/architecture.md), for other programs' files

    path = interop.located(path)
    if (path / layout.MANIFEST_FILE).exists() or path.resolve().name.startswith("step-"):
        _verify(path)
        return path
    if path.is_file() or any((path / n).exists() for n in (layout.MODEL_FILE, layout.ADAPTER_FILE, layout.SHARDS)):
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    candidates = [directory for _, directory in layout.checkpoints_in(root)]
    best = layout.read_pointer(root, "best") if prefer == "best" else None
    if best is not None:
        candidates = [best, *(other for other in candidates if other.name != best.name)]
    refused: list[str] = []
    for candidate in candidates:
        try:
            _verify(candidate)
        except UserError as error:
            refused.append(str(error))
            continue
        if refused:
            logger.warning("using %s, for newer or better ones do not verify: %s", candidate, "; ".join(refused))
        return candidate
    if refused:
        raise UserError(f"no checkpoint in {root} verifies: {'; '.join(refused)}")
    interop.find(path)
    return path


def is_adapter(found: Path) -> bool:
    """Whether what ``find_checkpoint`` found is an adapter alone."""
    return (found / layout.ADAPTER_FILE).exists()


def load_model(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, **overrides: Any
) -> Any:
    """The ``GPT`` or ``GPTForClassification`` of a run or checkpoint (see ``find_checkpoint``) on ``device``, in
    evaluation mode.

    ``overrides`` replace options of its configuration, such as ``dropout``. An adapter is merged into its base.
    """
    from llmfast.nn import GPT, GPTForClassification

    found = find_checkpoint(path)
    if is_adapter(found):
        model = _load_adapted(found, overrides)
    elif description_of(found).get("labels"):
        model = GPTForClassification.from_pretrained(found, **overrides)
    else:
        model = GPT.from_pretrained(found, **overrides)
    return model.to(device=device, dtype=dtype).eval()


def _load_adapted(path: Path, overrides: dict[str, Any]) -> Any:
    """The base of an adapter with the adapter merged into it."""
    from llmfast.nn import GPTForClassification, adapter, merge_lora

    described = description_of(path)
    where = adapter.read_config(path).get("base_model_name_or_path")
    if not where:
        raise UserError(f"{path / adapter.CONFIG_FILE} names no base: set base_model_name_or_path to its checkpoint")
    try:
        base = find_checkpoint(where)
    except UserError as error:
        raise UserError(
            f"{path} is an adapter, and its base {where} cannot be had ({error}): move it back, or name where it is "
            f"now as base_model_name_or_path in {adapter.CONFIG_FILE}"
        ) from None
    model = load_model(base, **overrides)
    wanted = (described.get("base") or {}).get("sha256")
    if wanted and adapter.weights_sha256(model) != wanted:
        raise UserError(f"{where} is not the base that the adapter {path} was trained on: its weights differ")
    if labels := described.get("labels") or _peft_labels(path, base):
        model = GPTForClassification.from_gpt(model, labels)
    return merge_lora(adapter.load_adapter(model, path))


def _peft_labels(path: Path, base: Path) -> list[str]:
    """The classes of an adapter that PEFT trained with a classification head, as the base names them; else none."""
    from llmfast.nn import adapter

    if adapter.read_config(path).get("task_type") != "SEQ_CLS":
        return []
    head = adapter.read_adapter(path).get("score.weight")
    if head is None:
        raise UserError(
            f"{path / layout.ADAPTER_FILE} has no score.weight: a classifier's adapter is useless without it"
        )
    names = description_of(base).get("id2label")
    numbers = [str(number) for number in range(len(head))]
    if isinstance(names, dict) and set(names) == set(numbers):
        return [str(names[number]) for number in numbers]
    return [f"LABEL_{number}" for number in numbers]  # Hugging Face's names where nobody gave any


def description_of(path: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint directory; nothing where there is none that can be read."""
    try:
        values = json.loads((path / layout.CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def load_tokenizer_of(path: str | Path) -> Tokenizer | None:
    """The tokenizer saved with a run or checkpoint, or that goes with another program's, or None; an adapter that
    brings none has its base's."""
    found = find_checkpoint(path)
    if (found / TOKENIZER_FILE).exists():
        return load_tokenizer(found)
    if is_adapter(found):
        from llmfast.nn import adapter

        base = adapter.read_config(found).get("base_model_name_or_path")
        return load_tokenizer_of(base) if base else None
    from llmfast import interop

    return interop.load_tokenizer(found)


def read_state(path: str | Path) -> dict[str, Any]:
    """``trainer.json`` of a checkpoint directory."""
    file = Path(path) / layout.STATE_FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not readable: {error}") from None


def load_training_state(
    path: str | Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Load a checkpoint directory's weights (of a model with adapters, these) into ``model`` and its state into
    ``optimizer``; returns ``trainer.json``.

    Tensors go to the parameters' devices. Raises ``UserError`` where names or shapes do not match.
    """
    from llmfast.nn import adapter, lora

    path = Path(path)
    if (path / layout.SHARDS).is_dir() or any(hasattr(p, "to_local") for p in model.parameters()):
        from llmfast.checkpoint import shards  # takes a second to import

        shards.load_training_state(path, model, optimizer)
        return read_state(path)
    if lora.lora_layers(model):
        adapter.fill_adapter(model, path)
    else:
        _load_weights(path, model)
    if optimizer is not None:
        _load_optimizer(path / layout.OPTIMIZER_FILE, model, optimizer)
    return read_state(path)


def _load_weights(path: Path, model: torch.nn.Module) -> None:
    weights = _read_tensors(path / layout.MODEL_FILE)
    for name, tensor in distinct(model).items():
        if name not in weights:
            raise UserError(f"{path / layout.MODEL_FILE} has no {name}: it is another model's checkpoint")
        if weights[name].shape != tensor.shape:
            got, want = tuple(weights[name].shape), tuple(tensor.shape)
            raise UserError(f"{path / layout.MODEL_FILE}: {name} is {got}, the model wants {want}")
        with torch.no_grad():
            tensor.copy_(weights[name])


def _load_optimizer(file: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, tensor in _read_tensors(file).items():
        entry, _, name = key.partition("/")
        parameter = parameters.get(name)
        if parameter is None or (tensor.dim() and tensor.shape != parameter.shape):
            raise UserError(f"{file}: {key} fits no parameter of the model")
        optimizer.state[parameter][entry] = tensor.to(parameter.device)


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not readable: {error}") from None
