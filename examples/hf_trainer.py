"""Hugging Face's Trainer on a GPT-2 of its own, faster by one line: ``llmfast.accelerate(model)``.

A small GPT-2 learns the bytes of a text. Nothing but that one line is llmfast's.

    pip install transformers accelerate
    python examples/hf_trainer.py --text book.txt --max-steps 200 --out runs/hf
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import llmfast


class Bytes(Dataset):
    """Windows of a text's bytes, one behind the other, with themselves as labels (the model shifts them)."""

    def __init__(self, data: bytes, length: int) -> None:
        self.rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
        self.rows = self.rows[: len(self.rows) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file of at least a few thousand bytes")
    parser.add_argument("--out", type=Path, default=Path("runs/hf"))
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    args = parser.parse_args()

    set_seed(1)
    data = args.text.read_bytes()
    split = len(data) * 9 // 10
    config = GPT2Config(
        vocab_size=256, n_positions=args.block_size, n_embd=args.width, n_layer=4, n_head=4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    print(llmfast.accelerate(model))

    settings = TrainingArguments(
        output_dir=str(args.out), max_steps=args.max_steps, per_device_train_batch_size=8, learning_rate=1e-3,
        logging_steps=max(1, args.max_steps // 10), save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=not
        torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(
        model, settings, train_dataset=Bytes(data[:split], args.block_size),
        eval_dataset=Bytes(data[split:], args.block_size),
    )  # fmt: skip
    trainer.train()
    print(f"validation loss {trainer.evaluate()['eval_loss']:.4f} nats a byte")

    llmfast.restore(model)  # what is saved needs no llmfast either way; the classes are Hugging Face's again
    trainer.save_model(str(args.out))


if __name__ == "__main__":
    main()
