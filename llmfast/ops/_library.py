"""Finds and loads the compiled kernels on first need, and remembers why not.

``_kernels.so`` registers ``llmfast::layer_norm_fwd`` and the other raw ops with PyTorch. It lies beside the package's
``__init__.py``; a package installed with LLMFAST_BUILD=none has none and runs on PyTorch alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = Path(__file__).resolve().parents[1] / "_kernels.so"

_NO_REASONS: list[str] = []
_on_load: list[Callable[..., None]] = []


def on_load(register: Callable[..., None]) -> Callable[..., None]:
    """Decorator: ``register`` (fakes, autograd) runs once, right after the library is loaded."""
    _on_load.append(register)
    return register


@functools.lru_cache(maxsize=1)
def why_not_loaded() -> str | None:
    """Load the library if it is not yet loaded; the reason if it cannot be, else None."""
    if not LIBRARY.exists():
        return "the compiled kernels are not built (build with pip install ., or LLMFAST_BUILD=none left them out)"
    try:
        torch.ops.load_library(str(LIBRARY))
        while _on_load:
            _on_load.pop()()
    except (OSError, RuntimeError, AttributeError) as error:  # wrong platform, undefined symbol, an older library's op
        return f"{LIBRARY.name} does not load: {' '.join(str(error).split())}"
    return None


def raw(op: str) -> Callable[..., object]:
    """The default overload of raw op ``llmfast::op``; the library must be loaded."""
    return getattr(torch.ops.llmfast, op).default


def unavailable(device: torch.device) -> list[str]:
    """Reasons why no compiled kernel runs on ``device``: no library, or one built without CUDA."""
    reason = why_not_loaded()
    if reason is not None:
        return [reason]
    if device.type == "cuda":
        archs = [int(arch.rstrip("af")) for arch in build_config().get("cuda_archs", "").split(",") if arch]
        if not archs:
            return ["the compiled kernels were built without CUDA"]
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor < min(archs):
            return [f"the compiled kernels need compute capability {min(archs) / 10}, this GPU has {major}.{minor}"]
    return []


def build_config() -> dict[str, str]:
    """How the library was built and which CPU instructions it chose; empty where it is not loaded."""
    if why_not_loaded() is not None:
        return {}
    pairs = (part.partition("=") for part in str(raw("build_config")()).split())
    return {"cpu_isa": str(raw("cpu_isa")()), **{key: value for key, _, value in pairs}}


def lies_transposed(weight: Tensor) -> bool:
    """Whether a weight (out, in) is the view of a contiguous (in, out), as csrc/cpu/operand.h tells it."""
    return weight.dim() == 2 and weight.stride() == (1, weight.shape[0]) and not weight.is_contiguous()


def gradient_like(weight: Tensor, wanted: bool = True) -> Tensor:
    """For fakes: the empty gradient of a weight or bias, laid out as the kernels make it."""
    if not wanted:
        return weight.new_empty((0,))
    return weight.new_empty(weight.shape[::-1]).t() if lies_transposed(weight) else weight.new_empty(weight.shape)


@functools.cache
def without_vectors() -> bool:
    """Whether the CPU kernels run in their portable form, on a CPU that has no instruction set they are written for."""
    return build_config().get("cpu_isa") == "portable"


def transforms() -> list[str]:
    """Reason of every kernel of ours against functorch (vmap, jvp, ...) and forward-mode differentiation."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return ["not under functorch or forward-mode differentiation"]
    return _NO_REASONS
