"""kill -9 a training process at random moments, resume it, and compare the final weights bit by bit.

    python benchmarks/kill_resume.py --kills 20 --steps 200 --seed 0

Each trial starts a run of ``--steps`` steps with dropout, evaluations, samples and a checkpoint every ten steps, kills
it at a random moment, resumes it (a third of the trials are killed a second time), and compares model and optimizer of
the last checkpoint with those of a run that was left alone. All runs use the matrix-product routing that the first one
measured, because a run that is killed before its first checkpoint has recorded none.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FILES = ("model.safetensors", "optimizer.safetensors")


def train(folder: Path, steps: int, threads: int, routing: dict[str, str] | None) -> None:
    """The child: one run, from its newest checkpoint where it has one."""
    import numpy as np
    import torch

    from llmfast import ops
    from llmfast.checkpoint import read_state
    from llmfast.config import GPTConfig, TrainConfig
    from llmfast.data import open_tokens
    from llmfast.nn import GPT
    from llmfast.tokenizer import load_tokenizer
    from llmfast.training import Trainer

    if routing is not None:
        ops.set_matmul_routing(routing)
    folder.mkdir(parents=True, exist_ok=True)
    source = np.frombuffer(Path(__file__).read_bytes(), dtype=np.uint8).astype(np.uint16)
    for name, part in (("train", source[:-1000]), ("val", source[-1000:])):
        if not (folder / f"{name}.bin").exists():
            part.tofile(folder / f"{name}.part")
            os.replace(folder / f"{name}.part", folder / f"{name}.bin")
    config = TrainConfig(
        out=str(folder / "run"), resume=True, device="cpu", threads=threads, max_steps=steps,
        micro_batch_size=4, batch_size=8, warmup_steps=10, log_every=5, eval_every=20, eval_batches=4, save_every=10,
        sample_tokens=8,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    model = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=64, dropout=0.1))
    data = [open_tokens(folder / f"{name}.bin") for name in ("train", "val")]
    result = Trainer(model, config, *data, tokenizer=load_tokenizer("byte"), progress=False).fit()
    print(
        json.dumps({"checkpoint": str(result.checkpoint), "routing": read_state(result.checkpoint)["matmul_routing"]})
    )


def start(folder: Path, options: argparse.Namespace, routing: dict[str, str] | None) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--child", str(folder), "--routing", json.dumps(routing)]
    command += ["--steps", str(options.steps), "--threads", str(options.threads)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, object]:
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"the training process failed:\n{errors}")
    return json.loads(output)


def last_step(run: Path) -> int:
    """The step of the newest metrics line."""
    try:
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError, KeyError):
        return 0


def kill_somewhere(
    process: subprocess.Popen[str], run: Path, first: int, steps: int, chance: random.Random
) -> int | None:
    """Kill the process a random while after it passed a random step; the step it had logged, None if it was done."""
    target, pause = chance.randrange(first, steps), chance.random() * 0.1
    while process.poll() is None and last_step(run) < target:
        time.sleep(0.002)
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return last_step(run) if process.returncode == -signal.SIGKILL else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="trials")
    parser.add_argument("--steps", type=int, default=200, help="steps of a run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--routing", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        train(options.child, options.steps, options.threads, options.routing)
        return 0
    chance = random.Random(options.seed)
    trials = []
    with tempfile.TemporaryDirectory() as base:
        reference = finish(start(Path(base) / "whole", options, None))
        wanted = [(Path(str(reference["checkpoint"])) / name).read_bytes() for name in FILES]
        routing = reference["routing"]
        assert isinstance(routing, dict)
        for trial in range(options.kills):
            folder = Path(base) / f"trial-{trial}"
            run, killed = folder / "run", []
            for _ in range(2 if chance.random() < 1 / 3 else 1):
                first = killed[-1] if killed and killed[-1] is not None else 0
                killed.append(kill_somewhere(start(folder, options, routing), run, first, options.steps, chance))
            final = Path(str(finish(start(folder, options, routing))["checkpoint"]))
            identical = [(final / name).read_bytes() for name in FILES] == wanted
            steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
            trials.append({"killed_at": killed, "identical": identical, "metrics_once": steps == sorted(set(steps))})
            if not options.json:
                print(
                    f"trial {trial}: killed at step {killed}, {'identical' if identical else 'DIFFERENT'}", flush=True
                )
    good = sum(trial["identical"] and trial["metrics_once"] for trial in trials)
    answer = {"seed": options.seed, "steps": options.steps, "kills": len(trials), "identical": good, "trials": trials}
    print(json.dumps(answer) if options.json else f"{good} of {len(trials)} ended bit-identical (seed {options.seed})")
    return 0 if good == len(trials) else 1


if __name__ == "__main__":
    raise SystemExit(main())
