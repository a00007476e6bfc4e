"""``llmfast bench``: how fast this machine runs every op, beside PyTorch and other packages."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmfast.cli.common import JSON_HELP, note, print_json
from llmfast.cli.options import Action
from llmfast.config import option
from llmfast.errors import UserError


@dataclass
class BenchOptions:
    """Where it runs and where the results go."""

    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    threads: int | None = option(None, "CPU threads (default: one a core)")
    json: bool = option(False, JSON_HELP)
    save: str | None = option(None, "write the results as JSON to this file")
    plot: str | None = option(None, "draw the results into this PNG file")


@dataclass
class OpsOptions(BenchOptions):
    """What is timed."""

    ops: list[str] = field(default_factory=list, metadata={"help": "the ops to run (default: all)", "positional": True})
    shape: list[str] = field(
        default_factory=list,
        metadata={"help": "sizes instead of the defaults, for one op: rows=16x1024,width=768; B=4,H=12,T=1024,D=64"},
    )
    dtype: list[Literal["float32", "bfloat16", "float16"]] = field(
        default_factory=list, metadata={"help": "(default: bfloat16 on a GPU, float32 and bfloat16 on a CPU)"}
    )
    mode: list[Literal["forward", "backward", "both"]] = field(
        default_factory=list, metadata={"help": "passes to time (default: all three)"}
    )
    cache: list[Literal["hot", "cold"]] = field(
        default_factory=list,
        metadata={"help": "caches as a call leaves them, or emptied before it (default: on a GPU both, on a CPU hot)"},
    )
    providers: list[str] = field(
        default_factory=list, metadata={"help": "who runs, by name or part of a name: llmfast SDPA (default: all)"}
    )
    samples: int | None = option(None, "samples of each provider, in turns (default: 30 on a GPU, 10 on a CPU)")


@dataclass
class TrainOptions(BenchOptions):
    """What is timed."""

    model: str = option("", "preset: tiny, small, gpt2, gpt2-medium, ... (default: gpt2 on a GPU, tiny on a CPU)")
    batch_size: int | None = option(None, "sequences a step (default: 16 on a GPU, 4 on a CPU)")
    block_size: int | None = option(None, "tokens a sequence (default: the model's)")
    dtype: Literal["float32", "bfloat16"] | None = option(
        None, "compute type, by autocast (default: bfloat16 on a GPU, float32 on a CPU)"
    )
    providers: list[str] = field(
        default_factory=list,
        metadata={"help": "who takes steps (default: llmfast eager compile huggingface, and the peers' checkouts)"},
    )
    ladder: bool = option(False, "the steps of a naive GPT made fast as well: naive, tf32, fused-adamw, bf16, ...")
    turns: int = option(9, "samples of each provider, in turns")


@dataclass
class GenerateOptions(BenchOptions):
    """What is timed."""

    model: str = option("", "preset: tiny, small, gpt2, ... (default: gpt2)")
    dtype: list[Literal["float32", "bfloat16", "int8"]] = field(
        default_factory=list, metadata={"help": "of the weights (default: bfloat16 on a GPU, all three on a CPU)"}
    )
    batch_size: list[int] = field(
        default_factory=list, metadata={"help": "prompts at a time (default: 1 and 16 on a GPU, 1 and 4 on a CPU)"}
    )
    prompt_tokens: int = option(64, "length of each prompt")
    tokens: int = option(32, "tokens to write")
    turns: int = option(5, "samples of each provider, in turns")


@dataclass
class DataOptions(BenchOptions):
    """What is timed."""

    tokenizer: str | None = option(None, "as for llmfast prepare (default: one trained on the text)")
    megabytes: int = option(16, "size of the text, which is made on the spot")
    workers: int | None = option(None, "processes, and threads of tiktoken (default: one a core)")
    turns: int = option(3, "samples, in turns")


def positive(options: BenchOptions, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if any(one is not None and one < 1 for one in (value if isinstance(value, list) else [value])):
            raise UserError(f"--{name.replace('_', '-')} must be positive, got {value}")


BUSY = 0.05  # share of the machine that other programs may use before the user is told


def start(options: BenchOptions) -> tuple[Any, Any]:
    """(device, what tells of other programs), with the process tuned; files that cannot be written are found before."""
    from llmfast.bench.timing import Others
    from llmfast.ops import tune_process
    from llmfast.training.device import choose_device

    for path in (options.save, options.plot):
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise UserError(f"{path}: there is no folder {Path(path).resolve().parent}")
        if path is not None and Path(path).is_dir():
            raise UserError(f"{path} is a folder; name a file in it")
    if options.plot is not None and Path(options.plot).suffix.lower() != ".png":
        raise UserError(f"--plot {options.plot}: the plot is a PNG file; end its name in .png")
    device = choose_device(options.device)
    tune_process(options.threads)
    return device, Others()


def finish(options: BenchOptions, results: dict[str, Any], others: Any, table: str, plot: Any) -> None:
    """Print and save what came out, and what other programs did meanwhile."""
    results["others"] = others.share()
    if options.json:
        print_json(results)
    else:
        print(table)
    if options.save is not None:
        save(options, results)
        note(f"results: {options.save}")
    if options.plot is not None:
        plot(results, Path(options.plot))
        note(f"plot: {options.plot}")
    if results["others"] > BUSY:
        note(f"other programs used {results['others']:.0%} of this machine: run it again when it is quiet")


def save(options: BenchOptions, results: dict[str, Any]) -> None:
    if options.save is not None:
        Path(options.save).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def run_ops(options: OpsOptions) -> int:
    import torch

    from llmfast.bench import plots, tables
    from llmfast.bench.ops import Selection, bench_ops, parse_shape
    from llmfast.ops._registry import OPS, SHORT_NAMES

    names = [SHORT_NAMES.get(name, name) for name in options.ops]
    if options.shape and len(names) != 1:
        raise UserError("--shape goes with one op: llmfast bench ops layer_norm --shape rows=16x1024,width=768")
    if options.samples is not None and options.samples < 3:
        raise UserError(f"--samples must be at least 3, got {options.samples}")
    device, others = start(options)
    shapes = [parse_shape(OPS[names[0]], text) for text in options.shape] if names and names[0] in OPS else []
    selection = Selection(
        ops=names,
        shapes=shapes,
        dtypes=[getattr(torch, name) for name in options.dtype],
        modes=tuple(options.mode) or Selection.modes,
        caches=tuple(options.cache),
        providers=options.providers,
        samples=options.samples,
    )
    results = bench_ops(device, selection, keep=lambda partial: save(options, partial))
    finish(options, results, others, tables.ops_table(results, ansi=sys.stdout.isatty()), plots.plot_ops)
    return 0


def run_train(options: TrainOptions) -> int:
    from llmfast.bench import plots, tables
    from llmfast.bench.steps import LADDER, Shape
    from llmfast.bench.train import bench_train, default_kinds
    from llmfast.config import GPTConfig

    positive(options, "turns", "batch_size", "block_size")
    device, others = start(options)
    gpu = device.type == "cuda"
    config = GPTConfig.preset(options.model or ("gpt2" if gpu else "tiny"))
    block_size = options.block_size or config.block_size
    batch_size = options.batch_size or (16 if gpu else 4)
    shape = Shape(config.n_layer, config.n_head, config.n_embd, config.vocab_size, block_size, batch_size)
    kinds = options.providers or default_kinds()
    kinds += [f"ladder {rung}" for rung in LADDER] if options.ladder else []
    dtype = {"float32": "fp32", "bfloat16": "bf16", None: "bf16" if gpu else "fp32"}[options.dtype]
    results = bench_train(shape, device, kinds, dtype, options.turns)
    finish(options, results, others, tables.steps_table(results, ansi=sys.stdout.isatty()), plots.plot_steps)
    return 0


def run_generate(options: GenerateOptions) -> int:
    from llmfast.bench import plots, tables
    from llmfast.bench.generate import DTYPES, bench_generate
    from llmfast.config import GPTConfig

    positive(options, "turns", "batch_size", "prompt_tokens", "tokens")
    device, others = start(options)
    config, gpu = GPTConfig.preset(options.model or "gpt2"), device.type == "cuda"
    if options.prompt_tokens + options.tokens + 1 > config.block_size:
        raise UserError(
            f"--prompt-tokens and --tokens together must be below the model's {config.block_size} positions"
        )
    results = bench_generate(
        config,
        device,
        dtypes=list(options.dtype) or (["bfloat16"] if gpu else list(DTYPES)),
        batches=options.batch_size or ([1, 16] if gpu else [1, 4]),
        prompt=options.prompt_tokens,
        tokens=options.tokens,
        turns=options.turns,
    )
    finish(options, results, others, tables.generate_table(results, ansi=sys.stdout.isatty()), plots.plot_generate)
    return 0


def run_data(options: DataOptions) -> int:
    import os

    from llmfast.bench import plots, tables
    from llmfast.bench.data import bench_data
    from llmfast.data import stdlib_sources
    from llmfast.tokenizer import load_tokenizer, train_bpe

    positive(options, "turns", "megabytes", "workers")
    _, others = start(options)
    if options.tokenizer:
        tokenizer = load_tokenizer(options.tokenizer)
    else:
        note("training a tokenizer on part of the standard library ...")
        tokenizer = train_bpe((p.read_text(encoding="utf-8", errors="replace") for p in stdlib_sources()[:200]), 4096)
    workers = options.workers or os.cpu_count() or 1
    results = bench_data(tokenizer, megabytes=options.megabytes, workers=workers, turns=options.turns)
    finish(options, results, others, tables.data_table(results, ansi=sys.stdout.isatty()), plots.plot_data)
    return 0


ACTIONS: dict[str, Action] = {
    "ops": ("every op: llmfast by backend, PyTorch in its several ways, other packages", OpsOptions, run_ops),
    "generate": ("reading prompts and writing tokens beside Hugging Face", GenerateOptions, run_generate),
    "data": ("preparing text and reading batches beside tiktoken", DataOptions, run_data),
    "train": ("whole training steps beside Hugging Face, plain PyTorch and the peers", TrainOptions, run_train),
}
