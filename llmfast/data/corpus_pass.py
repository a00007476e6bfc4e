"""One pass over a corpus: chunks to workers, their tokens in order to the shards, and a record to go on from."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from llmfast.data.encode import HASH_BYTES, Encoded, Settings
from llmfast.data.readers import Chunk, Span, read_chunks
from llmfast.data.shards import SPLITS, AppendFile, OutputFolder, ShardWriter, no_room_is_a_user_error
from llmfast.data.workers import WorkerPool, group_chunks
from llmfast.errors import UserError
from llmfast.tokenizer import Tokenizer

RECORD_SECONDS = 5.0  # between two records of what is done
PROCESSES_FROM_BYTES = 32 << 20  # below, starting processes takes longer than it saves


def say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


def fresh_state(fingerprint: str, threshold: int) -> dict[str, Any]:
    """What a pass needs to go on, as it is before the first chunk."""
    return {
        "fingerprint": fingerprint,
        "threshold": threshold,  # documents whose hash is below are for validation
        "position": {"span": 0, "offset": 0, "number": 0, "bytes": 0},
        "shards": {split: [] for split in SPLITS},
        "documents": {split: 0 for split in SPLITS},
        "last_side": 0,
        "lowest": 2**64 - 1,  # of the hashes that decided a side
        "highest": 0,
        "hashes": 0,  # kept to find duplicates
        "duplicates": 0,
        "skipped": 0,
        "first_problem": "",
    }


def better_threshold(state: dict[str, Any], settings: Settings, val_fraction: float) -> int | None:
    """Where every document fell on one side, the threshold that puts one on the other; else None."""
    documents = state["documents"]
    if not val_fraction or settings.characters is not None or state["lowest"] >= state["highest"]:
        return None
    if not documents["val"]:
        return state["lowest"] + 1
    return state["highest"] if not documents["train"] else None


class CorpusPass:
    """Encodes ``spans`` into the shards of ``folder``."""

    def __init__(
        self,
        folder: OutputFolder,
        tokenizer: Tokenizer,
        settings: Settings,
        spans: list[Span],
        shard_tokens: int,
        on_error: str,
    ) -> None:
        self._folder, self._tokenizer, self._settings, self._spans = folder, tokenizer, settings, spans
        self._shard_tokens, self._skip = shard_tokens, on_error == "skip"

    def run(self, state: dict[str, Any], workers: int, progress: bool) -> dict[str, Any]:
        """Go on from ``state`` to the end of the corpus; returns the state then."""
        self._state, folder, dtype = state, self._folder, self._tokenizer.dtype
        folder.write_state(state)
        self._writers = [
            ShardWriter(folder.path, name, dtype, self._shard_tokens, state["shards"][name]) for name in SPLITS
        ]
        self._seen: set[bytes] | None = None
        if "duplicates" in self._settings.clean:
            self._seen_file = AppendFile(folder.seen_file, state["hashes"] * HASH_BYTES)
            hashes = folder.seen_file.read_bytes()
            self._seen = {hashes[i : i + HASH_BYTES] for i in range(0, len(hashes), HASH_BYTES)}

        total = sum(span.size for span in self._spans)
        position = state["position"]
        processes = workers > 1 and total >= PROCESSES_FROM_BYTES
        recorded = time.monotonic()
        bar = tqdm(
            total=total, initial=position["bytes"], unit="B", unit_scale=True, desc="prepare", disable=not progress
        )
        with bar, WorkerPool(self._tokenizer, self._settings, workers, processes) as pool:
            for task, encoded in pool.encode(group_chunks(self._chunks())):
                if encoded.problems:
                    self._report(encoded.problems)
                self._take(encoded)
                read = sum(chunk.read for chunk in task)
                position["bytes"] += read
                self._advance(task[-1])
                bar.set_postfix_str(
                    f"{sum(writer.tokens for writer in self._writers) / 1e6:,.1f}M tokens", refresh=False
                )
                bar.update(read)
                if time.monotonic() - recorded > RECORD_SECONDS:
                    self._record()
                    recorded = time.monotonic()
        for writer in self._writers:
            writer.close()
        self._record()
        if self._seen is not None:
            self._seen_file.close()
        return state

    def _chunks(self) -> Iterator[Chunk]:
        position = self._state["position"]
        offset, number = position["offset"], position["number"]
        for index in range(position["span"], len(self._spans)):
            for chunk in read_chunks(self._spans[index], offset, number):
                chunk.span = index
                yield chunk
            offset = number = 0

    def _advance(self, chunk: Chunk) -> None:
        """The next chunk is the one after ``chunk``."""
        if chunk.kind == "text" and chunk.ends:
            self._state["position"].update(span=chunk.span + 1, offset=0, number=0)
        else:
            self._state["position"].update(span=chunk.span, offset=chunk.next_offset, number=chunk.next_number)

    def _report(self, problems: list[str]) -> None:
        if not self._skip:
            self._record()
            raise UserError(f"{problems[0]}; or leave out what cannot be read: --on-error skip")
        self._state["skipped"] += len(problems)
        self._state["first_problem"] = self._state["first_problem"] or problems[0]

    def _take(self, encoded: Encoded) -> None:
        """Send every entry to its side."""
        state = self._state
        by_hash = (encoded.sides < 0) & encoded.starts
        sides = encoded.sides.copy()
        sides[by_hash] = encoded.hashes[by_hash, 0] < np.uint64(state["threshold"])
        for i in np.flatnonzero(sides < 0):  # later pieces of a long text
            sides[i] = sides[i - 1] if i else state["last_side"]
        if by_hash.any():
            state["lowest"] = min(state["lowest"], int(encoded.hashes[by_hash, 0].min()))
            state["highest"] = max(state["highest"], int(encoded.hashes[by_hash, 0].max()))
        if len(sides):
            state["last_side"] = int(sides[-1])
        if self._seen is not None:
            sides[self._duplicates(encoded)] = -1
        for side, split in enumerate(SPLITS):
            chosen = sides == side
            state["documents"][split] += int((chosen & encoded.starts).sum())
            whole = chosen.all()
            self._writers[side].write(encoded.tokens if whole else encoded.tokens[np.repeat(chosen, encoded.lengths)])

    def _duplicates(self, encoded: Encoded) -> list[np.intp]:
        """The entries equal to one that came before; the others are remembered."""
        assert self._seen is not None
        found, new = [], []
        for i in np.flatnonzero(encoded.starts & encoded.ends):
            digest = encoded.hashes[i].tobytes()
            if digest in self._seen:
                found.append(i)
            else:
                self._seen.add(digest)
                new.append(digest)
        with no_room_is_a_user_error(self._folder.path):
            self._seen_file.write(b"".join(new))
        self._state["hashes"] += len(new)
        self._state["duplicates"] += len(found)
        return found

    def _record(self) -> None:
        """Make what is written safe, then say so: a killed run goes on from the newest record."""
        for writer, split in zip(self._writers, SPLITS, strict=True):
            writer.sync()
            self._state["shards"][split] = writer.record()
        if self._seen is not None:
            self._seen_file.sync()
        self._folder.write_state(self._state)
