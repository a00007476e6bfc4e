"""Writing a checkpoint so that a kill, a power cut or a full disk at any moment leaves a good one behind."""

from __future__ import annotations

import copy
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmfast.checkpoint import layout
from llmfast.errors import UserError
from llmfast.files import hash_file
from llmfast.ranks import Ranks


def save_checkpoint(root: str | Path, step: int, **content: Any) -> Path:
    """Write ``root/step-NNNNNN`` and return it; ``content`` is that of ``Saving``.

    ``latest`` (and ``best`` where ``best`` is true) moves only after the directory stands complete on the disk; then
    all but the ``keep`` newest and the best one are deleted. Raises ``UserError`` when it cannot be written; what was
    there before is intact.
    """
    return Saving(root, step, **content).finish()


class Saving:
    """A checkpoint on its way to the disk: every rank makes one, in turn, and calls ``finish``; the first one writes.

    ``root`` is a run's ``checkpoints`` folder. ``model`` offers ``save_pretrained(directory)``; ``state`` is what
    else a resume needs, as JSON values. ``beside``: training goes on meanwhile, for a thread writes a copy, in the
    CPU's memory, of all that training changes.
    """

    def __init__(
        self,
        root: str | Path,
        step: int,
        *,
        model: Any,
        tokenizer: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        state: dict[str, Any] | None = None,
        best: bool = False,
        keep: int = 2,
        ranks: Ranks | None = None,
        beside: bool = False,
    ) -> None:
        self._root, self._step = Path(root), step
        self._model, self._tokenizer, self._optimizer, self._state = model, tokenizer, optimizer, state or {}
        self._best, self._keep = best, keep
        self._ranks, self._beside = ranks or Ranks(), beside
        self.path = self._root / layout.step_name(step)
        self._building = Path(self._ranks.gather(str(layout.temporary(self._root, self.path.name)))[0])
        with self._or_intact():
            self._ranks.succeed(self._begin if self._ranks.first else lambda: None)
            self._capture()
        self._written: Future[dict[str, dict[str, Any]]] = Future()
        if self._beside:
            threading.Thread(target=self._run, name="llmfast checkpoint", daemon=True).start()
        else:
            self._run()

    def done(self) -> bool:
        """Whether this rank has written its part, or failed to."""
        return self._written.done()

    def finish(self) -> Path:
        """Wait for all ranks, then give the checkpoint its name and move the pointers."""
        ranks, files = self._ranks, dict[str, dict[str, Any]]()
        with self._or_intact():
            for part in ranks.gather(ranks.succeed(self._written.result)):
                files |= part
            ranks.succeed(lambda: self._publish(files) if ranks.first else None)
        return self.path

    def abandon(self, timeout: float) -> None:
        """Leave it unfinished, once the thread is done or after ``timeout`` seconds; no other rank is asked."""
        wait([self._written], timeout)
        if self._ranks.first and self.done():
            remove_stale(self._root)

    def _begin(self) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        remove_stale(self._root)
        self._building.mkdir()

    def _capture(self) -> None:
        """Fix what is to be written. Collective."""
        if not self._ranks.first:
            return
        self._tensors = optimizer_tensors(self._model, self._optimizer) if self._optimizer is not None else {}
        if self._beside:
            try:
                model = snapshot(self._model)
                tensors = {key: tensor.to("cpu", copy=True) for key, tensor in self._tensors.items()}
            except (TypeError, RuntimeError):  # no copy of such a model, or no memory for one: training waits
                self._beside = False
            else:
                self._model, self._tensors = model, tensors

    def _write(self) -> dict[str, dict[str, Any]]:
        """Write this rank's part, and the checksums of its files; not collective."""
        if not self._ranks.first:
            return {}
        self._model.save_pretrained(self._building)
        if self._optimizer is not None:
            save_file(self._tensors, self._building / layout.OPTIMIZER_FILE)
        self._write_rest()
        return checksums(self._building, layout.files_in(self._building))

    def _write_rest(self) -> None:
        if self._tokenizer is not None:
            self._tokenizer.save(self._building)
        _write_json(self._building / layout.STATE_FILE, {"step": self._step, **self._state})

    def _run(self) -> None:
        try:
            self._written.set_result(self._write())
        except BaseException as error:
            self._written.set_exception(OSError(str(error)) if isinstance(error, SafetensorError) else error)

    def _publish(self, files: dict[str, dict[str, Any]]) -> None:
        publish(self._building, self.path, files, best=self._best, keep=self._keep)

    @contextmanager
    def _or_intact(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._ranks.first:
                remove_stale(self._root)
            raise UserError(
                f"cannot write the checkpoint {self.path}: {error.strerror or error}; make room or choose another "
                "--out, then --resume (earlier checkpoints are intact)"
            ) from error


def snapshot(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of ``model`` in the CPU's memory; what does not train is shared with it."""
    memo: dict[int, Any] = {id(tensor): tensor.detach().to("cpu", copy=True) for tensor in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = parameter
        if parameter.requires_grad:
            memo[id(parameter)] = torch.nn.Parameter(parameter.detach().to("cpu", copy=True))
    return copy.deepcopy(model, memo)


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
