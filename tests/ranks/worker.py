"""What one rank of a test does: a small run on Python's own text, with trouble on the way where a test wants it."""

from __future__ import annotations

import inspect
import json
import multiprocessing
import os
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import torch

from llmfast.config import GPTConfig, TrainConfig
from llmfast.data import open_tokens
from llmfast.errors import UserError
from llmfast.nn import GPT
from llmfast.ranks import join, leave, speaks
from llmfast.training import Trainer, watchdog
from llmfast.training.losses import language_model_loss

SHAPE = GPTConfig(vocab_size=256, block_size=16, n_layer=2, n_head=2, n_embd=16)


def start(environment, log, *, call, out, options):
    """Be the rank that ``environment`` says; output goes to ``log``. Ends with the process that asked for it."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    code = call(out, **options)
    sys.stdout.flush()
    sys.exit(code)


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


def troubled(kind: str, step: int, ranks):
    """A loss function that gets rank 1 into trouble in its ``step``th batch."""
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += 1
        value, count = language_model_loss(model, batch)
        if ranks.rank != 1 or calls != step:
            return value, count
        if kind == "hang":
            time.sleep(1000)
        elif kind != "nan":
            os.kill(os.getpid(), getattr(signal, kind))
        return (value * float("nan") if kind == "nan" else value), count

    return loss


def train(
    out, *, weights="float32", masked=False, trouble=None, step=0, shape=SHAPE, patience=None, before=None, **options
):
    if patience is not None:
        watchdog.GONE, watchdog.SILENT, watchdog.STUCK = 0.75 * patience, patience, patience
    ranks = join()
    folder = Path(out).parent
    with ranks.in_turn("data"):
        if ranks.first:
            tokens(folder / "train.bin")
    source = open_tokens(folder / "train.bin")
    torch.manual_seed(1)
    model = GPT(shape).to(getattr(torch, weights))
    loss_fn = troubled(trouble, step, ranks) if trouble else masked_loss if masked else None
    config = TrainConfig(
        **{
            **dict(out=str(out), device="cpu", max_steps=50, batch_size=12, micro_batch_size=3, threads=1),
            **dict(log_every=1, eval_every=25, eval_batches=5, warmup_steps=5),
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
