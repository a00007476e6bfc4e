"""Text in, token shards out: ``prepare`` reads a corpus, splits it, encodes it on every core and writes shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llmfast.data.corpus_pass import CorpusPass, better_threshold, fresh_state, say
from llmfast.data.encode import CLEANINGS, Settings, chunk_texts
from llmfast.data.readers import Span, read_chunks, split_characters
from llmfast.data.shards import FORMAT, FORMAT_VERSION, SPLITS, OutputFolder
from llmfast.data.sources import Source, find_sources
from llmfast.data.workers import available_cores
from llmfast.errors import UserError
from llmfast.files import hash_file
from llmfast.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer, train_bpe, train_char

Paths = str | Path | Iterable[str | Path]

TOKENIZER_SAMPLE_BYTES = 128 << 20  # about as much text trains a tokenizer, drawn from the whole corpus


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` wrote; ``open_tokens(prepared.path, split)`` reads it."""

    path: Path
    tokens: dict[str, int]  # by split
    documents: dict[str, int]  # by split
    skipped: int  # records left out because they could not be read
    duplicates: int  # documents left out because an equal one came before
    meta: dict[str, Any]  # meta.json


def prepare(
    sources: Paths,
    out: str | Path,
    *,
    tokenizer: Tokenizer | str | None = None,
    tokenizer_size: int = 4096,
    val_sources: Paths = (),
    val_fraction: float = 0.1,
    split: Literal["auto", "documents", "characters"] = "auto",
    field: str = "text",
    clean: Iterable[str] = (),
    on_error: Literal["raise", "skip"] = "raise",
    workers: int | None = None,
    shard_tokens: int = 100_000_000,
    seed: int = 1337,
    progress: bool = True,
) -> Prepared:
    """Encode the text of ``sources`` into token shards below the folder ``out``.

    The bytes written depend on the data and these options, never on ``workers`` or on interruptions: a run that was
    stopped in any way goes on where it stopped when it is called again, and one that has finished returns at once.
    Memory does not grow with the corpus (but for ``duplicates``).

    Args:
        sources: files, folders (read recursively, sorted) and globs: text of any suffix, .jsonl, .json (a list, or a
            record a line), .parquet; all but the last also as .zst and .gz.
        tokenizer: a tokenizer, what ``load_tokenizer`` takes, or "bpe" (the default) or "char" to train one on the
            training text (on a sample of about 128 MB of it where it is larger; "char" on all text).
        tokenizer_size: the most tokens of a trained "bpe".
        val_sources: the validation data; without them a part of ``sources``.
        val_fraction: that part. Of documents it is drawn by a seeded hash of their text, so that it stays the same
            when documents are added; if every document fell on one side, the one nearest to the other goes there.
        split: "documents" keeps documents whole, "characters" takes the first characters of every document for
            training and its last for validation. "auto" is "characters" for a single text file, else "documents".
        field: the field of a record that holds the text.
        clean: any of "whitespace", "punctuation", "lowercase", and "duplicates", which drops documents equal to an
            earlier one (by 16-byte hashes, about 100 bytes of memory a document; text files over a megabyte stay).
        on_error: "skip" leaves out and counts records that cannot be read, instead of raising.
        workers: default one a core.
        shard_tokens: tokens in one shard file.
        seed: of the split by documents.

    Every document is followed by the tokenizer's end-of-text token, except where one single text is split by
    characters. Text files over a megabyte are encoded in pieces, cut where no token of a GPT-2-style tokenizer can lie
    across, so the tokens are those of the whole text (where 64 MB hold no such place, the cut is made regardless).

    Raises ``UserError`` for anything wrong with data, options or folder, naming file and line.
    """
    clean = _check_options(val_fraction, split, clean, on_error, workers, shard_tokens, seed, tokenizer_size)
    train_files = find_sources(sources)
    val_files = find_sources(val_sources) if val_sources else []
    one_text = len(train_files) == 1 and train_files[0].kind == "text" and not val_files
    by_characters = split == "characters" or (split == "auto" and one_text)
    settings = Settings(
        field=field,
        clean=clean,
        seed=seed,
        end_of_text=not (by_characters and one_text),
        characters=1 - val_fraction if by_characters and not one_text and not val_files else None,
    )
    if val_files:
        spans = [Span(file, side=0, field=field) for file in train_files]
        spans += [Span(file, side=1, field=field) for file in val_files]
    elif by_characters and one_text:
        spans = _split_one_text(train_files[0], val_fraction)
    else:
        spans = [Span(file, field=field) for file in train_files]

    with OutputFolder(Path(out)) as folder:
        fingerprint = _fingerprint(spans, settings, tokenizer, tokenizer_size, val_fraction, shard_tokens)
        if (meta := folder.read_meta()) is not None:
            if meta.get("fingerprint") != fingerprint:
                raise UserError(f"{folder.path}: holds data prepared from other sources or options; name a new folder")
            folder.remove_working_files()
            return _prepared(folder.path, meta)
        state = folder.read_state()
        if state is None and folder.holds_shards():
            raise UserError(f"{folder.path}: holds token files of something else; name a new or empty folder")
        if state is not None and state["fingerprint"] != fingerprint:
            say(f"{folder.path}: the data or the options have changed since this preparation stopped; starting over")
            folder.clear()
            state = None
        threshold = min(int(val_fraction * 2**64), 2**64 - 1)
        if state is None:
            if not isinstance(tokenizer, Tokenizer):
                tokenizer = _make_tokenizer(tokenizer, tokenizer_size, spans, settings, threshold, on_error == "skip")
            folder.save_tokenizer(tokenizer)
            state = fresh_state(fingerprint, threshold)
        else:
            say(f"{folder.path}: going on after {state['position']['bytes'] / 1e6:,.1f} MB")
        tokenizer = load_tokenizer(folder.path)
        workers = workers or available_cores()
        corpus_pass = CorpusPass(folder, tokenizer, settings, spans, shard_tokens, on_error)
        state = corpus_pass.run(state, workers, progress)
        better = better_threshold(state, settings, 0 if val_files else val_fraction)
        if better is not None:
            state = corpus_pass.run(fresh_state(fingerprint, better), workers, progress)
        _check_splits(state, val_fraction, bool(val_files))
        if state["skipped"]:
            say(f"skipped {state['skipped']:,} that could not be read; the first: {state['first_problem']}")
        meta = _meta(state, fingerprint, tokenizer, folder.path, train_files + val_files, settings)
        folder.finish(meta)
    return _prepared(folder.path, meta)


