"""The recipes of "Build a Large Language Model (From Scratch)" (Raschka 2024): chapters 5 to 7 and appendix E.

They run on llmfast's model and training loop, with the book's settings, its splits and its order of the data. That
order hangs on how PyTorch's DataLoader spends random numbers, which ``loader_order`` repeats.

Shapes: B batch, T sequence, K classes.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmfast.config import LoRAConfig, TrainConfig
from llmfast.errors import UserError
from llmfast.generation import generate
from llmfast.nn import GPT, GPTForClassification, add_lora
from llmfast.nn.lora import lora_layers
from llmfast.tokenizer import Tokenizer
from llmfast.training import Trainer

T = TypeVar("T")
Batch = tuple[Tensor, ...]
Loss = Callable[[Any, Batch], tuple[Tensor, int]]
SEED = 123
IGNORE_INDEX = -100
GREEDY_PROMPT = "Every effort moves you"


class RandomNumbers:
    """Draws that PyTorch's default generator would make, from a stream of their own."""

    def __init__(self, seed: int = SEED) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self) -> int:
        return int(torch.empty((), dtype=torch.int64).random_(generator=self._generator).item())

    def draws(self, count: int) -> None:
        for _ in range(count):
            self.draw()

    def shuffled(self, count: int) -> list[int]:
        """The order of a new pass of a shuffling DataLoader over ``count`` samples."""
        self.draw()  # the seed that worker processes would get
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.draw())).tolist()


def loader_order(count: int, batch_size: int, epochs: int, *, eval_every: int, per_epoch: int = 0) -> list[int]:
    """Sample numbers in the order in which the book's training loops take them, whole batches only.

    Every ``eval_every`` steps, from the first on, they estimate a loss on the shuffled training loader (two draws) and
    on the validation loader (one); ``per_epoch`` more draws follow each epoch.
    """
    numbers, order, step = RandomNumbers(), [], 0
    for _ in range(epochs):
        whole = count // batch_size
        order += numbers.shuffled(count)[: whole * batch_size]
        for _ in range(whole):
            if step % eval_every == 0:
                numbers.draws(3)
            step += 1
        numbers.draws(per_epoch)
    return order


class Ordered(Generic[T]):
    """``examples`` in a given order, as ``Trainer`` takes them; ``collate`` makes tensors of a batch's."""

    def __init__(
        self, examples: Sequence[T], order: list[int], epochs: int, rows: int, collate: Callable[[list[T]], Batch]
    ) -> None:
        self.examples, self.order, self.rows, self.collate = examples, order, rows, collate
        self.samples_per_epoch = len(order) // epochs

    def batch(self, position: int) -> Batch:
        places = range(position, position + self.rows)
        return self.collate([self.examples[self.order[place % len(self.order)]] for place in places])


def train(model: nn.Module, config: TrainConfig, data: Ordered[Any], loss: Loss, learning_rate: float) -> None:
    """The book's training: AdamW on everything with decay 0.1, a constant learning rate, no clipping.

    ``config`` says where it runs; what the book decides is set here. Raises ``KeyboardInterrupt`` where it is stopped:
    half a training has no figures.
    """
    config = dataclasses.replace(
        config,
        max_steps=len(data.order) // data.rows,
        micro_batch_size=data.rows,
        learning_rate=learning_rate,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.1,
        decay="all",
        beta2=0.999,
        grad_clip=0.0,
        seed=SEED,
        log_every=1,
        eval_every=0,
        sample_every=0,
        save_every=0,
    )
    if Trainer(model, config, data, loss_fn=loss).fit().interrupted:
        raise KeyboardInterrupt


# ---- Chapter 5: losses of the untrained GPT-2 on a short story -------------------------------------------------------


