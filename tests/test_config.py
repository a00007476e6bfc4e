"""Model options: what makes no model is one line that names the option."""

from __future__ import annotations

import pytest

from llmfast.config import GPTConfig
from llmfast.errors import UserError


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("n_layer", 0),
        ("n_layer", 1.0),
        ("n_head", 5),
        ("vocab_size", True),
        ("dropout", "x"),
        ("dropout", 1.0),
        ("dropout", float("nan")),
        ("bias", "no"),
        ("bias", None),
        ("qkv_bias", 1),
        ("tie_embeddings", 0),
        ("attn_scale", "width"),
        ("attn_scale", True),
        ("layer_norm_eps", None),
        ("layer_norm_eps", 0),
        ("activation", "swish"),
        ("init", None),
    ],
)
def test_a_wrong_model_option_is_named(option, value):
    with pytest.raises(UserError, match=option) as caught:
        GPTConfig(**{option: value})
    assert repr(value) in str(caught.value) or str(value) in str(caught.value)


@pytest.mark.parametrize("scale", [None, "n_embd", 1, 0.25])
def test_the_attention_scale_is_a_number_or_a_name(scale):
    assert GPTConfig(attn_scale=scale, qkv_bias=None, layer_norm_eps=1).softmax_scale > 0
