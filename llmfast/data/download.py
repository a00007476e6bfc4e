"""Fetching public files: resumed where they were left, checked against their SHA-256, and there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import http.client
import logging
import os
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llmfast import __version__
from llmfast.config import suggest
from llmfast.data.archives import unpack
from llmfast.data.catalog import ENTRIES, HUB, Remote
from llmfast.errors import UserError
from llmfast.files import hash_file

logger = logging.getLogger("llmfast")

_CHUNK = 1 << 20
_AGAIN = (408, 425, 429, 500, 502, 503, 504)  # HTTP answers that may be better next time
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # not the network's fault


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for."""

    timeout: float = 30.0  # seconds without a byte
    slow_after: float = 60.0  # seconds in which least_bytes must arrive
    least_bytes: int = 1024
    failures: int = 5  # in a row, without a new byte
    silent_failures: int = 2  # the same, where no byte came at all
    pause: float = 1.0  # seconds, doubled after each failure


class _Refused(Exception):
    """The address has no such file, or not the right one: trying again is of no use."""


def download(name: str, out: str | Path = "data", *, progress: bool = True) -> list[Path]:
    """Fetch what ``llmfast download --list`` calls ``name`` into the folder ``out``; returns its files.

    An entry of several files goes into a folder of its name. What is there already is checked and kept. Raises
    ``UserError`` for an unknown name, where no address answers, and for a file that is not the one it should be.
    """
    if name not in ENTRIES:
        raise UserError(f"unknown download {name!r}{suggest(name, ENTRIES)}; llmfast download --list names all")
    entry = ENTRIES[name]
    folder = Path(out) if len(entry.files) == 1 else Path(out, name)
    return [fetch(file, folder, progress=progress) for file in entry.files]


def fetch(
    remote: Remote, folder: Path, *, progress: bool = True, patience: Patience | None = None, check: bool = True
) -> Path:
    """``remote`` as a file in ``folder``; what is there already is read through and kept, or trusted without ``check``.

    It grows as NAME.part, from where an earlier call left it, and takes its name once its SHA-256 is right. A file
    whose hash nobody published is trusted when it first arrives: that is logged, and its hash is written to
    NAME.sha256, to which it is held from then on.
    """
    target = folder / remote.name
    if target.exists() and not check:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(target):
        sha256 = remote.sha256 or _recorded(target)
        if target.exists():
            return _keep(target, sha256)
        if remote.member is None:
            part = _arrive(remote.urls, target, sha256, remote.size, progress, patience or Patience())
        else:
            archive = target.with_name(f"{target.name}.archive")
            packed = _arrive(remote.urls, archive, remote.archive_sha256, None, progress, patience or Patience())
            part = _unpacked(packed, remote, target)
        if sha256 is None:
            _record(target, hash_file(part).hexdigest())
        os.replace(part, target)
    return target


def _keep(target: Path, sha256: str | None) -> Path:
    if sha256 is None:
        raise UserError(f"{target} is in the way: move it, or choose another folder")
    if hash_file(target).hexdigest() != sha256:
        raise UserError(
            f"{target} is there already, and its SHA-256 is not {sha256}: move it, or choose another folder"
        )
    return target


def _unpacked(packed: Path, remote: Remote, target: Path) -> Path:
    """The member of an archive that is wanted, checked, as NAME.part."""
    part, folder = _part(target), target.with_name(f"{target.name}.unpacked")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        unpack(packed, folder)
        member = folder / str(remote.member)
        if not member.is_file():
            raise UserError(f"{remote.urls[0]} holds no {remote.member}")
        if remote.sha256 is not None and hash_file(member).hexdigest() != remote.sha256:
            raise UserError(f"{remote.member} in {remote.urls[0]} has not the SHA-256 {remote.sha256}: not kept")
        os.replace(member, part)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        packed.unlink(missing_ok=True)
    return part


def _arrive(
    urls: tuple[str, ...], target: Path, sha256: str | None, size: int | None, progress: bool, patience: Patience
) -> Path:
    """The whole and checked NAME.part, from the first address that gives it."""
    part, reasons = _part(target), []
    for url in map(_endpoint, urls):
        try:
            for _ in range(2 if part.exists() else 1):  # what lies there may be half of another file
                _receive(url, target, size, progress, patience, resumable=sha256 is not None)
                if sha256 is None or (found := hash_file(part).hexdigest()) == sha256:
                    _etag_file(target).unlink(missing_ok=True)
                    return part
                _forget(target)
            raise _Refused(f"its SHA-256 is {found} instead of {sha256}: not kept")
        except _Refused as refusal:
            reasons.append(f"{url}: {refusal}")
    raise UserError(f"cannot download {target.name}: {'; '.join(reasons)}")


