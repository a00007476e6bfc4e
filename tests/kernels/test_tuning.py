"""The shipped configurations, and the search that LLMFAST_AUTOTUNE=1 asks for."""

from __future__ import annotations

import pytest
import torch
import triton

from llmfast.bench import tune
from llmfast.kernels import causal_attention, common, layer_norm, linear_cross_entropy, lora_linear, matmul, mlp

MODULES = (causal_attention, layer_norm, linear_cross_entropy, lora_linear, matmul, mlp)


def test_rows_are_chosen_by_shape_and_dtype():
    tuned = causal_attention._forward_tuned
    small = tuned.choose(90, torch.bfloat16, (("D", 64), ("T", 1024), ("dropout", 0), ("documents", 0)))
    exact = tuned.choose(90, torch.float32, (("D", 64), ("T", 1024), ("dropout", 0), ("documents", 0)))
    assert (small["BLOCK_M"], exact["BLOCK_M"]) == (128, 32)
    assert common.table(86) == common.table(80)  # the newest architecture that is not newer
    assert common.table(75) == {}


def test_every_row_names_a_kernel_and_its_tiles():
    tuned = [value for module in MODULES for value in vars(module).values() if isinstance(value, common.Tuned)]
    assert {id(value) for value in tuned} == {id(value) for value in common.TUNED.values()}
    for arch in (80, 90, 100):
        for name, rows in common.table(arch).items():
            for row in rows:
                assert set(row["config"]) == set(common.TUNED[name].default)
                ranges = [limits for key, limits in row["when"].items() if key != "dtype"]
                assert all(low <= high for low, high in ranges)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Launches take the way they take on an H100, through the interpreter; a benchmark launches three times."""
    monkeypatch.setattr(common, "INTERPRET", False)
    monkeypatch.setattr(common, "capability", lambda: 90)
    times = iter(range(1000, 0, -1))

    def benchmark(run, **options):
        for _ in range(3):
            run()
        return float(next(times))

    monkeypatch.setattr(triton.testing, "do_bench", benchmark)
    monkeypatch.setattr(matmul._product_tuned, "_tuned", {})


def test_a_search_takes_the_fastest_and_leaves_the_sum_alone(on_a_gpu, monkeypatch):
    monkeypatch.setattr(common, "AUTOTUNE", True)
    tried = []
    refused = matmul.SEARCH[-1]
    launch = matmul._product_tuned.kernel.run

    def run(*args, **config):
        tried.append({name: config[name] for name in matmul.TILES})
        if tried[-1] == refused:
            raise triton.runtime.errors.OutOfResources(1, 2, "shared memory")
        return launch(*args, **config)

    monkeypatch.setattr(matmul._product_tuned.kernel, "run", run)
    a, b, out = torch.randn(5, 7), torch.randn(3, 7), torch.ones(5, 3)
    for turn in (1, 2):
        tried.clear()
        matmul.product(a, b, out, add=True)
        torch.testing.assert_close(out, 1 + turn * a @ b.T)
        assert tried[-1] == matmul.SAFE  # tried last, and every benchmark was faster than the one before
        assert len(tried) == (3 * len(matmul.SEARCH) + 2 if turn == 1 else 1)


def test_a_gpu_with_less_shared_memory_takes_the_default(on_a_gpu, monkeypatch):
    product, tried = matmul._product_tuned, []
    monkeypatch.setattr(product, "_refused", [])
    launch = product.kernel.run

    def run(*args, **config):
        tried.append(config["BLOCK_M"])
        if config["BLOCK_M"] > 32:
            raise triton.runtime.errors.OutOfResources(1, 2, "shared memory")
        return launch(*args, **config)

    monkeypatch.setattr(product.kernel, "run", run)
    a, b, out = torch.randn(5, 7), torch.randn(3, 7), torch.empty(5, 3)
    for _ in range(2):
        torch.testing.assert_close(matmul.product(a, b, out), a @ b.T)
    assert tried[0] > 32
    assert tried[-2:] == [32, 32]
    product.choose.cache_clear()


def test_the_smallest_tiles_are_those_of_any_launch(on_a_gpu):
    for tuned in common.TUNED.values():
        for tile in (name for name in tuned.default if name.startswith("BLOCK")):
            least = tuned.least(tile)
            configs = (*tuned.configs(80), *tuned.configs(90), *tuned.configs(100), *tuned.search, tuned.interpreted)
            assert all(least <= config[tile] for config in configs)


def test_the_tuner_times_every_shipped_configuration(on_a_gpu, monkeypatch):
    """``llmfast.bench.tune`` on small shapes: a record a launch."""
    shapes = {"layer_norm": [{"rows": (2,), "width": 5}], "lora_linear": [{"rows": (2,), "K": 5, "N": 4, "r": 2}]}
    for op in tune.OPS.values():
        monkeypatch.setattr(op, "gpu_samples", shapes.get(op.name, []))
    results = tune.tune(torch.device("cpu"))
    kernels = {record["kernel"] for record in results["kernels"]}
    assert {"_layer_norm_forward", "_layer_norm_backward", "_lora_low", "_lora_forward", "_lora_backward_a"} <= kernels
    for record in results["kernels"]:
        configs = common.TUNED[record["kernel"]].configs(90)
        assert sorted(map(str, configs)) == sorted(str(config) for _, config in record["milliseconds"])
        assert "failed" not in record
