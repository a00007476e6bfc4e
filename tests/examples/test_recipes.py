"""The recipes in examples/ are valid configurations of the commands that they are for."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import pytest

from llmfast.config import ClassifyConfig, GPTConfig, InstructConfig, PretrainConfig

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    "path",
    [*sorted(EXAMPLES.glob("*.toml")), *EXAMPLES.glob("*/base.toml"), EXAMPLES / "spam" / "pretrain.toml"],
    ids=lambda p: p.stem,
)
def test_recipe_names_only_known_options_and_a_possible_model(path):
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    known = {f.name for f in dataclasses.fields(PretrainConfig)}
    assert set(values) <= known
    config = PretrainConfig(**values)
    shape = {k: values[k] for k in ("n_layer", "n_head", "n_embd", "activation", "dropout", "bias") if k in values}
    assert GPTConfig.preset(config.model, **shape).block_size >= (config.block_size or 1)


def test_instruct_recipe_names_only_known_options():
    values = tomllib.loads((EXAMPLES / "instruct" / "tune.toml").read_text(encoding="utf-8"))
    InstructConfig(data="", **values)


def test_the_spam_recipe_names_only_known_options_and_learns_from_its_training_texts_alone(tmp_path):
    values = tomllib.loads((EXAMPLES / "spam" / "classify.toml").read_text(encoding="utf-8"))
    assert set(values) <= {f.name for f in dataclasses.fields(ClassifyConfig)}
    data = tmp_path / "data.tsv"
    data.write_text("".join(f"{'ham' if i % 3 else 'spam'}\tmessage {i}\n" for i in range(90)))
    runpy.run_path(str(EXAMPLES / "spam" / "spam.py"))["split"](str(data), 1, tmp_path / "splits")
    texts = {
        name: [json.loads(line)["text"] for line in (tmp_path / "splits" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation", "test")
    }
    assert {name: len(part) for name, part in texts.items()} == {"train": 42, "validation": 6, "test": 12}
    assert len({text for part in texts.values() for text in part}) == 60
