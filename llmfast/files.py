"""Files that are there whole or not at all, and what their bytes hash to."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content``, text as UTF-8, to ``path``: at any moment that is what was there before, or all of it."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def hash_file(path: Path) -> Any:
    """A ``hashlib.sha256`` of all bytes of a file."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb") as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest
