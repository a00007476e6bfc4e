"""``describe()``: what would run on this machine, op by op, and why. ``llmfast info`` prints it."""

from __future__ import annotations

import platform
from typing import Any

import torch

import llmfast
from llmfast.ops import _library, decoder_layer, matmul, process
from llmfast.ops._registry import OPS, Op, current_setting, evidence


def describe() -> dict[str, Any]:
    """A JSON-able report: versions, devices, the compiled library, matrix products, and every op x backend per device.

    Measures the matrix-product routing if that is not yet decided (tens of milliseconds).
    """
    why_not = _library.why_not_loaded()
    return {
        "versions": {
            "llmfast": llmfast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _triton_version(),
            "platform": platform.platform(),
        },
        "devices": [_describe_device(device) for device in devices()],
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "default_matmul": "MKL" if torch.backends.mkl.is_available() else "PyTorch's BLAS",
            "allocator": process.allocator_state(),
        },
        "library": {"loaded": why_not is None, "why_not": why_not, **_library.build_config()},
        "matmul": matmul.routing_report(),
        "decoder_layer": {
            name: decoder_layer.why_not_dtype(dtype) or "one call" for dtype, name in matmul.ROUTED.items()
        },
        "cuda_mlp": str(_library.raw("mlp_products")()) if _library.build_config().get("cuda_archs") else None,
        "backend": str(current_setting()),
        "ops": {name: {str(device): _describe_op(op, device) for device in devices()} for name, op in OPS.items()},
    }


def devices() -> list[torch.device]:
    """The devices of this machine: the CPU, every GPU, and MPS."""
    found = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return [*found, torch.device("mps")] if torch.backends.mps.is_available() else found


def _describe_device(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = round(properties.total_memory / 2**30, 1)
        capability = f"{properties.major}.{properties.minor}"
        return {"device": str(device), "name": properties.name, "capability": capability, "memory_gib": memory}
    return {"device": str(device), "name": cpu_name() if device.type == "cpu" else platform.machine()}


def _describe_op(op: Op, device: torch.device) -> dict[str, Any]:
    """Of one op on one device, in the dtype it trains in: the chosen backend, and per backend whether it could run."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    candidates = op.resolve(current_setting(), device, dtype)
    chosen = candidates[0] if candidates else None
    backends = {}
    for backend, reasons in op.reasons(device, dtype).items():
        own = [i for i in op.implementations if i.backend == backend]
        backends[backend] = {
            "available": not reasons,
            "chosen": chosen is not None and chosen.backend == backend,
            "by": own[0].by if own else None,
            "reasons": reasons or (op.why_not_default(own[0], device) if own else []),
            "evidence": evidence(op.name, backend, device),
        }
    return {"dtype": str(dtype).removeprefix("torch."), "chosen": chosen and chosen.backend, "backends": backends}


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
