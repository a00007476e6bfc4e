"""``python -m llmfast.bench.tune``: the fastest configuration of every Triton kernel at GPT-2's shapes, on this GPU.

Only configurations that llmfast ships are tried (kernels/configs and each kernel's default): CI compiles those ahead of
time, and they neither spill nor serialize their matrix instructions. The result names, for each kernel, dtype and sizes
of a launch, every configuration's milliseconds, the fastest first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from llmfast.bench.environment import header
from llmfast.ops import _verify
from llmfast.ops._registry import OPS, use_backend


def tune(device: torch.device) -> dict[str, Any]:
    """The results as ``header`` and ``kernels``: one record a kernel, dtype and sizes of a launch."""
    import triton

    from llmfast.kernels import common

    found: dict[str, dict[str, Any]] = {}
    launch = common.Tuned.__call__

    def search(self: Any, grid: Any, *args: Any, dtype: torch.dtype, dims: dict[str, int]) -> None:
        key = f"{self.name} {dtype} {dims}"
        if key not in found:
            times = []
            for config in self.configs(common.capability()):
                try:
                    run = lambda c=config: self.kernel[grid(c)](*args, **c)  # noqa: E731
                    times.append([triton.testing.do_bench(run, return_mode="median"), config])
                except triton.runtime.errors.OutOfResources:
                    continue
            times.sort(key=lambda pair: pair[0])
            chosen = self.choose(common.capability(), dtype, tuple(dims.items()))
            name = str(dtype).removeprefix("torch.")
            found[key] = {"kernel": self.name, "dtype": name, "dims": dims, "chosen": chosen, "milliseconds": times}
        launch(self, grid, *args, dtype=dtype, dims=dims)

    common.Tuned.__call__ = search
    try:
        for op in OPS.values():
            own = [i for i in op.implementations if i.backend == "triton"]
            for shape in op.gpu_samples if own else []:
                for dtype in (torch.bfloat16,):
                    if _verify.why_not(op, own[0], shape, dtype, device):
                        continue
                    with use_backend(f"{op.name}=triton"):
                        _verify.outputs_and_gradients(op.function, op.inputs(shape, dtype, device))
                    torch.cuda.empty_cache()
    finally:
        common.Tuned.__call__ = launch
    return header("tune", device) | {"kernels": list(found.values())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        print("tuning needs a GPU", file=sys.stderr)
        return 2
    results = tune(torch.device("cuda"))
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for record in results["kernels"]:
        best = record["milliseconds"][0]
        own = next(ms for ms, config in record["milliseconds"] if config == record["chosen"])
        gain = f"{own / best[0]:.2f}x with {best[1]}" if best[1] != record["chosen"] else "as shipped"
        print(f"{record['kernel']:32} {record['dtype']} {record['dims']}: {own:.4f} ms, {gain}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
