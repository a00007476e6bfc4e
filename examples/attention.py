"""Attention four times over, from a weighted mean to what GPT runs: read top to bottom, then `python attention.py`.

Follows chapter 3 of Sebastian Raschka, "Build a Large Language Model (From Scratch)". The last one computes what
``llmfast.ops.causal_attention`` computes, which is what a GPT here trains with.

Shapes: B batch, T tokens, C width, H heads, D head size (C = H D).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmfast import ops


def simplified_attention(x: Tensor) -> Tensor:
    """1. Without weights: each token becomes a mean of all tokens (T, C), weighted by how much they point its way."""
    scores = x @ x.T
    weights = scores.softmax(dim=-1)  # each row sums to 1
    return weights @ x


class SelfAttention(nn.Module):
    """2. With trainable weights: what a token looks for (query), offers (key), passes on (value); (T, C) -> (T, D)."""

    def __init__(self, width: int, head_size: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, head_size, bias=False)
        self.key = nn.Linear(width, head_size, bias=False)
        self.value = nn.Linear(width, head_size, bias=False)

    def weights(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(-2, -1)
        # A dot product of D numbers spreads like sqrt(D): unscaled, the softmax of a wide head would saturate.
        return (scores * self.key.out_features**-0.5).softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.weights(x) @ self.value(x)


class CausalAttention(SelfAttention):
    """3. Without a view of the future: token i sees tokens 0 .. i, so that all next tokens train in one pass."""

    def __init__(self, width: int, head_size: int, dropout: float = 0.0) -> None:
        super().__init__(width, head_size)
        self.dropout = nn.Dropout(dropout)

    def weights(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(-2, -1) * self.key.out_features**-0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(diagonal=1)
        # Masked before the softmax, as exp(-inf) = 0, so that each row still sums to 1.
        return self.dropout(scores.masked_fill(future, float("-inf")).softmax(dim=-1))


class MultiHeadWrapper(nn.Module):
    """4a. Several heads side by side, one module each: easy to read, H small matrix products where one would do."""

    def __init__(self, width: int, n_head: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = nn.ModuleList(CausalAttention(width, width // n_head, dropout) for _ in range(n_head))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.heads], dim=-1)


class MultiHeadAttention(nn.Module):
    """4b. The same heads by splitting one large product: (B, T, C) -> (B, H, T, D) -> (B, T, C)."""

    def __init__(self, width: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        T, D = q.shape[-2:]
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(diagonal=1)
        weights = (q @ k.transpose(-2, -1) * D**-0.5).masked_fill(future, float("-inf")).softmax(dim=-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    @classmethod
    def from_wrapper(cls, wrapper: MultiHeadWrapper) -> MultiHeadAttention:
        """The heads of a wrapper as one: their query, key and value weights stacked."""
        heads: list[CausalAttention] = list(wrapper.heads)  # type: ignore[arg-type]
        merged = cls(heads[0].query.in_features, len(heads))
        parts = [head.get_submodule(name).weight for name in ("query", "key", "value") for head in heads]
        with torch.no_grad():
            merged.qkv.weight.copy_(torch.cat(parts))
        return merged


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    torch.set_printoptions(precision=2, sci_mode=False)
    words = "the cat sat on the mat".split()
    embedding = dict(zip(dict.fromkeys(words), torch.randn(len(words), 8), strict=False))
    x = torch.stack([embedding[word] for word in words])

    print("1. simplified: both 'the' are the same vector, so they see the same:")
    print("  ", torch.equal(simplified_attention(x)[0], simplified_attention(x)[4]))
    print("2. self-attention: weights, one row a query, each row sums to 1:")
    print(SelfAttention(8, 4).weights(x))
    print("3. causal: nothing above the diagonal, the first token sees only itself:")
    print(CausalAttention(8, 4).weights(x))
    wrapper = MultiHeadWrapper(8, n_head=2)
    merged = MultiHeadAttention.from_wrapper(wrapper)
    print("4. two heads, by wrapper and by weight split; largest difference:")
    print("  ", (wrapper(x[None]) - merged(x[None])).abs().max().item())
    fast = ops.causal_attention(*merged.split(x[None])).transpose(1, 2).flatten(2)
    print("   and of llmfast.ops.causal_attention, which never stores the T x T weights:")
    print("  ", (fast - merged(x[None])).abs().max().item())


if __name__ == "__main__":
    main()
