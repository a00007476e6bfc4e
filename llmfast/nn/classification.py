"""A GPT that reads a text and says which of several classes it belongs to.

Shapes: B batch, T sequence, C width, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llmfast.config import GPTConfig
from llmfast.errors import UserError
from llmfast.nn.gpt import GPT
from llmfast.nn.layers import Linear
from llmfast.nn.pretrained import CLASSIFIER_TYPE


class GPTForClassification(GPT):
    """The decoder of a ``GPT`` with a head ``score`` of one output a label instead of ``lm_head``.

    The head reads the hidden state of a text's last token, the only one that has seen all of it. ``labels`` are the
    names of the classes, in the order of the outputs.
    """

    def __init__(self, config: GPTConfig, labels: Sequence[str]) -> None:
        self.labels = list(labels)
        super().__init__(config)

    def _add_head(self) -> None:
        self.score = Linear(self.config.n_embd, len(self.labels))

    def _tie(self) -> None:
        """There is no head over the vocabulary to tie."""

    @property
    def head_weight(self) -> Tensor:
        return self.score.weight

    def forward(self, idx: Tensor, lengths: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Logits (B, K) of token ids ``idx`` (B, T), of which row b has ``lengths[b]`` and then padding.

        ``lengths`` (B,) int64, at least 1; without it the head reads the last position. What the padding holds does
        not matter, for no earlier token sees it.
        """
        x = self.hidden_states(idx)
        rows = torch.arange(len(idx), device=idx.device)
        return self.score(x[:, -1] if lengths is None else x[rows, lengths - 1])

    @classmethod
    def from_gpt(cls, gpt: GPT, labels: Sequence[str]) -> GPTForClassification:
        """A classifier with the decoder of ``gpt``, which it shares, and a head drawn from torch's generator."""
        with torch.device("meta"):
            model = cls(gpt.config, labels)
        model.transformer = gpt.transformer
        head = Linear(gpt.config.n_embd, len(labels))
        torch.nn.init.normal_(head.weight, 0.0, 0.02)
        torch.nn.init.zeros_(head.bias)
        model.score = head.to(gpt.transformer.wte.weight.device)
        return model.train(gpt.training)

    @classmethod
    def from_pretrained(cls, path: str | Path, **overrides: Any) -> GPTForClassification:
        """The classifier that ``save_pretrained`` wrote into the directory ``path``, in float32 on the CPU.

        ``overrides`` may change ``dropout``. Raises ``UserError`` where ``path`` holds none.
        """
        directory = Path(path)
        config, labels = read_description(directory)
        with torch.device("meta"):
            model = cls(GPTConfig.from_dict({**config.to_dict(), **overrides}), labels)
        model.to_empty(device="cpu")
        try:
            model.load_state_dict(load_file(directory / "model.safetensors"))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(f"{directory / 'model.safetensors'} is not readable: {error}") from None
        return model


def read_description(directory: Path) -> tuple[GPTConfig, list[str]]:
    """(configuration, labels) from a classifier's ``config.json``."""
    file = directory / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.pop("model_type") != CLASSIFIER_TYPE:
            raise UserError(f"{file} describes no classifier")
        values.pop("base", None)
        labels = values.pop("labels")
        return GPTConfig.from_dict(values), labels
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{file} is not readable: {error}") from None
