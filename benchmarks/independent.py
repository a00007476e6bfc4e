"""Times what ``llmfast bench`` timed again, with loops of its own, and sets the medians beside those of its file.

    llmfast bench ops --save ops.json && python benchmarks/independent.py ops.json
    llmfast bench train --model tiny --save train.json && python benchmarks/independent.py train.json

Nothing of llmfast.bench is used: each call is made from llmfast's, PyTorch's, transformers' or tiktoken's own functions
and timed by ``time.perf_counter`` around it. Exits with 1 where the two differ by more than ``--within``. Run it on a
machine that does nothing else, right after the benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import llmfast
from llmfast.config import GPTConfig, TrainConfig

Pair = tuple[str, float, float]  # what, seconds in the file, seconds here
DISTURBED: list[float] = []  # seconds of timing that other processes spoilt


def others_seconds() -> float:
    """CPU seconds that this machine has spent on anything but this process; 0 where it does not tell."""
    try:
        fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return 0.0
    return sum(fields[i] for i in (0, 1, 2, 5, 6, 7)) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


def seconds_of(call: Callable[[], Any], prepare: Callable[[], Any] = lambda: None, least: float = 0.3) -> float:
    """Median of the seconds of ``call()``, over ``least`` seconds or five calls; ``prepare()`` is not counted.

    Where other processes took more than a twentieth of the machine meanwhile, once more, three times at most.
    """
    prepare()
    call()
    for _ in range(3):
        taken: list[float] = []
        before, began = others_seconds(), time.perf_counter()
        while len(taken) < 5 or sum(taken) < least:
            prepare()
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        elapsed = time.perf_counter() - began
        if (others_seconds() - before - 0.02) / elapsed / (os.cpu_count() or 1) < 0.05:
            break
        DISTURBED.append(elapsed)
    return median(taken)


# ---- bench ops -------------------------------------------------------------------------------------------------------


def op_call(op: Any, provider: str, inputs: dict[str, Any]) -> tuple[Callable[[], Any], Any] | None:
    """The function that ``provider`` names, and the context that it runs in; None for packages."""
    if provider.startswith("llmfast "):
        return lambda: op.function(**inputs), llmfast.use_backend(f"{op.name}={provider.removeprefix('llmfast ')}")
    if provider == "eager":
        return lambda: op.eager(**inputs), nullcontext()
    if provider == "torch.compile":
        compiled = torch.compile(op.eager, dynamic=False)
        return lambda: compiled(**inputs), nullcontext()
    if provider == "SDPA flash":
        q, k, v = (inputs[name] for name in "qkv")
        call = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=inputs.get("scale"))  # noqa: E731
        return call, sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    if provider == "F.linear_cross_entropy":
        x, w, target = (inputs[name] for name in ("x", "weight", "target"))
        options = {k: v for k, v in inputs.items() if k not in ("x", "weight", "target", "bias")}
        options["linear_bias"] = inputs.get("bias")
        return lambda: F.linear_cross_entropy(x.flatten(0, -2), w, target.flatten(), **options), nullcontext()
    return None


def ops_again(found: dict[str, Any]) -> Iterator[Pair]:
    from llmfast.ops._registry import OPS

    cases: dict[str, list[dict[str, Any]]] = {}
    for record in found["ops"]:
        key = json.dumps([record["op"], record["shape"], record["dtype"], record["provider"]])
        cases.setdefault(key, []).append(record)
    for records in cases.values():
        first = records[0]
        op = OPS[first["op"]]
        shape = {k: tuple(v) if isinstance(v, list) else v for k, v in first["shape"].items()}
        inputs = op.inputs(shape, getattr(torch, first["dtype"]), torch.device("cpu"))
        leaves = []
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                inputs[name] = value.detach().requires_grad_(name not in op.frozen)
                leaves += [inputs[name]] if name not in op.frozen else []
        made = op_call(op, first["provider"], inputs)
        if made is None:
            continue
        call, context = made
        with context:
            outputs = call() if isinstance(call(), tuple) else (call(),)
            slopes = [torch.randn_like(y) for y in outputs]
            held: list[Any] = []

            def forward(call: Any = call, held: list[Any] = held) -> None:
                y = call()
                held[:] = y if isinstance(y, tuple) else (y,)

            def backward(held: list[Any] = held, leaves: list[Any] = leaves, slopes: list[Any] = slopes) -> None:
                torch.autograd.grad(held, leaves, slopes, allow_unused=True)

            def both(forward: Any = forward, backward: Any = backward) -> None:
                forward()
                backward()

            for r in records:
                here = {
                    "forward": lambda f=forward: seconds_of(f),
                    "backward": lambda f=forward, b=backward: seconds_of(b, f),
                    "both": lambda b=both: seconds_of(b),
                }[r["mode"]]()
                yield f"{r['op']} {r['dtype']} {r['provider']} {r['mode']}", r["seconds"][0], here
        torch.compiler.reset()


# ---- bench train -----------------------------------------------------------------------------------------------------


def step_of(kind: str, dtype: str, s: dict[str, int]) -> Callable[[], None]:
    """A training step, as llmfast's loop or as a user of transformers writes it."""
    torch.manual_seed(0)
    x, y = torch.randint(s["vocab_size"], (2, s["batch_size"], s["block_size"]))
    sizes = {k: s[k] for k in ("n_layer", "n_head", "n_embd", "vocab_size")}
    low = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")
    model: Any
    if kind == "llmfast":
        from llmfast.training.optimizer import build_optimizer
        from llmfast.training.update import Update

        llmfast.tune_process()
        model = llmfast.GPT(GPTConfig(bias=True, block_size=s["block_size"], **sizes))
        optimizer: Any = build_optimizer(model, TrainConfig(learning_rate=1e-4))
        kept = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        update = Update(optimizer, 1.0, torch.device("cpu"), kept)

        def ours() -> None:
            with low:
                loss = model(x, y)[1]
            update.backward(loss)
            update.apply(1, loss, 1.0)
            optimizer.zero_grad(set_to_none=True)

        return ours
    from transformers import GPT2Config, GPT2LMHeadModel

    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(n_positions=s["block_size"], **sizes, **dropout)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def theirs() -> None:
        with low:
            loss = model(input_ids=x, labels=y, shift_labels=y).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return theirs


