"""``llmfast download``: public corpora and weights, checked and resumable."""

from __future__ import annotations

import builtins
from dataclasses import dataclass, field

from llmfast.cli.common import JSON_HELP, note, print_json, table
from llmfast.config import option
from llmfast.errors import UserError


@dataclass
class Options:
    names: builtins.list[str] = field(
        default_factory=list, metadata={"positional": True, "help": "what to fetch; --list names all"}
    )
    out: str = option("data", "folder; what has several files gets a folder of its name in it")
    list: bool = option(False, "say what there is, and how large")
    json: bool = option(False, JSON_HELP)


def run(options: Options) -> int:
    from llmfast.data.catalog import ENTRIES
    from llmfast.data.download import download

    if options.list:
        if options.json:
            print_json({n: {"what": e.what, "bytes": e.size, "pinned": e.pinned} for n, e in ENTRIES.items()})
        else:
            print(table([(name, f"{_size(entry.size):>9}  {entry.what}") for name, entry in ENTRIES.items()]))
        return 0
    if not options.names:
        raise UserError("name what to fetch: llmfast download NAME; llmfast download --list names all")
    found = {name: [str(path) for path in download(name, options.out)] for name in dict.fromkeys(options.names)}
    if options.json:
        print_json(found)
    else:
        for paths in found.values():
            print(*paths, sep="\n")
        note("checked against their SHA-256")
    return 0


def _size(size: int | None) -> str:
    if size is None:
        return "?"
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"
