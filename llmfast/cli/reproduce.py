"""``llmfast reproduce RECIPE``: the figures of "Build a Large Language Model (From Scratch)", expected beside got."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llmfast.cli.common import JSON_HELP, note, print_json, table
from llmfast.config import TrainConfig, option
from llmfast.errors import UserError

if TYPE_CHECKING:
    from llmfast.nn import GPT
    from llmfast.tokenizer import Tokenizer

VARIABLE = "LLMFAST_GPT2"
NOT_REPRODUCED = 1


class Expected(NamedTuple):
    """A figure of the book, and how far from it ours may lie; a text must be equal."""

    value: float | str
    tolerance: float = 0.0
    unit: str = ""

    def holds(self, got: Any) -> bool | None:
        """Whether ``got`` is near enough; None where it was not measured."""
        if got is None:
            return None
        return got == self.value if isinstance(self.value, str) else abs(got - self.value) <= self.tolerance


@dataclass(frozen=True)
class Recipe:
    """One of the book's experiments. Tolerances: see docs/finetuning.md."""

    title: str
    size: str  # of OpenAI's checkpoint
    data: str  # the file's name
    download: str  # its name in llmfast download
    expected: dict[str, Expected]


RECIPES = {
    "book-verdict": Recipe(
        "GPT-2 124M reads The Verdict (chapter 5)",
        "124M",
        "the-verdict.txt",
        "the-verdict",
        {
            "training loss": Expected(3.7547, 0.001),
            "validation loss": Expected(3.5596, 0.001),
            "greedy text": Expected(
                "Every effort moves you forward.\n\nThe first step is to understand the importance of your work"
            ),
        },
    ),
    "book-spam": Recipe(
        "GPT-2 124M becomes a spam filter (chapter 6)",
        "124M",
        "SMSSpamCollection.tsv",
        "sms-spam",
        {
            "training accuracy": Expected(97.21, 1.5, "%"),
            "validation accuracy": Expected(97.32, 1.5, "%"),
            "test accuracy": Expected(95.67, 1.5, "%"),
        },
    ),
    "book-lora": Recipe(
        "the same with LoRA (appendix E)",
        "124M",
        "SMSSpamCollection.tsv",
        "sms-spam",
        {
            "training accuracy": Expected(99.81, 1.5, "%"),
            "validation accuracy": Expected(97.99, 2.0, "%"),
            "test accuracy": Expected(96.67, 2.0, "%"),
        },
    ),
    "book-instruct": Recipe(
        "GPT-2 355M follows instructions (chapter 7)",
        "355M",
        "instruction-data.json",
        "instructions",
        {
            "training loss before": Expected(3.8259, 0.005),
            "validation loss before": Expected(3.7619, 0.005),
            "validation loss": Expected(0.657, 0.05),
            "judge's average": Expected(50.0, 4.0, " of 100"),
        },
    ),
}


@dataclass
class Options:
    """Options of ``llmfast reproduce``."""

    recipe: Literal["book-verdict", "book-spam", "book-lora", "book-instruct"] = field(
        metadata={
            "positional": True,
            "help": "; ".join(f"{name}: {recipe.title}" for name, recipe in RECIPES.items()),
        }
    )
    checkpoints: str | None = option(
        None, f"folder with OpenAI's GPT-2 checkpoints 124M and 355M (default: {VARIABLE}, else data)"
    )
    data: str | None = option(None, "the recipe's file (default: data/, where llmfast download puts it)")
    out: str | None = option(None, "run directory (default: runs/RECIPE)")
    judge_model: str = option("llama3", "book-instruct: the judge model")
    judge_url: str = option("http://localhost:11434", "book-instruct: the Ollama server")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "compute type; the book's is float32")
    backend: str = option(
        "auto", "kernels: auto, cuda, triton, cpp, torch, or per op: attention=triton,layer_norm=cuda"
    )
    threads: int | None = option(None, "CPU threads (default: one a core)")
    json: bool = option(False, JSON_HELP)


def run(options: Options) -> int:
    recipe = RECIPES[options.recipe]
    folder = find_checkpoint(options, recipe)
    data = find_data(options, recipe)
    out = Path(_config(options).out)
    if (out / "metrics.jsonl").exists():
        raise UserError(f"{out} already holds a run: move it away, or choose another --out")

    from llmfast import ops
    from llmfast.training.device import choose_device

    device = choose_device(options.device)
    ops.tune_process(options.threads)
    model, tokenizer = _open(folder)
    note(f"{options.recipe}: {recipe.title}; weights {folder}, data {data}, {device}")
    with ops.use_backend(options.backend):
        got = _RUNS[options.recipe](options, model.to(device), tokenizer, data)
    holds = {name: expected.holds(got.get(name)) for name, expected in recipe.expected.items()}
    if options.json:
        figures = {
            name: {
                "expected": expected.value,
                "tolerance": expected.tolerance,
                "got": got.get(name),
                "holds": holds[name],
            }
            for name, expected in recipe.expected.items()
        }
        print_json({"recipe": options.recipe, "checkpoint": str(folder), "data": str(data), "figures": figures})
    else:
        print(render(recipe, got))
    return NOT_REPRODUCED if False in holds.values() else 0


