"""Who runs an op in ``bench ops``: llmfast by backend, PyTorch in its several ways, and other packages.

A provider gets the op's inputs once (the same tensors for all of them) and gives a function without arguments that runs
on them as they are then. One that cannot run these inputs raises ``CannotRun`` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmfast.ops._registry import OPS, Op, use_backend

Inputs = dict[str, Any]
Call = Callable[[], Any]


class CannotRun(Exception):
    """Why a provider does not run these inputs."""


@dataclass(frozen=True)
class Provider:
    """One way to run some ops.

    make(op, inputs) -> the function to time; runs: whether it has this op at all; context(op): entered around its
    calls; backend: of llmfast; pytorch: whether it comes with PyTorch, so that llmfast's own must not be slower.
    """

    name: str
    make: Callable[[Op, Inputs], Call]
    runs: Callable[[Op], bool] = lambda op: True
    context: Callable[[Op], AbstractContextManager[Any]] = lambda op: nullcontext()
    backend: str | None = None
    pytorch: bool = False


def _llmfast(backend: str) -> Provider:
    def runs(op: Op) -> bool:
        return any(i.backend == backend for i in op.implementations)

    def make(op: Op, inputs: Inputs) -> Call:
        first = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
        own = [i for i in op.implementations if i.backend == backend]
        reasons = [r for i in own for r in i.why_not_on(first.device, first.dtype)]
        if reasons:
            raise CannotRun("; ".join(dict.fromkeys(reasons)))
        return lambda: op.function(**inputs)

    return Provider(f"llmfast {backend}", make, runs, lambda op: use_backend(f"{op.name}={backend}"), backend)


def _compiled(op: Op, inputs: Inputs) -> Call:
    # A function of its own, so that a shape does not count against another's limit of recompilations.
    run = torch.compile(lambda given: op.eager(**given), dynamic=False, fullgraph=True)
    return lambda: run(inputs)


def attention_only(op: Op) -> bool:
    return op.name == "causal_attention"


def plain_causal(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float | None]:
    """(q, k, v, scale) of plain causal attention; ``CannotRun`` for anything else."""
    q, k, v = (inputs[name] for name in "qkv")
    extra = [name for name in ("kv_lens", "doc_ids") if inputs.get(name) is not None]
    if extra or q.shape != k.shape:
        raise CannotRun(f"plain causal attention alone, no {', '.join(extra) or 'cache'}")
    return q, k, v, inputs.get("scale")


def _sdpa(name: str, backend: SDPBackend) -> Provider:
    def make(op: Op, inputs: Inputs) -> Call:
        q, k, v, scale = plain_causal(inputs)
        if not q.is_cuda and backend is not SDPBackend.FLASH_ATTENTION:
            raise CannotRun("runs on GPUs alone")
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    return Provider(f"SDPA {name}", make, attention_only, lambda op: sdpa_kernel(backend), pytorch=True)


def _linear_cross_entropy(op: Op, inputs: Inputs) -> Call:
    if not hasattr(F, "linear_cross_entropy"):
        raise CannotRun(f"torch {torch.__version__} has none")
    given = dict(inputs)
    x, weight, target, bias = (given.pop(name, None) for name in ("x", "weight", "target", "bias"))
    x2, target2 = (lambda: x.flatten(0, -2)), target.flatten()
    return lambda: F.linear_cross_entropy(x2(), weight, target2, linear_bias=bias, **given)


PYTORCH = [
    Provider("eager", lambda op, inputs: lambda: op.eager(**inputs), pytorch=True),
    Provider("torch.compile", _compiled),
    _sdpa("flash", SDPBackend.FLASH_ATTENTION),
    _sdpa("efficient", SDPBackend.EFFICIENT_ATTENTION),
    _sdpa("cuDNN", SDPBackend.CUDNN_ATTENTION),
    Provider(
        "F.linear_cross_entropy", _linear_cross_entropy, lambda op: op.name == "linear_cross_entropy", pytorch=True
    ),
]


def providers() -> list[Provider]:
    """Every provider, llmfast's in order of preference first."""
    from llmfast.bench.packages import PACKAGES

    backends = dict.fromkeys(i.backend for op in OPS.values() for i in op.implementations)
    return [*(_llmfast(backend) for backend in backends), *PYTORCH, *PACKAGES]
