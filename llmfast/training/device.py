"""Which device and type a run computes with, what known GPUs can do, and model FLOPs utilisation."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import torch

from llmfast.errors import UserError


@dataclass(frozen=True)
class GPU:
    """A GPU: memory in GB (10^9 bytes) and dense 16-bit tensor-core peak in TFLOP/s, from its maker's data sheet."""

    name: str
    memory_gb: float
    tflops: float


# Makers' data sheets, dense 16-bit matmul with float32 accumulation. A name that holds another comes first.
GPUS = [
    GPU("RTX 4060", 8, 60), GPU("RTX 3080", 10, 59.5), GPU("RTX 3060", 12, 25.5), GPU("RTX 4070", 12, 58.3),
    GPU("T4", 16, 65), GPU("RTX 4080", 16, 97.5), GPU("RTX 5080", 16, 112.6), GPU("RTX 3090", 24, 71),
    GPU("A10G", 24, 70), GPU("A10", 24, 125), GPU("RTX 4090", 24, 165.2), GPU("L4", 24, 121),
    GPU("V100", 32, 125), GPU("RTX 5090", 32, 209.5), GPU("A100-SXM4-40GB", 40, 312), GPU("RTX A6000", 48, 154.8),
    GPU("L40S", 48, 362), GPU("A100", 80, 312), GPU("H100 PCIe", 80, 756), GPU("H100 NVL", 94, 835),
    GPU("H100", 80, 989), GPU("GH200", 96, 989), GPU("H200", 141, 989),
]  # fmt: skip


def choose_device(name: str) -> torch.device:
    """The device called ``name``: auto, cpu, cuda, cuda:N or mps. ``UserError`` where this machine has none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(
                f"device {name} is not there: PyTorch {torch.__version__} sees {count} CUDA devices on this machine; "
                "use --device cpu, or install a CUDA build of torch and a driver"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps is not there: it takes a Mac with Apple silicon; use --device cpu")
    elif device.type not in ("cpu", "mps"):
        raise UserError(f"device {name!r} is not supported: use auto, cpu, cuda, cuda:N or mps")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute type called ``name`` on ``device``. ``UserError`` where the device cannot train with it."""
    has_bfloat16 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and has_bfloat16 else "float32"
    if name == "float16" and device.type != "cuda":
        raise UserError(f"float16 trains on CUDA devices only, the device is {device.type}: use bfloat16 or float32")
    if name == "bfloat16" and not has_bfloat16:
        raise UserError(f"{torch.cuda.get_device_name(device)} has no bfloat16: use float16 or float32")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def dtype_note(device: torch.device, dtype: torch.dtype) -> str | None:
    """What the user should know about training with ``dtype`` on ``device``."""
    if device.type != "cpu" or dtype != torch.bfloat16 or platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return None
    return "bfloat16 will not be faster than float32 here: this CPU has neither AVX512_BF16 nor AMX"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense matmul peak of a known GPU in FLOP/s for a 16-bit type, else None."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu.tflops * 1e12 for gpu in GPUS if gpu.name in name), None)


def flops_per_token(model: Any, block_size: int) -> float | None:
    """Forward and backward: 6 N + 12 L C T (Chowdhery et al. 2022, appendix B), for a model with a ``GPTConfig``.

    N counts the parameters that are multiplied: all but the positions, and but the token embedding unless it is also
    the output head.
    """
    config: Any = getattr(model, "config", None)
    if not all(hasattr(config, name) for name in ("n_layer", "n_embd", "vocab_size", "block_size", "tie_embeddings")):
        return None
    lookups = config.block_size * config.n_embd
    lookups += 0 if config.tie_embeddings else config.vocab_size * config.n_embd
    N = sum(p.numel() for p in model.parameters()) - lookups
    return 6.0 * N + 12.0 * config.n_layer * config.n_embd * block_size
