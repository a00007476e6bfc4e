"""The ops under pytest-benchmark, over the registry and the providers of ``llmfast bench ops``, for work on one kernel:

    pytest benchmarks/test_ops_speed.py -k "layer_norm and cpp" --benchmark-autosave
    pytest benchmarks/test_ops_speed.py -k "layer_norm and cpp" --benchmark-compare

On a GPU use ``llmfast bench ops``, which times on the device.
"""

from __future__ import annotations

import pytest
import torch

from llmfast.bench.case import MODES, Case
from llmfast.bench.ops import describe_shape
from llmfast.bench.providers import CannotRun, providers
from llmfast.ops import tune_process
from llmfast.ops._registry import OPS

CASES = [
    pytest.param(op, shape, dtype, provider, mode, id=f"{name}-{describe_shape(shape)}-{dtype}-{provider.name}-{mode}")
    for name, op in OPS.items()
    for shape in op.cpu_samples
    for dtype in (torch.float32, torch.bfloat16)
    for provider in providers()
    for mode in MODES
    if provider.runs(op)
]


@pytest.mark.parametrize(("op", "shape", "dtype", "provider", "mode"), CASES)
def test_speed(benchmark, op, shape, dtype, provider, mode):
    tune_process()
    case = Case(op, shape, dtype, torch.device("cpu"))
    try:
        with provider.context(op):
            call = provider.make(op, case.inputs)
            _, wrong = case.why_wrong(call, (0,))
    except CannotRun as reason:
        pytest.skip(str(reason))
    assert not wrong, wrong
    task = case.task(provider, call, mode)

    def setup():
        task.touch()
        return (task.prepare(),), {}

    with task.context():
        benchmark.pedantic(task.run, setup=setup, rounds=15, warmup_rounds=2)
