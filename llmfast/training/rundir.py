"""The run directory: one process at a time, one run at a time."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import IO, Any

from llmfast.checkpoint import remove_stale
from llmfast.config import TrainConfig
from llmfast.data.shards import lock_file
from llmfast.errors import UserError
from llmfast.files import write_whole
from llmfast.ranks import is_first, join, starter

CONFIG_FILE = "config.toml"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"
STARTERS_FILE = ".starters"


class RunDirectory:
    """``path`` with an exclusive lock for as long as the context lasts; a killed process's lock ends with it.

    Raises ``UserError`` where another process trains there, where there is a run already and ``resume`` is false,
    and where the directory cannot be made. Of several ranks the first one holds it.
    """

    def __init__(self, path: str | Path, *, resume: bool) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / METRICS_FILE
        self._resume = resume
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunDirectory:
        if not is_first():  # the first rank holds it for all
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / LOCK_FILE, "a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write to the run directory {self.path}: {error.strerror or error}") from None
        try:
            lock_file(self._lock)
        except OSError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise UserError(
                f"{self.path} is in use by process {owner}: wait for it, stop it, or choose another --out"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        if not self._resume and any((self.path / name).exists() for name in (METRICS_FILE, "checkpoints")):
            self._lock.close()
            raise UserError(f"{self.path} already holds a run: pass --resume to go on with it, or choose another --out")
        remove_stale(self.checkpoints)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def write_config(self, config: TrainConfig) -> None:
        """Write ``config.toml``; ``resume`` is left out, so that the file starts the same run elsewhere, and what is
        no option of this kind of run."""
        left_out = {"resume", *getattr(config, "hidden", ())}
        values = {key: value for key, value in dataclasses.asdict(config).items() if key not in left_out}
        write_whole(self.path / CONFIG_FILE, to_toml(values))

    def begin(self) -> None:
        """Let ``goes_on`` know the run again when ``torchrun`` starts its ranks again; of every machine one does."""
        own = starter()
        try:
            if own is not None:
                with (self.path / STARTERS_FILE).open("a", encoding="utf-8") as file:
                    file.write(f"{own}\n")
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}; every machine must see the same --out") from None


def goes_on(config: TrainConfig) -> bool:
    """Whether to go on with what ``config.out`` holds: as told, or because ``torchrun`` starts the run again."""
    own, known = starter(), Path(config.out, STARTERS_FILE)
    begun = own is not None and known.exists() and own in known.read_text(encoding="utf-8").split("\n")
    return config.resume or (join().any(begun) and Path(config.out, CONFIG_FILE).exists())


def to_toml(values: dict[str, Any]) -> str:
    """A flat TOML document of booleans, numbers, strings and lists; None, which TOML lacks, is left out."""
    return "".join(f"{key} = {_toml(value)}\n" for key, value in values.items() if value is not None)


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
