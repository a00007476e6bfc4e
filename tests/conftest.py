from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.path.insert(0, str(Path(__file__).parent / "kernels"))
    import mended_interpreter

    mended_interpreter.mend()


@pytest.fixture
def one_thread():
    """For models so small that threads gain nothing, and that wait for them on a busy machine."""
    import torch  # here, so that tests of rooms that do without it stay quick

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fused_calls(monkeypatch):
    """How often the fused decoder layer ran, with the C++ ops forced."""
    from llmfast import ops
    from llmfast.ops import decoder_layer as fused

    count, run = [0], fused.decoder_layer

    def counted(*args, **kwargs):
        count[0] += 1
        return run(*args, **kwargs)

    monkeypatch.setattr(fused, "decoder_layer", counted)
    with ops.use_backend("cpp"):
        yield count
