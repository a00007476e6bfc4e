"""Ends a job of several ranks when one of them is gone or stuck, and names it; a collective waits for half an hour.

A thread of every rank tells the store once a second how far its main thread is, and where. The first rank reads what
all tell, the second what the first does; whoever finds a rank missing leaves a verdict, on which all of them end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from llmfast.ranks import Ranks, client, exchanges

BEAT = 1.0
SILENT = 12.0  # seconds without a sign of life
GONE = 4.0  # the same, once another rank has lost a connection
STUCK = 20.0  # seconds without progress on any rank, or five times the longest so far if that is more
COMPILING = 900.0  # the same where a step may wait for torch.compile
EXIT_LOST = 3
VERDICT = "verdict"


class Watchdog:
    """Within the context a thread watches; ``progress`` says that the main thread goes on.

    Before ``begin`` and within ``pause`` a rank may take as long as it likes: the others wait for it.
    """

    def __init__(self, ranks: Ranks, *, compiles: bool = False) -> None:
        self._ranks, self._place = ranks, f"{socket.gethostname()} {os.getpid()}"
        self._patience = COMPILING if compiles else STUCK
        self._done = threading.Event()
        self._count = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        self._doing = "starting"
        self._done.clear()
        if self._ranks.size > 1:
            self._thread = threading.Thread(target=self._run, name="llmfast watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * BEAT)

    def progress(self) -> None:
        """The main thread begins the next piece of its work."""
        self._count += 1

    def begin(self) -> None:
        """From here on every piece takes about as long as the one before."""
        self._doing = "-"

    @contextlib.contextmanager
    def pause(self, doing: str) -> Iterator[None]:
        """``doing``, one word, takes its time."""
        before, self._doing = self._doing, doing
        yield
        self._doing = before
        self.progress()

    def lost(self) -> None:
        """A connection is gone: wait for the verdict, which names the rank at its other end and ends this process."""
        self._doing = "lost"
        if self._thread is not None:
            self._thread.join(timeout=2 * SILENT)

    def _run(self) -> None:
        ranks = self._ranks
        watched = list(range(ranks.size)) if ranks.first else [0] if ranks.rank == 1 else []
        watch = _Watch(watched, self._patience)
        store, reached, beat = None, time.monotonic(), 0
        while not self._done.wait(BEAT if beat else 0):  # the first at once: a rank is named by its beat
            beat += 1
            try:
                store = store or _connect(ranks.start)
                store.set(f"beat/{ranks.rank}", self._beat(str(beat)))
                if store.check([VERDICT]):
                    self._end(store.get(VERDICT).decode())
                known = [rank for rank in watched if store.check([f"beat/{rank}"])]
                beats = {rank: store.get(f"beat/{rank}").decode() for rank in known}
                if problem := watch.look(beats, lost=self._doing == "lost"):
                    store.set(VERDICT, problem)
                    said = f"{problem.partition(' ')[2]}; what is saved is intact, --resume goes on from it"
                    print(f"llmfast: error: {said}", file=sys.stderr, flush=True)
                reached = time.monotonic()
            except (RuntimeError, ValueError):
                store = None
                if time.monotonic() - reached > (GONE if self._doing == "lost" else SILENT):
                    said = f"rank {ranks.rank} has lost the connection to the others; --resume goes on"
                    print(f"llmfast: error: {said} from what is saved", file=sys.stderr, flush=True)
                    self._end("-")
        with contextlib.suppress(RuntimeError, ValueError):
            if store is not None:
                store.set(f"beat/{ranks.rank}", self._beat("end"))

    def _beat(self, number: str) -> str:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"
        return f"{number} {self._count}.{exchanges()} {self._doing} {where} {self._place}"

    def _end(self, verdict: str) -> None:
        """End this process, and the one that the verdict names where that is beside it and cannot itself."""
        if self._done.is_set():
            return
        host, _, pid = verdict.partition(" ")[0].rpartition(":")
        if host == socket.gethostname() and pid != str(os.getpid()):
            with contextlib.suppress(OSError, ValueError, IndexError):
                parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) == os.getppid():  # names of hosts may repeat
                    os.kill(int(pid), signal.SIGKILL)
        os._exit(EXIT_LOST)


class _Watch:
    """What the beats of ``watched`` ranks mean; each is "NUMBER COUNT.EXCHANGES DOING WHERE HOST PID"."""

    def __init__(self, watched: list[int], patience: float) -> None:
        now = time.monotonic()
        self._patience = patience
        self._heard: dict[int, tuple[str, float]] = {rank: ("", now) for rank in watched}
        self._counts: dict[int, tuple[int, ...]] = {}
        self._moved, self._longest = now, 0.0

    def look(self, beats: dict[int, str], *, lost: bool) -> str | None:
        """``HOST:PID what is wrong``, or None. ``lost``: whether the one who looks has lost a connection."""
        now = time.monotonic()
        parts = {rank: beat.split(" ") for rank, beat in beats.items()}
        lost = lost or any(doing == "lost" for _, _, doing, *_ in parts.values())
        for rank, (before, when) in self._heard.items():
            if not before and rank not in beats and lost and now - when > GONE:
                return f"- rank {rank} is gone"
        for rank, beat in beats.items():
            if beat != self._heard[rank][0]:
                self._heard[rank] = (beat, now)
            silent = now - self._heard[rank][1]
            if parts[rank][0] == "end":
                if lost:
                    return f"- rank {rank} has ended, and the others cannot go on without it"
            elif lost and silent > GONE:
                return f"{_name(rank, beat)} is gone"
            elif silent > SILENT:
                return f"{_name(rank, beat)} has shown no sign of life for {SILENT:.0f} s"
        return self._stuck(beats, parts, now)

    def _stuck(self, beats: dict[int, str], parts: dict[int, list[str]], now: float) -> str | None:
        counts = {rank: tuple(map(int, part[1].split("."))) for rank, part in parts.items()}
        busy = any(part[0] == "end" or part[2] != "-" for part in parts.values())
        if counts != self._counts or busy:
            if self._counts and not busy:
                self._longest = max(self._longest, now - self._moved)
            self._counts, self._moved = counts, now
        limit = max(self._patience, 5 * self._longest)
        if now - self._moved <= limit or len(counts) < 2:
            return None
        slowest = min(counts, key=lambda rank: counts[rank])
        if counts[slowest] == max(counts.values()):
            return f"- no rank has gone on for {limit:.0f} s, and none is behind the others"
        where = parts[slowest][3]
        return f"{_name(slowest, beats[slowest])} has not gone on for {limit:.0f} s: it is at {where}"


def _name(rank: int, beat: str) -> str:
    *_, host, pid = beat.split(" ")
    return f"{host}:{pid} rank {rank} (process {pid} on {host})"


def _connect(start: str) -> dist.Store:
    timeout = timedelta(seconds=SILENT / 4)
    store = client(start, timeout)
    store.set_timeout(timeout)
    return store
