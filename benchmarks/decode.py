"""Generation on the CPU at batch 1, side by side: llmfast in float32, bfloat16 and int8, Hugging Face, nanoGPT.

The model is GPT-2 124M with random weights, greedy, a short prompt. Each provider lives in a process of its own, and
they take turns, so that whatever else the machine does hits all of them alike; figures are medians over the turns. The
floor of a dtype is the time to read its weights once (matrices and the output head; of the tables of embeddings a step
reads one row), at the read bandwidth that benchmarks/read_memory.c measures in the same turns, on as many threads, over
as many bytes and on huge pages.

    python benchmarks/decode.py
    LLMFAST_PEERS=folder/with/nanoGPT python benchmarks/decode.py --json out.json

Perplexity of int8 beside float32, token by token through the same step, on a checkpoint and its data:

    python benchmarks/decode.py --perplexity runs/demo
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import mmap
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from llmfast.bench.environment import header

OURS = ("float32", "bfloat16", "int8")
PROVIDERS = [
    *(f"llmfast {kind}" for kind in OURS),
    "huggingface float32",
    "huggingface bfloat16",
    "nanogpt float32",
    *(f"read {kind}" for kind in OURS),
]
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
PROMPT = [464, 3290, 318, 257]

Turn = Callable[[], float]


def weight_bytes(kind: str) -> int:
    """Bytes of weights that one step of GPT-2 124M reads: matrices, their biases and scales, norms."""
    C, L, V = 768, 12, 50257
    matrices, rows = L * 12 * C * C + V * C, L * 9 * C
    return matrices * BYTES[kind] + 4 * (rows + (L * 4 + 2) * C) + (4 * (rows + V) if kind == "int8" else 0)


def reader(kind: str, threads: int) -> Turn:
    """Seconds for a walk over as many bytes as a step reads."""
    folder = tempfile.mkdtemp()
    library = Path(folder) / "read_memory.so"
    source = Path(__file__).with_name("read_memory.c")
    flags = "-O3 -march=native -mprefer-vector-width=512 -shared -fPIC -pthread".split()
    subprocess.run([os.environ.get("CC", "cc"), *flags, str(source), "-o", str(library)], check=True)
    read = ctypes.CDLL(str(library)).read_memory
    read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    size = weight_bytes(kind)
    memory = mmap.mmap(-1, size + (2 << 20))
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory.write(os.urandom(1 << 20) * (size // (1 << 20) + 1))
    first = ctypes.c_char.from_buffer(memory)  # holds the map for as long as it is read

    def turn() -> float:
        start = time.perf_counter()
        for _ in range(5):
            read(ctypes.addressof(first), size, threads)
        return (time.perf_counter() - start) / 5

    return turn


def build(provider: str, tokens: int, threads: int) -> Turn:
    """A function that generates and returns the seconds of a token after the first."""
    name, kind = provider.split()
    if name == "read":
        return reader(kind, threads)
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    if name == "llmfast":
        import llmfast
        from llmfast.config import GPTConfig
        from llmfast.generation import generate_ids

        llmfast.tune_process()
        model = llmfast.GPT(GPTConfig()).to(dtype).eval()
        if kind == "int8":
            model = llmfast.nn.quantize_int8(model)
        run = lambda n: generate_ids(model, [PROMPT], max_new_tokens=n, temperature=0)  # noqa: E731
    elif name == "huggingface":
        import transformers

        model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).to(dtype).eval()
        ids = torch.tensor([PROMPT])
        options = dict(do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True)
        run = lambda n: model.generate(ids, max_new_tokens=n, min_new_tokens=n, **options)  # noqa: E731
    else:
        sys.path.insert(0, str(Path(os.environ["LLMFAST_PEERS"]) / "nanoGPT"))
        from model import GPT, GPTConfig

        model = GPT(GPTConfig(vocab_size=50257)).eval()
        ids = torch.tensor([PROMPT])
        run = lambda n: model.generate(ids, n, top_k=1)  # noqa: E731

    def turn() -> float:
        with torch.inference_mode():
            start = time.perf_counter()
            run(1)
            middle = time.perf_counter()
            run(1 + tokens)
            return (time.perf_counter() - middle - (middle - start)) / tokens

    return turn


def serve(provider: str, tokens: int, threads: int, pipe: Connection) -> None:
    try:
        turn = build(provider, tokens, threads)
        turn()
        pipe.send("ready")
        while pipe.recv():
            pipe.send(turn())
    except Exception as error:  # a provider that cannot run says why and leaves the table
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def compare(args: argparse.Namespace) -> None:
    names = [p for p in args.providers if "nanogpt" not in p or "LLMFAST_PEERS" in os.environ]
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    spawn = multiprocessing.get_context("spawn")
    workers = {}
    for name in names:
        ours, theirs = spawn.Pipe()
        spawn.Process(target=serve, args=(name, args.tokens, args.threads, theirs), daemon=True).start()
        theirs.close()  # so that the end of a worker is seen here
        try:
            answer = ours.recv()
        except EOFError:
            answer = "its process has died"
        if answer == "ready":
            workers[name] = ours
        else:
            print(f"{name}: cannot run: {answer}")
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(args.turns):
        for name, pipe in workers.items():
            pipe.send(True)
            seconds[name].append(pipe.recv())
    for pipe in workers.values():
        pipe.send(False)

    import torch

    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"GPT-2 124M, batch 1, {args.tokens} tokens, {args.turns} turns, {args.threads} threads,"
        f" torch {torch.__version__}"
    )
    print(
        f"{'':22}{'ms/token':>9}{'tokens/s':>10}{'GB/s':>8}{'of floor':>10}"
        f"{'x HF, dtype':>13}{'x HF bf16':>11}   spread"
    )
    for name, t in median.items():
        who, kind = name.split()
        share = f"{median[f'read {kind}'] / t:.2f}" if f"read {kind}" in median else ""
        same, low = (median.get(f"huggingface {k}") for k in (kind, "bfloat16"))
        ratios = [f"{peer / t:.2f}" if peer and who != "read" else "" for peer in (same, low)]
        speed = f"{weight_bytes(kind) / t / 1e9:.1f}"
        row = f"{name:22}{t * 1e3:9.2f}{1 / t:10.1f}{speed:>8}{share:>10}{ratios[0]:>13}{ratios[1]:>11}"
        print(f"{row}   {min(seconds[name]) * 1e3:.2f}-{max(seconds[name]) * 1e3:.2f}")
    if args.json:
        record = {
            **header("script"),
            "threads": args.threads,
            "weight_bytes": {kind: weight_bytes(kind) for kind in OURS},
            "seconds": seconds,
            "median": median,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def perplexity(args: argparse.Namespace) -> None:
    """Every token predicted from those before it in its window, one step a token, in each kind of weights."""
    import torch

    from llmfast.checkpoint import find_checkpoint, load_model
    from llmfast.cli.corpus import open_prepared
    from llmfast.generation import native
    from llmfast.nn import KVCache, quantize_int8

    torch.set_num_threads(args.threads)
    path = find_checkpoint(args.perplexity)
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    corpus = open_prepared(Path(args.data) if args.data else run / "data")
    source, base = corpus.val or corpus.train, load_model(path, device=torch.device("cpu"), dtype=None).eval()
    T = base.config.block_size
    rows = min(8, (len(source) - 1) // T)
    rounds = max(1, min(args.tokens_read, len(source) - 1) // (rows * T))
    windows = torch.from_numpy(source.windows([i * T for i in range(rows * rounds)], T + 1)).view(rounds, rows, T + 1)
    result = {}
    for kind in OURS:
        model = load_model(path, device=torch.device("cpu"), dtype=None).eval()
        model = model.bfloat16() if kind == "bfloat16" else quantize_int8(model) if kind == "int8" else model
        reasons = native.why_not(model)
        if reasons:
            sys.exit("; ".join(reasons))
        step, nats = native.NativeStep(model), 0.0
        with torch.inference_mode():
            for part in windows:
                cache = KVCache(model.config, rows, T, dtype=torch.float32 if kind == "float32" else torch.bfloat16)
                for t in range(T):
                    logits = step(part[:, t].tolist(), cache)
                    nats += float(torch.nn.functional.cross_entropy(logits, part[:, t + 1], reduction="sum"))
        result[kind] = math.exp(nats / (rounds * rows * T))
        print(f"{kind:9} perplexity {result[kind]:.4f}, {result[kind] / result['float32'] - 1:+.4%} beside float32")
    if args.json:
        record = {**header("script"), "perplexity": result, "tokens": rounds * rows * T}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--providers", nargs="+", default=PROVIDERS, choices=PROVIDERS)
    parser.add_argument("--perplexity", metavar="CHECKPOINT")
    parser.add_argument("--data", help="prepared data (default: the run's own)")
    parser.add_argument("--tokens-read", type=int, default=50_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    perplexity(args) if args.perplexity else compare(args)


if __name__ == "__main__":
    main()
