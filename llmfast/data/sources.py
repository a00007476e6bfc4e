"""Find the files of a corpus: files, folders and globs become one ordered list of sources."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmfast.errors import UserError
from llmfast.tokenizer import TOKENIZER_FILE

Kind = Literal["text", "lines", "json", "parquet"]
_KINDS: dict[str, Kind] = {".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".parquet": "parquet"}
_TOKEN_FILES = (".bin", ".idx", ".h5", ".hdf5")
_COMPRESSED = (".zst", ".gz")


@dataclass(frozen=True)
class Source:
    """One file of the corpus."""

    path: Path
    kind: Kind
    size: int  # bytes on disk

    @property
    def compressed(self) -> bool:
        return self.path.suffix.lower() in _COMPRESSED


def find_sources(paths: str | Path | Iterable[str | Path]) -> list[Source]:
    """The files behind ``paths`` in the order given; folders (recursive) and globs in sorted order, each file once.

    Hidden files and empty files are passed over inside folders and globs. A path that is not there, a folder or
    glob without files, and an empty file named by itself raise ``UserError``.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    files: dict[str, Source] = {}
    for path in paths:
        for file in _expand(Path(path).expanduser()):
            files.setdefault(os.path.realpath(file), _source(file))
    if not files:
        raise UserError("no data given: name text files, folders or globs")
    return list(files.values())


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        found = _files_below(path)
        if not found:
            raise UserError(f"{path}: the folder holds no text files")
        return found
    if path.exists():
        if path.is_file() and not path.stat().st_size:
            raise UserError(f"{path}: the file is empty")
        return [path]
    if glob.has_magic(str(path)):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        found = [match for match in matches if match.is_file() and match.stat().st_size]
        if not found:
            raise UserError(f"{path}: no file with text matches this pattern")
        return found
    raise UserError(f"{path}: no such file or folder")


def _files_below(folder: Path) -> list[Path]:
    found = []
    for root, folders, names in os.walk(folder):
        if TOKENIZER_FILE in names:  # shards or a checkpoint of ours: what training wrote beside its data
            folders[:] = []
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = [Path(root, name) for name in names if not name.startswith(".")]
        found += [file for file in files if file.is_file() and file.stat().st_size]
    return sorted(found)


def _source(path: Path) -> Source:
    name = path.name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    suffix = Path(name).suffix
    if suffix in _TOKEN_FILES:
        raise UserError(f"{path}: {suffix} holds tokens, not text; train on it directly, it needs no preparing")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: no permission to read it")
    return Source(path, _KINDS.get(suffix, "text"), path.stat().st_size)


_NOT_CODE = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}


def stdlib_sources() -> list[Path]:
    """The Python standard library's own ``.py`` files on this machine, sorted: the embedded default corpus.

    Without third-party packages, tests, empty files and files that are not UTF-8 (about 12 MB).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_CODE]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return [file for file in sorted(found) if _is_text(file)]


def _is_text(path: Path) -> bool:
    try:
        return bool(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, OSError):
        return False
