"""Runs of several processes on this machine: ``torchrun`` over Gloo, on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "worker.py"
LIMIT = 240  # seconds, on a busy machine


@pytest.fixture
def launch(tmp_path):
    """launch(ranks, name, options..., trouble=("kill", 7)) -> CompletedProcess; the run is tmp_path / name / "run"."""

    def run(size, name, *, trouble=(), torchrun=(), check=True, **options):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        command = [str(WORKER), str(folder / "run"), json.dumps(options), *map(str, trouble)]
        if size > 1:
            local = ("--nproc-per-node", str(size), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
            command = ["-m", "torch.distributed.run", *local, *torchrun, *command]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=LIMIT, env=env, check=False
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture
def metrics(tmp_path):
    """metrics(name) -> the lines of a run's metrics.jsonl."""
    return lambda name: [json.loads(line) for line in (tmp_path / name / "run" / "metrics.jsonl").open()]
