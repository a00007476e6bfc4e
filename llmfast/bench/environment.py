"""What every benchmark file begins with: when, where, with which command, versions and commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from llmfast.ops.describe import cpu_name

SCHEMA = 1
CPU = torch.device("cpu")
PACKAGES = (
    "llmfast", "torch", "triton", "numpy", "transformers", "tiktoken", "liger-kernel", "flash-attn", "quack-kernels",
    "xformers", "transformer-engine", "peft",
)  # fmt: skip


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {os.cpu_count()} cores" if device.type == "cpu" else platform.machine()


def commit() -> str:
    """The checkout's commit, "-dirty" where it has changes; empty outside of a checkout."""
    here = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=-dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return {**found, "platform": platform.platform()}


def header(kind: str, device: torch.device = CPU) -> dict[str, Any]:
    """The keys that every benchmark file shares. ``kind``: ops, train, generate, data, tune, or script."""
    program = Path(sys.argv[0])
    name = f"benchmarks/{program.name}" if program.parent.name == "benchmarks" else "llmfast"
    words = [name, *sys.argv[1:]]
    return {
        "schema": SCHEMA,
        "kind": kind,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(words),
        "commit": commit(),
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
