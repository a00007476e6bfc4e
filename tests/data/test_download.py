"""Downloads from a server that breaks off, hangs, lies, redirects, or is not there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import logging
import multiprocessing
import random
import time
import zipfile
from pathlib import Path

import pytest
from web import hang, page, status, web

from llmfast.cli.main import main
from llmfast.data import catalog, download
from llmfast.data.catalog import Entry, Remote
from llmfast.data.download import Patience, fetch
from llmfast.errors import UserError

BODY = random.Random(0).randbytes(300_001)
SHA256 = hashlib.sha256(BODY).hexdigest()
HASTY = Patience(timeout=0.3, slow_after=0.2, failures=3, pause=0.001)


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    with web() as running:
        yield running


def get(server, folder: Path, *paths: str, **known) -> Path:
    known = {"sha256": SHA256, **known}
    remote = Remote("file.bin", tuple(server.url(path) for path in paths or ("/file",)), **known)
    return fetch(remote, folder, progress=False, patience=HASTY)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_and_alone_and_is_not_fetched_twice(server, tmp_path):
    server.pages["/file"] = page(BODY)
    for _ in range(2):
        assert get(server, tmp_path / "new", size=len(BODY)).read_bytes() == BODY
    assert names(tmp_path / "new") == ["file.bin"]
    assert len(server.requests) == 1


@pytest.mark.parametrize("known", [{}, {"size": len(BODY)}], ids=["size unknown", "size known"])
def test_a_broken_connection_goes_on_where_it_broke(server, tmp_path, known):
    server.pages["/file"] = page(BODY, cut=[100_000, 50_000, 0])
    assert get(server, tmp_path, **known).read_bytes() == BODY
    ranges = [wanted for _, wanted in server.requests]
    assert ranges == [None, "bytes=100000-", "bytes=150000-", "bytes=150000-"]


def test_a_server_without_ranges_is_read_again_from_the_start(server, tmp_path):
    server.pages["/file"] = page(BODY, ranges=False, cut=[100_000, 200_000])
    assert get(server, tmp_path).read_bytes() == BODY


def test_a_later_call_goes_on_from_what_an_earlier_one_left(server, tmp_path):
    server.pages["/file"] = page(BODY, cut=[100_000, 0, 0, 0])
    with pytest.raises(UserError, match=r"connection ended after 100,000 of 300,001 bytes \(3 tries; what arrived is"):
        get(server, tmp_path)
    assert names(tmp_path) == ["file.bin.part", "file.bin.part.etag"]
    assert get(server, tmp_path).read_bytes() == BODY
    assert server.requests[-1][1] == "bytes=100000-"
    assert names(tmp_path) == ["file.bin"]


def test_a_file_that_changed_meanwhile_is_not_spliced(server, tmp_path):
    old, new = b"a" * 1000, b"b" * 1000
    server.pages["/file"] = page(old, cut=[500, 0, 0, 0])
    with pytest.raises(UserError):
        get(server, tmp_path, sha256=None)
    server.pages["/file"] = page(new)
    assert get(server, tmp_path, sha256=None).read_bytes() == new


@pytest.mark.parametrize("left", [b"wrong" * 100, BODY + b"too long", BODY[:-1] + b"?"])
def test_what_lay_there_and_is_wrong_is_fetched_anew(server, tmp_path, left):
    (tmp_path / "file.bin.part").write_bytes(left)
    server.pages["/file"] = page(BODY)
    assert get(server, tmp_path, size=len(BODY)).read_bytes() == BODY


def test_a_wrong_hash_is_refused_and_nothing_kept(server, tmp_path):
    server.pages["/file"] = page(BODY[:-1] + b"?")
    with pytest.raises(
        UserError, match=rf"file\.bin: http://.*/file: its SHA-256 is [0-9a-f]{{64}} instead of {SHA256}"
    ):
        get(server, tmp_path)
    assert names(tmp_path) == []


def test_a_wrong_size_is_refused_before_it_is_read(server, tmp_path):
    server.pages["/file"] = page(BODY)
    with pytest.raises(UserError, match="it is 300,001 bytes long instead of 1,000"):
        get(server, tmp_path, size=1000)
    server.pages["/file"] = hang(b"x" * 5000)
    with pytest.raises(UserError, match="it is 1,000,000 bytes long"):
        get(server, tmp_path, size=1000)


def test_a_body_without_an_end_stops_at_the_known_size(server, tmp_path):
    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(10_000):
                handler.wfile.write(b"x" * 65_536)

    server.pages["/file"] = endless
    with pytest.raises(UserError, match="it is longer than 1,000 bytes"):
        get(server, tmp_path, size=1000)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (hang(), "timed out"),
        (hang(b"x" * 5000), "timed out"),
        (hang(step=0.05), r"only \d+ bytes in \d+ seconds"),
        (lambda handler: None, "Remote end closed connection"),
        (lambda handler: handler.wfile.write(b"nonsense\r\n\r\n"), "nonsense"),
    ],
    ids=["silence", "silence after bytes", "a trickle", "hang-up", "no HTTP"],
)
def test_a_server_that_hangs_is_given_up(server, tmp_path, answer, said):
    server.pages["/file"] = answer
    start = time.monotonic()
    with pytest.raises(UserError, match=said):
        get(server, tmp_path)
    assert time.monotonic() - start < 5


def test_a_server_that_is_busy_is_asked_again(server, tmp_path):
    answers = iter([status(503), status(429), page(BODY)])
    server.pages["/file"] = lambda handler: next(answers)(handler)
    with pytest.raises(UserError, match=r"429 .*\(2 tries\)"):
        get(server, tmp_path)
    assert get(server, tmp_path).read_bytes() == BODY


@pytest.mark.parametrize(("code", "tries"), [(404, 1), (403, 1), (410, 1)])
def test_a_file_that_is_not_there_is_asked_for_once(server, tmp_path, code, tries):
    server.pages["/file"] = status(code)
    with pytest.raises(UserError, match=rf"cannot download file\.bin: http://.*: {code} "):
        get(server, tmp_path)
    assert len(server.requests) == tries


def test_a_mirror_stands_in(server, tmp_path):
    server.pages |= {"/gone": status(404), "/wrong": page(b"x"), "/file": page(BODY)}
    assert get(server, tmp_path, "/gone", "/wrong", "/file").read_bytes() == BODY
    with pytest.raises(UserError, match=r"gone: 404 .*; .*wrong: its SHA-256"):
        get(server, tmp_path / "none", "/gone", "/wrong")


def test_redirects_are_followed_but_not_forever(server, tmp_path):
    server.pages |= {"/old": status(302, Location="/file"), "/file": page(BODY, cut=[1000])}
    assert get(server, tmp_path, "/old").read_bytes() == BODY
    server.pages |= {"/a": status(302, Location="/b"), "/b": status(302, Location="/a")}
    with pytest.raises(UserError, match="infinite loop") as caught:
        get(server, tmp_path / "loop", "/a")
    assert "\n" not in str(caught.value)


def test_a_redirect_away_from_https_is_refused():
    request = download.urllib.request.Request("https://example.org/file")
    with pytest.raises(download._Refused, match="which is not https"):
        download._Redirects().redirect_request(request, None, 302, "Found", {}, "http://example.org/file")


def test_without_a_network_there_is_one_line(tmp_path, server):
    server.server_close()
    with pytest.raises(UserError, match="refused"):
        get(server, tmp_path)
    start = time.monotonic()
    remote = Remote("file.bin", ("https://no-such-host.invalid/file",), SHA256)
    with pytest.raises(UserError, match="no network, or no such host"):
        fetch(remote, tmp_path, progress=False)
    assert time.monotonic() - start < 20
    with pytest.raises(UserError, match="unknown url type"):
        fetch(Remote("file.bin", ("nowhere/file",), SHA256), tmp_path, progress=False)


def test_a_file_without_a_published_hash_is_trusted_aloud_and_held_to_it(server, tmp_path, caplog):
    server.pages["/file"] = page(BODY)
    with caplog.at_level(logging.WARNING, logger="llmfast"):
        path = get(server, tmp_path, sha256=None)
    assert SHA256 in caplog.text
    assert (tmp_path / "file.bin.sha256").read_text(encoding="utf-8") == f"{SHA256}  file.bin\n"
    assert get(server, tmp_path, sha256=None) == path
    path.write_bytes(b"changed")
    with pytest.raises(UserError, match="is there already, and its SHA-256 is not"):
        get(server, tmp_path, sha256=None)
    path.unlink()
    server.pages["/file"] = page(b"another")
    with pytest.raises(UserError, match=f"instead of {SHA256}"):
        get(server, tmp_path, sha256=None)


def test_what_is_in_the_way_is_left_alone(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"mine")
    for sha256 in (SHA256, None):
        with pytest.raises(UserError, match="move it, or choose another folder"):
            get(server, tmp_path, sha256=sha256)
    assert (tmp_path / "file.bin").read_bytes() == b"mine"
    assert server.requests == []


def test_a_full_disk_is_not_tried_again(server, tmp_path, monkeypatch):
    def full(*words):
        raise OSError(errno.ENOSPC, "No space left on device", "file.bin.part")

    monkeypatch.setattr(download, "_chunks", full)
    server.pages["/file"] = page(BODY)
    with pytest.raises(OSError, match="No space left"):
        get(server, tmp_path)
    assert len(server.requests) == 1


def _get_in_process(url: str, folder: Path) -> None:
    fetch(Remote("file.bin", (url,), SHA256), folder, progress=False)


def test_processes_that_want_the_same_file_fetch_it_once(server, tmp_path):
    server.pages["/file"] = page(BODY)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_get_in_process, args=(server.url("/file"), tmp_path)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(server.requests) == 1
    assert names(tmp_path) == ["file.bin"]


def _zip(**members: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def test_a_member_of_an_archive_is_taken_out_and_checked(server, tmp_path):
    packed = _zip(messages=BODY, readme=b"hello")
    server.pages["/file"] = page(packed, cut=[1000])
    known = {"member": "messages", "archive_sha256": hashlib.sha256(packed).hexdigest()}
    assert get(server, tmp_path, **known).read_bytes() == BODY
    assert names(tmp_path) == ["file.bin"]
    with pytest.raises(UserError, match="holds no none"):
        get(server, tmp_path / "b", **{**known, "member": "none"})
    with pytest.raises(UserError, match="has not the SHA-256"):
        get(server, tmp_path / "c", **known, sha256="0" * 64)
    assert names(tmp_path / "b") == names(tmp_path / "c") == []


def test_the_command_fetches_what_its_table_names(server, tmp_path, monkeypatch, capsys):
    server.pages |= {"/text": page(BODY), "/a": page(b"a"), "/b": page(b"b")}
    one, two = (hashlib.sha256(data).hexdigest() for data in (b"a", b"b"))
    table = {
        "text": Entry("a text", (Remote("text.txt", (server.url("/text"),), SHA256, len(BODY)),)),
        "pair": Entry("two", (Remote("a", (server.url("/a"),), one), Remote("b", (server.url("/b"),), two))),
    }
    monkeypatch.setattr(download, "ENTRIES", table)
    assert main(["download", "text", "pair", "--out", str(tmp_path / "data")]) == 0
    folder = tmp_path / "data"
    printed = capsys.readouterr().out.split()
    assert printed == [str(folder / "text.txt"), str(folder / "pair" / "a"), str(folder / "pair" / "b")]
    assert (folder / "text.txt").read_bytes() == BODY
    assert main(["download", "txt"]) == 2
    assert "unknown download 'txt' (did you mean text?)" in capsys.readouterr().err
    assert main(["download"]) == 2
    assert main(["download", "--list"]) == 0


def test_the_mirror_of_the_hub_is_asked(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url("/mirror/"))
    server.pages["/mirror/some/model"] = page(BODY)
    remote = Remote("file.bin", (catalog.HUB + "some/model",), SHA256)
    assert fetch(remote, tmp_path, progress=False).read_bytes() == BODY


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("the-verdict", "text/the-verdict.txt"),
        ("shakespeare", "text/tinyshakespeare.txt"),
        ("sms-spam", "spam/SMSSpamCollection.tsv"),
        ("instructions", "instructions/instruction-data.json"),
        ("preferences", "instructions/instruction-data-with-preference.json"),
        ("gpt2-vocab", "gpt2/encoder.json"),
        ("gpt2-vocab", "gpt2/vocab.bpe"),
    ],
)
def test_the_table_knows_the_real_files(real_data, name, file):
    data = (real_data / file).read_bytes()
    known = {(remote.sha256, remote.size) for remote in catalog.ENTRIES[name].files}
    assert (hashlib.sha256(data).hexdigest(), len(data)) in known


def test_the_table_is_well_formed():
    for name, entry in catalog.ENTRIES.items():
        assert len({remote.name for remote in entry.files}) == len(entry.files), name
        for remote in entry.files:
            assert all(url.startswith("https://") for url in remote.urls)
            for sha256 in (remote.sha256, remote.archive_sha256):
                assert sha256 is None or (len(sha256) == 64 and int(sha256, 16) >= 0)
            assert (remote.member is None) == (remote.archive_sha256 is None)
