"""Names and pointers in a run's ``checkpoints`` folder, and the file-system calls that make them durable.

checkpoints/step-000250/            one checkpoint
checkpoints/step-000250.old/        the one it replaces; exists only between two renames
checkpoints/.tmp-1234-.../          being written or deleted by process 1234
checkpoints/latest, best            symlinks (a one-line text file where the system has none)
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

MODEL_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"  # instead of the model's, where a checkpoint holds an adapter
SHARDS = "shards"  # a folder instead of both files below, where the ranks of a run hold a part each
CONFIG_FILE = "config.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer.json"
MANIFEST_FILE = "manifest.json"
MANIFEST_FORMAT = 1

_STEP = re.compile(r"step-(\d+)(\.old)?")
_TEMPORARY = re.compile(r"\.tmp-(\d+)-.+")


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def checkpoints_in(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every checkpoint in ``root``, newest first; a replaced one follows its successor."""
    found = []
    for entry in root.iterdir() if root.is_dir() else ():
        match = _STEP.fullmatch(entry.name)
        if match and entry.is_dir():
            found.append((int(match[1]), match[2] is None, entry))
    return [(step, entry) for step, _, entry in sorted(found, reverse=True)]


def temporary(root: Path, name: str) -> Path:
    """The name under which this process writes or deletes ``name``."""
    return root / f".tmp-{os.getpid()}-{name}"


def stale_in(root: Path) -> list[Path]:
    """Leftovers of this process's failed saves and of processes that are gone."""
    stale = []
    for entry in root.iterdir() if root.is_dir() else ():
        match = _TEMPORARY.fullmatch(entry.name)
        if match and (int(match[1]) == os.getpid() or not _is_alive(int(match[1]))):
            stale.append(entry)
    return stale


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # os.kill would end the process there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def read_pointer(root: Path, name: str) -> Path | None:
    """The directory that ``latest`` or ``best`` names, existing or not."""
    pointer = root / name
    if pointer.is_symlink():
        return root / os.readlink(pointer)
    if pointer.is_file():
        return root / pointer.read_text(encoding="utf-8").strip()
    return None


def write_pointer(root: Path, name: str, target: str) -> None:
    """Move ``latest`` or ``best`` to ``target`` in one step: a reader sees the old one or the new one."""
    new = temporary(root, name)
    new.unlink(missing_ok=True)
    try:
        os.symlink(target, new)
    except (OSError, NotImplementedError):
        new.write_text(target + "\n", encoding="utf-8")
        fsync(new)
    os.replace(new, root / name)
    fsync(root)


def files_in(directory: Path) -> list[Path]:
    """Every file of a checkpoint."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def fsync(path: Path) -> None:
    """Have the disk hold ``path``, a file or a directory (where the system can sync directories)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        with contextlib.suppress(NotImplementedError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
