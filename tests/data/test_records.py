"""Records of CSV, TSV, JSON and JSONL files, and what is said of bad ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llmfast.data.records import read_records
from llmfast.errors import UserError

DATA = os.environ.get("LLMFAST_TEST_DATA")


def read(tmp_path, name, content, **options):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_records(path, **options)


def rows(records):
    return [(record.line, record.values) for record in records]


def test_csv_with_quotes_and_line_breaks_inside(tmp_path):
    text = 'label,text\r\nham,"a, ""b""\r\nc"\r\n\r\nspam,d\r\n'
    records = read(tmp_path, "x.csv", text, names=["Text"])
    assert rows(records) == [
        (2, {"label": "ham", "text": 'a, "b"\r\nc'}),
        (5, {"label": "spam", "text": "d"}),
    ]
    assert records.columns == ["label", "text"]


def test_tsv_keeps_quotes_and_odd_line_separators(tmp_path):
    records = read(tmp_path, "x.tsv", 'ham\t"hi\nspam\ta\x85b\u2028c"\r\n', names=["text"])
    assert not records.has_header
    assert rows(records) == [(1, {"1": "ham", "2": '"hi'}), (2, {"1": "spam", "2": 'a\x85b\u2028c"'})]


@pytest.mark.skipif(not DATA, reason="LLMFAST_TEST_DATA names no folder of test data")
def test_the_sms_collection_has_5574_messages():
    records = read_records(Path(DATA, "spam", "SMSSpamCollection.tsv"), names=["text", "label"])
    assert len(records) == 5574
    assert [record.line for record in records] == list(range(1, 5575))
    assert sum(record.values["1"] == "spam" for record in records) == 747


def test_json_entries_know_their_lines(tmp_path):
    entries = [{"a": 1}, {"a": "x\ny", "b": [1, 2]}, {"a": None}]
    text = "\n[\n" + ",\n\n".join(json.dumps(e, indent=1) for e in entries) + "\n]\n"
    assert rows(read(tmp_path, "x.json", text)) == [(3, entries[0]), (7, entries[1]), (15, entries[2])]
    assert rows(read(tmp_path, "y.json", json.dumps({"v": 1, "data": entries}))) == [(1, e) for e in entries]
    assert len(read(tmp_path, "z.json", b"\xef\xbb\xbf" + json.dumps(entries).encode())) == 3


@pytest.mark.parametrize(
    ("content", "kind"),
    [('[{"a": 1}]', {"a": 1}), ('{"a": 1}\n{"a": 2}\n', {"a": 1}), ("x\ty\n", {"1": "x", "2": "y"}),
     ("x,y\n", {"1": "x", "2": "y"}), ('{"d":\n [{"a": 1}]}', {"a": 1})],
)  # fmt: skip
def test_a_format_is_told_by_its_beginning(tmp_path, content, kind):
    assert next(iter(read(tmp_path, "data", content))).values == kind


BAD = {
    "columns missing": ("x.tsv", "a\tb\nc\n", ":2: 1 columns, expected 2"),
    "a column too many": ("x.csv", "a,b\nc,d,e\n", ":2: 3 columns, expected 2"),
    "broken JSON line": ("x.jsonl", '{"a": 1}\n\n{"a": \n', ":3: broken JSON"),
    "a line that is no object": ("x.jsonl", '{"a": 1}\n3\n', ":2: expected a JSON object, found a number"),
    "an entry that is no object": ("x.json", '[{"a": 1},\n"b"]', ":2: expected a JSON object, found a text"),
    "not UTF-8 in a table": ("x.tsv", b"a\tb\nc\t\xa31\n", ":2: not UTF-8"),
    "not UTF-8 in JSONL": ("x.jsonl", b'{"a": 1}\n{"a": "\xa3"}\n', ":2: not UTF-8"),
}


@pytest.mark.parametrize(("name", "content", "says"), BAD.values(), ids=BAD)
def test_a_bad_record_is_named_or_left_out_and_counted(tmp_path, name, content, says):
    with pytest.raises(UserError) as caught:
        read(tmp_path, name, content)
    assert f"{tmp_path / name}{says}" in str(caught.value)
    assert "\n" not in str(caught.value)
    records = read(tmp_path, name, content, skip_bad=True)
    assert len(records) == 1
    assert f"left out 1 of 2 records of {tmp_path / name}; the first:" in records.summary()


HOPELESS = {
    "broken JSON": ("x.json", '[{"a": 1},\n{"a": ]', ":2: broken JSON"),
    "no comma": ("x.json", '[{"a": 1}\n{"a": 2}]', ":2: broken JSON (expecting ',' or ']'"),
    "JSON that does not end": ("x.json", '[{"a": 1},', "broken JSON"),
    "something after it": ("x.json", '[{"a": 1}]\n]', ":2: broken JSON (extra data"),
    "JSON without a list": ("x.json", '{"a": 1}', "expected a JSON list of objects, found an object"),
    "JSON not in UTF-8": ("x.json", b'[{"a": 1},\n{"a": "\xa3"}]', ":2: not UTF-8"),
    "deep JSON": ("x.json", "[" * 100_000, "nested too deeply"),
    "an open quote": ("x.csv", 'a,b\nc,"d\n', ":2: broken CSV"),
    "the same name twice": ("x.csv", "text,text\na,b\n", ":1: two columns have the same name"),
    "nothing": ("x.csv", "", "holds no record"),
    "a header alone": ("x.csv", "text,label\n", "holds no record"),
}


@pytest.mark.parametrize(("name", "content", "says"), HOPELESS.values(), ids=HOPELESS)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_what_cannot_be_skipped_is_an_error(tmp_path, name, content, says, skip_bad):
    with pytest.raises(UserError) as caught:
        read(tmp_path, name, content, names=["text"], skip_bad=skip_bad)
    assert says in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.csv: No such file"):
        read_records(tmp_path / "nothing.csv")
    with pytest.raises(UserError, match="is a folder"):
        read_records(tmp_path)


def test_texts_are_checked(tmp_path):
    lines = [{"t": "a"}, {"t": " "}, {"u": "b"}, {"t": 3}]
    records = read(tmp_path, "x.jsonl", "\n".join(map(json.dumps, lines)), skip_bad=True)
    assert [records.text(record, "t") for record in records] == ["a", None, None, None]
    said = [problem.split(":", 1)[1] for problem in records.problems]
    assert said == ["2: 't' is empty", "3: no 't'", "4: 't' is int, not text"]
    assert records.text(records.rows[1], "t", empty=True) == " "
