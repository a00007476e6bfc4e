"""Text from a model: greedy or sampled, batched, streamed, with a key/value cache."""

from llmfast.generation.decoding import generate_ids
from llmfast.generation.text import generate

__all__ = ["generate", "generate_ids"]
