"""Every implementation of every op once on its small sample shapes, forward and backward: for compute-sanitizer."""

from __future__ import annotations

import argparse

import torch

from llmfast.ops import _verify
from llmfast.ops._registry import OPS, use_backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    for op in OPS.values():
        for implementation in op.implementations:
            if implementation.by != "ours":
                continue
            for dtype in (torch.float32, torch.bfloat16):
                if implementation.why_not_on(torch.device(device), dtype):
                    continue
                for shape in op.samples:
                    if _verify.why_not(op, implementation, shape, dtype, device):
                        continue
                    with use_backend(f"{op.name}={implementation.backend}"):
                        _verify.outputs_and_gradients(op.function, op.inputs(shape, dtype, device))
                print(op.name, implementation.backend, dtype, flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
