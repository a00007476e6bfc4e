"""docs/scaling.md's table is what the formulas give, and they give what the ranks hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from llmfast.config import GPTConfig, TrainConfig
from llmfast.errors import UserError
from llmfast.nn import GPT
from llmfast.training.plan import bytes_sent, count_parameters, memory, memory_of_a_rank, parts, plan, sharing

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
SHAPES = {
    "124M (gpt2)": (12, 768, 12, 1024),
    "1.6B (gpt2-xl)": (48, 1600, 25, 1024),
    "7B-like": (32, 4096, 32, 2048),
    "13B-like": (40, 5120, 40, 2048),
    "70B-like": (80, 8192, 64, 2048),
}


def table() -> str:
    lines = ["| model | ranks | ddp: memory | sent | fsdp: memory | sent | hsdp: memory | sent |", "|---" * 8 + "|"]
    for name, (n_layer, n_embd, n_head, block_size) in SHAPES.items():
        model = GPTConfig(vocab_size=50304, n_layer=n_layer, n_embd=n_embd, n_head=n_head, block_size=block_size)
        config = TrainConfig(micro_batch_size=1, activation_checkpointing=True)
        whole = memory(model, config, torch.bfloat16, "cuda")
        for size in (8, 64, 1024):
            cells = [name, f"{size:,}"]
            for mode in ("ddp", "fsdp", "hsdp"):
                ranks = sharing(mode, size, 8)
                cells.append(f"{memory_of_a_rank(whole, model, ranks).total / 1e9:,.1f}")
                cells.append(f"{bytes_sent(model, ranks, 1) / 1e9:,.1f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_the_page_is_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    assert re.search(r"computes it again -->\n(.*?\n)\n", text, re.S)[1] == table()


def test_parts_of_a_model():
    model = GPTConfig.preset("tiny")
    with torch.device("meta"):
        made = GPT(model)
    rest, block = parts(model)
    assert block == sum(p.numel() for p in made.transformer.h[0].parameters())
    assert rest + model.n_layer * block == count_parameters(model)


def test_a_plan_of_ranks():
    model = GPTConfig.preset("gpt2")
    one = plan(model, TrainConfig(batch_size=64), flops_per_second=1e12)
    four = plan(model, TrainConfig(batch_size=64, parallel="fsdp"), flops_per_second=1e12, world_size=4)
    assert four.memory.optimizer * 4 == one.memory.optimizer
    assert four.memory.activations == one.memory.activations
    assert four.seconds == one.seconds / 4
    assert one.bytes_sent == 0
    P, (rest, _) = count_parameters(model), parts(model)
    assert four.bytes_sent == 2 * 4 * (3 * P - rest) * 3 // 4  # 16 sequences a rank: two micro batches
    assert sharing("hsdp", 16, 8).copies == 2
    with pytest.raises(UserError, match="no multiple of 8"):
        sharing("hsdp", 12, 8)
    with pytest.raises(UserError, match="at least 1"):
        sharing("ddp", 0, 8)