def _check_options(
    val_fraction: float,
    split: str,
    clean: Iterable[str],
    on_error: str,
    workers: int | None,
    shard_tokens: int,
    seed: int,
    tokenizer_size: int,
) -> tuple[str, ...]:
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction must lie in [0, 1), got {val_fraction}")
    if split not in ("auto", "documents", "characters"):
        raise UserError(f"split must be auto, documents or characters, got {split!r}")
    if on_error not in ("raise", "skip"):
        raise UserError(f"on_error must be raise or skip, got {on_error!r}")
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    if shard_tokens < 1:
        raise UserError(f"shard_tokens must be at least 1, got {shard_tokens}")
    if not -(2**63) <= seed < 2**63:
        raise UserError(f"seed must fit in 64 bits, got {seed}")
    if tokenizer_size < 257:
        raise UserError(f"tokenizer_size must be at least 257 (every byte and end of text), got {tokenizer_size}")
    clean = (clean,) if isinstance(clean, str) else tuple(clean)
    for name in clean:
        if name not in CLEANINGS:
            raise UserError(f"unknown cleaning {name!r}; there are {', '.join(CLEANINGS)}")
    return tuple(name for name in CLEANINGS if name in clean)


def _split_one_text(file: Source, val_fraction: float) -> list[Span]:
    cut, line = split_characters(file, 1 - val_fraction)
    spans = [Span(file, side=0, stop=cut)] if cut else []
    return [*spans, Span(file, side=1, start=cut, first=line)] if val_fraction else [Span(file, side=0)]


