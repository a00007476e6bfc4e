"""GELU and LayerNorm of examples/gelu_and_layer_norm.py compute what llmfast.ops computes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from llmfast import ops

PATH = Path(__file__).parents[2] / "examples" / "gelu_and_layer_norm.py"
lesson = runpy.run_path(str(PATH))


@pytest.mark.parametrize(("name", "activation"), [("gelu", "gelu"), ("gelu_tanh", "gelu_tanh")])
def test_gelu_is_the_activation_of_the_fused_mlp(name, activation):
    x = torch.linspace(-6, 6, 301)[:, None]
    one = torch.ones(1, 1)  # a layer of width 1 with weights 1 is its activation
    fused = ops.mlp(x, one, None, one, None, activation=activation)
    torch.testing.assert_close(lesson[name](x), fused, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (2, 3, 65)])
def test_layer_norm(shape):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape) * 3 + 2, torch.randn(shape[-1]), torch.randn(shape[-1])
    torch.testing.assert_close(lesson["layer_norm"](x, weight, bias), ops.layer_norm(x, weight, bias))


def test_mlp():
    torch.manual_seed(0)
    x, fc, proj = torch.randn(2, 3, 5), torch.randn(20, 5), torch.randn(5, 20)
    torch.testing.assert_close(lesson["mlp"](x, fc, proj), ops.mlp(x, fc, None, proj, None), rtol=1e-4, atol=1e-5)


def test_the_script_prints_its_lesson(capsys):
    runpy.run_path(str(PATH), run_name="__main__")
    printed = capsys.readouterr().out
    assert "dips to -0.170 at x = -0.75" in printed
    assert "mean 0.00 var 1.00" in printed
