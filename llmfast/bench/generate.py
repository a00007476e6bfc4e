"""``bench generate``: reading a prompt and writing tokens, by dtype and batch, beside Hugging Face and the floor.

The floor of a token step is the time to read the weights once, at the read bandwidth measured in this run.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from llmfast.bench.ceilings import measure_ceilings, measure_read
from llmfast.bench.environment import header
from llmfast.bench.timing import interleave_calls, paired_ratio, spread
from llmfast.config import GPTConfig

DTYPES = ("float32", "bfloat16", "int8")
Write = Callable[[int], Any]  # writes so many tokens


def bench_generate(
    config: GPTConfig,
    device: torch.device,
    *,
    dtypes: list[str],
    batches: list[int],
    prompt: int,
    tokens: int,
    turns: int,
    progress: bool = True,
) -> dict[str, Any]:
    """The results as ``header`` and ``generate``: one record a provider, dtype and batch; seconds [median, 10th, 90th].

    prompt_seconds: reading ``prompt`` tokens and writing one; token_seconds: each further one; share: the floor over
    that. Random weights, greedy.
    """
    results = header("generate", device)
    results |= {"model": config.to_dict(), "prompt": prompt, "tokens": tokens, "turns": turns}
    ceilings = measure_ceilings(device, [torch.float32])
    read = measure_read(device)
    records, not_run = [], []
    from tqdm import tqdm

    cases = list(itertools.product(dtypes, batches))
    for dtype, batch in tqdm(cases, unit="case", disable=None if progress else True, leave=False):
        ids = torch.randint(config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(1))
        writers: dict[str, Write] = {}
        weights = 0
        for name, build in (("llmfast", _llmfast), ("huggingface", _huggingface)):
            try:
                writers[name], size = build(config, device, dtype, ids)
                weights = size if name == "llmfast" else weights
            except (ImportError, ValueError) as error:
                why = str(error).splitlines()[0]
                not_run.append({"provider": name, "dtype": dtype, "batch": batch, "why": why})
        pairs = interleave_calls({name: _timed(write, tokens, device) for name, write in writers.items()}, turns)
        first = {name: [one for one, _ in taken] for name, taken in pairs.items()}
        each = {name: [(whole - one) / tokens for one, whole in taken] for name, taken in pairs.items()}
        for name in writers:
            prompts, steps = spread(first[name]), spread(each[name])
            records.append(
                {
                    "provider": name, "dtype": dtype, "batch": batch, "prompt_seconds": prompts.to_list(),
                    "token_seconds": steps.to_list(), "prompt_tokens_per_second": batch * prompt / prompts.median,
                    "tokens_per_second": batch / steps.median, "weight_bytes": weights,
                    "share": weights / read / steps.median,
                    "ratio_to_huggingface": paired_ratio(each["huggingface"], each[name]).to_list()
                    if "huggingface" in each else None,
                }
            )  # fmt: skip
    return results | {"ceilings": {**ceilings.to_dict(), "read": read}, "generate": records, "not_run": not_run}


def _timed(write: Write, tokens: int, device: torch.device) -> Callable[[], tuple[float, float]]:
    """Seconds of writing one token, and of writing ``tokens`` more."""

    def seconds(count: int) -> float:
        start = time.perf_counter()
        write(count)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    def turn() -> tuple[float, float]:
        with torch.inference_mode():
            return seconds(1), seconds(1 + tokens)

    return turn


def _llmfast(config: GPTConfig, device: torch.device, dtype: str, ids: torch.Tensor) -> tuple[Write, int]:
    from llmfast.generation import generate_ids
    from llmfast.nn import GPT, quantize_int8
    from llmfast.nn.int8 import weight_bytes

    if dtype == "int8" and device.type != "cpu":
        raise ValueError("int8 runs on a CPU")
    torch.manual_seed(0)
    model: Any = GPT(config).to(device).eval()
    model = quantize_int8(model) if dtype == "int8" else model.to(getattr(torch, dtype))
    prompts = ids.tolist()
    unread = config.block_size * config.n_embd * (2 if dtype == "bfloat16" else 4)  # one row of the positions counts
    size = weight_bytes(model) - unread
    return lambda count: generate_ids(model, prompts, max_new_tokens=count, temperature=0), size


def _huggingface(config: GPTConfig, device: torch.device, dtype: str, ids: torch.Tensor) -> tuple[Write, int]:
    if dtype == "int8":
        raise ValueError("has no int8 on a CPU of its own")
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {k: getattr(config, k) for k in ("n_layer", "n_head", "n_embd", "vocab_size")}
    sizes |= {"bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(n_positions=config.block_size, **sizes))
    model = model.to(device, getattr(torch, dtype)).eval()
    given, mask = ids.to(device), torch.ones_like(ids, device=device)
    options: dict[str, Any] = dict(do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True)

    def write(count: int) -> Any:
        return model.generate(given, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, **options)

    return write, 0
