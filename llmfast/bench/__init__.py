"""Benchmarks of ops, training steps, generation and data, beside PyTorch and the peers: docs/benchmarks.md."""
