"""Triton kernels, installed as ``llmfast.kernels``. Nothing here is imported where Triton is missing."""
