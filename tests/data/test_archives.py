"""Archives made to write elsewhere, to link, to swell or to lie, and plain ones."""

from __future__ import annotations

import contextlib
import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from llmfast.data import archives
from llmfast.data.archives import unpack
from llmfast.errors import UserError

OUTSIDE = ["../evil", "a/../../evil", "/evil", "C:/evil", "C:evil", "..\\evil", "\\evil", "a\\..\\..\\evil", ".."]


def zip_of(path: Path, *members: tuple[str, bytes], mode: int = stat.S_IFREG | 0o644) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            info = zipfile.ZipInfo("placeholder")
            info.filename = name  # as it stands, not as zipfile would mend it
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return path


def tar_of(path: Path, *members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, compression: str = "gz") -> Path:
    with tarfile.open(path, f"w:{compression}") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "target"
            archive.addfile(info, io.BytesIO(content))
    return path


def refused(archive: Path, folder: Path, said: str) -> None:
    with pytest.raises(UserError, match=said):
        unpack(archive, folder)
    assert not folder.exists()


@pytest.mark.parametrize("kind", ["zip", "gz", "bz2", "xz", ""])
def test_a_plain_archive_comes_out(tmp_path, kind):
    members = [("a.txt", b"one"), ("b/c.txt", b"two" * 1000), ("b/d/e", b"")]
    packed = tmp_path / "packed"
    packed = zip_of(packed, *members) if kind == "zip" else tar_of(packed, *members, compression=kind)
    written = unpack(packed, tmp_path / "out")
    assert {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in written} == dict(members)


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("make", [zip_of, tar_of], ids=["zip", "tar"])
def test_a_path_outside_is_refused(tmp_path, make, name):
    folder = tmp_path / "deep" / "out"
    refused(make(tmp_path / "packed", ("fine", b"x"), (name, b"x")), folder, "a path outside of its folder")
    assert [path.name for path in tmp_path.rglob("*")] == ["packed"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_of_a_tar_are_refused(tmp_path, kind):
    refused(tar_of(tmp_path / "packed", ("link", b""), kind=kind), tmp_path / "out", "no plain file")


@pytest.mark.parametrize("mode", [stat.S_IFLNK | 0o777, stat.S_IFIFO | 0o644])
def test_links_and_pipes_of_a_zip_are_refused(tmp_path, mode):
    refused(zip_of(tmp_path / "packed", ("link", b"/etc/passwd"), mode=mode), tmp_path / "out", "no plain file")


@pytest.mark.parametrize("make", [zip_of, tar_of], ids=["zip", "tar"])
def test_bombs_are_refused(tmp_path, make, monkeypatch):
    refused(make(tmp_path / "a", ("zeros", bytes(20 << 20))), tmp_path / "out", "would unpack to more than")
    monkeypatch.setattr(archives, "MOST_MEMBERS", 10)
    refused(make(tmp_path / "b", *((f"{i}", b"") for i in range(11))), tmp_path / "out", "more than 10 files")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("make", [zip_of, tar_of], ids=["zip", "tar"])
@pytest.mark.parametrize("again", ["a", "A", "./a"])
def test_the_same_file_twice_is_refused(tmp_path, make, again):
    refused(make(tmp_path / "packed", ("a", b"1"), (again, b"2")), tmp_path / "out", "twice")


@pytest.mark.parametrize("make", [zip_of, tar_of], ids=["zip", "tar"])
def test_a_damaged_archive_is_one_clear_error(tmp_path, make):
    whole = make(tmp_path / "whole", ("a", bytes(range(256)) * 40)).read_bytes()
    packed = tmp_path / "packed"
    for i in range(0, len(whole), 11):
        for data in (whole[:i], whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1 :]):
            packed.write_bytes(data)
            with contextlib.suppress(UserError):  # and nothing else
                unpack(packed, tmp_path / f"out-{i}-{len(data)}")


def test_what_is_no_archive_is_a_clear_error(tmp_path):
    (tmp_path / "text").write_text("hello", encoding="utf-8")
    refused(tmp_path / "text", tmp_path / "out", "neither a zip nor a tar archive")
