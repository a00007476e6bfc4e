"""The examples that accelerate somebody else's trainer train."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS = {"hf_trainer.py": [("transformers",), ("accelerate",)],
         "lightning_module.py": [("transformers",), ("lightning", "pytorch_lightning")]}  # fmt: skip


@pytest.mark.parametrize("name", NEEDS)
def test_it_trains_below_a_uniform_guess(name, tmp_path):
    for choices in NEEDS[name]:
        if not any(importlib.util.find_spec(package) for package in choices):
            pytest.skip(f"{' or '.join(choices)} is not installed")
    text = tmp_path / "text.txt"
    text.write_text(inspect.getsource(argparse)[:60_000], encoding="utf-8")
    options = ["--max-steps", "30", "--block-size", "64", "--width", "64", "--out", tmp_path / "run", "--text", text]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, ROOT / "examples" / name, *options], cwd=tmp_path, env=environment,
                         capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert "decoder layer         transformer.h.0..3 (GPT2Block)" in run.stdout
    loss = float(re.search(r"validation loss ([\d.]+)", run.stdout).group(1))
    assert 1.0 < loss < 4.0  # ln 256 is 5.55
