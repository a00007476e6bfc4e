"""``llmfast plan``: what a pretraining takes, before it starts. It takes the options of ``llmfast pretrain``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmfast.cli import pretrain
from llmfast.cli.common import print_json, table
from llmfast.cli.pretrain import check_preparing, fit_vocabulary, model_of, shape, starting_checkpoint
from llmfast.config import GPTConfig, PretrainConfig, option
from llmfast.errors import UserError

if TYPE_CHECKING:
    from llmfast.training import Plan


@dataclass
class Options(pretrain.Options):
    """Options of ``llmfast plan``."""

    world_size: int = option(1, "ranks that train together (torchrun), each with a device like this one")
    ranks_per_machine: int = option(8, "of these on one machine, for --parallel hsdp")


def run(options: Options) -> int:
    from llmfast.training import plan
    from llmfast.training.settings import check

    check(options)
    check_preparing(options)
    tokens, config = _data_and_model(options)
    if options.epochs is not None and tokens is None:
        raise UserError("a plan in epochs counts the tokens of prepared --data; prepare it first, or give --max-steps")
    made = plan(
        config,
        options,
        tokens=tokens,
        world_size=options.world_size,
        ranks_per_machine=options.ranks_per_machine,
    )
    if options.json:
        print_json({**made.to_dict(), "model": config.to_dict()})
    else:
        print(render(made, config))
    return 0


def _data_and_model(options: PretrainConfig) -> tuple[int | None, GPTConfig]:
    """The number of training tokens, where they are prepared, and the model's shape with their vocabulary."""
    from llmfast.cli.corpus import check_data, resolve_tokenizer
    from llmfast.data import open_tokens
    from llmfast.data.tokens import is_token_data

    if options.data:
        check_data(options.data, options.val_data)
    prepared = len(options.data) == 1 and is_token_data(options.data[0])
    source = open_tokens(options.data[0]) if prepared else None
    tokens = None if source is None else len(source)
    if options.checkpoint:
        start = starting_checkpoint(dataclasses.replace(options, resume=False))
        assert start is not None
        return tokens, model_of(options, start).config
    config = shape(options)
    tokenizer = resolve_tokenizer(options.tokenizer)
    if options.vocab_size is None:
        if source is not None and source.vocab_size is not None:
            config = fit_vocabulary(config, source.vocab_size)
        elif tokenizer is not None and not isinstance(tokenizer, str):
            config = fit_vocabulary(config, tokenizer.vocab_size)
        elif tokenizer == "bpe" or (tokenizer is None and options.data and source is None):
            config = fit_vocabulary(config, options.tokenizer_size)
    return tokens, config


def render(plan: Plan, config: GPTConfig) -> str:
    """A plan for people."""
    memory = plan.memory
    names = ("weights", "gradients", "optimizer", "activations", "transient", "total")
    rows: list[tuple[str, object]] = [
        ("parameters", f"{plan.parameters:,}"),
        (
            "shape",
            f"{config.n_layer} layers, width {config.n_embd}, {config.n_head} heads, context {config.block_size}",
        ),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("run", f"{plan.steps:,} steps of {plan.tokens_per_step:,} tokens: {plan.tokens:,} tokens"),
        (
            "work",
            f"{plan.flops_per_token / 1e9:,.3g} GFLOP a token, {plan.tokens * plan.flops_per_token / 1e15:,.3g} PFLOP",
        ),
        ("time", _time(plan)),
        *_ranks(plan),
        ("", ""),
        (f"memory{' of a rank' if plan.ranks.world_size > 1 else ''}, {plan.dtype} on {plan.device}", "GB"),
        *((f"  {name}", f"{getattr(memory, name) / 1e9:8.3f}") for name in names),
    ]
    rows += [("", ""), ("GPUs by memory", "")]
    sizes: dict[tuple[str, bool], list[str]] = {}
    for gpu, fits in plan.gpus.items():
        name, _, size = gpu.rstrip(")").partition(" (")
        sizes.setdefault((size, fits), []).append(name)
    rows += [
        (f"  {size:>6}", f"{'fits' if fits else 'too small':<11}{', '.join(names)}")
        for (size, fits), names in sizes.items()
    ]
    return table(rows)


def _ranks(plan: Plan) -> list[tuple[str, object]]:
    ranks = plan.ranks
    if ranks.world_size == 1:
        return []
    shards = f"in {ranks.shards} shards" if ranks.shards > 1 else "whole"
    rows: list[tuple[str, object]] = [
        ("ranks", f"{ranks.world_size:,}, {ranks.mode}: {ranks.copies:,} x the model, {shards}"),
        ("communication", f"each rank sends and receives {plan.bytes_sent / 1e9:,.3g} GB in a step"),
    ]
    if plan.seconds:
        rate = plan.bytes_sent / (plan.seconds / plan.steps)
        rows.append(("", f"{rate / 1e9:,.3g} GB/s each way hide it behind the computation, at best"))
    return rows


def _time(plan: Plan) -> str:
    if plan.seconds is None or plan.flops_per_second is None:
        return f"unknown: llmfast does not know the matmul rate of {plan.device} in {plan.dtype}"
    rate = f"{plan.share:.0%} of {plan.flops_per_second / 1e12:,.3g} TFLOP/s on {plan.device}"
    return f"about {duration(plan.seconds)}, assuming {rate}"


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, whichever reads best."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} s"
