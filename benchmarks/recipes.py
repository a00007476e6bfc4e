"""Two whole recipes, run by those who wrote them and by llmfast in turns: wall time and losses.

    LLMFAST_PEERS=folder python benchmarks/recipes.py shakespeare tinyshakespeare.txt --seeds 1 2 3 --bf16
    LLMFAST_PEERS=folder python benchmarks/recipes.py verdict the-verdict.txt --vocab gpt2/

`shakespeare` is nanoGPT's CPU recipe (2,000 steps of a character model), `verdict` the script of chapter 5 of "Build a
Large Language Model (From Scratch)" (GPT 124M, ten epochs). The folder holds checkouts of both. With --bf16, llmfast
runs once more in bfloat16, and the last line is the difference of the two validation losses.
The wall time is the whole command's: start, evaluations and samples included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from llmfast.bench.environment import header

ROOT = Path(__file__).resolve().parents[1]
NANOGPT_FLAGS = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=10 --block_size=64 --batch_size=12 --n_layer=4 "
    "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()
# Where the book's script differs from examples/verdict.toml.
BOOK_SCRIPT = ["--learning-rate", "5e-4", "--eval-batches", "1", "--grad-clip", "0"]
TIKTOKEN_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


def run(command: list[str], home: Path, **environment: str) -> tuple[float, str]:
    """Seconds and standard output of a command."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        sys.exit(f"{command[:3]} failed:\n{done.stderr}")
    return time.perf_counter() - start, done.stdout


def nanogpt(args: argparse.Namespace, seed: int, work: Path) -> dict[str, float]:
    """nanoGPT's own train.py, in a copy of its checkout."""
    home = work / "nanoGPT"
    shutil.copytree(Path(os.environ["LLMFAST_PEERS"]) / "nanoGPT", home, ignore=shutil.ignore_patterns(".git"))
    text = args.text.read_text(encoding="utf-8")
    characters = sorted(set(text))
    ids = {c: i for i, c in enumerate(characters)}
    data = home / "data" / "shakespeare_char"
    cut = int(len(text) * 0.9)
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        np.array([ids[c] for c in part], dtype=np.uint16).tofile(data / f"{name}.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": ids}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    train = home / "train.py"  # its seed is a constant in the source
    train.write_text(train.read_text().replace("torch.manual_seed(1337 +", f"torch.manual_seed({seed} +"))
    seconds, out = run([sys.executable, "train.py", "config/train_shakespeare_char.py", *NANOGPT_FLAGS], home)
    train_loss, val_loss = re.findall(r"train loss ([\d.]+), val loss ([\d.]+)", out)[-1]
    return {"seconds": seconds, "train": float(train_loss), "val": float(val_loss)}


def book(args: argparse.Namespace, seed: int, work: Path) -> dict[str, float]:
    """The book's own gpt_train.py, in a copy of its folder, with tiktoken's cache filled from --vocab."""
    home, cache = work / "book", work / "tiktoken"
    shutil.copytree(Path(os.environ["LLMFAST_PEERS"]) / "LLMs-from-scratch/ch05/01_main-chapter-code", home)
    shutil.copy(args.text, home / "the-verdict.txt")
    cache.mkdir()
    for name in ("vocab.bpe", "encoder.json"):
        shutil.copy(args.vocab / name, cache / hashlib.sha1((TIKTOKEN_URL + name).encode()).hexdigest())
    script = home / "gpt_train.py"
    script.write_text(script.read_text().replace("torch.manual_seed(123)", f"torch.manual_seed({seed})"))
    environment = {"TIKTOKEN_CACHE_DIR": str(cache), "MPLBACKEND": "Agg"}
    seconds, out = run([sys.executable, "gpt_train.py"], home, **environment)
    train_loss, val_loss = re.findall(r"Train loss ([\d.]+), Val loss ([\d.]+)", out)[-1]
    return {"seconds": seconds, "train": float(train_loss), "val": float(val_loss)}


def llmfast(args: argparse.Namespace, seed: int, work: Path) -> dict[str, float]:
    """``llmfast pretrain`` at the committed recipe."""
    recipe = {"shakespeare": "shakespeare_char.toml", "verdict": "verdict.toml"}[args.recipe]
    command = [sys.executable, "-m", "llmfast", "pretrain", "--config", str(ROOT / "examples" / recipe)]
    command += ["--data", str(args.text.resolve()), "--seed", str(seed), "--out", str(work / "run"), *args.flags]
    if args.vocab:
        command += ["--tokenizer", str(args.vocab.resolve())]
    seconds, _ = run(command, work)
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    last = {key: [line[key] for line in lines if key in line][-1] for key in ("train_loss", "val_loss")}
    return {"seconds": seconds, "train": last["train_loss"], "val": last["val_loss"]}


def llmfast_bf16(args: argparse.Namespace, seed: int, work: Path) -> dict[str, float]:
    return llmfast(argparse.Namespace(**{**vars(args), "flags": [*args.flags, "--dtype", "bfloat16"]}), seed, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=["shakespeare", "verdict"])
    parser.add_argument("text", type=Path)
    parser.add_argument("--vocab", type=Path, help="folder with GPT-2's vocab.bpe and encoder.json, for verdict")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    side = parser.add_mutually_exclusive_group()
    side.add_argument("--peer-only", action="store_true")
    side.add_argument("--llmfast-only", action="store_true")
    parser.add_argument("--as-script", action="store_true", help="verdict: at the settings of the book's script")
    parser.add_argument("--bf16", action="store_true", help="llmfast in bfloat16 as well")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.flags = BOOK_SCRIPT if args.as_script else []
    peer = nanogpt if args.recipe == "shakespeare" else book
    sides = [peer] * (not args.llmfast_only) + [llmfast] * (not args.peer_only)
    sides += [llmfast_bf16] * (args.bf16 and not args.peer_only)
    results: dict[str, list[dict[str, float]]] = {side.__name__: [] for side in sides}
    for seed in args.seeds:
        for side in sides:
            with tempfile.TemporaryDirectory() as work:
                row = side(args, seed, Path(work))
            results[side.__name__].append(row)
            print(f"seed {seed}: {side.__name__:12}", *(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
    mean = {name: {k: statistics.mean(r[k] for r in rows) for k in rows[0]} for name, rows in results.items()}
    for name, row in mean.items():
        faster = (
            f"{mean[peer.__name__]['seconds'] / row['seconds']:.2f}x {peer.__name__}" if peer.__name__ in mean else ""
        )
        print(f"mean of {len(args.seeds)}: {name:12}", *(f"{k} {v:.4g}" for k, v in row.items()), faster)
    if {"llmfast", "llmfast_bf16"} <= mean.keys():
        print(f"validation loss, bf16 - fp32: {mean['llmfast_bf16']['val'] - mean['llmfast']['val']:+.4f}")
    if args.json:
        record = {**header("script"), "seeds": args.seeds, "results": results, "mean": mean}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
