"""Damaged and hostile checkpoints: one clear error, and nothing in them is run. ``make fuzz`` runs many more."""

from __future__ import annotations

import json
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import format_fuzz
import numpy as np
import pytest
import tensorflow_bundle
import torch
from format_samples import FORMATS, TLFS, model
from safetensors.torch import load_file, save_file

from llmfast import GPT
from llmfast.errors import UserError
from llmfast.interop.crc32c import crc32c

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory in /proc")
@pytest.mark.parametrize("name", FORMATS)
def test_a_fixed_sample_of_damages(name):
    outcome = format_fuzz.run(name, seed=1, cases=24)
    assert not outcome.wrong, "\n".join(outcome.wrong)
    assert outcome.counts["error"] > 3
    assert outcome.counts["model"] + outcome.counts["error"] == 24


@pytest.mark.parametrize("name", FORMATS)
def test_undamaged_they_are_one_and_the_same_model(name, tmp_path):
    FORMATS[name](tmp_path / "model")
    read = GPT.from_pretrained(tmp_path / "model")
    options = TLFS if name == "tlfs" else {}
    expected = model(**options).state_dict()
    assert read.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[key]) for key, t in read.state_dict().items())


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


BY_HAND = {
    "GLOBAL and REDUCE": b"c__builtin__\nopen\n(S'{path}'\nS'w'\ntR.",
    "INST": b"(S'{path}'\nS'w'\ni__builtin__\nopen\n.",
    "OBJ": b"(c__builtin__\nopen\nS'{path}'\nS'w'\no.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x08builtins\x8c\x04open\x93(S'{path}'\nS'w'\ntR.",
    "an allowed module's other function": b"ctorch\nsave\n(}S'{path}'\ntR.",
}


@pytest.mark.parametrize("way", [*BY_HAND, *(f"protocol {n}" for n in range(pickle.HIGHEST_PROTOCOL + 1))])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, way, zipped):
    mark, file = tmp_path / "mark", tmp_path / "model.pt"
    if way in BY_HAND:
        hostile = BY_HAND[way].replace(b"{path}", str(mark).encode())
    else:
        hostile = pickle.dumps({"model": Touch(mark)}, protocol=int(way.split()[1]))
    if zipped:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", hostile)
            archive.writestr("archive/version", b"3\n")
    else:
        start = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        file.write_bytes(start + hostile + pickle.dumps([], 2))
    if way in ("GLOBAL and REDUCE", "protocol 2"):  # the file does run it where it is loaded as others do
        torch.load(file, weights_only=False)
        assert mark.exists()
        mark.unlink()
    with pytest.raises(UserError, match=r"is not loaded|no checkpoint that llmfast knows|is damaged") as caught:
        GPT.from_pretrained(file)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_the_forbidden_name_is_told(tmp_path):
    torch.save({"model": {}, "config": Path("x")}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"asks for pathlib\.\w*Path, and llmfast loads only tensors and plain values"):
        GPT.from_pretrained(tmp_path)


def test_mismatches_name_the_tensor_and_both_shapes(tmp_path):
    FORMATS["hf"](tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    whole = load_file(file)

    def message(**changed: torch.Tensor | None) -> str:
        state = {**whole, **changed}
        save_file({name: t for name, t in state.items() if t is not None}, file)
        with pytest.raises(UserError) as caught:
            GPT.from_pretrained(tmp_path / "model")
        return str(caught.value)

    name = "transformer.h.1.mlp.c_fc.weight"
    wrong = torch.zeros(24, 95)
    assert f"{name} is (24, 95), the model wants (24, 96)" in message(**{name: wrong})
    assert f"lacks {name}" in message(**{name: None})
    assert "holds transformer.h.1.mlp.extra, which its model has no place for" in message(
        **{"transformer.h.1.mlp.extra": torch.zeros(3)}
    )
    assert "is of type int64" in message(**{name: torch.zeros(24, 96, dtype=torch.int64)})


def test_a_config_that_disagrees_with_the_tensors_is_refused(tmp_path):
    FORMATS["hf"](tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "n_embd": 48}))
    with pytest.raises(UserError, match=r"config\.json: n_embd is 48, but the tensors of .* have 24"):
        GPT.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(("setting", "value"), [("n_head", float("nan")), ("tie_word_embeddings", None)])
def test_a_config_says_nothing_in_a_strange_way(tmp_path, setting, value):
    """NaN is unequal to itself, and null stands for what is not said."""
    FORMATS["hf"](tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), setting: value}))
    if value is None:
        assert GPT.from_pretrained(tmp_path / "model").config.tie_embeddings
    else:
        with pytest.raises(UserError, match="n_head must be a positive integer, got nan"):
            GPT.from_pretrained(tmp_path / "model")


def test_crc32c_is_castagnolis():
    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283
    assert crc32c(np.zeros(32, np.uint8)) == 0x8A9136AA
    rng = np.random.default_rng(0)
    for size in (0, 1, 3, 255, 257, 40_001, 9 << 20):
        data = rng.integers(0, 256, size, dtype=np.uint8)
        middle = size // 3
        whole = crc32c(data)
        if size:
            data[middle] ^= 1
            assert crc32c(data) != whole


def test_every_flip_in_openais_files_is_seen(tmp_path):
    """Tensors and tables have checksums; the table of filters, behind these, is empty and not read."""
    FORMATS["openai-tf"](tmp_path / "model")
    for name in ("model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        file = tmp_path / "model" / name
        whole = file.read_bytes()
        for at in range(0, 3 * len(whole) // 4, len(whole) // 8):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            with pytest.raises(UserError, match="is damaged"):
                GPT.from_pretrained(tmp_path / "model")
        file.write_bytes(whole)


def test_openais_checkpoints_in_parts_and_several(tmp_path):
    """Two data files, two checkpoints in a folder, an optimizer's variable among the tensors."""
    FORMATS["openai-tf"](tmp_path / "model")
    expected = GPT.from_pretrained(tmp_path / "model").state_dict()
    index = tmp_path / "model/model.ckpt.index"
    data = index.with_name("model.ckpt.data-00000-of-00001")
    for name in ("model-7.index", "model-7.data-00000-of-00001"):
        (index.parent / name).write_bytes((index if name.endswith("x") else data).read_bytes())
    (index.parent / "checkpoint").write_text('model_checkpoint_path: "model-7"\n')
    index.write_bytes(b"")  # the other of the two is the one that counts
    state = GPT.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(t, expected[key]) for key, t in state.items())
    (index.parent / "checkpoint").unlink()
    with pytest.raises(UserError, match="holds 2 checkpoints: name one"):
        GPT.from_pretrained(tmp_path / "model")


def test_hostile_lengths_ask_for_no_memory(tmp_path):
    """llm.c and safetensors headers that speak of terabytes."""
    FORMATS["llmc"](tmp_path / "llmc")
    file = tmp_path / "llmc/model.bin"
    data = bytearray(file.read_bytes())
    struct.pack_into("<i", data, 4 * 6, 1 << 30)
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged: .* bytes where its header wants"):
        GPT.from_pretrained(file)
    pairs = [(b"", tensorflow_bundle.header(1 << 30)), (b"model/wte", tensorflow_bundle.entry((1 << 40, 3), 0, b""))]
    (tmp_path / "x.index").write_bytes(tensorflow_bundle.table(pairs))
    with pytest.raises(UserError, match=r"is missing: it holds model/wte"):
        GPT.from_pretrained(tmp_path / "x.index")