@torch.inference_mode()
def verdict(model: GPT, tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    """Training and validation loss of ``model`` on the story, and 15 greedy tokens after the book's prompt."""
    cut = int(0.9 * len(text))
    block = min(256, model.config.block_size)
    numbers, losses = RandomNumbers(), []
    for part, shuffle in ((text[:cut], True), (text[cut:], False)):
        ids = tokenizer.encode(part)
        starts = list(range(0, len(ids) - block, block))
        if shuffle:  # which also leaves out an odd window
            starts = [starts[i] for i in numbers.shuffled(len(starts))[: len(starts) // 2 * 2]]
        if not starts:
            raise UserError(f"the text is too short: a part of {len(ids)} tokens has no window of {block}")
        windows = torch.tensor([ids[start : start + block + 1] for start in starts], device=_device(model))
        batches = [float(model(w[:, :-1].contiguous(), w[:, 1:].contiguous())[1]) for w in windows.split(2)]
        losses.append(sum(batches) / len(batches))
    written = generate(model, tokenizer, GREEDY_PROMPT, max_new_tokens=15, temperature=0, stop_at_eot=False)
    return {"training loss": losses[0], "validation loss": losses[1], "greedy text": GREEDY_PROMPT + written}


# ---- Chapter 6 and appendix E: spam ----------------------------------------------------------------------------------

SPAM_EPOCHS, SPAM_ROWS = 5, 8
LABELS = ["ham", "spam"]
Message = tuple[str, int]  # text, number of its label


def spam_splits(path: str | Path) -> dict[str, list[Message]]:
    """The book's balanced training, validation and test messages, as pandas reads, samples and shuffles them.

    pandas takes a quotation mark at the beginning of a message for quoting, which joins a few lines: of 5,574
    messages 5,572 are left.
    """
    with open(path, encoding="utf-8", newline="") as file:
        try:
            rows = [row for row in csv.reader(file, delimiter="\t") if row]
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a file of messages: {error}") from None
    for number, row in enumerate(rows, start=1):
        if len(row) != 2 or row[0] not in LABELS:
            raise UserError(f"{path}, record {number}: expected ham or spam, a tab and a message")
    messages = [(text, LABELS.index(label)) for label, text in rows]
    ham, spam = ([message for message in messages if message[1] == label] for label in (0, 1))
    if not 1 <= len(spam) <= len(ham):
        raise UserError(f"{path} has {len(ham)} ham and {len(spam)} spam messages: the recipe takes more ham than spam")
    chosen = np.random.RandomState(SEED).choice(len(ham), size=len(spam), replace=False)
    balanced = [ham[i] for i in chosen] + spam
    order = np.random.RandomState(SEED).choice(len(balanced), size=len(balanced), replace=False)
    shuffled = [balanced[i] for i in order]
    train, val = int(len(shuffled) * 0.7), int(len(shuffled) * 0.1)
    return {
        "training": shuffled[:train],
        "validation": shuffled[train : train + val],
        "test": shuffled[train + val :],
    }


Example = tuple[list[int], int]  # ids, padded; label


def spam_examples(splits: dict[str, list[Message]], tokenizer: Tokenizer, block: int) -> dict[str, list[Example]]:
    """Messages as ids, all as long as the longest of the training split: cut, or padded with end-of-text."""
    encoded = {name: [(tokenizer.encode(text), label) for text, label in part] for name, part in splits.items()}
    longest = max(len(ids) for ids, _ in encoded["training"])
    if longest > block:
        raise UserError(f"the longest training message has {longest} tokens, the model reads {block}")
    pad = tokenizer.eot_id or 0
    return {
        name: [((ids + [pad] * (longest - len(ids)))[:longest], label) for ids, label in part]
        for name, part in encoded.items()
    }


def collate_messages(examples: list[Example]) -> Batch:
    """(ids (B, T), labels (B,)) int64."""
    ids, labels = zip(*examples, strict=True)
    return torch.tensor(ids), torch.tensor(labels)


def spam_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """Cross-entropy of the label at the last position, padding included, as in the book."""
    ids, labels = batch
    return F.cross_entropy(model(ids).float(), labels), len(labels)


@torch.inference_mode()
def accuracy(model: GPTForClassification, examples: list[Example]) -> float:
    """Share of the messages that get their own label, in percent."""
    right = 0
    for first in range(0, len(examples), 32):
        ids, labels = collate_messages(examples[first : first + 32])
        right += int((model(ids.to(_device(model))).argmax(1).cpu() == labels).sum())
    return 100 * right / len(examples)


def spam_order(count: int) -> list[int]:
    return loader_order(count, SPAM_ROWS, SPAM_EPOCHS, eval_every=50, per_epoch=3)  # accuracies after each epoch


def spam_classifier(gpt: GPT, *, lora: bool) -> GPTForClassification:
    """``gpt`` with a two-class head drawn as the book draws it, of which the book's part is trained.

    Chapter 6 trains the head, the last block and the last norm; appendix E adapters beside every linear layer.
    """
    model = GPTForClassification.from_gpt(gpt, LABELS).requires_grad_(False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        head = nn.Linear(gpt.config.n_embd, len(LABELS))
        model.score.weight.copy_(head.weight)
        model.score.bias.copy_(head.bias)
    if lora:
        add_lora(model, LoRAConfig(r=16, alpha=16.0, targets=("all-linear", "score"), split_qkv=True))
        draw_adapters(model)
    else:
        for part in (model.score, model.transformer.h[-1], model.transformer.ln_f):
            part.requires_grad_(True)
    return model


@torch.no_grad()
def draw_adapters(model: GPTForClassification) -> None:
    """Draw the adapters as appendix E does: A is (in, r) there, which makes its entries uniform in +-1 / sqrt(r)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for _ in range(4):  # what the accuracies before it take
            torch.empty((), dtype=torch.int64).random_()
        for layer in lora_layers(model).values():  # in the book's order, the head last
            for part in layer.lora_A.chunk(layer.splits):
                drawn = torch.empty(part.shape[1], part.shape[0])
                part.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5)).T)


def spam(gpt: GPT, tokenizer: Tokenizer, path: str | Path, config: TrainConfig, *, lora: bool) -> dict[str, Any]:
    """Fine-tune ``gpt`` to tell spam from ham; accuracies in percent."""
    examples = spam_examples(spam_splits(path), tokenizer, gpt.config.block_size)
    model = spam_classifier(gpt, lora=lora)
    data = Ordered(
        examples["training"], spam_order(len(examples["training"])), SPAM_EPOCHS, SPAM_ROWS, collate_messages
    )
    train(model, config, data, spam_loss, 8e-4 if lora else 5e-5)
    return {f"{name} accuracy": accuracy(model, part) for name, part in examples.items()}


# ---- Chapter 7: instructions -----------------------------------------------------------------------------------------

INSTRUCT_EPOCHS, INSTRUCT_ROWS = 2, 8
Record = dict[str, str]


def instruction_splits(path: str | Path) -> dict[str, list[Record]]:
    """The first 85 % of the file for training, the next 10 % for the test, the rest for validation."""
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not a JSON file: {error}") from None
    keys = ("instruction", "input", "output")
    if not isinstance(records, list) or not all(
        isinstance(record, dict) and all(isinstance(record.get(key), str) for key in keys) for record in records
    ):
        raise UserError(f"{path} must hold a list of objects with {', '.join(keys)}")
    train, test = int(len(records) * 0.85), int(len(records) * 0.1)
    if train < INSTRUCT_ROWS or not test or train + test == len(records):
        raise UserError(f"{path} has {len(records)} entries: too few for three splits")
    return {"training": records[:train], "test": records[train : train + test], "validation": records[train + test :]}


def instruction_prompt(record: Record) -> str:
    """Alpaca's prompt (Taori et al. 2023) as the book words it, without the heading of the response."""
    text = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    text += f"\n\n### Instruction:\n{record['instruction']}"
    return text + f"\n\n### Input:\n{record['input']}" if record["input"] else text


def instruction_ids(record: Record, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(f"{instruction_prompt(record)}\n\n### Response:\n{record['output']}")


def collate_instructions(pad: int, block: int) -> Callable[[list[list[int]]], Batch]:
    """(inputs, targets) (B, T) int64: every next token is a target, and the first end-of-text of the padding."""

    def collate(rows: list[list[int]]) -> Batch:
        width = max(map(len, rows))
        inputs = [ids + [pad] * (width - len(ids)) for ids in rows]
        targets = [[*ids[1:], pad] + [IGNORE_INDEX] * (width - len(ids)) for ids in rows]
        return torch.tensor(inputs)[:, :block], torch.tensor(targets)[:, :block]

    return collate


def instruction_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    inputs, targets = batch
    return model(inputs, targets)[1], int((targets != IGNORE_INDEX).sum())


def untied(gpt: GPT) -> GPT:
    """A copy whose output head is a matrix of its own, as the book loads GPT-2."""
    with torch.device("meta"):
        model = GPT(dataclasses.replace(gpt.config, tie_embeddings=False))
    model.to_empty(device=_device(gpt))
    model.load_state_dict(gpt.state_dict())
    return model.eval()


@torch.inference_mode()
def first_losses(model: GPT, rows: list[list[int]], order: list[int], collate: Callable[..., Batch]) -> float:
    """Mean of the losses of the first five batches."""
    losses = []
    for first in range(0, min(len(order), 5 * INSTRUCT_ROWS), INSTRUCT_ROWS):
        batch = collate([rows[i] for i in order[first : first + INSTRUCT_ROWS]])
        losses.append(float(instruction_loss(model, tuple(tensor.to(_device(model)) for tensor in batch))[0]))
    return sum(losses) / len(losses)


def instruct(
    gpt: GPT, tokenizer: Tokenizer, path: str | Path, config: TrainConfig, *, max_new_tokens: int = 256
) -> tuple[dict[str, Any], Path]:
    """Fine-tune ``gpt`` on instructions: losses before it, and the file with responses to the test split."""
    splits = instruction_splits(path)
    gpt = untied(gpt)
    rows = {name: [instruction_ids(record, tokenizer) for record in part] for name, part in splits.items()}
    collate = collate_instructions(tokenizer.eot_id or 0, gpt.config.block_size)
    before = RandomNumbers().shuffled(len(rows["training"]))
    losses = {
        "training loss before": first_losses(gpt, rows["training"], before, collate),
        "validation loss before": first_losses(gpt, rows["validation"], [*range(len(rows["validation"]))], collate),
    }
    order = loader_order(len(rows["training"]), INSTRUCT_ROWS, INSTRUCT_EPOCHS, eval_every=5)
    data = Ordered(rows["training"], order, INSTRUCT_EPOCHS, INSTRUCT_ROWS, collate)
    train(gpt, config, data, instruction_loss, 5e-5)
    losses["validation loss"] = first_losses(gpt, rows["validation"], [*range(len(rows["validation"]))], collate)
    prompts = [instruction_prompt(record) for record in splits["test"]]
    texts: list[str] = []
    for first in range(0, len(prompts), INSTRUCT_ROWS):
        some = prompts[first : first + INSTRUCT_ROWS]
        texts += generate(gpt, tokenizer, some, max_new_tokens=max_new_tokens, temperature=0)
    entries = [
        {**record, "model_response": text.replace("### Response:", "").strip()}
        for record, text in zip(splits["test"], texts, strict=True)
    ]
    out = Path(config.out, "instruction-data-with-response.json")
    out.write_text(json.dumps(entries, indent=4) + "\n", encoding="utf-8")
    return losses, out


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