def find_checkpoint(options: Options, recipe: Recipe) -> Path:
    """The folder of OpenAI's weights, its own or Hugging Face's copy; ``UserError`` tells how to get them."""
    named = options.checkpoints or os.environ.get(VARIABLE)
    root = Path(named or "data")
    hub = {"124M": "gpt2", "355M": "gpt2-medium"}[recipe.size]
    for place in (root / recipe.size, root / f"gpt2-{recipe.size}", root / "gpt2" / recipe.size, root / hub):
        if (place / "model.ckpt.index").is_file() or (place / "model.safetensors").is_file():
            return place
    where = f"{root} holds no checkpoint of GPT-2 {recipe.size}" if named else f"GPT-2 {recipe.size} is not here"
    raise UserError(
        f"{where}: get OpenAI's weights with llmfast download gpt2-{recipe.size}, and name their folder by "
        f"--checkpoints or {VARIABLE} if it is not data"
    )


def find_data(options: Options, recipe: Recipe) -> Path:
    """The recipe's file; ``UserError`` tells how to get it."""
    path = Path(options.data or Path("data", recipe.data))
    if not path.is_file():
        raise UserError(f"there is no {path}: get it with llmfast download {recipe.download}, or name it by --data")
    return path


def _open(folder: Path) -> tuple[GPT, Tokenizer]:
    from llmfast.nn import GPT
    from llmfast.tokenizer import load_tokenizer

    model = GPT.from_pretrained(folder, dropout=0.0).eval()  # the book's; Hugging Face's copy says 0.1
    try:
        tokenizer = load_tokenizer(str(folder))
    except UserError:
        tokenizer = load_tokenizer("gpt2")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{folder} has {model.config.vocab_size} tokens, its tokenizer {tokenizer.vocab_size}")
    return model, tokenizer


def _config(options: Options) -> TrainConfig:
    return TrainConfig(
        out=options.out or f"runs/{options.recipe}",
        device=options.device,
        dtype=options.dtype,
        backend=options.backend,
        threads=options.threads,
    )


def _verdict(options: Options, model: GPT, tokenizer: Tokenizer, data: Path) -> dict[str, Any]:
    from llmfast.cli.common import read_text
    from llmfast.finetuning import book

    return book.verdict(model, tokenizer, read_text(data))


def _spam(options: Options, model: GPT, tokenizer: Tokenizer, data: Path) -> dict[str, Any]:
    from llmfast.finetuning import book

    return book.spam(model, tokenizer, data, _config(options), lora=options.recipe == "book-lora")


def _instruct(options: Options, model: GPT, tokenizer: Tokenizer, data: Path) -> dict[str, Any]:
    from llmfast.evaluation.judge import ModelJudge, judge_responses, read_entries, summarise
    from llmfast.evaluation.judge_client import ChatClient, NoServer
    from llmfast.finetuning import book

    client = ChatClient(url=options.judge_url, model=options.judge_model, say=note)
    got, responses = book.instruct(model, tokenizer, data, _config(options))
    entries = read_entries(responses)
    try:
        scores = judge_responses(entries, ModelJudge(client), responses.with_name("scores.json"))
    except (NoServer, UserError) as error:  # what was trained is not lost by it
        note(f"{error}\nnot judged: with Ollama and its model {options.judge_model}, run: llmfast judge {responses}")
        return got
    return {**got, "judge's average": summarise(entries, scores).average}


_RUNS: dict[str, Callable[..., dict[str, Any]]] = {
    "book-verdict": _verdict,
    "book-spam": _spam,
    "book-lora": _spam,
    "book-instruct": _instruct,
}


def render(recipe: Recipe, got: dict[str, Any]) -> str:
    """Expected beside got, for people."""
    rows: list[tuple[str, object]] = []
    for name, expected in recipe.expected.items():
        value = got.get(name)
        verdict = {True: "holds", False: "DIFFERS", None: "not measured"}[expected.holds(value)]
        if isinstance(expected.value, str):
            rows += [(name, verdict), ("  expected", repr(expected.value)), ("  got", repr(value))]
            continue
        shown = "-" if value is None else f"{value:.4f}".rstrip("0").rstrip(".") + expected.unit
        wanted = f"{expected.value:g}{expected.unit} +- {expected.tolerance:g}"
        rows.append((name, f"expected {wanted:<22} got {shown:<14} {verdict}"))
    return table(rows)
