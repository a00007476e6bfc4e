"""The recipes in examples/ are valid configurations."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from llmfast.config import GPTConfig, InstructConfig, PretrainConfig

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    "path", [*sorted(EXAMPLES.glob("*.toml")), *EXAMPLES.glob("*/base.toml")], ids=lambda p: p.stem
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
