"""Times what ``llmfast bench`` times once more, with loops of its own, and sets the two beside each other.

    python benchmarks/independent.py ops train generate data

One side are the benchmark's own samples, as it takes them for its files: its cases, clocks and processes. The other
side has nothing of llmfast.bench but an op's operands: each call is made from llmfast's, PyTorch's, transformers' or
tiktoken's own functions and timed by ``time.perf_counter`` around it. The two take turns, within a second of each
other, since a shared machine is not as fast from one minute to the next; compared are medians. Where they differ by
more than ``--within``, more turns are taken, three times at most, and all of them count; exits with 1 where they still
do. On a CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import llmfast
from llmfast.config import GPTConfig, TrainConfig

CPU = torch.device("cpu")
Timed = Callable[[], tuple[float, ...]]  # one sample: seconds of each figure
Pair = tuple[list[str], Timed, Timed]  # the figures' names, the benchmark's sample, ours


def seconds_of(call: Callable[[], Any], prepare: Callable[[], Any] = lambda: None, least: float = 0.01) -> float:
    """Mean seconds of ``call()`` over ``least`` seconds or one call; ``prepare()`` is not counted."""
    total, count = 0.0, 0
    while not count or total < least:
        prepare()
        start = time.perf_counter()
        call()
        total += time.perf_counter() - start
        count += 1
    return total / count


# ---- bench ops -------------------------------------------------------------------------------------------------------


def op_call(op: Any, provider: str, inputs: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[], Any]] | None:
    """The function that ``provider`` names, and what gives the context that it runs in; None for packages."""
    if provider.startswith("llmfast "):
        backend = f"{op.name}={provider.removeprefix('llmfast ')}"
        return lambda: op.function(**inputs), lambda: llmfast.use_backend(backend)
    if provider == "eager":
        return lambda: op.eager(**inputs), nullcontext
    if provider == "torch.compile":
        compiled = torch.compile(op.eager, dynamic=False)
        return lambda: compiled(**inputs), nullcontext
    if provider == "SDPA flash":
        q, k, v = (inputs[name] for name in "qkv")
        call = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=inputs.get("scale"))  # noqa: E731
        return call, lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    if provider == "F.linear_cross_entropy":
        x, w, target = (inputs[name] for name in ("x", "weight", "target"))
        options = {k: v for k, v in inputs.items() if k not in ("x", "weight", "target", "bias")}
        options["linear_bias"] = inputs.get("bias")
        return lambda: F.linear_cross_entropy(x.flatten(0, -2), w, target.flatten(), **options), nullcontext
    return None


def passes(call: Callable[[], Any], leaves: list[Any], slopes: list[Any]) -> dict[str, Callable[[], float]]:
    """What times a forward pass, a backward pass and both."""

    def forward() -> tuple[Any, ...]:
        y = call()
        return y if isinstance(y, tuple) else (y,)

    slopes = [slope.to(y.dtype) for slope, y in zip(slopes, forward(), strict=True)]
    held: list[Any] = []  # emptied before the next forward pass, so that it may have the memory

    def hold() -> None:
        held.clear()
        held.extend(forward())

    def backward() -> None:
        torch.autograd.grad(held, leaves, slopes, allow_unused=True)

    def both() -> None:
        torch.autograd.grad(forward(), leaves, slopes, allow_unused=True)

    return {
        "forward": lambda: seconds_of(forward),
        "backward": lambda: seconds_of(backward, hold),
        "both": lambda: seconds_of(both),
    }


def ops(*names: str) -> Iterator[Pair]:
    from llmfast.bench.case import MODES, Case
    from llmfast.bench.providers import CannotRun, providers
    from llmfast.bench.timing import Clock
    from llmfast.ops._registry import OPS

    llmfast.tune_process()
    clock = Clock(CPU)
    cases = [
        (op, shape, dtype)
        for op in (OPS[name] for name in names or OPS)
        for shape in op.cpu_samples or op.samples
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for op, shape, dtype in cases:
        case = Case(op, shape, dtype, CPU)
        inputs = case.inputs  # the very same: where in memory they lie makes some calls a tenth faster
        leaves = [inputs[name] for name in case.wanted]
        for provider in providers():
            made = op_call(op, provider.name, inputs) if provider.runs(op) else None
            if made is None:
                continue
            call, context = made
            try:
                with provider.context(op):
                    theirs = provider.make(op, case.inputs)
                    theirs()
            except (CannotRun, RuntimeError):
                continue
            with context():
                ours = passes(call, leaves, case.cotangents)
            for mode in MODES:
                task = case.task(provider, theirs, mode)
                calls = clock.calls_for(task)

                def here(time: Callable[[], float] = ours[mode], context: Callable[[], Any] = context) -> tuple[float]:
                    with context():
                        return (time(),)

                name = f"{op.name} {'x'.join(map(str, shape.values()))} {str(dtype)[6:]} {provider.name} {mode}"
                yield [name], lambda task=task, calls=calls: (clock.sample(task, calls),), here  # type: ignore[misc]
        torch.compiler.reset()


# ---- bench train -----------------------------------------------------------------------------------------------------


def step_of(kind: str, s: dict[str, int]) -> Callable[[], None]:
    """A training step in float32, as llmfast's loop or as a user of transformers writes it."""
    torch.manual_seed(0)
    x, y = torch.randint(s["vocab_size"], (2, s["batch_size"], s["block_size"]))
    sizes = {k: s[k] for k in ("n_layer", "n_head", "n_embd", "vocab_size")}
    model: Any
    if kind == "llmfast":
        from llmfast.training.optimizer import build_optimizer
        from llmfast.training.update import Update

        llmfast.tune_process()
        model = llmfast.GPT(GPTConfig(bias=True, block_size=s["block_size"], **sizes))
        optimizer: Any = build_optimizer(model, TrainConfig(learning_rate=1e-4))
        update = Update(optimizer, 1.0, CPU, torch.float32)

        def ours() -> None:
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
        loss = model(input_ids=x, labels=y, shift_labels=y).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return theirs


