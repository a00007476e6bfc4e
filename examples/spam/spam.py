"""From nothing to a spam filter: a small GPT is pretrained on the messages of the training split, then fine-tuned.

For each seed: balance and split the SMS spam collection, pretrain, fine-tune, test. The commands are printed as they
could be typed; the settings stand in pretrain.toml and classify.toml beside this file.

    llmfast download sms-spam
    python examples/spam/spam.py --data data/SMSSpamCollection.tsv
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from llmfast.config import ClassifyConfig
from llmfast.finetuning.base import write_splits
from llmfast.finetuning.classify_data import read_splits_of, stored
from llmfast.tokenizer import load_tokenizer

HERE = Path(os.path.relpath(Path(__file__).parent))


def say(text: str) -> None:
    print(text, flush=True)


def split(data: str, seed: int, out: Path) -> None:
    """Write ``out/train.jsonl``, ``validation.jsonl`` and ``test.jsonl``: 70, 10 and 20 % of the balanced messages.

    The base's tokenizer is yet to be trained, on the first of them alone, so bytes stand in for tokens here.
    """
    config = ClassifyConfig(checkpoint="", data=data, balance=True, split_seed=seed)
    splits = read_splits_of(config, load_tokenizer("byte"), context=10**6, say=say)
    write_splits(out, {name: stored(part) for name, part in splits.items()})


def llmfast(*words: str | Path) -> None:
    """Run a command of llmfast, with its output in this script's."""
    say("$ " + shlex.join(["llmfast", *map(str, words)]))
    subprocess.run([sys.executable, "-m", "llmfast", *map(str, words)], stderr=subprocess.STDOUT, check=True)


def run(data: str, seed: int, out: Path, options: list[str]) -> float:
    """The test accuracy of one seed, for the split, the base and the classifier."""
    begin = time.perf_counter()
    split(data, seed, out / "data")
    train, validation, test = (out / "data" / f"{name}.jsonl" for name in ("train", "validation", "test"))
    common = ["--seed", str(seed), *options]
    llmfast("pretrain", "--config", HERE / "pretrain.toml", "--data", train, "--out", out / "base", *common)
    llmfast(
        "finetune", "classify", "--config", HERE / "classify.toml", "--checkpoint", out / "base", "--data", train,
        "--val-data", validation, "--test-data", test, "--out", out / "classifier", *common,
    )  # fmt: skip
    results = json.loads((out / "classifier" / "results.json").read_text(encoding="utf-8"))
    accuracy = results["test"]["accuracy"]
    say(f"seed {seed}: test accuracy {accuracy:.2%}, {time.perf_counter() - begin:.0f} s in all\n")
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="SMSSpamCollection.tsv")
    parser.add_argument("--out", type=Path, default=Path("runs/spam"), help="holds a folder for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args, options = parser.parse_known_args()  # the rest goes to both commands, such as --threads 2
    accuracies = [run(args.data, seed, args.out / f"seed-{seed}", options) for seed in args.seeds]
    say(f"mean test accuracy over {len(accuracies)} seeds: {statistics.mean(accuracies):.2%}")


if __name__ == "__main__":
    main()
