"""The folder a preparation writes: token shards, and a record of what is done, so that it can go on after a kill."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from llmfast.errors import UserError
from llmfast.files import hash_file
from llmfast.tokenizer import TOKENIZER_FILE, Tokenizer

META_FILE = "meta.json"
FORMAT = "llmfast-tokens"
FORMAT_VERSION = 1
SPLITS = ("train", "val")

_STATE = ".prepare.json"
_LOCK = ".prepare.lock"
_SEEN = ".prepare.seen"
_OURS = re.compile(r"(?:train|val)-\d{5}\.bin|meta\.json|\..*|.*\.tmp|" + re.escape(TOKENIZER_FILE))
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.bin"


@contextlib.contextmanager
def no_room_is_a_user_error(folder: Path) -> Iterator[None]:
    """A full disk becomes one line; what is on disk stays good for going on."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise UserError(
            f"{folder}: no space left on the disk; free some and run the same command again to go on"
        ) from error


class OutputFolder:
    """An output folder that this process alone writes, from ``with`` on until it ends or dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def __enter__(self) -> OutputFolder:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: a file is in the way of the output folder")
        with no_room_is_a_user_error(self.path):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                if error.errno in _NO_ROOM:
                    raise
                raise UserError(f"{self.path}: cannot make the output folder ({error.strerror})") from error
        strange = sorted(entry.name for entry in self.path.iterdir() if not _OURS.fullmatch(entry.name))
        if strange:
            raise UserError(
                f"{self.path}: the output folder holds other things ({strange[0]}); name a new or empty one"
            )
        self._take_lock()
        return self

    def _take_lock(self) -> None:
        try:
            self._lock = open(self.path / _LOCK, "w")  # noqa: SIM115 (held until __exit__)
        except OSError as error:
            raise UserError(f"{self.path}: cannot write into the output folder ({error.strerror})") from error
        try:
            lock_file(self._lock)
        except OSError as error:
            self._lock.close()
            raise UserError(f"{self.path}: another process is writing into this folder right now") from error

    def __exit__(self, *_: object) -> None:
        assert self._lock
        if not (self.path / _STATE).exists():  # finished, or never begun
            with contextlib.suppress(OSError):  # removes the folder only if nothing was written
                (self.path / _LOCK).unlink()
                self.path.rmdir()
        self._lock.close()

    def read_state(self) -> dict[str, Any] | None:
        return _read_json(self.path / _STATE)

    def read_meta(self) -> dict[str, Any] | None:
        return _read_json(self.path / META_FILE)

    def save_tokenizer(self, tokenizer: Tokenizer) -> None:
        with no_room_is_a_user_error(self.path):
            tokenizer.save(self.path)

    def holds_shards(self) -> bool:
        return any(self.path.glob("*.bin"))

    def clear(self) -> None:
        """Forget a half-done preparation."""
        for shard in self.path.glob("*.bin"):
            shard.unlink()
        self.remove_working_files()

    def write_state(self, state: dict[str, Any]) -> None:
        with no_room_is_a_user_error(self.path):
            write_json(self.path / _STATE, state)

    def finish(self, meta: dict[str, Any]) -> None:
        """Write ``meta.json``, which makes the folder a prepared one, and remove the working files."""
        with no_room_is_a_user_error(self.path):
            write_json(self.path / META_FILE, meta)
        self.remove_working_files()

    def remove_working_files(self) -> None:
        for name in (_STATE, _SEEN):
            (self.path / name).unlink(missing_ok=True)

    @property
    def seen_file(self) -> Path:
        return self.path / _SEEN


def lock_file(file: IO[str]) -> None:
    """Lock ``file`` for as long as it is open, or raise OSError; the system frees it when the process dies."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        file.seek(1 << 20)  # a byte behind the text, which stays readable for others
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        file.seek(0)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete the folder and prepare again") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace ``path`` in one step: whole old or whole new content, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


class AppendFile:
    """A file that only grows, opened at ``size`` bytes: what lies beyond (written after the last record) is dropped."""

    def __init__(self, path: Path, size: int = 0) -> None:
        self._file = open(path, "r+b" if size else "wb", buffering=0)  # noqa: SIM115 (closed by close)
        if os.fstat(self._file.fileno()).st_size < size:
            raise UserError(f"{path}: shorter than recorded; delete the folder and prepare again")
        self._file.truncate(size)
        self._file.seek(size)

    def write(self, data: memoryview | bytes) -> None:
        view = memoryview(data)
        while len(view):
            view = view[self._file.write(view) :]

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class ShardWriter:
    """Writes tokens of one split to ``SPLIT-00000.bin``, ... of ``shard_tokens`` tokens each, the last one shorter.

    ``done`` is what ``record`` gave when the writer to go on from was last synced.
    """

    def __init__(
        self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int, done: list[dict[str, Any]] | None = None
    ) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._shards: list[dict[str, Any]] = [dict(shard) for shard in done or []]
        self._file: AppendFile | None = None
        self._hash = hashlib.sha256()
        for path in folder.glob(f"{split}-*.bin"):
            if path.name not in {shard["file"] for shard in self._shards}:
                path.unlink()
        if self._shards:
            last = self._shards[-1]
            self._file = AppendFile(folder / last["file"], last["tokens"] * dtype.itemsize)
            self._hash = hash_file(folder / last["file"])

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self._shards)

    def write(self, tokens: np.ndarray) -> None:
        tokens = np.ascontiguousarray(tokens, self._dtype.newbyteorder("<"))
        while len(tokens):
            if not self._shards or self._shards[-1]["tokens"] == self._shard_tokens:
                self._next_shard()
            assert self._file
            part = tokens[: self._shard_tokens - self._shards[-1]["tokens"]]
            data = part.data.cast("B")
            with no_room_is_a_user_error(self._folder):
                self._file.write(data)
            self._hash.update(data)
            self._shards[-1]["tokens"] += len(part)
            tokens = tokens[len(part) :]

    def _next_shard(self) -> None:
        self.close()
        name = shard_name(self._split, len(self._shards))
        with no_room_is_a_user_error(self._folder):
            self._file = AppendFile(self._folder / name)
        self._hash = hashlib.sha256()
        self._shards.append({"file": name, "tokens": 0})

    def sync(self) -> None:
        if self._file:
            with no_room_is_a_user_error(self._folder):
                self._file.sync()

    def close(self) -> None:
        """Finish the present shard."""
        if self._file:
            self._shards[-1]["sha256"] = self._hash.hexdigest()
            self.sync()
            self._file.close()
            self._file = None

    def record(self) -> list[dict[str, Any]]:
        """One {file, tokens[, sha256]} a shard."""
        return [dict(shard) for shard in self._shards]