def serve_steps(kind: str, shape: str) -> None:
    """In a process of its own, as the benchmark has them: a line in, seconds a step out."""
    step = step_of(kind, json.loads(shape))
    seconds_of(step, least=2.0)
    for _ in sys.stdin:
        print(seconds_of(step, least=0.3), flush=True)


@contextmanager
def own_steps(kind: str, shape: dict[str, int]) -> Iterator[Timed]:
    command = [sys.executable, __file__, "--serve", kind, json.dumps(shape)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        asks, answers = process.stdin, process.stdout
        assert asks is not None
        assert answers is not None

        def sample() -> tuple[float]:
            asks.write("\n")
            asks.flush()
            return (float(answers.readline()),)

        yield sample
        asks.close()


def train() -> Iterator[Pair]:
    from llmfast.bench.steps import Shape
    from llmfast.bench.train import workers

    config = GPTConfig.preset("tiny")
    shape = Shape(config.n_layer, config.n_head, config.n_embd, config.vocab_size, config.block_size, 4)
    for kind in ("llmfast", "huggingface"):
        name = f"{kind} fp32"
        with workers([name], shape, {}, "cpu") as pipes, own_steps(kind, vars(shape)) as here:

            def there(pipe: Any = pipes[name]) -> tuple[float]:
                pipe.send(True)
                return (pipe.recv()[0],)

            yield [f"step of tiny, {name}"], there, here


# ---- bench generate --------------------------------------------------------------------------------------------------

PROMPT, TOKENS = 64, 16


def writer(kind: str, dtype: str, config: GPTConfig, ids: torch.Tensor) -> Callable[[int], Any]:
    """What writes so many tokens after ``ids``."""
    model: Any
    if kind == "llmfast":
        from llmfast.generation import generate_ids
        from llmfast.nn import GPT, quantize_int8

        model = GPT(config).eval()
        model = quantize_int8(model) if dtype == "int8" else model.to(getattr(torch, dtype))
        return lambda n: generate_ids(model, ids.tolist(), max_new_tokens=n, temperature=0)
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {k: getattr(config, k) for k in ("n_layer", "n_head", "n_embd", "vocab_size")}
    none = {"bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(n_positions=config.block_size, **sizes, **none))
    model = model.to(getattr(torch, dtype)).eval()
    mask = torch.ones_like(ids)
    return lambda n: model.generate(
        ids, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0
    )


def generate() -> Iterator[Pair]:
    from llmfast.bench.generate import _huggingface, _llmfast, _timed

    llmfast.tune_process()
    config = GPTConfig.preset("gpt2")
    builders = {"llmfast": _llmfast, "huggingface": _huggingface}
    cases = [(k, d, b) for d in ("float32", "bfloat16", "int8") for b in (1, 4) for k in builders]
    for kind, dtype, batch in cases:
        if (kind, dtype) == ("huggingface", "int8"):
            continue
        ids = torch.randint(config.vocab_size, (batch, PROMPT))
        timed = _timed(builders[kind](config, CPU, dtype, ids)[0], TOKENS, CPU)
        write = writer(kind, dtype, config, ids)

        def there(timed: Timed = timed) -> tuple[float, float]:
            one, whole = timed()
            return one, (whole - one) / TOKENS

        def here(write: Callable[[int], Any] = write) -> tuple[float, float]:
            with torch.inference_mode():
                one = seconds_of(lambda: write(1), least=0)
                return one, (seconds_of(lambda: write(1 + TOKENS), least=0) - one) / TOKENS

        name = f"{kind} {dtype} batch {batch}"
        yield [f"{name}: a prompt", f"{name}: a token"], there, here


# ---- bench data ------------------------------------------------------------------------------------------------------

MEGABYTES = 8


def data() -> Iterator[Pair]:
    """Seconds a token; ours of another text of the same kind: the standard library in pieces, some letters changed."""
    from llmfast.bench.data import bench_data
    from llmfast.data import Batches, open_tokens, prepare, stdlib_sources
    from llmfast.tokenizer import train_bpe

    tokenizer: Any = train_bpe((p.read_text("utf-8", "replace") for p in stdlib_sources()[:200]), 4096)
    draw, pieces, size = random.Random(5), [], 0
    text = "".join(p.read_text("utf-8") for p in stdlib_sources()).encode("ascii", "ignore").decode()
    while size < MEGABYTES * 1_000_000:
        at = draw.randrange(len(text) - 8000)
        piece = list(text[at : at + draw.randrange(100, 8000)])
        for _ in range(len(piece) // 100):
            piece[draw.randrange(len(piece))] = chr(draw.randrange(97, 123))
        pieces.append("".join(piece))
        size += len(pieces[-1])

    def there() -> tuple[float, ...]:
        found = bench_data(tokenizer, megabytes=MEGABYTES, workers=2, turns=1, progress=False)
        return tuple(1 / record["tokens_per_second"] for record in found["data"])

    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.jsonl")
        corpus.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
        number = iter(range(10**6))

        def prepared() -> int:
            out = Path(folder, f"out-{next(number)}")
            return sum(prepare([corpus], out, tokenizer=tokenizer, workers=2, progress=False).tokens.values())

        def encoded() -> int:
            return sum(map(len, tokenizer.encoding.encode_ordinary_batch(pieces, num_threads=2)))

        def batched() -> int:
            batches = Batches(open_tokens(Path(folder, "out-0")), 256, 16)
            return sum(batches.batch(16 * i)[0].numel() for i in range(min(2000, batches.samples_per_epoch // 16)))

        def here() -> tuple[float, ...]:
            taken = []
            for call in (prepared, encoded, batched):
                start = time.perf_counter()
                tokens = call()
                taken.append((time.perf_counter() - start) / tokens)
            return tuple(taken)

        yield ["prepare: a token", "tiktoken: a token", "batches: a token"], there, here


KINDS: dict[str, tuple[Callable[..., Iterator[Pair]], float]] = {  # and the seconds that the turns of a pair may take
    "ops": (ops, 0.8), "train": (train, 12.0), "generate": (generate, 12.0), "data": (data, 60.0),
}  # fmt: skip
FEWEST, MOST, ROUNDS = 7, 41, 3


def compare(there: Timed, here: Timed, seconds: float, within: float) -> list[tuple[float, float]]:
    """Medians of both, figure by figure, of samples taken in turns of changing order after one to warm up."""
    there(), here()
    theirs: list[tuple[float, ...]] = []
    ours: list[tuple[float, ...]] = []
    found: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        start, before = time.perf_counter(), len(ours)
        while len(ours) - before < FEWEST or (len(ours) - before < MOST and time.perf_counter() - start < seconds):
            sides = [(there, theirs), (here, ours)]
            for sample, taken in sides if len(ours) % 2 else reversed(sides):
                taken.append(sample())
        found = [
            (median(a), median(b)) for a, b in zip(zip(*theirs, strict=True), zip(*ours, strict=True), strict=True)
        ]
        if all(abs(t / o - 1) <= within for t, o in found):
            break
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all of them")
    parser.add_argument("--within", type=float, default=0.1, help="how far the two may be apart (default: 0.1)")
    parser.add_argument("--op", nargs="+", default=[], metavar="NAME", help="of the ops, these alone")
    parser.add_argument("--serve", nargs=2, metavar=("KIND", "SHAPE"), help="takes steps: used by the script")
    options = parser.parse_args()
    if options.serve:
        serve_steps(*options.serve)
        return 0
    apart = []
    for kind in options.kinds or (["ops"] if options.op else KINDS):
        pairs, seconds = KINDS[kind]
        for names, there, here in pairs(*(options.op if kind == "ops" else ())):
            for name, (t, o) in zip(names, compare(there, here, seconds, options.within), strict=True):
                apart.append(abs(t / o - 1))
                mark = "" if apart[-1] <= options.within else "  <--"
                print(f"{name:68} {t * 1e3:10.4g} ms there, {o * 1e3:10.4g} ms here, {t / o:.3f}{mark}", flush=True)
    far = sum(one > options.within for one in apart)
    print(f"{len(apart)} figures, median difference {median(apart):.1%}, {far} beyond {options.within:.0%}")
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
