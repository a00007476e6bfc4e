"""Random shapes for every op, implementation, dtype and matmul route: ``python -m tests.ops.fuzz --cases N --seed S``.

Prints one line each (cases that ran, declined, worst error over allowed error) and ends with 1 if one was wrong.
"""

from __future__ import annotations

import argparse
import random
import sys

import torch

from llmfast.ops import _verify, matmul, set_matmul_routing
from llmfast.ops._registry import FLOATING, OPS


def routes() -> list[str]:
    """The matmul routes that float32 can take on this machine."""
    try:
        set_matmul_routing({"float32": "onednn", "bfloat16": "onednn"})
    except ValueError:
        return ["default"]
    return ["default", "onednn"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20, help="random shapes per op, implementation, dtype and route")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    matmul.MIN_MACS = 0  # the route counts, not the speed
    wrong = 0
    for op in OPS.values():
        for implementation in op.implementations:
            for dtype in FLOATING:
                if implementation.why_not_on(torch.device(options.device), dtype):
                    continue
                for route in routes() if implementation.backend == "torch" and dtype in matmul.ROUTED else ["default"]:
                    set_matmul_routing({"float32": route, "bfloat16": route})
                    worst, where, declined = 0.0, "", 0
                    rng = random.Random(options.seed)
                    for _ in range(options.cases):
                        shape = op.random_shape(rng)
                        if _verify.why_not(op, implementation, shape, dtype, options.device):
                            declined += 1
                            continue
                        ratio, name = _verify.worst_ratio(op, implementation.backend, shape, dtype, options.device)
                        if ratio > worst:
                            worst, where = ratio, f"{name} of {shape}"
                    wrong += worst > 1
                    print(
                        f"{op.name:22}{implementation.backend:8}{str(dtype).removeprefix('torch.'):10}{route:9}"
                        f"{options.cases - declined:5} cases {declined:4} declined  worst {worst:.2f} {where}",
                        flush=True,
                    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
