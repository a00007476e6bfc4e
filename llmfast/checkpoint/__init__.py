"""Checkpoints: whole directories that exist completely, with a checksum for each file, or not at all."""

from llmfast.checkpoint.find import (
    find_checkpoint,
    is_adapter,
    load_model,
    load_tokenizer_of,
    load_training_state,
    read_state,
    verify_checkpoint,
)
from llmfast.checkpoint.layout import read_pointer
from llmfast.checkpoint.rng import capture_rng, restore_rng
from llmfast.checkpoint.save import remove_stale, save_checkpoint

__all__ = [
    "capture_rng",
    "find_checkpoint",
    "is_adapter",
    "load_model",
    "load_tokenizer_of",
    "load_training_state",
    "read_pointer",
    "read_state",
    "remove_stale",
    "restore_rng",
    "save_checkpoint",
    "verify_checkpoint",
]