def train_again(found: dict[str, Any]) -> Iterator[Pair]:
    """Each provider in a process of its own, as the benchmark has them: allocators remember."""
    for record in found["steps"]:
        kind, _, dtype = record["provider"].rpartition(" ")
        if kind in ("llmfast", "huggingface"):
            command = [sys.executable, __file__, "--step", kind, dtype, json.dumps(found["shape"])]
            here, spoilt = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            DISTURBED.extend([2.0] * int(spoilt))
            yield f"step {record['provider']}", record["seconds"][0], float(here)


# ---- bench generate --------------------------------------------------------------------------------------------------


def generate_again(found: dict[str, Any]) -> Iterator[Pair]:
    from llmfast.generation import generate_ids
    from llmfast.nn import GPT, quantize_int8

    config, count = GPTConfig(**found["model"]), found["tokens"]
    for record in found["generate"]:
        ids = torch.randint(config.vocab_size, (record["batch"], found["prompt"]))
        dtype = record["dtype"]
        model: Any
        if record["provider"] == "llmfast":
            model = GPT(config).eval()
            model = quantize_int8(model) if dtype == "int8" else model.to(getattr(torch, dtype))

            def write(n: int, model: Any = model, ids: Any = ids) -> None:
                generate_ids(model, ids.tolist(), max_new_tokens=n, temperature=0)
        else:
            from transformers import GPT2Config, GPT2LMHeadModel

            sizes = {k: getattr(config, k) for k in ("n_layer", "n_head", "n_embd", "vocab_size")}
            none = {"bos_token_id": None, "eos_token_id": None}
            model = GPT2LMHeadModel(GPT2Config(n_positions=config.block_size, **sizes, **none))
            model = model.to(getattr(torch, dtype)).eval()

            def write(n: int, model: Any = model, ids: Any = ids) -> None:
                mask = torch.ones_like(ids)
                model.generate(
                    ids, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0
                )

        with torch.inference_mode():
            one = seconds_of(lambda w=write: w(1))
            whole = seconds_of(lambda w=write: w(1 + count))
        name = f"{record['provider']} {dtype} batch {record['batch']}"
        yield f"{name}: a prompt", record["prompt_seconds"][0], one
        yield f"{name}: a token", record["token_seconds"][0], (whole - one) / count


