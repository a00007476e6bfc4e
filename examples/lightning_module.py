"""A PyTorch Lightning module around a GPT-2 of Hugging Face, faster by one line: ``llmfast.accelerate(model)``.

pip install lightning transformers
python examples/lightning_module.py --text book.txt --max-steps 200
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

import llmfast

try:
    import lightning as L
except ImportError:
    import pytorch_lightning as L


class ByteGPT(L.LightningModule):
    """Predicts the next byte. Lightning moves, wraps and saves the model as ever: names and parameters are its own."""

    def __init__(self, block_size: int, width: int, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = GPT2LMHeadModel(
            GPT2Config(vocab_size=256, n_positions=block_size, n_embd=width, n_layer=4, n_head=4, bos_token_id=0,
                       eos_token_id=0)
        )  # fmt: skip
        print(llmfast.accelerate(self.model))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        loss = self.model(batch[0], labels=batch[0]).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        self.log("val_loss", self.model(batch[0], labels=batch[0]).loss, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


def rows(data: bytes, length: int) -> TensorDataset:
    ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    return TensorDataset(ids[: len(ids) // length * length].view(-1, length))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file of at least a few thousand bytes")
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    args = parser.parse_args()

    L.seed_everything(1)
    data = args.text.read_bytes()
    split = len(data) * 9 // 10
    module = ByteGPT(args.block_size, args.width)
    trainer = L.Trainer(
        max_steps=args.max_steps, default_root_dir=args.out, logger=False, accelerator="auto", devices=1,
        gradient_clip_val=1.0, enable_progress_bar=False,
    )  # fmt: skip
    train = DataLoader(rows(data[:split], args.block_size), batch_size=8, shuffle=True)
    val = DataLoader(rows(data[split:], args.block_size), batch_size=8)
    trainer.fit(module, train)
    loss = trainer.validate(module, val, verbose=False)[0]["val_loss"]
    print(f"validation loss {loss:.4f} nats a byte")
    trainer.save_checkpoint(args.out / "last.ckpt")
    again = ByteGPT.load_from_checkpoint(args.out / "last.ckpt")
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(module.parameters(), again.parameters(), strict=True))


if __name__ == "__main__":
    main()
