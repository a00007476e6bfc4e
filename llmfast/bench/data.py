"""``bench data``: preparing text and reading batches, beside tiktoken alone.

The text is the Python standard library's own, as documents of JSON lines; it is drawn with random edits, so that no
cache of words serves it. tiktoken only encodes text that lies in memory; ``prepare`` also reads, parses, hashes, splits
and writes.
"""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmfast.bench.environment import header
from llmfast.bench.timing import interleave_calls, paired_ratio, spread
from llmfast.data import Batches, open_tokens, prepare, stdlib_sources
from llmfast.tokenizer import Tokenizer

DOCUMENT_CHARACTERS = 4000


def write_corpus(path: Path, size: int, seed: int = 1) -> None:
    """``size`` bytes of {"text": ...} lines, each a slice of the standard library with some letters changed."""
    draw = random.Random(seed)
    text = "".join(path.read_text(encoding="utf-8") for path in stdlib_sources()).encode("ascii", "ignore")
    written = 0
    with open(path, "w", encoding="utf-8", buffering=1 << 20) as file:
        while written < size:
            start = draw.randrange(len(text) - 2 * DOCUMENT_CHARACTERS)
            document = bytearray(text[start : start + draw.randrange(100, 2 * DOCUMENT_CHARACTERS)])
            for _ in range(len(document) // 100):
                document[draw.randrange(len(document))] = draw.randrange(97, 123)
            written += file.write(json.dumps({"text": document.decode()}) + "\n")


def resident_bytes(pid: int | str = "self") -> int:
    """Resident memory of a process and all its descendants (Linux); 0 once it has gone."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total = int(line.split()[1]) * 1024
        for thread in Path(f"/proc/{pid}/task").iterdir():
            total += sum(resident_bytes(child) for child in (thread / "children").read_text().split())
    except OSError:
        return total
    return total


def bench_data(
    tokenizer: Tokenizer, *, megabytes: int, workers: int, turns: int, progress: bool = True
) -> dict[str, Any]:
    """The results as ``header`` and ``data``: one record each of tiktoken, prepare and batches.

    tokens_per_second; seconds [median, 10th, 90th percentile]; extra_bytes: resident memory of all processes beyond
    what this one held before, at most.
    """
    from tqdm import tqdm

    results = header("data", torch.device("cpu"))
    results |= {"megabytes": megabytes, "workers": workers, "turns": turns, "tokenizer": tokenizer.kind}
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.jsonl")
        write_corpus(corpus, megabytes * 1_000_000)
        texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
        counts: dict[str, int] = {}
        peaks: dict[str, int] = {}
        number = iter(range(10**9))

        def prepared() -> int:
            out = Path(folder, f"out-{next(number)}")
            done = prepare([corpus], out, tokenizer=tokenizer, workers=workers, progress=False)
            return sum(done.tokens.values())

        def encoded() -> int:
            encoding: Any = tokenizer.encoding  # type: ignore[attr-defined]
            return sum(map(len, encoding.encode_ordinary_batch(texts, num_threads=workers)))

        def batched() -> int:
            batches = Batches(open_tokens(Path(folder, "out-0")), 256, 16)
            rounds = min(2000, batches.samples_per_epoch // 16)
            return sum(batches.batch(16 * i)[0].numel() for i in range(rounds))

        tasks: dict[str, Callable[[], int]] = {"prepare": prepared}
        if hasattr(tokenizer, "encoding"):
            tasks["tiktoken"] = encoded
        tasks["batches"] = batched

        def timed(name: str) -> float:
            with _Watch() as watch:
                start = time.perf_counter()
                counts[name] = tasks[name]()
                seconds = time.perf_counter() - start
            peaks[name] = max(peaks.get(name, 0), watch.grown)
            return seconds

        with tqdm(total=turns, unit="turn", disable=None if progress else True, leave=False) as bar:
            seconds = interleave_calls({name: partial(timed, name) for name in tasks}, turns, bar.update)
        records = []
        for name, taken in seconds.items():
            record = {"provider": name, "tokens": counts[name], "seconds": spread(taken).to_list()}
            record |= {"tokens_per_second": counts[name] / spread(taken).median, "extra_bytes": peaks[name]}
            if name == "prepare" and "tiktoken" in seconds:
                record["ratio_to_tiktoken"] = [
                    r * counts[name] / counts["tiktoken"] for r in paired_ratio(seconds["tiktoken"], taken).to_list()
                ]
            records.append(record)
    return results | {"data": records}


class _Watch:
    """Samples the resident memory of this process and its children while the block runs."""

    def __enter__(self) -> _Watch:
        self._before = self._peak = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._done.wait(0.05):
            self._peak = max(self._peak, resident_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def grown(self) -> int:
        return self._peak - self._before
