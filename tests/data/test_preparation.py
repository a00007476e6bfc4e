"""prepare: the tokens it writes, how it splits, and that neither workers nor kills change a byte."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import zstandard
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from llmfast.data import corpus_pass, find_sources, open_tokens, prepare, readers, stdlib_sources
from llmfast.errors import UserError
from llmfast.tokenizer import load_tokenizer

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@pytest.fixture(scope="module")
def reference(real_data: Path) -> tiktoken.Encoding:
    """tiktoken with GPT-2's original pattern, straight from OpenAI's files."""
    folder = real_data / "gpt2"
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    return tiktoken.Encoding(
        "ref", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )


def read(folder: Path, split: str) -> np.ndarray:
    files = sorted(folder.glob(f"{split}-*.bin"))
    return np.concatenate([np.fromfile(file, "<u2") for file in files] or [np.empty(0, "<u2")])


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.bin"))}


def documents(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    words = "the of and a in that it is was I for on you he be with as by at have are this ñandú 東京\n".split(" ")
    return [f"{i}: " + " ".join(rng.choice(words, rng.integers(1, 60))) for i in range(count)]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def split_documents(tokens: np.ndarray, eot: int) -> list[list[int]]:
    ends = np.flatnonzero(tokens == eot)
    assert len(tokens) == 0 or tokens[-1] == eot
    return [part[:-1].tolist() for part in np.split(tokens, ends + 1)[:-1]]


# ---- one text


@pytest.mark.parametrize(
    ("name", "train", "val"), [("the-verdict.txt", 4612, None), ("tinyshakespeare.txt", 301966, 36059)]
)
def test_one_text_is_split_by_characters_without_end_of_text(real_data, gpt2, reference, tmp_path, name, train, val):
    path = real_data / "text" / name
    done = prepare(path, tmp_path / "out", tokenizer=gpt2, progress=False)
    text = path.read_text(encoding="utf-8")
    cut = int(len(text) * 0.9)
    assert read(done.path, "train").tolist() == reference.encode_ordinary(text[:cut])
    assert read(done.path, "val").tolist() == reference.encode_ordinary(text[cut:])
    assert done.tokens["train"] == train
    assert val is None or done.tokens["val"] == val


def test_long_text_is_cut_where_its_tokens_do_not_change(gpt2, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1000)
    text = "\ufeff" + "\n\n".join(documents(700)) + "  \n \n" + "東京\n大阪\n" * 300 + "a b\tc  d\r\n\r\n" * 200
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    done = prepare(path, tmp_path / "out", tokenizer=gpt2, val_fraction=0, split="documents", progress=False)
    assert read(done.path, "train").tolist() == [*reference.encode_ordinary(text[1:]), 50256]
    assert done.documents == {"train": 1, "val": 0}


def test_pieces_of_random_text_have_the_tokens_of_the_whole(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 24)
    rng = np.random.default_rng(11)
    alphabet = [
        *"  \n\n\n\r\t'.,-1",
        *"abs",
        "the",
        " of",
        "\nx",
        "é",
        "東",
        "\u3000",
        "\xa0",
        "\u2003",
        "\x85",
        "😀",
        "\ufeff",
    ]
    cuts = 0
    for _ in range(300):
        text = "x" + "".join(rng.choice(alphabet, 120))
        (tmp_path / "x.txt").write_text(text, encoding="utf-8", newline="")
        chunks = list(readers.read_chunks(readers.Span(find_sources(tmp_path / "x.txt")[0])))
        tokens = [token for chunk in chunks for token in reference.encode_ordinary(chunk.data.decode())]
        assert tokens == reference.encode_ordinary(text)
        assert [chunk.ends for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        cuts += len(chunks) - 1
    assert cuts > 300


def test_text_without_any_safe_place_is_still_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 100)
    monkeypatch.setattr(readers, "LARGEST_PIECE", 400)
    text = "東京大阪é" * 500
    (tmp_path / "cjk.txt").write_text(text, encoding="utf-8")
    done = prepare(tmp_path / "cjk.txt", tmp_path / "out", tokenizer="byte", val_fraction=0, progress=False)
    assert bytes(read(done.path, "train").astype(np.uint8)) == text.encode()


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.99])
def test_split_by_characters_takes_whole_characters(tmp_path, monkeypatch, fraction):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 7)
    text = "añ東😀\n" * 101
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    done = prepare(tmp_path / "x.txt", tmp_path / "out", tokenizer="byte", val_fraction=fraction, progress=False)
    cut = int(len(text) * (1 - fraction))
    assert bytes(read(done.path, "train").astype(np.uint8)).decode() == text[:cut]
    assert bytes(read(done.path, "val").astype(np.uint8)).decode() == text[cut:]


# ---- documents


def test_the_pile_sample_becomes_its_300_documents_in_order(real_data, gpt2, reference, tmp_path):
    path = real_data / "pile" / "sample.jsonl.zst"
    done = prepare(path, tmp_path / "out", tokenizer=gpt2, progress=False)
    raw = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
    expected = [reference.encode_ordinary(json.loads(line)["text"]) for line in raw.splitlines()]
    parts = [split_documents(read(done.path, split), 50256) for split in ("train", "val")]
    assert sum(map(len, parts)) == len(expected) == 300
    assert done.documents == {"train": len(parts[0]), "val": len(parts[1])}
    assert 10 <= len(parts[1]) <= 60
    iterators = [iter(part) for part in parts]
    in_val = {tuple(part) for part in parts[1]}
    assert all(next(iterators[tuple(document) in in_val]) == document for document in expected)


def test_split_of_a_document_does_not_depend_on_the_others(tmp_path):
    texts = documents(400)
    few = prepare(write_lines(tmp_path / "a.jsonl", texts[:200]), tmp_path / "a", tokenizer="byte", progress=False)
    more = prepare(write_lines(tmp_path / "b.jsonl", texts[::-1]), tmp_path / "b", tokenizer="byte", progress=False)
    other = prepare(tmp_path / "b.jsonl", tmp_path / "c", tokenizer="byte", seed=2, progress=False)
    eot = load_tokenizer("byte").eot_id
    val = [
        {bytes(part).decode() for part in split_documents(read(done.path, "val"), eot)} for done in (few, more, other)
    ]
    assert val[0] == {text for text in val[1] if text in texts[:200]}
    assert val[1] != val[2]
    assert 20 <= len(val[1]) <= 65


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_no_split_is_left_without_a_document(tmp_path, fraction):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"this is text {name}\n")
    done = prepare(tmp_path / "*.txt", tmp_path / "out", tokenizer="byte", val_fraction=fraction, progress=False)
    assert sorted(done.documents.values()) == [1, 2]
    assert done.documents["val"] == (1 if fraction < 0.5 else 2)


def test_validation_sources_go_to_validation_whole(tmp_path):
    (tmp_path / "train.txt").write_text("train")
    (tmp_path / "val.txt").write_text("val")
    done = prepare(
        tmp_path / "train.txt", tmp_path / "out", val_sources=tmp_path / "val.txt", tokenizer="byte", progress=False
    )
    eot = load_tokenizer("byte").eot_id
    assert read(done.path, "train").tolist() == [*b"train", eot]
    assert read(done.path, "val").tolist() == [*b"val", eot]


def test_split_of_several_documents_by_characters(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["0123456789", "abcdefghij"])
    done = prepare(path, tmp_path / "out", tokenizer="byte", split="characters", val_fraction=0.3, progress=False)
    eot = load_tokenizer("byte").eot_id
    assert [bytes(part) for part in split_documents(read(done.path, "train"), eot)] == [b"0123456", b"abcdefg"]
    assert [bytes(part) for part in split_documents(read(done.path, "val"), eot)] == [b"789", b"hij"]


# ---- cleaning


def test_cleaning_is_off_by_default_and_does_what_it_says(tmp_path):
    texts = ["  Hello,\n\n World! ", "hello world", "Hello,\n\n World!", "other"]
    path = write_lines(tmp_path / "a.jsonl", texts)
    eot = load_tokenizer("byte").eot_id

    def cleaned(*clean: str) -> list[str]:
        out = tmp_path / ("out" + "-".join(clean))
        done = prepare(path, out, tokenizer="byte", clean=clean, val_fraction=0, split="documents", progress=False)
        assert done.duplicates == 4 - done.documents["train"]
        return [bytes(part).decode() for part in split_documents(read(out, "train"), eot)]

    assert cleaned() == texts
    assert cleaned("whitespace") == ["Hello, World!", "hello world", "Hello, World!", "other"]
    assert cleaned("whitespace", "duplicates") == ["Hello, World!", "hello world", "other"]
    assert cleaned("lowercase", "punctuation", "whitespace", "duplicates") == ["hello world", "other"]
    assert cleaned("lowercase")[0] == "  hello,\n\n world! "


def test_duplicates_are_found_across_chunks_and_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 500)
    texts = documents(150)
    path = write_lines(tmp_path / "a.jsonl", texts + texts[::-1])
    done = prepare(path, tmp_path / "out", tokenizer="byte", clean=["duplicates"], workers=3, progress=False)
    assert done.duplicates == 150
    assert sum(done.documents.values()) == 150


# ---- the same bytes, however


def test_neither_threads_nor_processes_nor_shard_size_change_the_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 3000)
    folder = tmp_path / "in"
    folder.mkdir()
    write_lines(folder / "b.jsonl", documents(300, seed=1))
    (folder / "a.txt").write_text("\n".join(documents(100, seed=2)), encoding="utf-8")
    (folder / "empty.txt").write_text("")
    one = prepare(folder, tmp_path / "one", tokenizer="byte", workers=1, progress=False)
    threads = prepare(folder, tmp_path / "threads", tokenizer="byte", workers=2, progress=False)
    monkeypatch.setattr(corpus_pass, "PROCESSES_FROM_BYTES", 0)
    processes = prepare(folder, tmp_path / "processes", tokenizer="byte", workers=2, progress=False)
    shards = prepare(folder, tmp_path / "shards", tokenizer="byte", workers=2, shard_tokens=997, progress=False)
    assert digests(one.path) == digests(threads.path) == digests(processes.path)
    sizes = [len(np.fromfile(file, "<u2")) for file in sorted(shards.path.glob("train-*.bin"))]
    assert len(sizes) > 3
    assert set(sizes[:-1]) == {997}
    for split in ("train", "val"):
        assert np.array_equal(read(one.path, split), read(shards.path, split))


def test_a_finished_preparation_is_not_done_again(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", documents(50))
    first = prepare(path, tmp_path / "out", tokenizer="byte", progress=False)
    times = {file: file.stat().st_mtime_ns for file in first.path.iterdir()}
    again = prepare(path, tmp_path / "out", tokenizer="byte", workers=1, progress=False)
    assert again.tokens == first.tokens
    assert {file: file.stat().st_mtime_ns for file in first.path.iterdir()} == times
    assert not any(file.name.startswith(".") for file in times)


CHILD = """
import sys
from llmfast.data import corpus_pass, prepare, readers
readers.CHUNK_BYTES = 2000
corpus_pass.RECORD_SECONDS = 0
corpus_pass.PROCESSES_FROM_BYTES = int(sys.argv[3])
prepare(sys.argv[1], sys.argv[2], tokenizer="byte", clean=["duplicates"], shard_tokens=20011, workers=2, progress=False)
"""


def recorded_bytes(out: Path) -> int:
    try:
        return json.loads((out / ".prepare.json").read_text())["position"]["bytes"]
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("processes_from", [0, 1 << 40], ids=["processes", "threads"])
def test_killed_preparation_goes_on_to_the_same_bytes(tmp_path, monkeypatch, processes_from):
    folder = tmp_path / "in"
    folder.mkdir()
    texts = documents(900, seed=3)
    write_lines(folder / "a.jsonl", texts)
    (folder / "b.txt").write_text("\n".join(texts[::-1]), encoding="utf-8")
    raw = "".join(json.dumps(text) + "\n" for text in documents(900, seed=4) + texts)
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(raw.encode()))
    (folder / "d.json").write_text(json.dumps(documents(600, seed=5)))
    whole = prepare(
        folder, tmp_path / "whole", tokenizer="byte", clean=["duplicates"], shard_tokens=20011, progress=False
    )
    assert whole.duplicates == 900

    out, total = tmp_path / "out", sum(file.stat().st_size for file in folder.iterdir())
    command = [sys.executable, "-c", CHILD, str(folder), str(out), str(processes_from)]
    places = []
    for share in (0.05, 0.35, 0.7):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and recorded_bytes(out) < share * total:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        places.append(recorded_bytes(out))
    # A kill may come late on a busy machine, but not every time.
    assert sum(0 < place < total for place in places) >= 2, places
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert digests(out) == digests(whole.path)
    expected, found = (json.loads((folder / "meta.json").read_text()) for folder in (whole.path, out))
    assert found["splits"] == expected["splits"]
    assert found["duplicates"] == expected["duplicates"]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers through /proc")
def test_a_worker_that_dies_ends_the_run_with_one_error_and_it_can_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 500)
    monkeypatch.setattr(corpus_pass, "PROCESSES_FROM_BYTES", 0)
    path = write_lines(tmp_path / "a.jsonl", documents(300))
    whole = prepare(path, tmp_path / "whole", tokenizer="byte", progress=False)
    taken, take = [], corpus_pass.CorpusPass._take

    def kill_workers(self, encoded):
        taken.append(encoded)
        if len(taken) == 5:
            for task in Path("/proc/self/task").iterdir():
                for child in (task / "children").read_text().split():
                    os.kill(int(child), signal.SIGKILL)
        take(self, encoded)

    monkeypatch.setattr(corpus_pass.CorpusPass, "_take", kill_workers)
    with pytest.raises(UserError, match="a worker process ended"):
        prepare(path, tmp_path / "out", tokenizer="byte", workers=2, progress=False)
    done = prepare(path, tmp_path / "out", tokenizer="byte", workers=2, progress=False)
    assert digests(done.path) == digests(whole.path)


# ---- tokenizers trained on the way


def test_the_standard_library_with_a_bpe_trained_on_it(tmp_path):
    sources = [path for path in stdlib_sources() if path.parent.name in ("json", "email")]
    done = prepare(sources, tmp_path / "out", tokenizer_size=600, progress=False)
    source = open_tokens(done.path, "train", verify=True)
    assert source.tokenizer.kind == "bpe"
    assert source.vocab_size <= 600
    source.check_ids(source.vocab_size)
    texts = {path.read_text(encoding="utf-8") for path in sources}
    for part in split_documents(read(done.path, "train"), source.tokenizer.eot_id):
        assert source.tokenizer.decode(part) in texts


def test_char_tokenizer_has_an_id_for_every_character_of_both_splits(real_data, tmp_path):
    done = prepare(real_data / "text" / "tinyshakespeare.txt", tmp_path / "out", tokenizer="char", progress=False)
    text = (real_data / "text" / "tinyshakespeare.txt").read_text()
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    assert read(done.path, "train").tolist() == [ids[character] for character in text[:1003854]]
    assert read(done.path, "val").tolist() == [ids[character] for character in text[1003854:]]


def test_the_standard_library_is_sorted_python_text_without_tests():
    paths = stdlib_sources()
    assert paths == sorted(paths)
    assert {path.suffix for path in paths} == {".py"}
    assert sum(path.stat().st_size for path in paths) > 5_000_000
    assert not {"test", "tests", "site-packages", "__pycache__"} & {part for path in paths for part in path.parts[-3:]}
