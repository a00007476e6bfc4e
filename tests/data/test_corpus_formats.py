"""What prepare reads, and the one line it says where it cannot."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from llmfast.data import find_sources, prepare, readers
from llmfast.errors import UserError
from llmfast.tokenizer import load_tokenizer

TEXTS = ["one", "ñandú\n東京", "", "x" * 300, 'q"uo\\te', "last 😀"]
KEPT = [text for text in TEXTS if text]


def prepared_texts(sources, out: Path, **options) -> list[str]:
    done = prepare(
        sources, out, tokenizer="byte", val_fraction=0, split="documents", workers=1, progress=False, **options
    )
    tokens = np.concatenate([np.fromfile(file, "<u2") for file in sorted(done.path.glob("train-*.bin"))])
    ends = np.flatnonzero(tokens == load_tokenizer("byte").eot_id)
    return [bytes(part[:-1].astype(np.uint8)).decode() for part in np.split(tokens, ends + 1)[:-1]]


def lines(field: str = "text") -> bytes:
    return "\n".join(json.dumps({"id": 1, field: text}, ensure_ascii=False) for text in TEXTS).encode()


def write_parquet(path: Path, field: str = "text", row_group_size: int = 2) -> None:
    table = pyarrow.table({"id": list(range(len(TEXTS))), field: TEXTS})
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(lines()),
    "crlf.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + lines().replace(b"\n", b"\r\n\r\n")),
    "strings.ndjson": lambda path: path.write_text("\n".join(map(json.dumps, TEXTS)) + "\n"),
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(lines())),
    "frames.jsonl.zst": lambda path: path.write_bytes(
        zstandard.compress(lines()[:100]) + zstandard.compress(b"") + zstandard.compress(lines()[100:])
    ),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines())),
    "list.json": lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=2)),
    "strings.json": lambda path: path.write_text(" \n" + json.dumps(TEXTS) + "\n"),
    "lines.json": lambda path: path.write_bytes(lines()),
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("chunk", [1, 13, 1 << 20])
def test_every_format_gives_the_same_documents(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr(readers, "CHUNK_BYTES", chunk)
    WRITERS[name](tmp_path / name)
    assert prepared_texts(tmp_path / name, tmp_path / "out") == KEPT


@pytest.mark.parametrize("name", ["a.txt", "a.md", "noending", "a.txt.zst", "a.txt.gz"])
def test_any_other_file_is_one_text(tmp_path, name):
    data = "\r\n".join(TEXTS).encode()
    pack = {".zst": zstandard.compress, ".gz": gzip.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(data))
    assert prepared_texts(tmp_path / name, tmp_path / "out") == ["\r\n".join(TEXTS)]


def test_another_field(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("body"))
    write_parquet(tmp_path / "b.parquet", "body")
    found = prepared_texts([tmp_path / "a.jsonl", tmp_path / "b.parquet"], tmp_path / "out", field="body")
    assert found == KEPT * 2


def test_chunks_go_on_from_any_of_their_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 50)
    for name, write in {**WRITERS, "a.txt": lambda path: path.write_text("some words\n" * 99)}.items():
        write(tmp_path / name)
        span = readers.Span(find_sources(tmp_path / name)[0])
        chunks = list(readers.read_chunks(span))
        assert len(chunks) > 1, name
        for i, chunk in enumerate(chunks[:-1]):
            rest = list(readers.read_chunks(span, chunk.next_offset, chunk.next_number))
            assert rest[0].first == chunks[i + 1].first, name
            if chunk.kind == "text":  # pieces must be cut at the same places; groups of records may differ
                assert [c.data for c in rest] == [c.data for c in chunks[i + 1 :]]
            else:
                assert [x for c in rest for x in c.data] == [x for c in chunks[i + 1 :] for x in c.data], name


def test_what_was_prepared_inside_a_folder_of_text_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    assert prepared_texts(tmp_path, tmp_path / "out") == ["text"]
    assert [source.path.name for source in find_sources(tmp_path)] == ["a.txt"]
    assert prepared_texts(tmp_path, tmp_path / "out") == ["text"]


def test_lone_surrogates_of_json_become_the_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    assert prepared_texts(tmp_path / "a.jsonl", tmp_path / "out") == ["a\ufffdb \U0001f600"]


def test_folders_are_read_sorted_without_hidden_and_empty_files_and_each_file_once(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "a.txt", ".hidden/x.txt", "b/.x.txt", "b/empty.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else name)
    found = [source.path.relative_to(tmp_path).as_posix() for source in find_sources(tmp_path)]
    assert found == ["a.txt", "b/1.txt", "b/2.txt"]
    found = [source.path.name for source in find_sources([tmp_path / "b/2.txt", tmp_path / "**/*.txt"])]
    assert found == ["2.txt", "a.txt", "1.txt"]


# ---- mistakes


def put(name: str, data: bytes):
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


GOOD = b'{"text": "good"}\n'
MISTAKES = {
    "missing file": (lambda folder: folder / "none.txt", "none.txt: no such file or folder"),
    "empty file": (put("a.txt", b""), "a.txt: the file is empty"),
    "empty folder": (lambda folder: folder, "the folder holds no text files"),
    "glob without match": (lambda folder: folder / "*.txt", r"\*.txt: no file with text matches"),
    "binary file": (put("a.txt", b"line\nli\0ne"), "a.txt, line 2: a binary file"),
    "not UTF-8": (put("a.txt", b"a\nb\nc\xff\n"), "a.txt, line 3: not UTF-8 text .byte 0xff."),
    "cut in a character": (put("a.txt", "東".encode()[:2]), "a.txt, line 1: not UTF-8"),
    "broken line": (put("a.jsonl", GOOD + b"\n{broken\n"), "a.jsonl, line 3: not JSON"),
    "missing field": (put("a.jsonl", GOOD + b'{"body": 1}\n'), "a.jsonl, line 2: no field 'text' .fields: body."),
    "field of another type": (put("a.jsonl", b'{"text": 5}\n'), "a.jsonl, line 1: field 'text' holds int"),
    "record of another type": (put("a.jsonl", GOOD + b"[1]\n"), "a.jsonl, line 2: expected an object or a string"),
    "line not UTF-8": (put("a.jsonl", GOOD + b'{"text": "\xe9"}\n'), "a.jsonl, line 2: not UTF-8"),
    "nested too deeply": (put("a.jsonl", b"[" * 200_000), "a.jsonl, line 1: not JSON"),
    "broken list": (put("a.json", b'[{"text": "a"}, {"text"'), "a.json, record 2: broken JSON"),
    "list without commas": (put("a.json", b'["a" "b"]'), "a.json, record 2: broken JSON"),
    "list not UTF-8": (put("a.json", b'["a", "\xff"]'), "a.json, after record 0: not UTF-8"),
    "record without field": (put("a.json", b'["a", {}]'), "a.json, record 2: no field 'text' .fields: none."),
    "truncated zst": (put("a.txt.zst", zstandard.compress(os.urandom(99999))[:5000]), "a.txt.zst: .*too early"),
    "no zst": (put("a.jsonl.zst", GOOD), "a.jsonl.zst: broken compressed file"),
    "truncated gz": (put("a.txt.gz", gzip.compress(os.urandom(9999))[:5000]), "a.txt.gz: broken compressed file"),
    "no parquet": (put("a.parquet", GOOD), "a.parquet: broken parquet file"),
    "token file": (put("a.bin", b"1234"), "a.bin: .bin holds tokens, not text"),
    "number too long": (put("a.jsonl", b"[" + b"1" * 9999 + b"]\n"), "a.jsonl, line 1: (not JSON|expected)"),
    "list nested too deeply": (put("a.json", b"[" * 200_000), "a.json, record 1: (unreadable|broken) JSON"),
    "nothing but empty records": (put("a.jsonl", b'{"text": ""}\n'), "the sources hold no text"),
    "one record to split": (put("a.jsonl", GOOD), "leaves nothing for validation"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_data_are_one_clear_line(tmp_path, mistake):
    make, message = MISTAKES[mistake]
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        prepare(make(tmp_path / "in"), tmp_path / "out", tokenizer="byte", progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "where"), [("a.jsonl", "line 3"), ("a.json", "record 3")])
def test_an_endless_record_is_told_before_it_fills_the_memory(tmp_path, monkeypatch, name, where):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 100)
    monkeypatch.setattr(readers, "LARGEST_RECORD", 5000)
    begin = GOOD * 2 if name == "a.jsonl" else b'["one", "two", '
    (tmp_path / name).write_bytes(begin + b'"' + b"x" * 20_000)
    with pytest.raises(UserError, match=f"{name}, {where}: longer than 0 MB"):
        prepare(tmp_path / name, tmp_path / "out", tokenizer="byte", progress=False)


def test_a_mistake_before_the_first_token_leaves_no_folder_behind(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{oops\n")
    with pytest.raises(UserError, match="line 1: not JSON"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(val_fraction=1.0), "val_fraction"),
        (dict(val_fraction=-0.1), "val_fraction"),
        (dict(split="lines"), "split must be"),
        (dict(on_error="ignore"), "on_error must be"),
        (dict(workers=0), "workers must be"),
        (dict(shard_tokens=0), "shard_tokens must be"),
        (dict(seed=2**64), "seed must fit"),
        (dict(clean=["html"]), "unknown cleaning 'html'"),
        (dict(tokenizer="none-such"), "none-such"),
        (dict(tokenizer=None, tokenizer_size=100), "tokenizer_size must be"),
        (dict(val_sources="nowhere.txt"), "nowhere.txt: no such file"),
    ],
)
def test_mistakes_in_the_options_are_one_clear_line(tmp_path, options, message):
    (tmp_path / "a.txt").write_text("some text\n")
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "a.txt", tmp_path / "out", **{"tokenizer": "byte", "progress": False, **options})


def test_what_cannot_be_read_is_skipped_counted_and_said_aloud(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(GOOD + b'{"text": 3}\n{oops\n' + GOOD)
    (tmp_path / "in/b.txt").write_bytes(b"\xff\xff")
    (tmp_path / "in/c.txt").write_bytes(b"fine")
    assert prepared_texts(tmp_path / "in", tmp_path / "out", on_error="skip") == ["good", "good", "fine"]
    assert json.loads((tmp_path / "out/meta.json").read_text())["skipped"] == 3
    said = capsys.readouterr().err
    assert "skipped 3 that could not be read; the first:" in said
    assert "a.jsonl, line 2: field 'text' holds int" in said


def test_a_run_stopped_by_a_broken_line_goes_on_with_skip(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 40)
    (tmp_path / "a.jsonl").write_bytes(GOOD * 20 + b"{oops\n" + GOOD * 20)
    with pytest.raises(UserError, match=r"line 21: not JSON.*--on-error skip"):
        prepared_texts(tmp_path / "a.jsonl", tmp_path / "out")
    assert json.loads((tmp_path / "out/.prepare.json").read_text())["position"]["number"] > 10
    assert prepared_texts(tmp_path / "a.jsonl", tmp_path / "out", on_error="skip") == ["good"] * 40


def test_a_run_that_was_stopped_starts_over_when_its_data_has_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 40)
    (tmp_path / "a.jsonl").write_bytes(GOOD * 20 + b"{oops\n")
    with pytest.raises(UserError, match="line 21"):
        prepared_texts(tmp_path / "a.jsonl", tmp_path / "out")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "mended"}\n' * 3)
    assert prepared_texts(tmp_path / "a.jsonl", tmp_path / "out") == ["mended"] * 3
    assert "have changed since this preparation stopped; starting over" in capsys.readouterr().err


def test_missing_optional_library_says_what_to_install(tmp_path, monkeypatch):
    WRITERS["a.jsonl.zst"](tmp_path / "a.jsonl.zst")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match=r'zstandard: pip install "llmfast\[data\]"'):
        prepare(tmp_path / "a.jsonl.zst", tmp_path / "out", tokenizer="byte", progress=False)


# ---- the output folder


def test_an_output_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 9)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="a file is in the way"):
        prepare(tmp_path / "a.txt", tmp_path / "file", tokenizer="byte", progress=False)
    with pytest.raises(UserError, match="holds other things"):
        prepare(tmp_path / "a.txt", tmp_path, tokenizer="byte", progress=False)
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/train-00000.bin").write_bytes(b"1234")
    with pytest.raises(UserError, match="token files of something else"):
        prepare(tmp_path / "a.txt", tmp_path / "tokens", tokenizer="byte", progress=False)
    assert (tmp_path / "tokens/train-00000.bin").read_bytes() == b"1234"
    prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer="byte", progress=False)
    before = (tmp_path / "out/train-00000.bin").read_bytes()
    with pytest.raises(UserError, match="other sources or options"):
        prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer="byte", seed=5, progress=False)
    assert (tmp_path / "out/train-00000.bin").read_bytes() == before


def test_two_processes_do_not_write_one_folder(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 9)
    hold = "import sys; from pathlib import Path; from llmfast.data.shards import OutputFolder\n"
    hold += "with OutputFolder(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline().strip() == b"held"
        with pytest.raises(UserError, match="another process is writing"):
            prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer="byte", progress=False)
        holder.kill()
    done = prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer="byte", progress=False)
    assert sum(done.tokens.values()) == 45


@contextlib.contextmanager
def no_file_may_grow_beyond(size: int):
    """The kernel refuses writes past ``size`` with EFBIG, as it refuses them on a full disk with ENOSPC."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1000)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 30}) + "\n" for i in range(500)))
    whole = prepared_texts(tmp_path / "a.jsonl", tmp_path / "whole")
    with no_file_may_grow_beyond(20_000), pytest.raises(UserError, match="no space left on the disk"):
        prepared_texts(tmp_path / "a.jsonl", tmp_path / "out")
    assert prepared_texts(tmp_path / "a.jsonl", tmp_path / "out") == whole
