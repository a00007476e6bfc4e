"""Corpora, preparation, token sources and batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmfast.data.batches import Batches
    from llmfast.data.preparation import Prepared, prepare
    from llmfast.data.sources import find_sources, stdlib_sources
    from llmfast.data.tokens import TokenSource, export_hdf5, open_tokens

__all__ = [
    "Batches",
    "Prepared",
    "TokenSource",
    "export_hdf5",
    "find_sources",
    "open_tokens",
    "prepare",
    "stdlib_sources",
]

_HOME = {
    "Batches": "batches",
    "Prepared": "preparation",
    "prepare": "preparation",
    "find_sources": "sources",
    "stdlib_sources": "sources",
    "TokenSource": "tokens",
    "export_hdf5": "tokens",
    "open_tokens": "tokens",
}


def __getattr__(name: str) -> Any:
    # On demand, because worker processes want encode.py without torch and tqdm.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
