"""The floors of docs/architecture.md: every room imports only from the floors below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llmfast"
FLOORS = {
    "errors": -1,  # floor 0 as well; config raises them
    "config": 0, "files": 0, "ranks": 0, "kernels": 0, "_C": 0,
    "ops": 1, "tokenizer": 1,
    "nn": 2, "data": 2,
    "checkpoint": 3, "generation": 3, "interop": 3,
    "training": 4,
    "finetuning": 5, "evaluation": 5, "bench": 5,
    "cli": 6,
}  # fmt: skip
# Doors upwards, opened inside a function and only for what another program wrote: (file, room).
DOORS = {("gpt.py", "interop"), ("find.py", "interop")}
# The package's own version is the one name that any room may take from the top.
TOP_LEVEL_NAMES = {"__version__"}


def imported_rooms(path: Path, package: str) -> set[str]:
    """Rooms of llmfast that a file imports, at its top or inside a function."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            if base == "llmfast":
                names = [f"llmfast.{a.name}" for a in node.names if a.name not in TOP_LEVEL_NAMES]
            else:
                names = [base]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("llmfast.")}
    return rooms


def sources() -> list[tuple[str, Path, str]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] in ("__init__", "__main__"):
            continue
        package = ".".join(["llmfast", *parts[:-1]])
        found.append((parts[0], path, package))
    for path in sorted((PACKAGE.parent / "kernels").rglob("*.py")):
        found.append(("kernels", path, "llmfast.kernels"))
    return found


def test_every_room_has_a_floor():
    assert {room for room, _, _ in sources()} <= set(FLOORS)


@pytest.mark.parametrize(("room", "path", "package"), sources(), ids=lambda v: getattr(v, "name", str(v)))
def test_imports_point_downwards(room, path, package):
    rooms = {r for r in imported_rooms(path, package) if (path.name, r) not in DOORS}
    above = {r for r in rooms if r != room and FLOORS[r] >= FLOORS[room]}
    assert not above, f"{path.name} (floor {FLOORS[room]}) imports {sorted(above)}"


def test_the_reader_of_imports_sees_every_form(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "import llmfast.cli.main\nfrom llmfast import training\nfrom llmfast import __version__\n"
        "def f():\n    from ..nn import GPT\n    from . import here\n",
        encoding="utf-8",
    )
    assert imported_rooms(path, "llmfast.ops") == {"cli", "training", "nn", "ops"}
