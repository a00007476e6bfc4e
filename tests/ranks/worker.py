"""One rank of a small run on Python's own text: worker.py RUN_DIRECTORY JSON_OF_OPTIONS [TROUBLE STEP]."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch

from llmfast.config import GPTConfig, TrainConfig
from llmfast.data import open_tokens
from llmfast.errors import UserError
from llmfast.nn import GPT
from llmfast.ranks import join, leave, speaks
from llmfast.training import Trainer
from llmfast.training.losses import language_model_loss


def tokens(path: Path):
    ids = np.frombuffer(inspect.getsource(textwrap).encode("ascii", "replace"), dtype=np.uint8).astype(np.uint16)
    ids.tofile(path)


def masked_loss(model, batch):
    """Of every third row all targets are masked, and of the others some."""
    inputs, targets = batch
    targets = targets.clone()
    targets[inputs % 3 == 0] = -100
    targets[inputs[:, 0] % 3 == 0] = -100
    return language_model_loss(model, (inputs, targets))


def trouble(kind: str, step: int, ranks):
    """A loss function that gets rank 1 into trouble in its ``step``th batch."""
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += 1
        if ranks.rank == 1 and calls == step:
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif kind == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif kind == "hang":
                time.sleep(1000)
            elif kind == "term":
                os.kill(os.getpid(), signal.SIGTERM)
        value, count = language_model_loss(model, batch)
        return (value * float("nan") if kind == "nan" and ranks.rank == 1 and calls == step else value), count

    return loss


def main(out: str, text: str, kind: str = "", step: str = "0") -> int:
    options = json.loads(text)
    ranks = join()
    folder = Path(out).parent
    with ranks.in_turn("data"):
        if ranks.first:
            tokens(folder / "train.bin")
    source = open_tokens(folder / "train.bin")
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=256, block_size=16, n_layer=2, n_head=2, n_embd=16)).to(
        getattr(torch, options.pop("weights", "float32"))
    )
    masked = options.pop("masked", False)
    loss_fn = trouble(kind, int(step), ranks) if kind else masked_loss if masked else None
    resume = options.pop("resume", False) or (
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and Path(out, "config.toml").exists()
    )
    config = TrainConfig(
        **{
            **dict(out=out, device="cpu", max_steps=50, batch_size=12, micro_batch_size=3, threads=1, log_every=1),
            **dict(eval_every=25, eval_batches=5, warmup_steps=5, resume=resume),
            **options,
        }
    )
    try:
        result = Trainer(model, config, source, source, loss_fn=loss_fn, progress=False).fit()
    except UserError as error:
        if speaks(str(error)):
            print(f"rank {ranks.rank}: {error}", file=sys.stderr)
        return 2
    if ranks.first:
        print(json.dumps(result.to_dict()))
    leave()
    return 128 + 15 if result.interrupted else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
