"""What LLMFAST_BUILD=none must still do on PyTorch: import, the ops, the tokenizer trainer's Python twin, training."""

import importlib.util
from pathlib import Path

import torch

import llmfast
from llmfast.ops import describe, layer_norm
from llmfast.tokenizer import train_bpe

assert not list(Path(importlib.util.find_spec("llmfast").origin).parent.glob("*.so"))
assert describe()["ops"]["layer_norm"]["cpu"]["chosen"] == "torch"

x, weight = torch.randn(5, 7), torch.randn(7)
torch.testing.assert_close(layer_norm(x, weight), torch.nn.functional.layer_norm(x, (7,), weight))

text = "the cat sat on the mat, and the dog on the cat. " * 20
tokenizer = train_bpe([text], vocab_size=270)
ids = tokenizer.encode(text)
assert tokenizer.decode(ids) == text
assert len(ids) < 0.7 * len(text)

torch.manual_seed(0)
config = llmfast.GPTConfig(vocab_size=tokenizer.vocab_size, block_size=32, n_layer=2, n_head=2, n_embd=16)
model = llmfast.GPT(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
tokens = torch.tensor(ids[:33])[None]
losses = []
for _ in range(10):
    loss = model(tokens[:, :-1], tokens[:, 1:])[1]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.8 * losses[0], losses
print(f"ten training steps on PyTorch alone: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
