"""What one rank of a test does: a small run on Python's own text, with trouble on the way where a test wants it."""

from __future__ import annotations

import errno
import faulthandler
import hashlib
import inspect
import json
import multiprocessing
import os
import signal
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from llmfast.checkpoint.save import Saving
from llmfast.config import GPTConfig, TrainConfig
from llmfast.data import open_tokens
from llmfast.errors import UserError
from llmfast.nn import GPT
from llmfast.ranks import join, leave, speaks
from llmfast.training import Trainer, watchdog
from llmfast.training.losses import language_model_loss
from llmfast.training.parallel import local
from llmfast.training.report import Report
from llmfast.training.update import Update

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
    faulthandler.dump_traceback_later(150)
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


def troubled_disk(ranks, slow, full):
    """Checkpoints take ``slow`` seconds each, and rank 1 has no room for the ``full``th of them."""
    write, calls = Saving._run, 0

    def run(saving):
        nonlocal calls
        calls += 1
        time.sleep(slow)
        if ranks.rank == 1 and calls == full:
            saving._written.set_exception(OSError(errno.ENOSPC, "No space left on device"))
        else:
            write(saving)

    Saving._run = run


def finetune(out, *, kind, **options):
    from llmfast.config import ClassifyConfig, InstructConfig, PreferenceConfig
    from llmfast.finetuning import classify, instruct, preference

    Report.plot = lambda self, now=False: None
    config_class, tune = {
        "classify": (ClassifyConfig, classify.finetune_classify),
        "instruct": (InstructConfig, instruct.finetune_instruct),
        "preference": (PreferenceConfig, preference.finetune_preference),
    }[kind]
    values = dict(out=str(out), device="cpu", threads=1, micro_batch_size=4, batch_size=8, epochs=1, log_every=1)
    values |= dict(learning_rate=3e-3, sample_every=0, eval_every=2, save_every=2, dropout=0.0)
    if kind != "classify":
        values |= dict(prompt_style="{instruction} {input}>", response_tokens=8)
    tune(config_class(**{**values, **options}), progress=False)
    leave()
    return 0


class Recorded:
    """A rank's micro batches, and what was in them."""

    def __init__(self, batches):
        self._batches, self.count, self.most, self.steps = batches, batches.count, batches.most, []

    def of_step(self, position):
        self.steps.append(b"")
        for batch, counts in self._batches.of_step(position):
            if counts:
                self.steps[-1] += batch[0].numpy().tobytes()
            yield batch, counts

    def order(self, ranks) -> str:
        """A hash of all samples that all ranks learned from, in their order."""
        return hashlib.sha256(
            b"".join(b"".join(step) for step in zip(*ranks.gather(self.steps), strict=True))
        ).hexdigest()


def held(model, optimizer) -> int:
    """Bytes of the storages of parameters, gradients and optimizer state."""
    tensors = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [value for entries in optimizer.state.values() for value in entries.values()]
    storages = [local(tensor).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def train(
    out, *, weights="float32", masked=False, trouble=None, step=0, larger=None, patience=None, gather=False, slow=0.0,
    full=0, **options,
):  # fmt: skip
    """A run; ``gather`` writes its whole weights as well. Says what it held, and the order of the samples."""
    if patience is not None:
        watchdog.GONE, watchdog.SILENT, watchdog.STUCK = 0.75 * patience, patience, patience
    if options.get("parallel") == "hsdp":
        os.environ["LOCAL_WORLD_SIZE"] = "2"  # as on machines of two
    Report.plot = lambda self, now=False: None
    ranks = join()
    troubled_disk(ranks, slow, full)
    folder = Path(out).parent
    with ranks.in_turn("data"):
        if ranks.first:
            tokens(folder / "train.bin")
    source = open_tokens(folder / "train.bin")
    torch.manual_seed(1)
    model = GPT(replace(SHAPE, **(larger or {}))).to(getattr(torch, weights))
    loss_fn = troubled(trouble, step, ranks) if trouble else masked_loss if masked else None
    config = TrainConfig(
        **{
            **dict(out=str(out), device="cpu", max_steps=50, batch_size=12, micro_batch_size=3, threads=1),
            **dict(log_every=1, eval_every=25, eval_batches=5, warmup_steps=5),
            **options,
        }
    )
    most = 0
    original = Update.apply

    def apply(self, *arguments):
        nonlocal most
        norm = original(self, *arguments)
        most = max(most, held(model, self.optimizer))
        return norm

    Update.apply = apply
    trainer = Trainer(model, config, source, source, loss_fn=loss_fn, progress=False)
    trainer.own = Recorded(trainer.own)
    try:
        result = trainer.fit()
    except UserError as error:
        if speaks(str(error)):
            print(f"rank {ranks.rank}: {error}", file=sys.stderr)
        return 2
    if gather:
        whole = {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in model.state_dict().items()}
        if ranks.first:
            torch.save(whole, Path(out, "gathered.pt"))
    print("held", most)
    order = trainer.own.order(ranks)
    if ranks.first:
        print("order", order)
        print("graphs", torch._dynamo.utils.counters["stats"]["unique_graphs"])
        print(json.dumps(result.to_dict()))
    leave()
    return 128 + 15 if result.interrupted else 0
