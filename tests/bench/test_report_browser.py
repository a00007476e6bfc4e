"""The report in a headless browser: nothing is fetched, nothing complains, and its figures are those of the files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from browser import CHROMIUM, browser

from llmfast.bench.report import TABLES, write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
# Rows of text, whether of tables or of preformatted ones.
ROWS = """[...document.querySelectorAll('tr')].map(r => [...r.cells].map(c => c.innerText))"""
COLOURS = "(e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color])(document.body)"


def brightness(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def stands_for(cell, value):
    """Whether the first number of ``cell`` is ``value`` rounded to the digits that it shows."""
    shown = re.match(r"-?[\d,]+(\.\d+)?", cell)
    if not shown:
        return False
    digits = len(shown.group(1) or ".") - 1
    return math.isclose(float(shown.group().replace(",", "")), value, abs_tol=0.51 * 10**-digits)


def test_the_report_of_the_recorded_runs_in_light_and_dark_has_their_figures_and_needs_no_network(run_folder, tmp_path):
    kinds = {path: json.loads(path.read_text()).get("kind") for path in sorted(RESULTS.glob("cpu-*/*.json"))}
    files = [path for path, kind in kinds.items() if kind in TABLES]
    assert "ops" in kinds.values()
    page = write_report([run_folder, *files], tmp_path / "report.html")
    with browser(tmp_path / "profile") as chromium:
        seen = {}
        for scheme in ("light", "dark"):
            chromium.open(page, scheme)
            seen[scheme] = [brightness(colour) for colour in chromium.value(COLOURS)]
            assert chromium.complaints() == []
        rows, text = chromium.value(ROWS), chromium.value("document.body.innerText")
        assert chromium.value("document.querySelectorAll('svg polyline').length") > 2
        assert chromium.value("document.documentElement.scrollWidth <= innerWidth")
    assert seen["light"][0] > 200 > 80 > seen["light"][1]
    assert seen["dark"][0] < 80 < 200 < seen["dark"][1]
    for path in files:
        results = json.loads(path.read_text())
        for record in results.get("ops", []):
            where = record["mode"] if record["cache"] == "hot" else f"{record['mode']}, {record['cache']}"
            mine = [row for row in rows if row[:2] == [record["provider"], where] and len(row) == 8]
            assert any(
                stands_for(row[2], 1e3 * record["seconds"][0])
                and stands_for(row[3], record["ratio_to_eager"][0])
                and stands_for(row[5], record["share"])
                and stands_for(row[6], record["peak_bytes"] / 1e6)
                for row in mine
            ), record
        for record in results.get("steps", []):
            (row,) = (row for row in rows if row[0] == record["provider"] and len(row) == 7)
            assert stands_for(row[1], 1e3 * record["seconds"][0])
            assert stands_for(row[2], record["tokens_per_second"])
            assert stands_for(row[4], record["mfu"])
        for record in results.get("generate", []):
            shown = rf"^{record['provider']}[ *]+{record['dtype']} +{record['batch']} +([\d,]+) +([\d,.]+) "
            prompt, tokens = re.search(shown, text, re.M).groups()
            assert stands_for(prompt, record["prompt_tokens_per_second"])
            assert stands_for(tokens, record["tokens_per_second"])
        for record in results.get("data", []):
            tokens, speed = re.search(rf"^{record['provider']} +([\d,]+) +([\d,]+) ", text, re.M).groups()
            assert stands_for(tokens, record["tokens"])
            assert stands_for(speed, record["tokens_per_second"])


def test_a_page_that_fetches_or_fails_is_noticed(tmp_path):
    """What the test above would see."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<img src='http://example.invalid/a.png'><script>console.error('no'); undefined_function()</script>"
    )
    with browser(tmp_path / "profile") as chromium:
        chromium.open(page, "light")
        found = " ".join(chromium.complaints())
    assert "request: http://example.invalid/a.png" in found
    assert "consoleAPICalled" in found
    assert "undefined_function" in found
