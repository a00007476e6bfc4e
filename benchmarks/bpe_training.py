"""BPE training beside the Hugging Face ``tokenizers`` library: wall time, and tokens needed for text not trained on.

    python benchmarks/bpe_training.py                      # the Python standard library, about 12 MB
    python benchmarks/bpe_training.py FOLDER --pattern "*.txt" --vocab-size 8192

Both get the same texts in memory and split them by GPT-2's pattern (ByteLevel over there). llmfast trains on one
thread, the library on as many as it likes. Every tenth file is held out. The rounds take turns; the ratio is of the
medians.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from llmfast.data import stdlib_sources
from llmfast.tokenizer import train_bpe


def train_peer(texts: list[str], vocab_size: int) -> Tokenizer:
    peer = Tokenizer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    peer.train_from_iterator(texts, trainer, length=len(texts))
    return peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="text to train on (default: the standard library)")
    parser.add_argument("--pattern", default="*.py", help="files to take from the folder")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    files = sorted(options.folder.rglob(options.pattern)) if options.folder else stdlib_sources()
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    train = [text for i, text in enumerate(texts) if i % 10]
    held_out = texts[::10]
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, tokenizers", end=" ")
    print(f"{tokenizers.__version__}; {len(train)} files, {sum(map(len, train)) / 1e6:.1f} M characters")

    seconds: dict[str, list[float]] = {"llmfast": [], "tokenizers": []}
    for _ in range(options.rounds):
        start = time.perf_counter()
        ours = train_bpe(train, options.vocab_size)
        middle = time.perf_counter()
        peer = train_peer(train, options.vocab_size)
        seconds["llmfast"].append(middle - start)
        seconds["tokenizers"].append(time.perf_counter() - middle)
    tokens = {
        "llmfast": sum(len(ids) for ids in ours.encode_batch(held_out)),
        "tokenizers": sum(len(peer.encode(text).ids) for text in held_out),
    }
    for name, vocab_size in (("llmfast", ours.vocab_size), ("tokenizers", peer.get_vocab_size())):
        print(f"{name:10}  {vocab_size:,} tokens in {statistics.median(seconds[name]):6.2f} s", end=" ")
        print(f"(from {min(seconds[name]):.2f} to {max(seconds[name]):.2f}); held-out text: {tokens[name]:,} tokens")
    faster = statistics.median(seconds["tokenizers"]) / statistics.median(seconds["llmfast"])
    print(f"llmfast trains {faster:.1f}x as fast and needs {tokens['llmfast'] / tokens['tokenizers'] - 1:+.3%} tokens")


if __name__ == "__main__":
    main()
