"""llmfast: the fastest and most pleasant way to train GPT-2-style models.

Names are imported on first use, so that ``import llmfast`` and ``llmfast --help`` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "GPTConfig": "llmfast.config",
    "TrainConfig": "llmfast.config",
    "FinetuneConfig": "llmfast.config",
    "LoRAConfig": "llmfast.config",
    "PretrainConfig": "llmfast.config",
    "UserError": "llmfast.errors",
    "use_backend": "llmfast.ops",
    "tune_process": "llmfast.ops",
    "GPT": "llmfast.nn",
    "generate": "llmfast.generation",
    "Trainer": "llmfast.training",
    "ClassifyConfig": "llmfast.config",
    "finetune_classify": "llmfast.finetuning.classify",
    "accelerate": "llmfast.interop.accelerate",
    "restore": "llmfast.interop.accelerate",
    "load_tokenizer": "llmfast.tokenizer",
    "prepare": "llmfast.data",
}
_SUBMODULES = {"ops", "nn", "data", "tokenizer", "checkpoint", "generation", "training", "finetuning", "evaluation"}
_SUBMODULES |= {"kernels", "interop"}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"llmfast.{name}")
    raise AttributeError(f"module 'llmfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS, *_SUBMODULES])
