"""Token files of four programs, written here by hand from their specifications."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from llmfast.data import TokenSource, export_hdf5, open_tokens, prepare
from llmfast.data.tokens import is_token_data
from llmfast.errors import UserError

RNG = np.random.default_rng(7)
IDS = RNG.integers(0, 50257, 1009)


def nanogpt(folder: Path) -> Path:
    IDS.astype("<u2").tofile(folder / "train.bin")
    return folder / "train.bin"


def nanogpt_folder(folder: Path) -> Path:
    IDS[:10].astype("<u2").tofile(folder / "val.bin")
    return nanogpt(folder).parent


def raw_uint32(folder: Path) -> Path:
    (IDS + 100_000).astype("<u4").tofile(folder / "big.bin")
    return folder / "big.bin"


def llmc(folder: Path, name: str = "x.bin", ids: np.ndarray = IDS) -> Path:
    # llm.c: 256 int32 (magic, version, number of tokens, zeros), then uint16 tokens.
    (folder / name).write_bytes(struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253) + ids.astype("<u2").tobytes())
    return folder / name


def llmc_folder(folder: Path) -> Path:
    llmc(folder, "web_train_000000.bin", IDS[:500])
    llmc(folder, "web_train_000001.bin", IDS[500:])
    llmc(folder, "web_val_000000.bin", IDS[:10])
    return folder


def llmc_llama3(folder: Path) -> Path:
    head = struct.pack("<256i", 20240801, 7, len(IDS), *[0] * 253)
    (folder / "llama.bin").write_bytes(head + IDS.astype("<u4").tobytes())
    return folder / "llama.bin"


def megatron(folder: Path, code: int = 8, dtype: str = "<u2") -> Path:
    # Megatron-LM: magic, uint64 version, uint8 type code, uint64 sequences, uint64 documents, int32 lengths,
    # int64 byte offsets, int64 document boundaries.
    lengths = np.array([400, 0, 609], "<i4")
    offsets = np.array([0, 400, 400], "<i8") * np.dtype(dtype).itemsize
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 3, 4)
    (folder / "mega.idx").write_bytes(
        head + lengths.tobytes() + offsets.tobytes() + np.arange(4).astype("<i8").tobytes()
    )
    IDS.astype(dtype).tofile(folder / "mega.bin")
    return folder / "mega.bin"


def hdf5(folder: Path, **options) -> Path:
    with h5py.File(folder / "t.h5", "w") as file:
        file.create_dataset("tokens", data=IDS.astype("<i4"), **options)
    return folder / "t.h5"


def hdf5_as_train_llm_from_scratch_writes_it(folder: Path) -> Path:
    with h5py.File(folder / "grown.h5", "w") as file:
        data = file.create_dataset("tokens", (0,), maxshape=(None,), dtype="i")
        for start in range(0, len(IDS), 100):
            end = min(start + 100, len(IDS))
            data.resize(end, axis=0)
            data[start:end] = IDS[start:end]
    return folder / "grown.h5"


FORMATS = {
    "nanogpt": nanogpt,
    "nanogpt folder": nanogpt_folder,
    "raw uint32": raw_uint32,
    "llm.c": llmc,
    "llm.c folder": llmc_folder,
    "llm.c llama3": llmc_llama3,
    "megatron": megatron,
    "megatron index": lambda folder: megatron(folder).with_suffix(".idx"),
    "megatron prefix": lambda folder: megatron(folder).with_suffix(""),
    "megatron int32": lambda folder: megatron(folder, 4, "<i4"),
    "hdf5": hdf5,
    "hdf5 in chunks": lambda folder: hdf5(folder, chunks=(64,), compression="gzip"),
    "hdf5 grown": hdf5_as_train_llm_from_scratch_writes_it,
}


@pytest.mark.parametrize("name", FORMATS)
def test_format_is_recognised_and_read(tmp_path, name):
    path = FORMATS[name](tmp_path)
    expected = IDS + (100_000 if name == "raw uint32" else 0)
    assert is_token_data(path)
    source = open_tokens(path)
    assert len(source) == len(expected)
    assert np.array_equal(source.window(0, len(source)), expected)
    starts = np.array([0, 3, 490, 499, 500, 980, 3, 1009 - 29])
    found = source.windows(starts, 29)
    assert found.dtype == np.int64
    assert np.array_equal(found, [expected[start : start + 29] for start in starts])
    assert source.tokenizer is None
    assert source.vocab_size is None
    source.check_ids(int(expected.max()) + 1)
    with pytest.raises(UserError, match=rf"token {int(expected.argmax()):,} is id {expected.max()}.*vocab_size"):
        source.check_ids(int(expected.max()))
    if "folder" in name:
        assert np.array_equal(open_tokens(path, "val").window(0, 10), IDS[:10])


def test_windows_equal_slices_across_parts_of_any_size():
    parts = [RNG.integers(0, 99, size).astype(np.uint16) for size in (1, 0, 7, 2, 64, 1, 1, 30)]
    whole, source = np.concatenate(parts), TokenSource(parts, "parts")
    for length in (1, 2, 8, 70, len(whole)):
        starts = RNG.integers(0, len(whole) - length + 1, 57)
        assert np.array_equal(source.windows(starts, length), [whole[start : start + length] for start in starts])
        assert np.array_equal(source.window(int(starts[0]), length), whole[starts[0] : starts[0] + length])
    assert source.windows(np.empty(0, np.int64), 5).shape == (0, 5)
    for start, length in ((-1, 2), (len(whole) - 1, 2)):
        with pytest.raises(IndexError):
            source.windows(np.array([0, start]), length)
        with pytest.raises(IndexError):
            source.window(start, length)


def test_raw_dtype_can_be_told(tmp_path):
    np.zeros(100, "<u2").tofile(tmp_path / "zeros.bin")
    assert len(open_tokens(tmp_path / "zeros.bin")) == 100
    assert len(open_tokens(tmp_path / "zeros.bin", dtype="uint32")) == 50


def test_exported_hdf5_is_what_train_llm_from_scratch_reads(tmp_path, monkeypatch):
    monkeypatch.setattr("llmfast.data.tokens._SCAN_TOKENS", 100)
    export_hdf5(open_tokens(llmc_folder(tmp_path)), tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5", "r") as file:
        assert list(file) == ["tokens"]
        assert file["tokens"].dtype == np.int32
        assert np.array_equal(file["tokens"][:], IDS)


def test_export_goes_through_the_peers_own_loader(tmp_path):
    peers = os.environ.get("LLMFAST_PEERS")
    if not peers:
        pytest.skip("LLMFAST_PEERS names no folder of peers' checkouts")
    export_hdf5(TokenSource([np.arange(1000, dtype=np.uint16)], "numbers"), tmp_path / "out.h5")
    sys.path.insert(0, str(Path(peers, "train-llm-from-scratch")))
    try:
        from data_loader.data_loader import get_batch_iterator
    finally:
        del sys.path[0]
    x, y = next(get_batch_iterator(str(tmp_path / "out.h5"), 4, 10))
    assert x.shape == (4, 10)
    assert ((x + 1) == y).all()


# ---- mistakes


def change(folder: Path, **values) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **values}))


def flip_a_byte(folder: Path) -> None:
    with open(folder / "train-00001.bin", "r+b") as file:
        file.seek(10)
        file.write(b"\x07\x07")


DAMAGE = {
    "shard missing": (lambda folder: (folder / "train-00001.bin").unlink(), "train-00001.bin: the shard is missing"),
    "shard cut off": (lambda folder: os.truncate(folder / "train-00001.bin", 100), "50 tokens instead of 64"),
    "shard cut in a token": (lambda folder: os.truncate(folder / "train-00001.bin", 101), "no whole number of uint16"),
    "shard changed": (flip_a_byte, "train-00001.bin: changed since it was prepared"),
    "newer version": (lambda folder: change(folder, version=99), "version 99 is unknown"),
    "meta of another program": (lambda folder: (folder / "meta.json").write_text("[1]"), "meta.json: not the record"),
    "meta cut off": (lambda folder: (folder / "meta.json").write_text("{"), "meta.json: not the record"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_prepared_folder_is_one_clear_line(tmp_path, damage):
    (tmp_path / "a.txt").write_text("some words " * 50)
    out = prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer="byte", shard_tokens=64, progress=False).path
    assert np.array_equal(open_tokens(out, verify=True).window(0, 4), list(b"some"))
    spoil, message = DAMAGE[damage]
    spoil(out)
    with pytest.raises(UserError, match=message):
        open_tokens(out, verify=True)


def written(name: str, data: bytes):
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


def without_bin(folder: Path) -> Path:
    path = megatron(folder)
    path.unlink()
    return path.with_suffix(".idx")


def cut_off(make, size: int):
    def write(folder: Path) -> Path:
        path = make(folder)
        os.truncate(path, size)
        return path

    return write


MISTAKES = {
    "missing": (lambda folder: folder / "none.bin", "no such file"),
    "folder of text": (lambda folder: written("a.txt", b"a")(folder).parent, "no meta.json and no train.bin"),
    "empty": (written("train.bin", b""), "the file is empty"),
    "odd size": (written("train.bin", b"123"), "no whole number of uint16 tokens"),
    "llm.c cut off": (cut_off(llmc, 1200), "cut off: 1,009 tokens expected, 88 are there"),
    "llm.c header cut off": (cut_off(llmc, 200), "cut off in the header"),
    "llm.c negative count": (
        written("x.bin", struct.pack("<256i", 20240520, 1, -1, *[0] * 253)),
        "damaged: its header counts -1 tokens",
    ),
    "megatron cut off": (cut_off(megatron, 100), "cut off: 1,009 tokens expected, 50 are there"),
    "megatron without tokens": (without_bin, "mega.bin: missing beside mega.idx"),
    "no hdf5": (written("a.h5", b"text"), "a.h5: not an HDF5 file"),
    "hdf5 cut off": (cut_off(hdf5, 3000), "a.h5|t.h5: not an HDF5 file, or cut off"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_files_that_hold_no_tokens_are_one_clear_line(tmp_path, mistake):
    make, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message):
        open_tokens(make(tmp_path))


def test_other_mistakes_are_one_clear_line(tmp_path):
    (tmp_path / "m.bin").write_bytes(b"12")
    (tmp_path / "m.idx").write_bytes(b"TNTIDX\x00\x00" + bytes(99))
    with pytest.raises(UserError, match="not a Megatron index"):
        open_tokens(tmp_path / "m.bin")
    (tmp_path / "m.idx").write_bytes(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 6, 1, 1) + bytes(20))
    with pytest.raises(UserError, match="type code 6 is not supported"):
        open_tokens(tmp_path / "m.bin")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["words"] = np.arange(3)
    with pytest.raises(UserError, match=r"no flat data set .* tokens \(it holds words\)"):
        open_tokens(tmp_path / "other.h5")
    with pytest.raises(UserError, match="split must be train or val"):
        open_tokens(nanogpt(tmp_path), "test")
    with pytest.raises(UserError, match="dtype must be"):
        open_tokens(nanogpt(tmp_path), dtype="int8")
    with pytest.raises(UserError, match="cannot be written"):
        export_hdf5(open_tokens(nanogpt(tmp_path)), tmp_path / "none" / "x.h5")
