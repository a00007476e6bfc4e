"""Throughput and memory of ``llmfast.data.prepare`` beside tiktoken's own batch encoder.

    python benchmarks/prepare.py --tokenizer GPT2_FOLDER --megabytes 64 --rounds 3
    python benchmarks/prepare.py --tokenizer GPT2_FOLDER --megabytes 5000 --memory-only

The corpus is made on the spot: slices of the Python standard library's text with random edits, one JSON record a line.
Speed is measured interleaved, round by round, on the same documents and as many threads as workers: tiktoken only
encodes text that lies in memory; prepare also reads, parses, hashes, splits and writes. Memory is the resident memory
of all processes together, sampled while they run (Linux).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llmfast.bench.data import resident_bytes, write_corpus

REFERENCE_BYTES = 32 << 20  # a sample of the corpus is enough to time tiktoken


PREPARE = """
import json, resource, sys, time
from llmfast.data import prepare
from llmfast.tokenizer import load_tokenizer
source, out, tokenizer, workers = sys.argv[1:]
tokenizer = load_tokenizer(tokenizer)
start, cpu = time.perf_counter(), time.process_time()
done = prepare(source, out, tokenizer=tokenizer, workers=int(workers), progress=False)
seconds, children = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
cpu = time.process_time() - cpu + children.ru_utime + children.ru_stime
print(json.dumps({"seconds": seconds, "cpu": cpu, "tokens": sum(done.tokens.values())}))
"""

TIKTOKEN = """
import json, sys, time
from llmfast.tokenizer import load_tokenizer
source, size, tokenizer, workers = sys.argv[1:]
encoding = load_tokenizer(tokenizer).encoding
texts, read = [], 0
with open(source, encoding="utf-8") as file:
    for line in file:
        texts.append(json.loads(line)["text"])
        read += len(line)
        if read >= int(size):
            break
start, cpu = time.perf_counter(), time.process_time()
tokens = sum(map(len, encoding.encode_ordinary_batch(texts, num_threads=int(workers))))
print(json.dumps({"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "tokens": tokens}))
"""


def measure(program: str, *arguments: object) -> tuple[float, float, float]:
    """(million tokens a second, the same a CPU second, peak MB of all processes) of a program on its own."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(0.05)
    assert process.stdout
    if process.returncode:
        raise SystemExit(f"the measured program failed: {' '.join(command[:1])}")
    result = json.loads(process.stdout.read())
    tokens = result["tokens"] / 1e6
    return tokens / result["seconds"], tokens / result["cpu"], peak / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer", required=True, help="GPT-2 vocabulary files, or what llmfast tokenizers are named by"
    )
    parser.add_argument("--megabytes", type=int, default=64, help="size of the corpus")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-only", action="store_true", help="one run of prepare, without tiktoken")
    parser.add_argument("--folder", help="where to put corpus and shards (default: the temporary folder)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        corpus, out = Path(folder, "corpus.jsonl"), Path(folder, "out")
        write_corpus(corpus, options.megabytes * 1_000_000)
        ratios, cpu_ratios = [], []
        for number in range(1 if options.memory_only else options.rounds):
            shutil.rmtree(out, ignore_errors=True)
            ours, ours_cpu, peak = measure(PREPARE, corpus, out, options.tokenizer, options.workers)
            line = f"round {number}: prepare {ours:.2f} M tokens/s ({ours_cpu:.2f} a CPU second), peak {peak:,.0f} MB"
            if not options.memory_only:
                theirs, theirs_cpu, _ = measure(TIKTOKEN, corpus, REFERENCE_BYTES, options.tokenizer, options.workers)
                ratios.append(ours / theirs)
                cpu_ratios.append(ours_cpu / theirs_cpu)
                line += f"; tiktoken {theirs:.2f} ({theirs_cpu:.2f}); ratio {ratios[-1]:.2f} ({cpu_ratios[-1]:.2f})"
            print(line, flush=True)
        limit = 1000 + 64 * options.workers
        print(f"{options.megabytes:,} MB, {options.workers} workers; memory limit of all processes {limit:,} MB")
        if ratios:
            wall, cpu = statistics.median(ratios), statistics.median(cpu_ratios)
            print(f"median ratio {wall:.2f} by the clock, {cpu:.2f} by CPU time (what counts where cores are shared)")


if __name__ == "__main__":
    main()
