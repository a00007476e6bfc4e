"""Unpacking zip and tar archives from elsewhere: nothing is written outside the folder, no links, no bombs."""

from __future__ import annotations

import errno
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, NamedTuple

from llmfast.errors import UserError

MOST_BYTES = 4 << 30
MOST_RATIO = 200  # text shrinks by 3 to 20; deflate cannot do more than about 1,000
MOST_MEMBERS = 10_000
_CHUNK = 1 << 20
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError)


class _Member(NamedTuple):
    name: str
    size: int
    is_folder: bool
    is_file: bool
    item: zipfile.ZipInfo | tarfile.TarInfo


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Write the files of a zip or tar archive (plain, gz, bz2, xz) into ``folder``, which must not exist yet.

    Returns the files; empty folders are left out. Raises ``UserError``, before anything is written, for a damaged
    archive and for one that holds a path outside of ``folder``, a link or device, the same file twice, or more than
    MOST_BYTES, MOST_MEMBERS or MOST_RATIO times its own size.
    """
    try:
        with _opened(archive) as source:
            checked = _check(archive, _members(source))
            folder.mkdir(parents=True)
            return [_write(source, member, folder / path, archive) for member, path in checked if not member.is_folder]
    except UserError:
        raise
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):
            raise  # the disk's
        raise UserError(_damaged(archive, error)) from None
    except _DAMAGE as error:
        raise UserError(_damaged(archive, error)) from None


def _damaged(archive: Path, why: object) -> str:
    return f"{archive} is damaged, or no archive that can be read: {why}"


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            yield packed
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as packed:
            yield packed
    else:
        raise UserError(f"{archive} is neither a zip nor a tar archive")


def _members(source: zipfile.ZipFile | tarfile.TarFile) -> Iterator[_Member]:
    if isinstance(source, tarfile.TarFile):
        for item in source:  # one header at a time, so that a bomb of headers ends at MOST_MEMBERS
            yield _Member(item.name, item.size, item.isdir(), item.isreg(), item)
        return
    for info in source.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0: not from a Unix
        plain = kind in (0, stat.S_IFREG) and not info.flag_bits & 1
        # zipfile turns backslashes of Windows names into slashes; the name as it stands must be harmless too.
        name = info.orig_filename if "\\" in info.orig_filename else info.filename
        yield _Member(name, info.file_size, info.is_dir(), plain, info)


def _check(archive: Path, members: Iterator[_Member]) -> list[tuple[_Member, PurePosixPath]]:
    """The members, and where each goes relative to the folder."""
    limit = min(MOST_BYTES, MOST_RATIO * max(archive.stat().st_size, 4096))
    checked: list[tuple[_Member, PurePosixPath]] = []
    files: set[str] = set()
    total = 0
    for member in members:
        path, windows = PurePosixPath(member.name), PureWindowsPath(member.name)
        outside = path.is_absolute() or windows.drive or windows.root or ".." in windows.parts or "\0" in member.name
        if outside or not path.parts:
            raise UserError(f"{archive} holds {member.name!r}, a path outside of its folder: not unpacked")
        if not (member.is_file or member.is_folder):
            raise UserError(f"{archive} holds {member.name!r}, which is no plain file: not unpacked")
        if not member.is_folder:
            key = str(path).casefold()  # as file systems that ignore case would have it
            if key in files:
                raise UserError(f"{archive} holds {member.name!r} twice: not unpacked")
            files.add(key)
            total += member.size
        checked.append((member, path))
        # At once, so that not even the list of a bomb is read to its end.
        if total > limit:
            raise UserError(f"{archive} would unpack to more than {limit:,} bytes: not unpacked")
        if len(checked) > MOST_MEMBERS:
            raise UserError(f"{archive} holds more than {MOST_MEMBERS:,} files: not unpacked")
    return checked


@contextmanager
def _reading(source: zipfile.ZipFile | tarfile.TarFile, member: _Member) -> Iterator[IO[bytes]]:
    item: Any = member.item
    data = source.extractfile(item) if isinstance(source, tarfile.TarFile) else source.open(item)
    assert data is not None  # None for links, which were refused
    with data:
        yield data


def _write(source: zipfile.ZipFile | tarfile.TarFile, member: _Member, target: Path, archive: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    left = member.size
    with _reading(source, member) as data, target.open("xb") as out:
        while chunk := data.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                raise UserError(_damaged(archive, f"{member.name!r} is longer than it says"))
            out.write(chunk)
    if left:
        raise UserError(_damaged(archive, f"{member.name!r} ends early"))
    return target
