"""Weights in parts: cut, merged, and read by torch.distributed.checkpoint."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from llmfast import interop
from llmfast.checkpoint import load_model
from llmfast.checkpoint.shards import load_into
from llmfast.cli.main import main
from llmfast.config import GPTConfig
from llmfast.errors import UserError
from llmfast.nn import GPT

SHAPE = GPTConfig(vocab_size=37, block_size=5, n_layer=2, n_head=1, n_embd=2)  # also fewer rows than parts


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_convert_cuts_into_parts_and_merges_them(tmp_path, capsys, shards):
    model = GPT(SHAPE)
    whole, parts, merged = (tmp_path / name for name in ("whole", "parts", "merged"))
    interop.convert(model, whole)
    assert main(["convert", str(whole), str(parts), "--shards", str(shards)]) == 0
    assert main(["convert", str(parts), str(merged)]) == 0
    assert len(list((parts / "shards").iterdir())) == shards
    before, after = (load_file(folder / "model.safetensors") for folder in (whole, merged))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    read = {name: torch.empty_like(tensor) for name, tensor in before.items()}
    load_into(parts, read)
    assert all(torch.equal(before[name], read[name]) for name in before)
    assert torch.equal(load_model(parts).transformer.wpe.weight, model.transformer.wpe.weight)


def test_a_part_that_is_missing_is_named(tmp_path):
    folder = interop.convert(GPT(SHAPE), tmp_path / "parts", shards=3)
    (folder / "shards" / "shard-00002-model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"a part of .* is missing"):
        load_model(folder)


def test_only_our_own_format_is_cut(tmp_path):
    with pytest.raises(UserError, match="2 shards"):
        interop.convert(GPT(SHAPE), tmp_path / "hf", "hf", shards=2)
