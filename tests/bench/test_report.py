"""``llmfast report``: one page with everything in it, whose figures are those of the files."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from llmfast.bench.report import write_report
from llmfast.cli.main import main
from llmfast.errors import UserError

HEADER = {
    "schema": 1, "date": "2026-11-21T10:00:00+00:00", "command": "llmfast bench", "commit": "abc", "device": "a <CPU>",
    "device_type": "cpu", "threads": 2, "versions": {"torch": "2.13", "llmfast": "0.1.0"},
    "ceilings": {"copy": 2e10, "matmul": {"float32": 1e11}},
}  # fmt: skip


def op_record(provider, seconds):
    return {
        "op": "layer_norm", "shape": {"rows": [4, 2], "width": 8}, "dtype": "float32", "device": "cpu",
        "provider": provider, "mode": "both", "cache": "hot", "correct": True, "seconds": seconds, "samples": 9,
        "bytes": 10**6, "flops": 10**5, "bytes_per_second": 10**6 / seconds[0], "flops_per_second": 1e9, "share": 0.5,
        "bound": "copy", "ratio_to_eager": [1.25, 1.2, 1.3], "peak_bytes": 12_300_000,
    }  # fmt: skip


@pytest.fixture
def ops_file(tmp_path):
    records = [op_record("eager", [0.002, 0.0019, 0.0021]), op_record("llmfast cpp", [0.0016, 0.0015, 0.0017])]
    wrong = [
        {"op": "layer_norm", "shape": {"rows": [4, 2]}, "dtype": "float32", "provider": "cheat", "why": "y0 <is> off"}
    ]
    path = tmp_path / "ops.json"
    path.write_text(json.dumps({**HEADER, "kind": "ops", "samples": 9, "ops": records, "wrong": wrong, "not_run": []}))
    return path


class Page(HTMLParser):
    """Cells of all tables, tags that are open at the end, and everything that points outside of the page."""

    VOID = ("meta", "link", "line", "polyline")

    def __init__(self, text):
        super().__init__()
        self.cells, self.open, self.links, self.polylines = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        for name, value in attributes:
            if name in ("src", "href", "xlink:href"):
                self.links.append(value)
            if name == "points":
                self.polylines.append(value.split())

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_figures_are_those_of_the_files(ops_file, run_folder, tmp_path):
    text = write_report([run_folder, ops_file], tmp_path / "a.html").read_text()
    page = Page(text)
    assert page.open == []
    for cell in (
        "1.600 (1.500-1.700)",
        "2.000 (1.900-2.100)",
        "1.25 (1.20-1.30)",
        "12.3",
        "cheat",
        "y0 <is> off",
        "a <CPU>",
    ):
        assert cell in page.cells, cell
    for cell in ("200", "12,800", "3.0000", "4.3219", "1,101"):
        assert cell in page.cells, cell
    assert re.search(r"<tr class=best><td>llmfast cpp", text)
    assert "model = &quot;tiny&quot;" in text
    assert max(len(curve) for curve in page.polylines) == 200


def test_the_page_needs_nothing_from_elsewhere_and_has_a_dark_side(ops_file, run_folder, tmp_path):
    text = write_report([run_folder, ops_file], tmp_path / "a.html").read_text()
    assert Page(text).links == ["data:,"]
    assert not re.search(r"https?:|url\(|@import|<script", text)
    assert "prefers-color-scheme: dark" in text


def test_a_long_run_is_thinned_and_keeps_its_last_point(tmp_path):
    rows = [{"step": i, "loss": float(i)} for i in range(1, 50_001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report([tmp_path], tmp_path / "a.html").read_text()
    assert len(text) < 60_000
    curve = Page(text).polylines[0]
    assert curve[-1] == "748.0,10.0"  # right and top edge: the last step has the largest loss


@pytest.mark.parametrize("rows", [[], [{"step": 1, "loss": 2.0}], [{"step": 1}], [{"step": 1, "loss": None}]])
def test_runs_with_hardly_anything_in_them(tmp_path, rows):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Page(write_report([tmp_path], tmp_path / "a.html").read_text())


def test_what_is_no_run_and_no_results_is_the_users_mistake(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("nonsense")
    (tmp_path / "c.json").write_text(json.dumps({**HEADER, "kind": "ops", "schema": 99}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 1}\n')
    for path, says in (
        ("a.json", "not a file of"),
        ("b.json", "not a JSON"),
        ("c.json", "schema 99"),
        (".", "jsonl:2"),
    ):
        with pytest.raises(UserError, match=says):
            write_report([tmp_path / path], tmp_path / "x.html")
    assert main(["report", str(tmp_path / "none")]) == 2
    assert main(["report", str(tmp_path / "a.json"), "--out", "/no/such/x.html"]) == 2
    assert "internal" not in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()
