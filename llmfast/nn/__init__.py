"""The model: a GPT-2-style decoder whose hot paths are the functions of ``llmfast.ops``."""

from llmfast.nn.gpt import GPT
from llmfast.nn.int8 import quantize_int8
from llmfast.nn.kv_cache import KVCache
from llmfast.nn.layers import MLP, Block, CausalSelfAttention, Embedding, LayerNorm, Linear

__all__ = ["GPT", "MLP", "Block", "CausalSelfAttention", "Embedding", "KVCache", "LayerNorm", "Linear", "quantize_int8"]