def _receive(url: str, target: Path, size: int | None, progress: bool, patience: Patience, resumable: bool) -> None:
    """Fill NAME.part, trying again as long as bytes arrive; ``_Refused`` where that is of no use."""
    if not resumable and not _etag_file(target).exists():
        _forget(target)  # nothing would tell that the two halves belong together
    part, failures = _part(target), 0
    first = most = _size(part)
    while True:
        try:
            return _attempt(url, target, size, progress, patience)
        except urllib.error.HTTPError as error:
            error.close()
            reason = " ".join(f"{error.code} {error.reason}".split())
            if error.code == 416:
                _forget(target)
            elif error.code not in _AGAIN:
                raise _Refused(reason) from None
        except ValueError as error:
            raise _Refused(str(error)) from None
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in _DISK:
                raise
            cause = getattr(error, "reason", error)
            reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise _Refused(reason) from None
            if _is_offline(cause) and _size(part) <= first:
                raise _Refused(f"no network, or no such host ({reason})") from None
        have = _size(part)
        failures = 0 if have > most else failures + 1
        most = max(most, have)
        if failures >= (patience.failures if most > first else patience.silent_failures):
            kept = "; what arrived is kept, and the next call goes on from it" if have else ""
            raise _Refused(f"{reason} ({failures} tries{kept})")
        time.sleep(min(patience.pause * 2 ** (failures - 1), 30.0))


def _is_offline(cause: object) -> bool:
    return isinstance(cause, socket.gaierror) or getattr(cause, "errno", None) in (
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _attempt(url: str, target: Path, size: int | None, progress: bool, patience: Patience) -> None:
    """One request; returns once NAME.part is as long as the server says."""
    part, etag_file = _part(target), _etag_file(target)
    have = _size(part)
    if size is not None and have >= size:
        if have == size:
            return
        _forget(target)
        have = 0
    headers = {"User-Agent": f"llmfast/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if etag_file.exists():
            headers["If-Range"] = etag_file.read_text(encoding="latin-1")
    with _opener().open(urllib.request.Request(url, headers=headers), timeout=patience.timeout) as response:
        start, total = _extent(response)
        if start not in (0, have):
            _forget(target)
            raise ConnectionError(f"the server sent bytes from {start} instead of {have}")
        if size is not None and total is not None and total != size:
            raise _Refused(f"it is {total:,} bytes long instead of {size:,}")
        etag = response.headers.get("ETag", "")
        if start == 0:
            etag_file.unlink(missing_ok=True)
            if etag.startswith('"'):  # a weak one says nothing about bytes
                etag_file.write_text(etag, encoding="latin-1")
        with part.open("ab" if start else "wb") as file, _bar(target.name, start, total, progress) as bar:
            for chunk in _chunks(response, patience):
                file.write(chunk)
                bar.update(len(chunk))
                if size is not None and file.tell() > size:
                    raise _Refused(f"it is longer than {size:,} bytes")
            arrived = file.tell()
    if arrived < (total or size or 0):
        raise ConnectionError(f"the connection ended after {arrived:,} of {total or size:,} bytes")


def _chunks(response: Any, patience: Patience) -> Iterator[bytes]:
    since, amount = time.monotonic(), 0
    while chunk := response.read1(_CHUNK):
        yield chunk
        amount += len(chunk)
        if (now := time.monotonic()) - since > patience.slow_after:
            if amount < patience.least_bytes:
                raise TimeoutError(f"only {amount} bytes in {now - since:.0f} seconds")
            since, amount = now, 0


def _extent(response: Any) -> tuple[int, int | None]:
    """(first byte that follows, length of the whole file or None)."""
    length = response.headers.get("Content-Length", "")
    if response.status != 206:
        return 0, int(length) if length.isdigit() else None
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if match is None:
        raise ConnectionError("the server answered a range that cannot be read")
    return int(match[1]), None if match[2] == "*" else int(match[2])


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows up to ten, but not from https to anything else."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise _Refused(f"redirected to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Redirects)


def _endpoint(url: str) -> str:
    """``url`` at the mirror of the Hugging Face hub that HF_ENDPOINT names, where it is one of the hub's."""
    mirror = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    return f"{mirror}/{url.removeprefix(HUB)}" if mirror and url.startswith(HUB) else url


@contextlib.contextmanager
def _bar(name: str, start: int, total: int | None, progress: bool) -> Iterator[Any]:
    with tqdm(
        total=total, initial=start, unit="B", unit_scale=True, unit_divisor=1000, desc=name, disable=not progress
    ) as bar:
        yield bar


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Only one process fetches a file: the others (ranks of one job, say) wait and find it there."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    lock = target.with_name(f".{target.name}.lock")
    while True:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_same(lock, file.fileno()):
                continue  # whoever held it has removed it, and others may hold a new one
            try:
                yield
            finally:
                lock.unlink()
            return


def _is_same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _etag_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.part.etag")


def _forget(target: Path) -> None:
    _part(target).unlink(missing_ok=True)
    _etag_file(target).unlink(missing_ok=True)


def _hash_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _recorded(target: Path) -> str | None:
    """The hash that NAME.sha256 holds this file to, if there is one."""
    file = _hash_file(target)
    if not file.exists():
        return None
    match = re.match(r"([0-9a-f]{64})\b", file.read_text(encoding="utf-8", errors="replace"))
    if match is None:
        raise UserError(f"{file} holds no SHA-256: mend or remove it")
    return match[1]


def _record(target: Path, sha256: str) -> None:
    _hash_file(target).write_text(f"{sha256}  {target.name}\n", encoding="utf-8")
    logger.warning("nobody published a hash of %s: trusted as it came, SHA-256 %s", target.name, sha256)
