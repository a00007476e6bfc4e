"""examples/scale starts what it says: with stand-ins for SLURM's commands, two torchrun on this machine train."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llmfast.checkpoint import find_checkpoint, read_state

ROOT = Path(__file__).parents[2]
RUN = "--n-layer 1 --n-head 1 --n-embd 8 --block-size 8 --tokenizer byte --device cpu --threads 1 --micro-batch-size 2"
RUN += " --batch-size 4 --max-steps 3 --eval-every 0 --sample-every 0"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="shell scripts")


def run(script: str, folder: Path, *options: str, commands: dict[str, str], **environment: str) -> str:
    """What the script says, with ``commands`` in front of PATH."""
    for name, text in commands.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    environment |= dict(PATH=f"{folder}:{os.environ['PATH']}", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    environment |= dict(LLMFAST_MATMUL="default")  # to measure it takes longer than the run
    done = subprocess.run(
        ["bash", ROOT / "examples" / "scale" / script, *options],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_slurm_starts_one_torchrun_a_node_and_they_train_together(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    data = tmp_path / "text.txt"
    data.write_text(Path(random.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    said = run(
        "slurm.sh",
        tmp_path,
        *("--out", str(tmp_path / "run"), "--data", str(data), *RUN.split()),
        commands={
            "python": f'exec "{sys.executable}" "$@"',
            "scontrol": '[ "$*" = "show hostnames node[1-2]" ] && printf "127.0.0.1\\n127.0.0.2\\n"',
            "srun": '"$@" & other=$!; "$@" || exit; wait $other',
        },
        **dict(SLURM_JOB_NODELIST="node[1-2]", SLURM_JOB_NUM_NODES="2", SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(ROOT)),
        **dict(GLOO_SOCKET_IFNAME="lo", ADDRESS="127.0.0.1", PORT=port, RESTARTS="0"),
    )
    assert "2 ranks, the whole model on each (ddp)" in said, said
    assert read_state(find_checkpoint(tmp_path / "run"))["step"] == 3


@pytest.mark.parametrize(("gpus", "ranks"), [("exit 1", 2), ("printf 'GPU 0\\nGPU 1\\nGPU 2\\n'", 3)])
def test_one_node_starts_a_rank_on_every_gpu_or_two_without(tmp_path, gpus, ranks):
    said = run("one_node.sh", tmp_path, "--seed", "1", commands={"nvidia-smi": gpus, "python": 'echo "$@"'})
    assert f"--standalone --nproc-per-node {ranks} --max-restarts 3 -m llmfast pretrain --seed 1" in said


def test_a_job_that_is_queued_again_goes_on(tmp_path):
    slurm = dict(SLURM_JOB_NODELIST="n", SLURM_JOB_NUM_NODES="1", SLURM_JOB_ID="7", SLURM_GPUS_ON_NODE="8")
    slurm |= dict(SLURM_SUBMIT_DIR=str(ROOT), SLURM_RESTART_COUNT="1")
    said = run("slurm.sh", tmp_path, commands={"scontrol": "echo n", "srun": '"$@"', "python": 'echo "$@"'}, **slurm)
    assert "--nnodes 1 --nproc-per-node 8" in said
    assert said.strip().endswith("-m llmfast pretrain --resume")
