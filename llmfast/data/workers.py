"""Encode chunks on several cores, in order, with a bounded number of chunks in flight.

Workers are fresh Python processes that talk through pipes: neither forked (a fork of a process that has threads may
hang) nor started by ``multiprocessing`` (which would run the user's script again in each of them). They end with the
process that started them, because their pipe closes. Small inputs run on threads, which need no start.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from llmfast.data import readers
from llmfast.data.encode import Encoded, Settings, encode_chunks
from llmfast.data.readers import Chunk
from llmfast.errors import UserError
from llmfast.tokenizer import Tokenizer

Task = list[Chunk]


def available_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def group_chunks(chunks: Iterator[Chunk]) -> Iterator[Task]:
    """Small chunks (small files) together, so that a task is worth sending."""
    task: Task = []
    size = 0
    for chunk in chunks:
        task.append(chunk)
        size += chunk.read
        if size >= readers.CHUNK_BYTES // 2 or len(task) == 256:
            yield task
            task, size = [], 0
    if task:
        yield task


class WorkerPool:
    """Encodes on ``workers`` threads, or on as many processes if ``processes``; a context manager."""

    def __init__(self, tokenizer: Tokenizer, settings: Settings, workers: int, processes: bool) -> None:
        self._tokenizer, self._settings, self._workers = tokenizer, settings, workers
        # Every process has its next task before it has finished one: it never waits for this process to be scheduled.
        self._threads = ThreadPoolExecutor(2 * workers if processes else workers)
        self._processes = [_Process(tokenizer, settings) for _ in range(workers if processes else 0)]
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for process in self._processes * 2:
            self._idle.put(process)

    def encode(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Encoded]]:
        """Each task with its tokens, in the order of ``tasks``."""
        pending: deque[tuple[Task, Future[Encoded]]] = deque()
        for task in tasks:
            pending.append((task, self._threads.submit(self._encode, task)))
            if len(pending) > 3 * self._workers:
                task, future = pending.popleft()
                yield task, future.result()
        for task, future in pending:
            yield task, future.result()

    def _encode(self, task: Task) -> Encoded:
        if not self._processes:
            return encode_chunks(task, self._tokenizer, self._settings)
        process = self._idle.get()
        try:
            return process.encode(task)
        finally:
            self._idle.put(process)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.close()


class _Process:
    def __init__(self, tokenizer: Tokenizer, settings: Settings) -> None:
        # It imports from where this process does, whatever lies in the current folder.
        code = f"import sys; sys.path[:] = {sys.path!r}; from llmfast.data.workers import serve; serve()"
        self._popen = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._popen.stdin
        assert self._popen.stdout
        self._to, self._from = self._popen.stdin, self._popen.stdout
        self._sending, self._receiving = threading.Lock(), threading.Condition()
        self._sent = self._received = 0
        self._send((tokenizer, settings))

    def encode(self, task: Task) -> Encoded:
        with self._sending:
            turn = self._sent
            self._sent += 1
            self._send(task)
        with self._receiving:  # answers come in the order of the tasks
            self._receiving.wait_for(lambda: self._received == turn)
            try:
                answer = pickle.load(self._from)
            except (EOFError, pickle.UnpicklingError) as error:
                raise self._died() from error
            finally:
                self._received += 1
                self._receiving.notify_all()
        if isinstance(answer, Encoded):
            return answer
        if isinstance(answer, UserError):
            raise answer
        raise RuntimeError(f"a worker failed:\n{answer}")

    def _send(self, message: Any) -> None:
        try:
            pickle.dump(message, self._to, protocol=5)
            self._to.flush()
        except OSError as error:
            raise self._died() from error

    def _died(self) -> UserError:
        return UserError(
            f"a worker process ended (exit code {self._popen.wait()}; out of memory?); run the same command again, "
            "perhaps with fewer workers: it goes on where it stopped"
        )

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._to.close()
        self._from.close()
        self._popen.wait()


def serve() -> None:
    """A worker process: tasks come in on standard input, their tokens go out on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes our pipe
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that prints may come between the replies
    tokenizer, settings = pickle.load(requests)
    tasks: queue.Queue[Task | None] = queue.Queue(maxsize=1)

    def read_tasks() -> None:
        with contextlib.suppress(EOFError, pickle.UnpicklingError):
            while True:
                tasks.put(pickle.load(requests))
        tasks.put(None)

    threading.Thread(target=read_tasks, daemon=True).start()
    with contextlib.suppress(BrokenPipeError):
        while (task := tasks.get()) is not None:
            answer: Encoded | UserError | str
            try:
                answer = encode_chunks(task, tokenizer, settings)
            except UserError as error:
                answer = error
            except Exception:
                answer = traceback.format_exc()
            pickle.dump(answer, replies, protocol=5)
            replies.flush()
