"""Records of one file: CSV, TSV, JSON and JSONL become dicts that know their line, and bad ones are named by it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmfast.errors import UserError

FORMATS = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl"}


@dataclass(frozen=True)
class Record:
    """One record and the line of the file on which it begins, counted from 1."""

    values: dict[str, Any]
    line: int


@dataclass
class Records:
    """The records of ``path`` that can be used so far.

    ``columns`` are the names of a table's columns, or the keys that occur in JSON records; ``has_header`` is False
    for a table without one, whose columns are called "1", "2", ... ``problems`` says of each record left out why.
    """

    path: Path
    skip_bad: bool = False
    rows: list[Record] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    has_header: bool = True
    problems: list[str] = field(default_factory=list)
    total: int = 0  # records that the file holds

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.rows)

    def reject(self, line: int, why: str) -> None:
        """The record of ``line`` cannot be used: ``UserError``, or, with ``skip_bad``, one more of ``problems``."""
        problem = f"{self.path}:{line}: {why}"
        if not self.skip_bad:
            raise UserError(f"{problem}; mend it, or leave out what cannot be used: --skip-bad")
        self.problems.append(problem)

    def summary(self) -> str | None:
        """What was left out, in one line; None where nothing was."""
        if not self.problems:
            return None
        count = len(self.problems)
        return f"left out {count:,} of {self.total:,} records of {self.path}; the first: {self.problems[0]}"

    def text(self, record: Record, column: str, *, empty: bool = False) -> str | None:
        """The text in ``column`` of ``record``; where it is missing, no text, or blank (unless ``empty``), rejects."""
        value = record.values.get(column)
        if value is None:
            self.reject(record.line, f"no {column!r}")
        elif not isinstance(value, str):
            self.reject(record.line, f"{column!r} is {type(value).__name__}, not text")
        elif not empty and not value.strip():
            self.reject(record.line, f"{column!r} is empty")
        else:
            return value
        return None


def read_records(path: str | Path, *, names: Iterable[str] = (), skip_bad: bool = False) -> Records:
    """Read ``path``, its format told by its ending, else by its beginning.

    CSV follows RFC 4180; TSV is tab-separated lines as they are, quotes included. A table's first line is its header
    if it holds one of ``names`` (in any case). JSON is a list of objects (or an object whose only list that is), JSONL
    one object a line; blank lines mean nothing. Raises ``UserError`` with file and line for what cannot be read;
    with ``skip_bad`` a bad record is left out and remembered, as far as the format lets the next one be found.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name one file of examples")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    # Bytes that are not UTF-8 become lone surrogates, by which the records that hold them are known.
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    records = Records(path, skip_bad)
    kind = FORMATS.get(path.suffix.lower()) or _guess(text)
    if kind == "json":
        _read_json(records, text)
    elif kind == "jsonl":
        _read_json_lines(records, text)
    else:
        _read_table(records, _csv_rows(records, text) if kind == "csv" else _tsv_rows(records, text), names)
    if kind in ("json", "jsonl"):
        records.columns = list(dict.fromkeys(key for record in records for key in record.values))
    records.total = len(records.rows) + len(records.problems)
    if not records.rows:
        raise UserError(f"{path} holds no record that can be used" + (f": {p[0]}" if (p := records.problems) else ""))
    return records


def _guess(text: str) -> str:
    start = text.lstrip()[:1]
    if start == "[":
        return "json"
    if start == "{":
        first = next(line for line in text.split("\n") if line.strip())
        try:
            json.loads(first)
        except ValueError:
            return "json"
        return "jsonl"
    return "tsv" if "\t" in text.split("\n", 1)[0] else "csv"


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text)


def _read_json(records: Records, text: str) -> None:
    if not _is_utf8(text):
        place = next(i for i, character in enumerate(text) if "\udc80" <= character <= "\udcff")
        raise UserError(f"{records.path}:{text.count(chr(10), 0, place) + 1}: not UTF-8 text")
    decoder = json.JSONDecoder()
    try:
        if not text.lstrip().startswith("["):
            _take_object(records, decoder.decode(text))
            return
        # Entry by entry, for the line of each.
        place = _skip(text, text.index("[") + 1)
        counted, line = 0, 1
        while text[place : place + 1] != "]":
            value, end = decoder.raw_decode(text, place)
            counted, line = place, line + text.count("\n", counted, place)
            _add(records, value, line)
            place = _skip(text, end)
            if text[place : place + 1] == ",":
                place = _skip(text, place + 1)
            elif text[place : place + 1] != "]":
                raise json.JSONDecodeError("expecting ',' or ']'", text, place)
        if text[place + 1 :].strip():
            raise json.JSONDecodeError("extra data", text, _skip(text, place + 1))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{records.path}:{error.lineno}: broken JSON ({error.msg.lower()}, column {error.colno})"
        ) from None
    except RecursionError:
        raise UserError(f"{records.path}: JSON nested too deeply") from None


def _take_object(records: Records, value: Any) -> None:
    lists = [item for item in value.values() if isinstance(item, list)] if isinstance(value, dict) else []
    if len(lists) != 1:
        raise UserError(f"{records.path}: expected a JSON list of objects, found {_kind(value)}")
    for item in lists[0]:
        _add(records, item, 1)


def _read_json_lines(records: Records, text: str) -> None:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if not _is_utf8(line):
            records.reject(number, "not UTF-8 text")
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = error.msg.lower() if isinstance(error, json.JSONDecodeError) else str(error)
            records.reject(number, f"broken JSON ({why})")
            continue
        _add(records, value, number)


def _add(records: Records, value: Any, line: int) -> None:
    if isinstance(value, dict):
        records.rows.append(Record(value, line))
    else:
        records.reject(line, f"expected a JSON object, found {_kind(value)}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _read_table(records: Records, rows: Iterator[tuple[int, list[str]]], names: Iterable[str]) -> None:
    known = {name.casefold() for name in names}
    for line, row in rows:
        if not records.columns:
            records.has_header = any(cell.strip().casefold() in known for cell in row)
            if records.has_header:
                records.columns = [cell.strip() for cell in row]
                if len(set(records.columns)) != len(row):
                    raise UserError(f"{records.path}:{line}: two columns have the same name: {', '.join(row)}")
                continue
            records.columns = [str(i) for i in range(1, len(row) + 1)]
        if not all(map(_is_utf8, row)):
            records.reject(line, "not UTF-8 text")
        elif len(row) != len(records.columns):
            records.reject(line, f"{len(row)} columns, expected {len(records.columns)}")
        else:
            records.rows.append(Record(dict(zip(records.columns, row, strict=True)), line))


def _tsv_rows(records: Records, text: str) -> Iterator[tuple[int, list[str]]]:
    # Not splitlines(): a text may hold any of the characters that it splits at.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r").split("\t")


def _csv_rows(records: Records, text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{records.path}:{line}: broken CSV ({error})") from None
        if row:
            yield line, row


def _skip(text: str, place: int) -> int:
    """The place of the next character that is no white space."""
    while text[place : place + 1].isspace():
        place += 1
    return place
