"""The model: a GPT-2-style decoder whose hot paths are the functions of ``llmfast.ops``."""

from llmfast.nn.adapter import load_adapter, save_adapter
from llmfast.nn.classification import GPTForClassification
from llmfast.nn.gpt import GPT
from llmfast.nn.int8 import quantize_int8
from llmfast.nn.kv_cache import KVCache
from llmfast.nn.layers import MLP, Block, CausalSelfAttention, LayerNorm, Linear
from llmfast.nn.lora import LoRALinear, add_lora, lora_disabled, lora_state_dict, merge_lora

__all__ = [
    "GPT",
    "MLP",
    "Block",
    "CausalSelfAttention",
    "GPTForClassification",
    "KVCache",
    "LayerNorm",
    "Linear",
    "LoRALinear",
    "add_lora",
    "load_adapter",
    "lora_disabled",
    "lora_state_dict",
    "merge_lora",
    "quantize_int8",
    "save_adapter",
]
