"""The teaching attentions of examples/attention.py compute what ops.causal_attention computes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from llmfast import ops

PATH = Path(__file__).parents[2] / "examples" / "attention.py"
attention = runpy.run_path(str(PATH))


def see_all(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention without a mask by the causal op: each query (T, D) is the last of its own batch row."""
    T = len(q)
    k, v = k.expand(T, 1, T, -1), v.expand(T, 1, T, -1)
    return ops.causal_attention(q[:, None, None], k, v, scale=scale)[:, 0, 0]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("T", [1, 6, 17])
def test_simplified_attention(T):
    x = torch.randn(T, 5)
    torch.testing.assert_close(attention["simplified_attention"](x), see_all(x, x, x, 1.0))


@pytest.mark.parametrize("T", [1, 6, 17])
def test_self_attention(T):
    x, module = torch.randn(T, 5), attention["SelfAttention"](5, 3)
    torch.testing.assert_close(module(x), see_all(module.query(x), module.key(x), module.value(x), 3**-0.5))


@pytest.mark.parametrize("T", [1, 6, 17])
def test_causal_attention(T):
    x, module = torch.randn(2, T, 5), attention["CausalAttention"](5, 3)
    expected = ops.causal_attention(*(part(x)[:, None] for part in (module.query, module.key, module.value)))
    torch.testing.assert_close(module(x), expected[:, 0])


def test_dropout_of_the_causal_attention_keeps_the_expected_weights():
    x, module = torch.randn(6, 5), attention["CausalAttention"](5, 3, dropout=0.3)
    mean = module.weights(x.expand(3000, 6, 5)).mean(0)
    torch.testing.assert_close(mean, module.eval().weights(x), rtol=0, atol=0.06)


@pytest.mark.parametrize("n_head", [1, 2, 4])
def test_both_multi_head_attentions(n_head):
    x, wrapper = torch.randn(3, 7, 8), attention["MultiHeadWrapper"](8, n_head)
    merged = attention["MultiHeadAttention"].from_wrapper(wrapper)
    expected = ops.causal_attention(*merged.split(x)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(merged(x), expected)
    torch.testing.assert_close(wrapper(x), expected)


def test_the_script_prints_its_lesson(capsys):
    runpy.run_path(str(PATH), run_name="__main__")
    printed = capsys.readouterr().out
    assert "True" in printed
    differences = [float(line) for line in printed.splitlines() if line.startswith("   ") and "e-" in line]
    assert all(difference < 1e-6 for difference in differences)