def _fingerprint(
    spans: list[Span],
    settings: Settings,
    tokenizer: Tokenizer | str | None,
    tokenizer_size: int,
    val_fraction: float,
    shard_tokens: int,
) -> str:
    """Changes with everything that decides the bytes written, and with the sizes and times of the source files."""
    files = [(str(span.source.path.resolve()), span.source.path.stat().st_mtime_ns, asdict(span)) for span in spans]
    if isinstance(tokenizer, Tokenizer):
        name = f"{tokenizer.kind} {tokenizer.vocab_size} {_hash_of_tokens(tokenizer)}"
    else:
        name = f"{tokenizer or 'bpe'} {tokenizer_size}"
    parts = [FORMAT_VERSION, files, asdict(settings), name, val_fraction, shard_tokens]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _hash_of_tokens(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(repr(tokenizer.token_bytes()).encode()).hexdigest()


def _make_tokenizer(
    spec: str | None, size: int, spans: list[Span], settings: Settings, threshold: int, skip: bool
) -> Tokenizer:
    if spec not in (None, "bpe", "char"):
        return load_tokenizer(spec)
    if spec == "char":
        return train_char(_texts(spans, settings, skip))
    return train_bpe(_training_sample(spans, settings, threshold, skip), vocab_size=size)


def _texts(spans: list[Span], settings: Settings, skip: bool) -> Iterator[str]:
    for span in spans:
        for chunk in read_chunks(span):
            for text, _ in chunk_texts(chunk, settings, skip):
                yield text


def _training_sample(spans: list[Span], settings: Settings, threshold: int, skip: bool) -> Iterator[str]:
    spans = [span for span in spans if span.side != 1]
    size = sum(span.size for span in spans)
    keep = min(1.0, TOKENIZER_SAMPLE_BYTES / max(size, 1))
    validation = False
    for span in spans:
        for chunk in read_chunks(span):
            for text, hashed in chunk_texts(chunk, settings, skip):
                if chunk.starts:
                    validation = span.side < 0 and settings.characters is None and hashed < threshold
                # The hash, scrambled, also draws the sample.
                if validation or (hashed * 0x9E3779B97F4A7C15) % 2**64 >= keep * 2**64:
                    continue
                yield text if settings.characters is None else text[: int(len(text) * settings.characters)]


def _check_splits(state: dict[str, Any], val_fraction: float, val_given: bool) -> None:
    tokens = {split: sum(shard["tokens"] for shard in state["shards"][split]) for split in SPLITS}
    if not sum(tokens.values()):
        raise UserError("the sources hold no text")
    if val_given and not tokens["val"]:
        raise UserError("the validation sources hold no text")
    if val_fraction and not val_given and not tokens["val"]:
        raise UserError(
            f"val_fraction {val_fraction:g} leaves nothing for validation: the data is one document; "
            "give validation data, split by characters, or set val_fraction 0"
        )
    if not tokens["train"]:
        raise UserError(f"val_fraction {val_fraction:g} leaves nothing for training")


def _meta(
    state: dict[str, Any],
    fingerprint: str,
    tokenizer: Tokenizer,
    folder: Path,
    files: list[Source],
    settings: Settings,
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "dtype": str(tokenizer.dtype),
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "eot_id": tokenizer.eot_id,
            "sha256": hash_file(folder / TOKENIZER_FILE).hexdigest(),
        },
        "splits": {
            split: {
                "tokens": sum(shard["tokens"] for shard in state["shards"][split]),
                "documents": state["documents"][split],
                "shards": state["shards"][split],
            }
            for split in SPLITS
        },
        "sources": {
            "files": len(files),
            "bytes": sum(file.size for file in files),
            "first": [str(file.path) for file in files[:10]],
        },
        "settings": asdict(settings),
        "skipped": state["skipped"],
        "duplicates": state["duplicates"],
        "fingerprint": fingerprint,
    }


def _prepared(path: Path, meta: dict[str, Any]) -> Prepared:
    return Prepared(
        path=path,
        tokens={split: meta["splits"][split]["tokens"] for split in SPLITS},
        documents={split: meta["splits"][split]["documents"] for split in SPLITS},
        skipped=meta["skipped"],
        duplicates=meta["duplicates"],
        meta=meta,
    )
