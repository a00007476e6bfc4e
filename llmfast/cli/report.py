"""``llmfast report RUN...``: training runs and benchmark files as one HTML page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llmfast.cli.common import note
from llmfast.config import option
from llmfast.errors import UserError


@dataclass
class Options:
    """Options of ``llmfast report``."""

    runs: list[str] = field(
        metadata={"help": "run directories, and files that llmfast bench --save wrote", "positional": True}
    )
    out: str = option("report.html", "the page to write")
    title: str = option("llmfast report", "its title")


def run(options: Options) -> int:
    from llmfast.bench.report import write_report

    for path in options.runs:
        if not Path(path).exists():
            raise UserError(f"{path}: no such run or file")
    if not Path(options.out).resolve().parent.is_dir():
        raise UserError(f"{options.out}: there is no folder {Path(options.out).resolve().parent}")
    note(f"report: {write_report(options.runs, Path(options.out), options.title)}")
    return 0