# ---- bench data ------------------------------------------------------------------------------------------------------


def data_again(found: dict[str, Any]) -> Iterator[Pair]:
    """Seconds a token, on another text of the same kind: the standard library in pieces, some letters changed."""
    from llmfast.data import Batches, open_tokens, prepare, stdlib_sources
    from llmfast.tokenizer import train_bpe

    if found["tokenizer"] != "bpe":
        raise SystemExit("only files of bench data's own tokenizer")
    tokenizer: Any = train_bpe((p.read_text("utf-8", "replace") for p in stdlib_sources()[:200]), 4096)
    draw, pieces, size = random.Random(5), [], 0
    text = "".join(p.read_text("utf-8") for p in stdlib_sources()).encode("ascii", "ignore").decode()
    while size < found["megabytes"] * 1_000_000:
        at = draw.randrange(len(text) - 8000)
        piece = list(text[at : at + draw.randrange(100, 8000)])
        for _ in range(len(piece) // 100):
            piece[draw.randrange(len(piece))] = chr(draw.randrange(97, 123))
        pieces.append("".join(piece))
        size += len(pieces[-1])
    here: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.jsonl")
        corpus.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))

        def timed(name: str, call: Callable[[], int]) -> None:
            taken = []
            for _ in range(4):
                start = time.perf_counter()
                tokens = call()
                taken.append((time.perf_counter() - start) / tokens)
            here[name] = median(taken[1:])

        number = iter(range(9))

        def prepared() -> int:
            out = Path(folder, f"out-{next(number)}")
            return sum(
                prepare([corpus], out, tokenizer=tokenizer, workers=found["workers"], progress=False).tokens.values()
            )

        def encoded() -> int:
            return sum(map(len, tokenizer.encoding.encode_ordinary_batch(pieces, num_threads=found["workers"])))

        def batched() -> int:
            batches = Batches(open_tokens(Path(folder, "out-0")), 256, 16)
            return sum(batches.batch(16 * i)[0].numel() for i in range(min(2000, batches.samples_per_epoch // 16)))

        for name, call in (("prepare", prepared), ("tiktoken", encoded), ("batches", batched)):
            timed(name, call)
    for record in found["data"]:
        yield f"{record['provider']}: a token", 1 / record["tokens_per_second"], here[record["provider"]]


AGAIN = {"ops": ops_again, "train": train_again, "generate": generate_again, "data": data_again}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--within", type=float, default=0.1, help="how far the two may be apart (default: 0.1)")
    parser.add_argument("--step", nargs=3, metavar=("KIND", "DTYPE", "SHAPE"), help="time one step: used by the script")
    options = parser.parse_args()
    if options.step:
        kind, dtype, shape = options.step
        print(seconds_of(step_of(kind, dtype, json.loads(shape)), least=2.0), len(DISTURBED))
        return 0
    if options.file is None:
        parser.error("which file?")
    found = json.loads(options.file.read_text(encoding="utf-8"))
    if found["kind"] != "train":  # there every step has its own process
        llmfast.tune_process(found["threads"])
    apart = []
    for what, theirs, ours in AGAIN[found["kind"]](found):
        apart.append(abs(theirs / ours - 1))
        mark = "" if apart[-1] <= options.within else "  <--"
        print(
            f"{what:60} {theirs * 1e3:10.4f} ms in the file, {ours * 1e3:10.4f} ms here, {theirs / ours:.3f}{mark}",
            flush=True,
        )
    far = sum(one > options.within for one in apart)
    print(f"{len(apart)} figures, median difference {median(apart):.1%}, {far} beyond {options.within:.0%}")
    if DISTURBED:
        print(f"other programs spoilt {len(DISTURBED)} timings, {sum(DISTURBED):.0f} s: not a quiet machine")
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
