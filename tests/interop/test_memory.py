"""Loading takes little more memory than the model has: no format leads through a second copy."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import pytest
from format_fuzz import peak_memory
from format_samples import FORMATS

from llmfast import GPT
from llmfast.nn import weights

LARGE = dict(n_embd=384, n_layer=4, vocab_size=1500)  # 31 MB, no tensor above 2.4


def load(path: Path, pipe) -> None:
    """Send what loading took at its peak, and how large the model is, in bytes."""
    weights.PIECE = 1 << 20
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = peak_memory()
    model = GPT.from_pretrained(path)
    pipe.send((peak_memory() - before, sum(p.nbytes for p in model.parameters())))


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory in /proc")
@pytest.mark.parametrize("name", FORMATS)
def test_loading_needs_a_tenth_more_than_the_model(name, tmp_path, one_thread):
    FORMATS[name](tmp_path / "model", **LARGE)
    ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=load, args=(tmp_path / "model", theirs))
    process.start()
    assert ours.poll(60)
    peak, size = ours.recv()
    process.join()
    assert 0.9 * size < peak < 1.1 * size + (4 << 20)
