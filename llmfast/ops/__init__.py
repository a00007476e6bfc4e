"""Fused operations with one contract: reference, samples, cost model, and the fastest implementation that is proven.

See docs/adding_a_kernel.md. Importing this loads torch, but no compiled kernel: that waits for the first call.
"""

from __future__ import annotations

from llmfast.ops import _update as _update  # registers the optimizer's raw ops
from llmfast.ops._dropout import dropout
from llmfast.ops._registry import BackendError, use_backend
from llmfast.ops.add_layer_norm import add_layer_norm
from llmfast.ops.causal_attention import causal_attention
from llmfast.ops.describe import describe
from llmfast.ops.layer_norm import layer_norm
from llmfast.ops.linear_cross_entropy import linear_cross_entropy
from llmfast.ops.lora_linear import lora_linear
from llmfast.ops.matmul import linear, matmul_routing, set_matmul_routing
from llmfast.ops.mlp import mlp
from llmfast.ops.process import ProcessReport, release_freed_memory, tune_process

__all__ = [
    "BackendError",
    "ProcessReport",
    "add_layer_norm",
    "causal_attention",
    "describe",
    "dropout",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "lora_linear",
    "matmul_routing",
    "mlp",
    "release_freed_memory",
    "set_matmul_routing",
    "tune_process",
    "use_backend",
]
