"""``python -m llmfast.bench.tune``: the fastest configuration of every Triton kernel at GPT-2's shapes, on this GPU.

Only configurations that llmfast ships are tried (kernels/configs and each kernel's default): CI compiles those ahead of
time, and they neither spill nor serialize their matrix instructions. The result names, for each kernel, dtype and sizes
of a launch, every configuration's milliseconds, the fastest first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmfast.bench.environment import header
from llmfast.ops import _verify
from llmfast.ops._registry import OPS, use_backend


def tune(device: torch.device, keep: Callable[[dict[str, Any]], None] = lambda results: None) -> dict[str, Any]:
    """The results as ``header`` and ``kernels``: one record a kernel, dtype and sizes of a launch.

    ``keep(results)`` is called after each op and shape, so that a run which is cut short has something to show. In
    Triton's interpreter the small samples run, once: to see that it works.
    """
    import triton

    from llmfast.kernels import common

    found: dict[str, dict[str, Any]] = {}
    launch = common.Tuned.__call__
    capability = 90 if common.INTERPRET else common.capability()

    def milliseconds(run: Callable[[], Any]) -> float:
        if not common.INTERPRET:
            return float(triton.testing.do_bench(run, warmup=10, rep=40, return_mode="median"))
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    def search(self: Any, grid: Any, *args: Any, dtype: torch.dtype, dims: dict[str, int], **options: Any) -> None:
        key = f"{self.name} {dtype} {dims}"
        if key not in found:
            times, failed = [], []
            for config in self.configs(capability):
                try:
                    run = lambda c=config: self.kernel[grid(c)](*args, **c)  # noqa: E731
                    times.append([milliseconds(run), config])
                except Exception as error:  # one that does not fit, or that the compiler refuses, is out
                    failed.append([f"{type(error).__name__}: {error}"[:200], config])
            times.sort(key=lambda pair: pair[0])
            chosen = self.choose(capability, dtype, tuple(dims.items()))
            name = str(dtype).removeprefix("torch.")
            found[key] = {"kernel": self.name, "dtype": name, "dims": dims, "chosen": chosen, "milliseconds": times}
            found[key] |= {"failed": failed} if failed else {}
        launch(self, grid, *args, dtype=dtype, dims=dims, **options)

    results = header("tune", device)
    common.Tuned.__call__ = search
    try:
        for op in OPS.values():
            own = [i for i in op.implementations if i.backend == "triton"]
            shapes = op.samples[:2] if common.INTERPRET else op.gpu_samples
            dtype = torch.float32 if common.INTERPRET else torch.bfloat16
            for shape in shapes if own else []:
                if _verify.why_not(op, own[0], shape, dtype, device):
                    continue
                with use_backend(f"{op.name}=triton"):
                    _verify.outputs_and_gradients(op.function, op.inputs(shape, dtype, device))
                keep(results | {"kernels": list(found.values())})
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    finally:
        common.Tuned.__call__ = launch
    return results | {"kernels": list(found.values())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        print("tuning needs a GPU", file=sys.stderr)
        return 2

    def keep(results: dict[str, Any]) -> None:
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    results = tune(torch.device("cpu" if interpreted else "cuda"), keep)
    for record in results["kernels"]:
        name = f"{record['kernel']:32} {record['dtype']} {record['dims']}"
        own = [ms for ms, config in record["milliseconds"] if config == record["chosen"]]
        if not own:
            print(f"{name}: the shipped configuration does not run: {record['failed']}")
            continue
        best = record["milliseconds"][0]
        gain = f"{own[0] / best[0]:.2f}x with {best[1]}" if best[1] != record["chosen"] else "as shipped"
        print(f"{name}: {own[0]:.4f} ms, {gain}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
