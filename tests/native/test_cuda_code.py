"""What nvcc has made of the kernels for Hopper, read from the compiled library without a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

LIBRARY = Path(importlib.util.find_spec("llmfast").origin).parent / "_kernels.so"


def cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")  # carries one
    own = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return shutil.which("cuobjdump") or (str(own) if own and os.access(own, os.X_OK) else None)


def test_the_products_of_hopper_are_wgmma_on_tiles_brought_by_tma():
    program = cuobjdump()
    if program is None:
        pytest.skip("no cuobjdump on PATH, and no Triton, which carries one")
    if not LIBRARY.exists() or not re.search(rb"cuda_archs=[\d,]*90", LIBRARY.read_bytes()):
        pytest.skip("llmfast is installed without its kernels for sm_90a")
    said = subprocess.run([program, "--dump-sass", LIBRARY], capture_output=True, text=True, check=True).stdout
    code: dict[str, str] = {}
    for part in said.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        code[name] = code.get(name, "") + body  # of every architecture: that for older GPUs than sm_90a is empty
    kernels = [body for name, body in code.items() if "sm90_kernel" in name]
    attention = [name for name in code if re.search("(for|back)ward_sm90_kernel", name)]
    assert len(attention) >= 24
    assert len(kernels) - len(attention) >= 8
    assert all("HGMMA" in body and "UTMALDG" in body for body in kernels)
    ampere = re.compile("11gemm_kernel|15low_rank_kernel|14forward_kernelI.*Attention|(queries|keys)_kernel")
    assert [name for name, body in code.items() if ampere.search(name) and "HMMA" not in body] == []
