"""Read a corpus as a stream of chunks of about a megabyte, whatever the size of its files.

Reading only cuts bytes; decoding, JSON and tokens are the workers' work (``encode.py``). A chunk tells where the next
one begins, so that an interrupted preparation goes on in the middle of a file.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import importlib
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from llmfast.data.sources import Source
from llmfast.errors import UserError

CHUNK_BYTES = 1 << 20
LARGEST_PIECE = 64 << 20
LARGEST_RECORD = 256 << 20  # bytes of a line or of an element of a list; more is no record but a broken file
_UTF8_BOM = b"\xef\xbb\xbf"

# Places inside a text where no pre-token of a GPT-2-style pattern crosses, so that the tokens of the pieces are the
# tokens of the whole: after a newline between two characters that are not white space (written as UTF-8, leaving out
# the lead bytes that some white space has), and before the single space between two ASCII letters.
_SAFE_CUT = re.compile(
    rb"(?:[!-~]|[\xc3-\xdf][\x80-\xbf]|(?!\xe3\x80\x80)[\xe3-\xef][\x80-\xbf]{2})\n(?=[!-~\xc3-\xdf]|(?!\xe3\x80\x80)[\xe3-\xef])"
    rb"|[A-Za-z](?= [A-Za-z])"
)


@dataclass
class Chunk:
    """Consecutive documents of one file, or one piece of a long text file."""

    path: str
    kind: Literal["text", "lines", "records"]
    data: Any  # bytes of one text (piece) or of whole lines; a list of parsed records
    first: int  # number of the first line or record, from 1
    next_offset: int  # bytes into the (decompressed) file at which the next chunk begins
    next_number: int  # line or record number there
    read: int  # bytes of the file consumed, for the progress bar
    starts: bool = True  # a text piece that begins its document
    ends: bool = True  # a text piece that ends its document
    side: int = -1  # 0: training, 1: validation, -1: by the document's hash
    span: int = 0  # number of its span


@dataclass(frozen=True)
class Span:
    """A file, or bytes ``start`` to ``stop`` of a text file, that goes to ``side``."""

    source: Source
    side: int = -1
    start: int = 0
    stop: int | None = None
    first: int = 1  # number of the line at ``start``
    field: str = "text"  # of records: what to read of a parquet file

    @property
    def size(self) -> int:
        return (self.source.size if self.stop is None else self.stop) - self.start


def read_chunks(span: Span, offset: int = 0, number: int = 0) -> Iterator[Chunk]:
    """The chunks of ``span`` from ``offset``/``number`` on, as an earlier chunk's ``next_offset``/``next_number``."""
    readers = {"text": _text_pieces, "lines": _lines, "json": _json, "parquet": _parquet}
    with _readable(span.source.path):
        for chunk in readers[span.source.kind](span, offset, number or span.first):
            chunk.side = span.side
            yield chunk


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: the file has gone") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: broken compressed file ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def optional_module(name: str, purpose: str) -> Any:
    """Import an optional library; a missing one is a ``UserError`` that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(f'{purpose} needs {package}: pip install "llmfast[data]"') from error


# ---- bytes


class _Stream:
    """Sequential bytes of a plain, .gz or .zst file; ``read(n)`` gives n bytes except at the end."""

    def __init__(self, source: Source, offset: int = 0):
        self._raw = open(source.path, "rb")  # noqa: SIM115 (closed by __exit__)
        self._file: IO[bytes] | gzip.GzipFile | _Zstd = self._raw
        suffix = source.path.suffix.lower()
        if suffix == ".gz":
            self._file = gzip.GzipFile(fileobj=self._raw)
        elif suffix == ".zst":
            self._file = _Zstd(self._raw, source.path)
        if self._file is self._raw:
            self._raw.seek(offset)
        while self._file is not self._raw and offset > 0:
            offset -= len(self.read(min(offset, CHUNK_BYTES))) or offset

    def read(self, size: int) -> bytes:
        parts = []
        while size > 0 and (part := self._file.read(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def blocks(self) -> Iterator[bytes]:
        while block := self.read(CHUNK_BYTES):
            yield block

    def consumed(self) -> int:
        return self._raw.tell()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()


class _Zstd:
    """Decompress zstd frames one after the other. (zstandard's own reader takes a truncated file for a whole one.)"""

    def __init__(self, raw: IO[bytes], path: Path):
        self._zstd = optional_module("zstandard", f"{path}: reading .zst")
        self._raw, self._path = raw, path
        self._frame: Any = None
        self._compressed = self._ready = b""

    def read(self, size: int) -> bytes:
        while not self._ready:
            self._compressed = self._compressed or self._raw.read(1 << 16)
            if not self._compressed:
                if self._frame is not None:
                    raise UserError(f"{self._path}: the compressed file ends too early (truncated?)")
                return b""
            try:
                self._frame = self._frame or self._zstd.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                self._ready = self._frame.decompress(self._compressed)
            except self._zstd.ZstdError as error:
                raise UserError(f"{self._path}: broken compressed file ({error})") from error
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        part, self._ready = self._ready[:size], self._ready[size:]
        return part


# ---- text


def _text_pieces(span: Span, offset: int, number: int) -> Iterator[Chunk]:
    offset = max(offset, span.start)
    with _Stream(span.source, offset) as stream:
        consumed = stream.consumed() if span.source.compressed else offset
        data, more = b"", True
        while more:
            target = CHUNK_BYTES if span.stop is None else min(CHUNK_BYTES, span.stop - offset)
            data += stream.read(target - len(data))
            cut = 0
            # A piece is cut as a function of where it starts alone: a resumed preparation cuts at the same places.
            while more and not cut:
                view = data[:target]
                more = len(view) == target and offset + target != span.stop
                if not more:
                    cut = len(view)
                elif target < LARGEST_PIECE:
                    cut = safe_cut(view)
                    target = target * 2 if span.stop is None else min(target * 2, span.stop - offset)
                    data += b"" if cut else stream.read(target - len(data))
                else:
                    cut = safe_cut(view) or _any_cut(view)
            piece, data = data[:cut], data[cut:]
            starts = offset == span.start
            offset += len(piece)
            first, number = number, number + piece.count(b"\n")
            now = stream.consumed() if span.source.compressed else offset
            if starts and span.start == 0:
                piece = piece.removeprefix(_UTF8_BOM)
            yield Chunk(str(span.source.path), "text", piece, first, offset, number, now - consumed, starts, not more)
            consumed = now


def safe_cut(data: bytes) -> int:
    """The last place in ``data`` where cutting changes no token, or 0."""
    window = 1 << 12
    while True:
        begin = max(0, len(data) - window)
        matches = [match.end() for match in _SAFE_CUT.finditer(data, begin)]
        if matches or not begin:
            return matches[-1] if matches else 0
        window *= 16


def _any_cut(data: bytes) -> int:
    """Where to cut a text without safe places: after its last newline, else between two characters."""
    if cut := data.rfind(b"\n") + 1:
        return cut
    cut = len(data)
    while cut > len(data) - 4 and data[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    return cut - 1 if data[cut - 1] >= 0xC0 else len(data)


def split_characters(source: Source, fraction: float) -> tuple[int, int]:
    """Where character ``int(characters * fraction)`` of a UTF-8 text file begins: byte offset and line number."""
    with _readable(source.path), _Stream(source) as stream:
        count = sum(len(_character_starts(block)) for block in stream.blocks())
    left, offset, line = int(count * fraction), 0, 1
    with _Stream(source) as stream:
        for block in stream.blocks():
            starts = _character_starts(block)
            if left < len(starts):
                return offset + int(starts[left]), line + block.count(b"\n", 0, int(starts[left]))
            left, offset, line = left - len(starts), offset + len(block), line + block.count(b"\n")
    return offset, line


def _character_starts(block: bytes) -> np.ndarray:
    return np.flatnonzero((np.frombuffer(block, np.uint8) & 0xC0) != 0x80)


# ---- records


def _lines(span: Span, offset: int, number: int) -> Iterator[Chunk]:
    with _Stream(span.source, offset) as stream:
        consumed = stream.consumed() if span.source.compressed else offset
        pending: list[bytes] = []
        while True:
            block = stream.read(CHUNK_BYTES)
            cut = block.rfind(b"\n") + 1 if block else 0
            if block and not cut:
                pending.append(block)
                if sum(map(len, pending)) > LARGEST_RECORD:
                    raise UserError(f"{span.source.path}, line {number}: {_too_long()}")
                continue
            data = b"".join([*pending, block[:cut]])
            pending = [block[cut:]]
            if data:
                offset += len(data)
                first, number = number, number + data.count(b"\n")
                now = stream.consumed() if span.source.compressed else offset
                yield Chunk(str(span.source.path), "lines", data, first, offset, number, now - consumed)
                consumed = now
            if not block:
                return


def _too_long() -> str:
    return f"longer than {LARGEST_RECORD >> 20} MB; is the file broken, or no list of records?"


def _records(span: Span, number: int, records: Iterator[tuple[Any, int]]) -> Iterator[Chunk]:
    """Group (record, bytes) into chunks."""
    batch: list[Any] = []
    size = 0
    for record, bytes_read in records:
        batch.append(record)
        size += bytes_read
        if size >= CHUNK_BYTES:
            yield Chunk(str(span.source.path), "records", batch, number, 0, number + len(batch), size)
            number, batch, size = number + len(batch), [], 0
    if batch:
        yield Chunk(str(span.source.path), "records", batch, number, 0, number + len(batch), size)


def _json(span: Span, offset: int, number: int) -> Iterator[Chunk]:
    with _Stream(span.source) as stream:
        head = stream.read(4096).removeprefix(_UTF8_BOM).lstrip()
    if head.startswith(b"["):
        yield from _records(span, number, itertools.islice(_json_array(span.source), number - 1, None))
    else:
        yield from _lines(span, offset, number)


def _json_array(source: Source) -> Iterator[tuple[Any, int]]:
    """The elements of a JSON array, one at a time, without holding the whole file."""
    decoder, path = json.JSONDecoder(), source.path
    space = re.compile(r"[ \t\r\n]*")
    with _Stream(source) as stream:
        utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        text, at, count, want, ended = "", 0, 0, CHUNK_BYTES, False
        separator = "["
        while True:
            try:
                place = space.match(text, at).end()  # type: ignore[union-attr]
                if text[place : place + 1] != separator and text[place : place + 1] != "]":
                    raise json.JSONDecodeError(f"expected {separator!r} or ']'", text, place)
                if text[place] == "]":
                    return
                place = space.match(text, place + 1).end()  # type: ignore[union-attr]
                if separator == "[" and text[place : place + 1] == "]":
                    return
                record, end = decoder.raw_decode(text, place)
                if end == len(text) and not ended:
                    raise json.JSONDecodeError("needs more", text, end)
            except json.JSONDecodeError as error:
                if ended:
                    raise UserError(f"{path}, record {count + 1}: broken JSON ({error.msg})") from error
                if len(text) - at > LARGEST_RECORD:
                    raise UserError(f"{path}, record {count + 1}: {_too_long()}") from error
                try:
                    block = stream.read(want)
                    text = text[at:] + utf8.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}, after record {count}: not UTF-8 text") from error
                at, ended, want = 0, not block, want * 2
                continue
            except (ValueError, RecursionError) as error:  # a number of too many digits, too deep a nesting
                raise UserError(f"{path}, record {count + 1}: unreadable JSON ({error})") from error
            count, separator, want = count + 1, ",", CHUNK_BYTES
            yield record, end - at
            at = end


def _parquet(span: Span, offset: int, number: int) -> Iterator[Chunk]:
    path = span.source.path
    arrow = optional_module("pyarrow", f"{path}: reading .parquet")
    parquet = optional_module("pyarrow.parquet", f"{path}: reading .parquet")
    try:
        with parquet.ParquetFile(path, buffer_size=CHUNK_BYTES) as file:
            rows = file.metadata.num_rows
            columns = [span.field] if span.field in file.schema_arrow.names else None
            items = _parquet_rows(file, columns, number - 1, int(span.source.size / max(rows, 1)) + 1)
            yield from _records(span, number, items)
    except arrow.ArrowException as error:
        raise UserError(f"{path}: broken parquet file ({str(error).splitlines()[0]})") from error


def _parquet_rows(file: Any, columns: list[str] | None, skip: int, bytes_a_row: int) -> Iterator[tuple[Any, int]]:
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if skip >= rows:
            skip -= rows
            continue
        for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=columns):
            for record in batch.slice(skip).to_pylist():
                yield record, bytes_a_row
            skip = max(0, skip - batch.num_rows)
