"""Kills random ranks of a training run at random moments, and looks at what is left: python -m tests.ranks.kills

A run of ``llmfast pretrain`` that examples/scale/one_node.sh starts, under ``torchrun --max-restarts``, loses a random
rank (SIGKILL) again and again. Each time all of its processes must be gone and others in their place within the limit,
the newest checkpoint must verify and be no older than before, and the run must go on past it; at the end no file may
be left over. Checkpoints are written beside training.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llmfast.checkpoint import read_pointer, read_state, verify_checkpoint

SCRIPT = Path(__file__).parents[2] / "examples" / "scale" / "one_node.sh"
LIMIT = 30.0  # seconds until all processes of a job that lost one are gone
START = 240.0  # and until its successor has saved a checkpoint, on a busy machine


def pretrain(out: Path, data: Path, parallel: str) -> list[str]:
    """A small run that goes on until it is stopped, and saves all the time."""
    shape = "--n-layer 2 --n-head 2 --n-embd 32 --block-size 32 --tokenizer byte --device cpu --threads 1".split()
    run = "--max-steps 1000000 --batch-size 8 --micro-batch-size 2 --save-every 3 --sample-every 0 --eval-every 1000"
    run += " --async-save on"
    where = ["--out", str(out), "--data", str(data), "--parallel", parallel]
    return [*where, *shape, *run.split()]


def children(pid: int) -> set[int]:
    """The processes that ``pid`` started (Linux)."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.add(int(stat.parent.name))
    return found


def step(out: Path) -> int:
    """The step of the newest checkpoint, which must verify; 0 where there is none."""
    for _ in range(3):  # it may be replaced while we look
        latest = read_pointer(out / "checkpoints", "latest")
        try:
            if latest is None:
                return 0
            verify_checkpoint(latest)
            return int(read_state(latest)["step"])
        except ValueError:
            if read_pointer(out / "checkpoints", "latest") == latest:
                raise
    raise AssertionError("the newest checkpoint changes all the time")


def wait(what: str, limit: float, job: subprocess.Popen[bytes], holds) -> float:
    began = time.monotonic()
    while not holds():
        assert job.poll() is None, f"torchrun ended with {job.returncode} while waiting for {what}"
        assert time.monotonic() - began < limit, f"{what}: not within {limit} s"
        time.sleep(0.1)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--parallel", default="fsdp")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of what is to be tidied up
    print(f"seed {options.seed}, {options.ranks} ranks, {options.parallel}", flush=True)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        data = Path(folder, "text.txt")
        data.write_text(Path(random.__file__).read_text(encoding="utf-8"), encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        environment |= {"RANKS": str(options.ranks), "RESTARTS": str(options.kills + 5)}
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the script's python is this one
        with Path(folder, "log").open("wb") as log:
            job = subprocess.Popen(
                ["bash", SCRIPT, *pretrain(out, data, options.parallel)], stderr=log, stdout=log, env=environment
            )
            try:
                for number in range(1, options.kills + 1):
                    before = step(out)
                    up = wait("a new checkpoint", START, job, lambda before=before: step(out) > before)
                    time.sleep(chance.random() * 2)
                    ranks = children(job.pid)
                    before, victim = step(out), chance.choice(sorted(ranks))
                    os.kill(victim, signal.SIGKILL)
                    gone = wait("the others' end", LIMIT, job, lambda ranks=ranks: not ranks & children(job.pid))
                    after = step(out)
                    assert after >= before, f"a checkpoint was lost: {before}, then {after}"
                    print(
                        f"kill {number}: process {victim} at step {before}; all gone after {gone:.1f} s, checkpoint "
                        f"{after} intact (the run was up after {up:.1f} s)",
                        flush=True,
                    )
                before = step(out)
                wait("a new checkpoint", START, job, lambda: step(out) > before)
                job.send_signal(signal.SIGTERM)
                job.wait(60)
            except BaseException:
                for pid in children(job.pid):
                    os.kill(pid, signal.SIGABRT)  # says where it is
                time.sleep(2)
                print(Path(folder, "log").read_text(errors="replace")[-9000:], file=sys.stderr)
                raise
            finally:
                for pid in children(job.pid):
                    os.kill(pid, signal.SIGKILL)
                job.kill()
                job.wait()
        files = [path for path in out.rglob("*") if re.search(r"\.tmp|unfinished|\.old$", path.name)]
        assert not files, f"left over: {files}"
        print(f"{options.kills} kills: the last checkpoint is step {step(out):,}, nothing is left over")


if __name__ == "__main__":
    main()
