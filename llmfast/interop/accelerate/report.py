"""What accelerate() did, and what it left alone and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One module: its name in the model, its class, and the swap or the reason against one."""

    name: str
    type: str
    swap: str | None
    reason: str = ""
    note: str = ""


@dataclass
class Report:
    """``swapped`` and ``kept`` hold an ``Entry`` for each module looked at; printing it groups modules alike.

    ``process`` says what ``tune_process`` found or set; None where it was not called.
    """

    model: str
    entries: list[Entry] = field(default_factory=list)
    process: str | None = None

    @property
    def swapped(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.swap is not None]

    @property
    def kept(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.swap is None]

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.swapped)} modules swapped, {len(self.kept)} left as they are"]
        for names, entry in _grouped(self.swapped):
            lines.append(f"  {entry.swap:<21} {names} ({entry.type}){': ' if entry.note else ''}{entry.note}")
        if self.kept:
            lines.append("  left as they are:")
        for names, entry in _grouped(self.kept):
            lines.append(f"  - {names} ({entry.type}): {entry.reason}")
        if self.process:
            lines.append(f"  the whole process: {self.process}")
        return "\n".join(lines)


def _grouped(entries: list[Entry]) -> Iterator[tuple[str, Entry]]:
    """Entries alike but for the numbers in their names, as one, with the ranges of the numbers."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        key = (re.sub(r"\d+", "#", entry.name), entry.type, entry.swap or "", entry.reason, entry.note)
        groups.setdefault(key, []).append(entry)
    for (pattern, *_), members in groups.items():
        yield _ranges(pattern, [entry.name for entry in members]), members[0]


def _ranges(pattern: str, names: list[str]) -> str:
    if len(names) == 1:
        return names[0] or "the model"
    columns = zip(*(map(int, re.findall(r"\d+", name)) for name in names), strict=True)
    for numbers in columns:
        low, high = min(numbers), max(numbers)
        pattern = pattern.replace("#", str(low) if low == high else f"{low}..{high}", 1)
    return pattern
