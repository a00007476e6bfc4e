"""The modules on their own, as drop-ins for torch.nn's and for what people write with torch.nn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmfast.nn import MLP, CausalSelfAttention, LayerNorm, LoRALinear

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("args", "options"),
    [((24,), {}), ((24, 0.1), {"bias": False}), (([24],), {"elementwise_affine": False}), (((5, 24),), {"eps": 1e-3})],
)
def test_layer_norm_is_constructed_called_and_loaded_as_torchs(args, options):
    theirs = nn.LayerNorm(*args, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    ours = LayerNorm(*args, **options, dtype=torch.float32, device="cpu")
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 24)
    torch.testing.assert_close(ours(x), theirs(x))
    assert all(torch.equal(p, torch.ones_like(p)) for n, p in LayerNorm(7).named_parameters() if n == "weight")


def test_attention_is_torchs_with_the_same_weights():
    torch.manual_seed(0)
    ours, theirs = CausalSelfAttention(48, 4), nn.MultiheadAttention(48, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.c_attn.weight)
        theirs.in_proj_bias.copy_(ours.c_attn.bias)
        theirs.out_proj.load_state_dict(ours.c_proj.state_dict())
    x = torch.randn(2, 70, 48)
    hidden = nn.Transformer.generate_square_subsequent_mask(70)
    torch.testing.assert_close(ours(x), theirs(x, x, x, attn_mask=hidden)[0], rtol=1e-4, atol=1e-5)


def test_options_of_attention_and_mlp():
    attention = CausalSelfAttention(8, 2, bias=False, qkv_bias=True, out_proj=False, scale=0.5, dtype=torch.float64)
    assert [n for n, _ in attention.named_parameters()] == ["c_attn.weight", "c_attn.bias"]
    assert attention.scale == 0.5
    assert attention(torch.randn(1, 3, 8).double()).dtype is torch.float64
    mlp, x = MLP(6, 10, activation="relu", bias=False), torch.randn(4, 6)
    torch.testing.assert_close(mlp(x), F.relu(x @ mlp.c_fc.weight.T) @ mlp.c_proj.weight.T)
    assert MLP(6).c_fc.weight.shape == (24, 6)
    assert MLP(6, device="meta").c_fc.weight.is_meta


def test_a_model_of_ones_own_starts_and_trains():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.norm = nn.Linear(5, 16), LayerNorm(16)
            self.attn, self.mlp = CausalSelfAttention(16, 2, dropout=0.1), MLP(16)
            self.head = LoRALinear(nn.Linear(16, 3), r=2, alpha=4)

        def forward(self, x):
            x = self.read(x)
            return self.head(x + self.mlp(self.norm(x + self.attn(x))))

    model, x, y = Model(), torch.randn(8, 6, 5), torch.randint(3, (8, 6))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(30):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] < 3.0
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("make", [lambda: CausalSelfAttention(10, 3), lambda: MLP(8, activation="swish")])
def test_bad_arguments_are_named(make):
    with pytest.raises(ValueError, match=r"n_head must divide n_embd 10|activation must be gelu_tanh"):
        make()
