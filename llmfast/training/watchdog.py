"""Ends a job of several ranks when one of them is gone or stuck, and names it; a collective waits for half an hour.

A thread of every rank tells the store once a second how far its main thread is. The first rank reads what all tell,
the second what the first does; whoever finds a rank missing leaves a verdict, on which all of them end.
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

import torch.distributed as dist

from llmfast.ranks import Ranks, client

BEAT = 1.0
SILENT = 12.0  # seconds without a sign of life
STUCK = 20.0  # seconds without progress on any rank, or five times the longest so far if that is more
EXIT_LOST = 3
VERDICT = "verdict"


class Watchdog:
    """Within the context a thread watches; ``progress`` says that the main thread goes on.

    Within ``pause`` a rank may take as long as it likes: the others wait for it.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._place = ranks, f"{socket.gethostname()} {os.getpid()}"
        self._done = threading.Event()
        self._count = 0
        self._doing = "starting"
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
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
        self._doing = "-"

    @contextlib.contextmanager
    def pause(self, doing: str) -> Iterator[None]:
        """``doing``, one word, takes its time."""
        self._doing = doing
        try:
            yield
        finally:
            self.progress()

    def _run(self) -> None:
        ranks = self._ranks
        watched = list(range(ranks.size)) if ranks.first else [0] if ranks.rank == 1 else []
        watch = _Watch(watched)
        store, reached, beat = None, time.monotonic(), 0
        while not self._done.wait(BEAT):
            beat += 1
            try:
                store = store or _connect()
                store.set(f"beat/{ranks.rank}", f"{beat} {self._count} {self._doing} {self._place}")
                if store.check([VERDICT]):
                    self._end(store.get(VERDICT).decode())
                known = [rank for rank in watched if store.check([f"beat/{rank}"])]
                problem = watch.look({rank: store.get(f"beat/{rank}").decode() for rank in known})
                if problem:
                    store.set(VERDICT, problem)
                    print(f"llmfast: error: {problem.partition(' ')[2]}", file=sys.stderr, flush=True)
                reached = time.monotonic()
            except (RuntimeError, ValueError):
                store = None
                if time.monotonic() - reached > SILENT:
                    self._end(f"- rank {ranks.rank} has lost the connection to the others")
        with contextlib.suppress(RuntimeError, ValueError):
            if store is not None:
                store.set(f"beat/{ranks.rank}", f"end {self._count} {self._doing} {self._place}")

    def _end(self, verdict: str) -> None:
        """End this process, and the one that the verdict names where that is on this machine and cannot itself."""
        if self._done.is_set():
            return
        host, _, pid = verdict.partition(" ")[0].rpartition(":")
        if host == socket.gethostname() and pid != str(os.getpid()):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(pid), signal.SIGKILL)
        os._exit(EXIT_LOST)


class _Watch:
    """What the beats of ``watched`` ranks mean; each is "NUMBER COUNT DOING HOST PID"."""

    def __init__(self, watched: list[int]) -> None:
        now = time.monotonic()
        self._heard: dict[int, tuple[str, float]] = {rank: ("", now) for rank in watched}
        self._counts: dict[int, int] = {}
        self._moved, self._longest = now, 0.0

    def look(self, beats: dict[int, str]) -> str | None:
        """``HOST:PID what is wrong``, or None."""
        now = time.monotonic()
        for rank, beat in beats.items():
            if beat != self._heard[rank][0]:
                self._heard[rank] = (beat, now)
        for rank, (beat, when) in self._heard.items():
            if beat and not beat.startswith("end") and now - when > SILENT:
                _, _, _, host, pid = beat.split(" ")
                return (
                    f"{host}:{pid} rank {rank} (process {pid} on {host}) has shown no sign of life for {SILENT:.0f} s"
                )
        return self._stuck(beats, now)

    def _stuck(self, beats: dict[int, str], now: float) -> str | None:
        parts = {rank: beat.split(" ") for rank, beat in beats.items()}
        counts = {rank: int(part[1]) for rank, part in parts.items()}
        busy = any(part[0] == "end" or part[2] != "-" for part in parts.values())
        if counts != self._counts or busy:
            if self._counts and not busy:
                self._longest = max(self._longest, now - self._moved)
            self._counts, self._moved = counts, now
        limit = max(STUCK, 5 * self._longest)
        if now - self._moved <= limit or len(counts) < 2:
            return None
        slowest = min(counts, key=lambda rank: counts[rank])
        if counts[slowest] == max(counts.values()):
            return f"- no rank has gone on for {limit:.0f} s, and none is behind the others"
        return f"{_name(slowest, beats[slowest])} has not gone on for {limit:.0f} s, and the others wait for it"


def _name(rank: int, beat: str) -> str:
    *_, host, pid = beat.split(" ")
    return f"{host}:{pid} rank {rank} (process {pid} on {host})"


def _connect() -> dist.Store:
    store = client()
    store.set_timeout(timedelta(seconds=SILENT / 2))
    return store
