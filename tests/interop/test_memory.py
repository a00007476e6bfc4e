"""Loading takes little more memory than the model has: no format leads through a second copy."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from format_samples import FORMATS

M_MMAP_THRESHOLD = -3  # malloc.h
LARGE = dict(n_embd=384, n_layer=4, vocab_size=1500)  # 31 MB, no tensor above 2.4
SLACK = 20 << 20  # bytes, for what does not grow with the model: checksums' tables, a piece that is copied
NAMES = ("hf", "hf-bin-old", "nanogpt", "openai-tf")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets up glibc's allocator, reads /proc")
def test_loading_needs_a_tenth_more_than_the_model(tmp_path, one_thread):
    folders = [str(tmp_path / name) for name in NAMES]
    for name in NAMES:
        FORMATS[name](tmp_path / name, **LARGE)
    answer = subprocess.run([sys.executable, __file__, *folders], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    took = dict(zip(NAMES, map(json.loads, answer.stdout.splitlines()), strict=True))
    assert all(0.9 * size < peak < 1.1 * size + SLACK for peak, size in took.values()), took


def measure(folders: list[str]) -> None:
    """Print, of each model, the memory that loading took at its peak and the model's size, in bytes."""
    import torch
    from format_fuzz import peak_memory

    from llmfast import GPT
    from llmfast.nn import weights

    torch.set_num_threads(1)
    weights.PIECE = 1 << 20
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back, and hides nothing later
    for folder in folders:
        if os.fork() == 0:
            GPT.from_pretrained(folder)  # code that runs for the first time takes memory, too
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            before = peak_memory()
            model = GPT.from_pretrained(folder)
            print(json.dumps([peak_memory() - before, sum(p.nbytes for p in model.parameters())]), flush=True)
            os._exit(0)
        os.wait()


if __name__ == "__main__":
    measure(sys.argv[1:])
