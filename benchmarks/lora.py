"""A classifier of gpt2's size, trained whole, in part, and by adapters: time of a step and peak memory, on the CPU.

One step is forward, loss, backward, clipping and AdamW on 8 texts of 128 tokens, with random weights, through the
model, loss and update of ``llmfast finetune classify``. "lora" is the book's configuration: rank 16 on every linear
layer, one adapter each for q, k and v. "peft" is Hugging Face's GPT-2 with PEFT's adapters of the same rank, as its
users run it ("tuned": with an allocator that keeps its pages). Each lives in a process of its own and they take turns;
a sample that other processes disturbed is taken again. The peak is the kernel's high-water mark of resident memory
over three steps, less what the process held before, after a step of a tiny model, so that the code which PyTorch loads
on first use does not count: weights, gradients, moments and activations.

    python benchmarks/lora.py --threads 2 --json out.json
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfast.bench.case import resident
from llmfast.bench.environment import header
from llmfast.bench.steps import keep_pages
from llmfast.bench.train import DISTURBED, sample
from llmfast.ops.describe import cpu_name

if TYPE_CHECKING:
    from llmfast.config import GPTConfig

B, T, RANK = 8, 128, 16
KINDS = ["all", "last-block", "lora", "peft", "peft tuned"]
# Of full fine-tuning: speed of a step and share of the peak.
MEMORY_TARGET, TIME_TARGET = 0.5, 1.0


class Trained:
    """A classifier with its optimizer; ``step()`` returns the loss."""

    def __init__(self, kind: str, preset: str, bf16: bool) -> None:
        import torch

        from llmfast import ops
        from llmfast.config import GPTConfig

        g = torch.Generator().manual_seed(1)
        self.ids, self.labels = torch.randint(1000, (B, T), generator=g), torch.randint(2, (B,), generator=g)
        self.bf16, self.count = bf16, 0
        torch.manual_seed(0)
        make = self._peft if kind.startswith("peft") else self._llmfast
        make(kind, GPTConfig.preset("tiny", vocab_size=1000, block_size=T, dropout=0.0))
        self.step()
        del self.model, self._loss, self._update
        gc.collect()
        ops.release_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
        before, self.count = resident("VmRSS") or 0, 0
        make(kind, GPTConfig.preset(preset, dropout=0.0))
        self.losses = [self.step() for _ in range(3)]
        self.peak = (resident("VmHWM") or 0) - before
        self.trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def _llmfast(self, kind: str, shape: GPTConfig) -> None:
        import torch

        import llmfast
        from llmfast.config import ClassifyConfig
        from llmfast.finetuning.base import Base
        from llmfast.finetuning.classify import ClassificationLoss, build
        from llmfast.tokenizer import load_tokenizer
        from llmfast.training.optimizer import build_optimizer
        from llmfast.training.update import Update

        llmfast.tune_process()
        config = ClassifyConfig(
            checkpoint="", data="", train=kind, lora_r=RANK, lora_targets=["all-linear", "score"], lora_split_qkv=True
        )  # type: ignore[arg-type]
        base = Base(Path(), llmfast.GPT(shape), load_tokenizer("byte"))
        self.model = build(base, ["ham", "spam"], config).train()
        optimizer, loss = build_optimizer(self.model, config), ClassificationLoss(None)
        update = Update(optimizer, config.grad_clip, torch.device("cpu"), torch.float32)
        batch = self.ids, torch.full((B,), T), self.labels
        self._loss = lambda: loss(self.model, batch)[0]

        def apply(loss: Any) -> None:
            update.backward(loss)
            self.count += 1
            update.apply(self.count, loss, 1.0)
            optimizer.zero_grad(set_to_none=True)

        self._update = apply

    def _peft(self, kind: str, shape: GPTConfig) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import GPT2Config, GPT2ForSequenceClassification

        if kind.endswith("tuned"):
            keep_pages()
        config = GPT2Config(
            vocab_size=shape.vocab_size, n_embd=shape.n_embd, n_layer=shape.n_layer, n_head=shape.n_head,
            num_labels=2, pad_token_id=0, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        adapters = LoraConfig(
            task_type="SEQ_CLS", r=RANK, lora_alpha=RANK, target_modules=["c_attn", "c_proj", "c_fc"],
            fan_in_fan_out=True,
        )  # fmt: skip
        self.model = get_peft_model(GPT2ForSequenceClassification(config), adapters).train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=5e-5, fused=True)
        self._loss = lambda: self.model(self.ids, labels=self.labels).loss

        def apply(loss: Any) -> None:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        self._update = apply

    def step(self) -> float:
        import torch

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            loss = self._loss()
        self._update(loss)
        return loss.item()


def serve(kind: str, preset: str, bf16: bool, threads: int, pipe: Connection) -> None:
    """In a process of its own: build, report, then one sample a request."""
    import torch

    torch.set_num_threads(threads)
    try:
        trained = Trained(kind, preset, bf16)
    except ImportError as error:
        pipe.send(str(error))
        return
    pipe.send({"trained parameters": trained.trained, "peak bytes": trained.peak, "losses": trained.losses})
    while pipe.recv():
        pipe.send(sample(trained))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", help="a preset (default: gpt2)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 (default: float32)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    spawn = multiprocessing.get_context("spawn")
    pipes, facts, samples = {}, {}, {kind: [] for kind in args.kinds}
    for kind in args.kinds:  # one after the other: the first steps should not be disturbed either
        pipe, theirs = spawn.Pipe()
        spawn.Process(target=serve, args=(kind, args.model, args.bf16, args.threads, theirs), daemon=True).start()
        theirs.close()
        answer = pipe.recv()
        if isinstance(answer, dict):
            pipes[kind], facts[kind] = pipe, answer
        else:
            print(f"{kind}: cannot run: {answer}", file=sys.stderr, flush=True)
    for _ in range(args.turns):
        for kind, pipe in pipes.items():
            for _ in range(3):
                pipe.send(True)
                samples[kind].append(pipe.recv())
                if samples[kind][-1][1] <= DISTURBED:
                    break

    for pipe in pipes.values():
        pipe.send(False)
    quiet = {kind: [t for t, others in samples[kind] if others <= DISTURBED] for kind in pipes}
    seconds = {kind: quiet[kind] if len(quiet[kind]) >= 2 else [t for t, _ in samples[kind]] for kind in pipes}
    median = {kind: statistics.median(taken) for kind, taken in seconds.items()}
    print(f"{args.model}, {B} x {T} tokens, {'bfloat16' if args.bf16 else 'float32'}, {cpu_name()}")
    print(f"{'trained':11} {'parameters':>12} {'ms/step':>9} {'of all':>7} {'peak MB':>9} {'of all':>7} {'quiet':>6}")
    for kind, fact in facts.items():
        base, peak = facts.get("all", fact)["peak bytes"], fact["peak bytes"]
        print(
            f"{kind:11} {fact['trained parameters']:12,} {median[kind] * 1e3:9.0f} "
            f"{median[kind] / median.get('all', median[kind]):7.2f} {peak / 1e6:9.0f} {peak / base:7.2f} "
            f"{len(quiet[kind]):3}/{len(samples[kind])}"
        )
    targets = []
    if {"all", "lora"} <= set(pipes):
        memory = facts["lora"]["peak bytes"] / facts["all"]["peak bytes"]
        for what, ratio, target in (
            ("peak memory", memory, MEMORY_TARGET),
            ("time of a step", median["lora"] / median["all"], TIME_TARGET),
        ):
            met = ratio <= target
            print(f"{what} of lora / all: {ratio:.2f}, target at most {target}: {'met' if met else 'NOT MET'}")
            targets.append({"what": f"{what} lora / all", "ratio": ratio, "target": target, "met": met})
    if args.json:
        record = {
            **header("script"),
            "tokens": B * T,
            "seconds": {kind: [round(t, 6) for t in taken] for kind, taken in seconds.items()},
            "disturbed": {kind: len(samples[kind]) - len(quiet[kind]) for kind in pipes},
            "median": median,
            "facts": facts,
            "targets": targets,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
