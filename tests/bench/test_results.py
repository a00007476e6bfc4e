"""RESULTS.md and the README's speed table are what benchmarks/results.py makes of the recorded files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("llmfast_results", ROOT / "benchmarks" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_results_is_up_to_date(results):
    assert (ROOT / "benchmarks" / "results" / "RESULTS.md").read_text(encoding="utf-8") == results.page()


def test_the_speed_table_of_the_readme_is_up_to_date(results):
    assert (ROOT / "README.md").read_text(encoding="utf-8") == results.readme()
