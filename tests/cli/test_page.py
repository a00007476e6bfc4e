"""docs/cli.md is what the code makes of itself, and names every flag that help shows."""

from __future__ import annotations

import re
from pathlib import Path

from llmfast.cli.main import VERBS, main
from llmfast.cli.page import page

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m llmfast.cli.page > docs/cli.md"


def test_the_page_names_every_flag_of_the_help(capsys):
    sections = dict(re.findall(r"^## llmfast (\w+)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S))
    assert list(sections) == list(VERBS)
    for verb, section in sections.items():
        for words in [[verb], *([verb, action] for action in re.findall(rf"^### llmfast {verb} (\w+)", section, re.M))]:
            assert main([*words, "--help"]) == 0
            for flag in re.findall(r"^  (--[a-z0-9-]+)", capsys.readouterr().out, re.M):
                assert flag == "--config" or f"`{flag}" in section
