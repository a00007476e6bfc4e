"""Writing a checkpoint so that a kill, a power cut or a full disk at any moment leaves a good one behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmfast.checkpoint import layout
from llmfast.errors import UserError
from llmfast.files import hash_file


def save_checkpoint(
    root: str | Path,
    step: int,
    *,
    model: Any,
    tokenizer: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    state: dict[str, Any] | None = None,
    best: bool = False,
    keep: int = 2,
) -> Path:
    """Write ``root/step-NNNNNN`` and return it.

    ``root`` is a run's ``checkpoints`` folder. ``model`` offers ``save_pretrained(directory)``; ``state`` is what
    else a resume needs, as JSON values. ``latest`` (and ``best`` where ``best`` is true) moves only after the
    directory stands complete on the disk; then all but the ``keep`` newest and the best one are deleted. Raises
    ``UserError`` when it cannot be written; what was there before is intact.
    """
    root = Path(root)
    name = layout.step_name(step)
    building = layout.temporary(root, name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_stale(root)
        building.mkdir()
        model.save_pretrained(building)
        if optimizer is not None:
            save_file(optimizer_tensors(model, optimizer), building / layout.OPTIMIZER_FILE)
        if tokenizer is not None:
            tokenizer.save(building)
        write_state(building, step, state or {})
        publish(building, root / name, checksums(building, layout.files_in(building)), best=best, keep=keep)
    except (OSError, SafetensorError) as error:
        for path in layout.stale_in(root):
            _delete(path)
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(
            f"cannot write the checkpoint {root / name}: {reason}; make room or choose another --out, then --resume "
            "(earlier checkpoints are intact)"
        ) from error
    return root / name


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as ``KEY/PARAMETER`` -> tensor; numbers are copied, for parameters may share them."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{key}/{names[parameter]}": value.detach().contiguous() if value.dim() else value.detach().clone()
        for parameter, entries in optimizer.state.items()
        for key, value in entries.items()
    }


def distinct(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors, a tied one only under the first of its names, as it is stored."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def remove_stale(root: str | Path) -> None:
    """Delete half-written directories of processes that are gone."""
    for path in layout.stale_in(Path(root)):
        _delete(path)


def write_state(directory: Path, step: int, state: dict[str, Any]) -> None:
    _write_json(directory / layout.STATE_FILE, {"step": step, **state})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def checksums(directory: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of ``files``, on the disk, by their names in ``directory``."""
    entries = {}
    for path in files:
        layout.fsync(path)
        entries[path.relative_to(directory).as_posix()] = {
            "size": path.stat().st_size,
            "sha256": hash_file(path).hexdigest(),
        }
    return entries


def publish(building: Path, final: Path, files: dict[str, dict[str, Any]], *, best: bool, keep: int) -> None:
    """Write the manifest last, give the complete directory its name, move the pointers, delete what is too old."""
    manifest = building / layout.MANIFEST_FILE
    _write_json(manifest, {"format": layout.MANIFEST_FORMAT, "files": files})
    layout.fsync(manifest)
    for directory in (path for path in building.iterdir() if path.is_dir()):
        layout.fsync(directory)
    layout.fsync(building)
    _publish(building, final)
    layout.write_pointer(final.parent, "latest", final.name)
    if best:
        layout.write_pointer(final.parent, "best", final.name)
    _prune(final.parent, keep)


def _publish(building: Path, final: Path) -> None:
    """Rename to the final name; a checkpoint that already has it stays readable until the new one stands."""
    replaced = final.with_name(final.name + ".old")
    if final.exists():
        _discard(replaced)
        os.rename(final, replaced)
    os.rename(building, final)
    layout.fsync(final.parent)
    _discard(replaced)


def _prune(root: Path, keep: int) -> None:
    checkpoints = [path for _, path in layout.checkpoints_in(root)]
    kept = {path.name for path in checkpoints[: max(keep, 1)]}
    for pointer in ("latest", "best"):
        target = layout.read_pointer(root, pointer)
        if target is not None:
            kept.add(target.name)
    for path in checkpoints:
        if path.name not in kept:
            _discard(path)


def _discard(path: Path) -> None:
    """Delete a checkpoint; a kill on the way never leaves half of one under its name."""
    if path.exists():
        doomed = layout.temporary(path.parent, f"deleted-{path.name}")
        _delete(doomed)
        os.rename(path, doomed)
        _delete(doomed)


def _delete(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
