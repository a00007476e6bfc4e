"""What every writer needs: refusing what a program cannot express, and the biases that a program always has."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfast.config import GPTConfig
from llmfast.errors import UserError
from llmfast.nn import GPT

GPT2_SIZES = (50257, 50304)  # GPT-2's vocabulary, and that padded to a multiple of 64
_GELUS = {"gelu": "GELU's erf form", "gelu_tanh": "GELU's tanh form"}

logger = logging.getLogger("llmfast")


def need(config: GPTConfig, program: str, *, activation: str, **options: Any) -> None:
    """``UserError`` for the first option of ``config`` that is not as ``program`` always has it.

    Only between the two forms of GELU it is a warning: programs pass weights on across them, GPT-2's to nanoGPT.
    """
    if {config.activation, activation} == set(_GELUS):
        logger.warning(
            "%s computes %s, this model %s: its answers there differ in the third digit",
            program, _GELUS[activation], _GELUS[config.activation],
        )  # fmt: skip
    else:
        options["activation"] = activation
    for name, value in options.items():
        have = getattr(config, name)
        if have != value:
            raise UserError(f"{program} cannot hold this model: {name} is {have}, and it has {value} only")


def need_default_scale(config: GPTConfig, program: str) -> None:
    if config.softmax_scale != config.head_size**-0.5:
        raise UserError(
            f"{program} cannot hold this model: attn_scale is {config.attn_scale}, and it has 1/sqrt(head size) only"
        )


def with_biases(config: GPTConfig, weights: Mapping[str, Tensor], *, qkv: bool = True) -> dict[str, Tensor]:
    """The weights in memory of their own, contiguous, with zeros for biases that they lack: the same function."""
    with torch.device("meta"):
        model = GPT(dataclasses.replace(config, bias=True, qkv_bias=qkv))
    dtype = weights["transformer.wte.weight"].dtype
    state = {}
    for name, parameter in model.named_parameters():
        state[name] = weights[name].contiguous() if name in weights else torch.zeros(parameter.shape, dtype=dtype)
    return state


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
